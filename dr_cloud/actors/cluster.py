"""The provider's Ray: started here or joined, where an actor may run, and answers awaited with a limit.

Placement
    Each node of a cluster is started with labels (`ray start --labels data-center=us-east,jurisdiction=USA`). An actor
    that touches an enterprise's data is made with a selector on them, so Ray itself can run it nowhere else: where no
    such node lives it waits, and after its node is lost Ray starts it on another that fits. With `ray: local` this
    machine stands for every data center: there are no labels, and nothing is selected.

Crash recovery
    Actors are named and detached: they outlive whoever made them, and are found again by name. A Ray that was started
    here ends with this process, however that ends; its actors find their state again when they are next started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import ray
import structlog
from pydantic import BaseModel, ConfigDict

from dr_cloud.model.errors import DrCloudError, UnavailableError

LOCAL: Final = "local"
_OBJECT_STORE_BYTES: Final = 256 << 20
"""Ray carries control only, no disk data."""
ANSWER_SECONDS: Final = 30.0
UNHEARD_SECONDS: Final = 10.0
"""For calls that take a moment and may be made again."""
START_SECONDS: Final = 120.0
"""For actors that may have to be started first, on a machine that is busy."""
_PAUSE_SECONDS: Final = 0.2
_CALLS_AT_ONCE: Final = 16
"""An actor's methods run in threads; what they share is on one event loop or under a lock."""

_log = structlog.get_logger(__name__)


class Placement(BaseModel):
    """Where actors may run, and under which names."""

    model_config = ConfigDict(frozen=True)

    namespace: str
    """Ray's namespace: one per provider."""
    local: bool
    """This machine stands for every data center."""

    def options(self, name: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the options of a detached actor of that name that runs only on nodes with these labels."""
        options: dict[str, Any] = {
            "name": name,
            "namespace": self.namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "max_concurrency": _CALLS_AT_ONCE,
        }
        if labels and not self.local:
            options["label_selector"] = dict(labels)
        return options

    def find(self, name: str) -> Any:
        """Return the actor of that name. Raises `UnavailableError` if there is none."""
        try:
            return ray.get_actor(name, namespace=self.namespace)
        except ValueError:
            raise UnavailableError(f"there is no {name} now", "Look at the provider's health; try again.") from None

    def names(self) -> list[str]:
        """Return the names of the provider's actors."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        return sorted(actor["name"] for actor in actors if actor["namespace"] == self.namespace)

    def end(self, name: str) -> None:
        """End the actor of that name for good, if there is one."""
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            ray.kill(ray.get_actor(name, namespace=self.namespace), no_restart=True)


def node_address() -> str:
    """Return the address of this node, by which actors on others reach it."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class Where(NamedTuple):
    """Where an actor runs."""

    pid: int
    node: str
    labels: dict[str, str]


def whereabouts() -> Where:
    """Return where this actor runs."""
    context = ray.get_runtime_context()
    labels = {name: str(value) for name, value in context.get_node_labels().items()}
    return Where(os.getpid(), context.get_node_id(), labels)


def start_ray(address: str, provider: str) -> Placement:
    """Start Ray here (`local`), or join the cluster at `address`. Raises `UnavailableError`."""
    local = address == LOCAL
    placement = Placement(namespace=f"dr-cloud-{provider}", local=local)
    if ray.is_initialized():
        return placement
    started = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False} if local else {}
    try:
        ray.init(
            address=address,
            namespace=placement.namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **started,  # type: ignore[arg-type]
        )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise UnavailableError(
            f"Ray at {address} does not answer: {error}", "Start the cluster's nodes, or write `ray: local`."
        ) from error
    if local:
        _log.info("ray.local", meaning="this machine stands for every data center: actors are placed anywhere on it")
    return placement


def ray_has_gone() -> bool:
    """Return whether one of the processes that a Ray started here cannot do without has ended."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if name in ("raylet", "gcs_server") and state == "Z" and int(parent) == os.getpid():
                return True
    return False


@contextlib.contextmanager
def _told(what: str, timeout_seconds: float) -> Iterator[None]:
    """Turn what Ray says of an answer into the project's words."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DrCloudError):
            raise error.cause from None
        raise
    except (ray.exceptions.GetTimeoutError, TimeoutError):
        raise UnavailableError(
            f"{what} has not answered for {timeout_seconds:g} s",
            "Is there a node for it? Look at the provider's health; the call may be made again.",
        ) from None
    except ray.exceptions.RayActorError as error:
        raise UnavailableError(f"{what} has died", "It is started again by itself; try again.") from error


def ask(reference: Any, what: str, timeout_seconds: float = ANSWER_SECONDS) -> Any:
    """Wait for an actor's answer.

    Args:
        reference: What a remote call returned.
        what: Who is asked, for errors.
        timeout_seconds: How long to wait.

    Raises:
        DrCloudError: The actor's own error, as it raised it.
        UnavailableError: It has died, restarts, finds no node, or does not answer in time.
    """
    with _told(what, timeout_seconds):
        return ray.get(reference, timeout=timeout_seconds)


async def answer(reference: Any, what: str, timeout_seconds: float = ANSWER_SECONDS) -> Any:
    """Wait for an actor's answer on an event loop; see `ask`."""
    with _told(what, timeout_seconds):
        return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_seconds)


def ask_again(call: Callable[[], Any], what: str, timeout_seconds: float = ANSWER_SECONDS) -> Any:
    """Make a call that is safe to repeat until it is answered: over an actor's restart, for `timeout_seconds` in all.

    Args:
        call: Makes the remote call.
        what: Who is asked, for errors.
        timeout_seconds: How long to try.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return ask(call(), what, max(0.1, deadline - time.monotonic()))
        except UnavailableError as error:
            cause = error.__cause__
            if isinstance(cause, ray.exceptions.ActorDiedError) and "__init__" in str(cause):
                reason = str(cause).strip().splitlines()[-1]
                raise DrCloudError(f"{what} could not be started: {reason}", "Look at its log.") from error
            if time.monotonic() + _PAUSE_SECONDS > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)
