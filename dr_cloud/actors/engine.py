"""The rights manager's service with the engine that the configuration names: for the process of its actor.

Where that is an OPA server and none is named, one is started: a child that fetches the signed bundle from the
provider's API, with a token that the manager has made for it. Until the API is there, it does not answer.
"""

from __future__ import annotations

from dr_cloud.actors.https import api_address
from dr_cloud.actors.settings import ProviderSettings
from dr_cloud.rights.bundle import Signer
from dr_cloud.rights.embedded import EmbeddedEngine
from dr_cloud.rights.engine import Engine
from dr_cloud.rights.opa import OpaEngine
from dr_cloud.rights.opa_process import OpaProcess
from dr_cloud.rights.service import RightsService


class _OwnOpa(OpaEngine):
    """An OPA server that ends with its engine."""

    def __init__(self, process: OpaProcess) -> None:
        super().__init__(process.url)
        self._process = process

    def close(self) -> None:
        """End both. Idempotent."""
        super().close()
        self._process.close()


def open_service(settings: ProviderSettings) -> RightsService:
    """Return the service, with the provider's keys. Raises `DrCloudError` if the engine cannot be had."""
    return RightsService(settings.config.state, _engine(settings))


def _engine(settings: ProviderSettings) -> Engine:
    config = settings.config
    if config.rights.engine == "embedded":
        return EmbeddedEngine()
    if config.rights.opa:
        return OpaEngine(config.rights.opa)
    host, port = api_address(config)
    process = OpaProcess(
        config.state / "rights" / "opa",
        f"https://{host}:{port}/v1/rights/bundle",
        Signer.open(config.state).public,
        token_file=settings.bundle_token,
        ca_file=config.state / "ca" / "ca-cert.pem",
    )
    return _OwnOpa(process)
