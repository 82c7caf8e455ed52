"""What every actor of a provider is given: who they are, where they run, where their files are. No secrets."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from dr_cloud.actors.cluster import START_SECONDS, UNHEARD_SECONDS, Placement, answer, ask_again
from dr_cloud.actors.node import NodeSettings
from dr_cloud.model.errors import ConflictError, DrCloudError, UnavailableError
from dr_cloud.model.provider import Architecture, DatastoreConfig, ProviderConfig, load_yaml
from dr_cloud.seal.identity import Credentials, new_key_and_csr

MANAGER: Final = "manager"
RIGHTS: Final = "rights"
ADMIN_TOKEN: Final = "admin-token"
"""The file, in the state folder, with the first administrator's token."""
_FILE_URL: Final = re.compile(r"file://(?!/)(.+)")


class ProviderSettings(BaseModel):
    """One provider, on its Ray."""

    model_config = ConfigDict(frozen=True)

    config: ProviderConfig
    """With absolute paths only."""
    placement: Placement

    @property
    def node(self) -> NodeSettings:
        """Where the files of actors are. Each node has the state folder: shared, or with the keyring copied to it.

        So it is with `rights_key`.
        """
        state = self.config.state
        return NodeSettings(
            keyring=state / "keyring.json",
            work_dir=state / "work",
            cache_dir=state / "cache",
            run_dir=state / "run",
            kernel_mounts=self.config.kernel_mounts,
        )

    @property
    def rights_key(self) -> Path:
        """The public half of the rights manager's key: with it grants are checked."""
        return self.config.state / "rights" / "public.pem"

    @property
    def bundle_token(self) -> Path:
        """The token with which an OPA server fetches its bundle from the API."""
        return self.config.state / "rights" / "bundle-token"

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


class Ready(BaseModel):
    """Where a provider that is ready can be reached."""

    model_config = ConfigDict(frozen=True)

    provider: str
    api: str
    ca: str
    """Path of the CA's certificate: what clients of the API trust."""
    links: dict[str, str]
    """Where the sites of each enterprise dial."""


class ManagerDesk:
    """The provider's manager, as other actors reach it.

    It is found by name, and looked for anew after it could not be reached.
    """

    def __init__(self, placement: Placement) -> None:
        """Find it when it is first asked."""
        self._placement = placement
        self._manager: Any = None

    def _found(self) -> Any:
        if self._manager is None:
            self._manager = self._placement.find(MANAGER)
        return self._manager

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Have an operation carried out. Raises its error, or `UnavailableError` if the manager is away."""
        try:
            manager = self._manager or await asyncio.to_thread(self._found)
            return await answer(manager.inbound.remote(method, *arguments), "the manager", UNHEARD_SECONDS)
        except UnavailableError:
            self._manager = None
            raise

    def certified(self, service: str, hosts: list[str]) -> Credentials:
        """Make a key and have the manager certify it; waits while the manager is away.

        Args:
            service: What this process is.
            hosts: Names and addresses by which it is reached.
        """
        key, csr = new_key_and_csr()
        certificate, ca = ask_again(
            lambda: self._placement.find(MANAGER).certify.remote(csr, service, hosts), "the manager", START_SECONDS
        )
        return Credentials(key, certificate, ca)


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
    policies = (folder / config.rights.policies).resolve() if config.rights.policies is not None else None
    return config.model_copy(
        update={
            "state": state,
            "tenants": (folder / config.tenants).resolve() if config.tenants is not None else None,
            "rights": config.rights.model_copy(update={"policies": policies}),
            "data_centers": centers,
            "database": config.database or f"sqlite:///{state}/provider.db",
        }
    )


def registry_url(config: ProviderConfig) -> str:
    """Return the store in which the registry is kept: the first datastore of the first data center."""
    return config.data_centers[0].datastores[0].store


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """Hold the state folder. Raises `ConflictError` if another process does, `DrCloudError` if it cannot be used."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DrCloudError(f"state folder {state} cannot be used: {error.strerror}", "Name another.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConflictError(f"another process runs the provider of {state}", "Stop it first.") from None
    else:
        yield
    finally:
        os.close(fd)
