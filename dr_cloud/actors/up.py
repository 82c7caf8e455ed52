"""`dr-cloud provider up` without its command line: starts a provider's actors, and ends them.

Start
    The state folder is locked, Ray is started or joined, and the actors of manager and rights manager made; the manager
    does the rest by itself (`dr_cloud.actors.manager`), also when Ray starts it again. Where a cluster is joined its
    actors may still run from before: they are found by name and stay as they are.

End
    On SIGTERM every actor finishes what is under way and ends; then Ray, if it was started here. After kill -9 of this
    process a Ray that was started here ends with it; so it does when the signal went to the whole process group, as a
    terminal and service managers send it. The next start finds everything in the state folder and stores.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, Final

import ray
import structlog

from dr_cloud.actors.cloud import CloudManager
from dr_cloud.actors.cluster import START_SECONDS, Placement, ask, ask_again, ray_has_gone, start_ray
from dr_cloud.actors.https import api_address
from dr_cloud.actors.rights import RightsManager
from dr_cloud.actors.settings import ADMIN_TOKEN, MANAGER, RIGHTS, ProviderSettings, Ready
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.provider import EnterpriseConfig, ProviderConfig, load_yaml

_READY_SECONDS: Final = 300.0
_THERE_SECONDS: Final = 3.0
_GONE_SECONDS: Final = 1.0

_log = structlog.get_logger(__name__)


def tenants_of(config: ProviderConfig) -> list[EnterpriseConfig]:
    """Read the enterprises that are registered at the start. Raises `DrCloudError` that names file and field."""
    if config.tenants is None:
        return []
    return [load_yaml(path, EnterpriseConfig) for path in sorted(config.tenants.glob("*.yaml"))]


class RunningProvider:
    """A provider's actors."""

    def __init__(self, config: ProviderConfig) -> None:
        """Start everything; return when the API answers and every connector is open.

        Args:
            config: With absolute paths (`load_provider`).
        """
        tenants = tenants_of(config)
        token = config.state / ADMIN_TOKEN
        first = not token.exists()
        api_address(config)  # chosen once, before several processes look for it
        self._ending_ray = False
        self._own_ray = not ray.is_initialized() and config.ray == "local"
        self._placement: Placement = start_ray(config.ray, config.name)
        self.settings = ProviderSettings(config=config, placement=self._placement)
        try:
            rights = RightsManager.options(**self._placement.options(RIGHTS)).remote(  # type: ignore[attr-defined]
                self.settings.without_database
            )
            manager = CloudManager.options(**self._placement.options(MANAGER)).remote(  # type: ignore[attr-defined]
                self.settings, tenants
            )
            ask_again(lambda: rights.where.remote(), "the rights manager", START_SECONDS)
            self.ready: Ready = ask_again(lambda: manager.ready.remote(), "the manager", _READY_SECONDS)
        except BaseException:
            self.close()
            raise

        links = " ".join(f"{enterprise}={link}" for enterprise, link in sorted(self.ready.links.items()))
        self.line = f"provider {config.name} ready: api {self.ready.api} ca {self.ready.ca} links {links}".rstrip()
        """For people: every address, and at the first start where the first administrator's token lies."""
        if first and token.exists():
            self.line += f" administrator's token in {token}"

    def actors(self) -> list[str]:
        """Return the names of the actors that run."""
        return self._placement.names()

    def close(self) -> bool:
        """End every actor, and Ray if it was started here.

        Returns False if that Ray was ended by somebody else before: nothing may be asked of it then, not even its end.
        """
        if not self._own_ray:
            self._close()
            return True
        closing = threading.Thread(target=self._close, name="close", daemon=True)
        closing.start()
        while closing.is_alive():
            closing.join(_GONE_SECONDS)
            if closing.is_alive() and not self._ending_ray and ray_has_gone():
                _log.warning("provider.ray_gone", meaning="Ray was ended first; its actors end with it")
                return False
        return True

    def _close(self) -> None:
        with contextlib.suppress(DrCloudError):
            ask(self._placement.find(MANAGER).stop.remote(), "the manager", START_SECONDS)
        self._placement.end(MANAGER)
        names = [name for name in self._placement.names() if name != MANAGER]
        for name, reference in self._stopping([name for name in names if not name.startswith("stack/")]):
            try:
                ask(reference, name)
            except (DrCloudError, ray.exceptions.RayError) as error:
                _log.warning("provider.not_stopped", actor=name, reason=str(error))
        for name in names:
            self._placement.end(name)
        if self._own_ray:
            self._ending_ray = True
            ray.shutdown()

    def _stopping(self, names: Sequence[str]) -> list[tuple[str, Any]]:
        """Have actors stop; return those that were there to hear it. One that waits for a node is not."""
        heard = []
        with contextlib.suppress(DrCloudError):
            actors = {name: self._placement.find(name) for name in names}
            alive = {actor.where.remote(): name for name, actor in actors.items()}
            answered, _ = ray.wait(list(alive), num_returns=len(alive), timeout=_THERE_SECONDS) if alive else ([], [])
            heard = [(name, actors[name].stop.remote()) for name in (alive[reference] for reference in answered)]
        return heard
