"""The `CloudManager` actor: the provider's manager and its API, in a process that alone loads their code.

Ray loads the code of an actor's class in every process that holds its handle. The manager's own code (database, API) is
as large as a connector, and each connector and VDSA holds its handle; so it is loaded by name, where it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

import ray

from dr_cloud.actors.cluster import Where, whereabouts
from dr_cloud.actors.settings import ProviderSettings, Ready
from dr_cloud.model.provider import EnterpriseConfig

_MODULE: Final = "dr_cloud.actors.manager"


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0)
class CloudManager:
    """See `dr_cloud.actors.manager.Headquarters`, which does the work."""

    def __init__(self, settings: ProviderSettings, tenants: Sequence[EnterpriseConfig]) -> None:
        """Begin to open.

        Args:
            settings: The provider.
            tenants: Enterprises to be registered if they are not.
        """
        self._headquarters = importlib.import_module(_MODULE).Headquarters(settings, tenants)

    def ready(self) -> Ready:
        """Wait until everything is open; return where it is. Raises what stands in the way."""
        ready: Ready = self._headquarters.ready()
        return ready

    def certify(self, csr: str, service: str, hosts: list[str]) -> tuple[str, str]:
        """Return a service's certificate and the CA's, both PEM."""
        certificate, ca = self._headquarters.certify(csr, service, hosts)
        return certificate, ca

    def inbound(self, method: str, *arguments: Any) -> Any:
        """Carry out what a connector or a VDSA asks."""
        return self._headquarters.inbound(method, *arguments)

    def where(self) -> Where:
        """Return where it runs."""
        return whereabouts()

    def stop(self) -> None:
        """End the API and what runs by itself; the actor is of no use afterwards."""
        self._headquarters.stop()
