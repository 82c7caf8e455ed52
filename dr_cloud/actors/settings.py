"""What every actor of a provider is given: who they are, where they run, where their files are. No secrets."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from dr_cloud.actors.cluster import START_SECONDS, UNHEARD_SECONDS, Placement, answer, ask_again
from dr_cloud.actors.node import NodeSettings
from dr_cloud.model.errors import DrCloudError, UnavailableError
from dr_cloud.model.provider import Architecture, DatastoreConfig, ProviderConfig, load_yaml
from dr_cloud.seal.identity import Credentials, new_key_and_csr

MANAGER: Final = "manager"
_FILE_URL: Final = re.compile(r"file://(?!/)(.+)")


class ProviderSettings(BaseModel):
    """One provider, on its Ray."""

    model_config = ConfigDict(frozen=True)

    config: ProviderConfig
    """With absolute paths only."""
    placement: Placement

    @property
    def node(self) -> NodeSettings:
        """Where the files of actors are. Each node has the state folder: shared, or with the keyring copied to it."""
        state = self.config.state
        return NodeSettings(
            keyring=state / "keyring.json", work_dir=state / "work", cache_dir=state / "cache", run_dir=state / "run"
        )

    @property
    def without_database(self) -> ProviderSettings:
        """The same for actors that do not use the database: its URL may hold a password."""
        return self.model_copy(update={"config": self.config.model_copy(update={"database": ""})})

    @property
    def idle_stacks(self) -> dict[str, int]:
        """How many stack actors are kept ready, by data center."""
        return {
            center.name: self.config.idle_stacks if center.idle_stacks is None else center.idle_stacks
            for center in self.config.data_centers
        }

    @property
    def manager_per_enterprise(self) -> bool:
        """Whether each enterprise's control is in a process of its own."""
        return self.config.architecture in (Architecture.MANAGER_PER_ENTERPRISE, Architecture.VDSA_PER_ENTERPRISE)

    @property
    def vdsa_per_enterprise(self) -> bool:
        """Whether each enterprise has a VDSA of its own on each host."""
        return self.config.architecture is Architecture.VDSA_PER_ENTERPRISE

    def connector_name(self, enterprise: str) -> str:
        """Return the name of an enterprise's connector."""
        return f"connector/{enterprise}"

    def vdsa_name(self, data_center: str, host: str, enterprise: str = "") -> str:
        """Return the name of the VDSA that serves an enterprise on a host; none where one serves all."""
        return f"vdsa/{data_center}/{host}/{enterprise if self.vdsa_per_enterprise else ''}"

    def credentials(self, service: str, hosts: list[str]) -> Credentials:
        """Have the manager certify a new key of this process, which waits while the manager is away.

        Args:
            service: What the process is.
            hosts: Names and addresses by which it is reached.
        """
        key, csr = new_key_and_csr()
        certificate, ca = ask_again(
            lambda: self.placement.find(MANAGER).certify.remote(csr, service, hosts), "the manager", START_SECONDS
        )
        return Credentials(key, certificate, ca)


class AskManager:
    """Asks the provider's manager over Ray, from an event loop. It is looked for anew after it could not be reached."""

    def __init__(self, placement: Placement) -> None:
        """Find it when it is first asked."""
        self._placement = placement
        self._manager: Any = None

    async def __call__(self, method: str, *arguments: Any) -> Any:
        """Have an operation carried out. Raises its error, or `UnavailableError` if the manager is away."""
        try:
            if self._manager is None:
                self._manager = await asyncio.to_thread(self._placement.find, MANAGER)
            return await answer(self._manager.inbound.remote(method, *arguments), "the manager", UNHEARD_SECONDS)
        except UnavailableError:
            self._manager = None
            raise


def load_provider(path: Path, state: Path | None = None) -> ProviderConfig:
    """Read a provider's configuration, with every path made absolute.

    Relative paths count from the file's folder. Stores written `file://folder/…` lie in `stores/` of the state folder.

    Args:
        path: The file.
        state: Takes the place of the state folder that the file names.

    Raises:
        DrCloudError: The file is wrong; the message names the field.
    """
    config = load_yaml(path, ProviderConfig)
    folder = path.resolve().parent
    state = state.resolve() if state is not None else (folder / config.state).resolve()
    if len(str(state)) > 70:
        raise DrCloudError(f"{state} is too long a path for unix sockets", "Name a shorter one with --state DIR.")

    def absolute(datastore: DatastoreConfig) -> DatastoreConfig:
        match = _FILE_URL.fullmatch(datastore.store)
        url = f"file://{state}/stores/{match[1]}" if match else datastore.store
        return datastore.model_copy(update={"store": url})

    centers = [
        center.model_copy(update={"datastores": [absolute(store) for store in center.datastores]})
        for center in config.data_centers
    ]
    return config.model_copy(
        update={
            "state": state,
            "tenants": (folder / config.tenants).resolve() if config.tenants is not None else None,
            "data_centers": centers,
            "database": config.database or f"sqlite:///{state}/provider.db",
        }
    )
