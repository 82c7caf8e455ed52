"""How the manager reaches what is outside of it: connectors, VDSAs and stacks.

The manager itself knows no actor and no socket. Every method may block for a while (never for ever), may be called from
any thread, and raises `DrCloudError` with a remedy if what it needs is not there. All but `open_stacks` are safe to
repeat; `open_stacks` is too, for the ids name the stacks: one that is open already is told as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from dr_cloud.model.cloud import CheckpointFilter, LogRequest, Route
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.journal import Checkpoint, PlacedImage, PlacedWrite, Write
from dr_cloud.model.probe import ProbeResult, ProbeSpec
from dr_cloud.model.recovery import TestCredential
from dr_cloud.recovery.servers import RecoveredProgress
from dr_cloud.stack.stack import StackStatistics


class ServedStack(BaseModel):
    """A stack that is open."""

    model_config = ConfigDict(frozen=True)

    at_ns: int
    note: str
    """Why it is not the time that was asked for, where it is not."""
    uris: dict[str, list[str]]
    """The NBD URIs of each disk, by the disk's name."""
    open_seconds: float


class ProbeProgress(BaseModel):
    """How the probes of a stack go."""

    model_config = ConfigDict(frozen=True)

    started: bool
    done: bool
    """All that were started have ended."""
    results: list[ProbeResult]
    """So far, in their order."""


class Fabric(Protocol):
    """The world outside of the manager."""

    def start_connector(self, enterprise: str) -> str:
        """Make sure that the enterprise's connector runs; return where its sites dial (`wss://host:port/link`)."""
        ...

    def stop_connector(self, enterprise: str) -> None:
        """End the enterprise's connector, with all its links."""
        ...

    def disconnect(self, enterprise: str, site: str) -> None:
        """Close the links of this site at once: its certificate has been revoked."""
        ...

    def orders_changed(self, enterprise: str, site: str) -> None:
        """Tell the site's connector to fetch `Cloud.orders_for` and to send it on. Returns without waiting for it."""
        ...

    def host_orders_changed(self, data_center: str, host: str) -> None:
        """Tell the VDSA (or VDSAs) of a data center's host to fetch `Cloud.host_orders`. Returns without waiting."""
        ...

    def deploy_vdsa(self, data_center: str, host: str) -> None:
        """Make sure that a VDSA runs on a data center's host."""
        ...

    def undeploy_vdsa(self, data_center: str, host: str) -> None:
        """Make sure that none does."""
        ...

    def checkpoints(
        self,
        route: Route,
        which: CheckpointFilter = CheckpointFilter(),
        before: int | None = None,
        limit: int | None = None,
    ) -> Sequence[Checkpoint]:
        """Return the newest `limit` wanted checkpoints of a scope, ascending; see `CheckpointFilter.newest`.

        None if its journal was never begun.
        """
        ...

    def writes(self, route: Route, since_ns: int, until_ns: int, limit: int) -> Sequence[Write]:
        """Return the first `limit` writes of a scope with `since_ns` ≤ time ≤ `until_ns`, ascending."""
        ...

    def images_at(self, route: Route, times_ns: Sequence[int]) -> Sequence[PlacedImage]:
        """Return for each time which image is served for it, and how much of the journal that holds."""
        ...

    def writes_at(self, route: Route, positions: Sequence[int]) -> Sequence[PlacedWrite]:
        """Return for each position in the journal the write that it is in. Reads their checkpoints' objects only."""
        ...

    def insert_checkpoint(self, route: Route, tag: str, description: str) -> str:
        """Ask the source of a scope for a checkpoint by hand; return the request's id at once, before it is made.

        The checkpoint carries that id (`Checkpoint.request`), so that its arrival can be told from others'.
        """
        ...

    def open_stacks(
        self, route: Route, times_ns: Mapping[str, int], quota_bytes: int | None, remote: bool = False
    ) -> Mapping[str, ServedStack | DrCloudError]:
        """Open a stack at each time, in parallel, in the data center of the scope.

        Args:
            route: The scope and where its journal is.
            times_ns: By the id that the stack is to have: the time.
            quota_bytes: How much each may write; None is what the node allows.
            remote: Whether to serve over TLS too, to whoever holds `credential`.
        """
        ...

    def stacks(self) -> Mapping[str, str]:
        """Return the stacks that are open as far as this process knows: by the stack's id, whose it is."""
        ...

    def credential(self, stack: str) -> TestCredential | None:
        """Return what a client needs to attach the disks of a stack that is served remotely; None if it is gone."""
        ...

    def start_probes(self, route: Route, stack: str, probes: Sequence[ProbeSpec]) -> None:
        """Begin to run probes on an open stack, where it is. Once per stack: asked again, nothing happens.

        Artefacts go, sealed, into the datastore of the journal; `artefact` reads them.

        Raises:
            InvalidError: A probe is not known there, or names no disk.
            NotFoundError: There is no such stack (any more).
        """
        ...

    def probe_progress(self, stack: str) -> ProbeProgress | None:
        """Return how the probes of a stack go; None if there is no such stack (any more)."""
        ...

    def artefact(self, route: Route, stack: str, path: str) -> bytes:
        """Return a file that a probe of this stack left. Raises `NotFoundError`."""
        ...

    def forget_artefacts(self, route: Route, stacks: Sequence[str]) -> None:
        """Remove what the probes of these stacks left; those that left nothing are passed by."""
        ...

    def stack_statistics(self, stack: str) -> StackStatistics | None:
        """Return the counters of an open stack; None if there is no such stack (any more)."""
        ...

    def close_stack(self, stack: str) -> StackStatistics | None:
        """End a stack, its exports and its write log; return its last counters, None if it was gone already."""
        ...

    def pause_stack(self, stack: str, reason: str) -> None:
        """Have an open stack answer every request with an error until it is resumed; one that is gone is passed by."""
        ...

    def resume_stack(self, stack: str) -> None:
        """Let it serve again."""
        ...

    def recover(self, route: Route, failover: str, at_ns: int | None) -> ServedStack:
        """Serve the servers of a failover, whose disks last, in the data center of the scope.

        Safe to repeat: those that are served are told as they are.

        Args:
            route: The scope and where its journal is.
            failover: The id that they are to have.
            at_ns: The time that their disks begin as; None: they were there before, and nothing is begun anew.
        """
        ...

    def recovered(self, failover: str) -> RecoveredProgress | None:
        """Return how the servers of a failover stand; None if nobody serves them now."""
        ...

    def promote(self, failover: str) -> None:
        """Begin to make their disks their own, so that they need the journal no more. May be repeated."""
        ...

    def discard_recovered(self, route: Route, failover: str) -> None:
        """End the servers of a failover, with all that was written to their disks. May be repeated."""
        ...

    def free_bytes(self, data_center: str, datastore: str) -> int | None:
        """Return how much a datastore can still take; None if it has no bound, or does not tell."""
        ...

    def collect_logs(self, enterprise: str, site: str, request: LogRequest) -> bytes:
        """Return an archive (tar.gz) of the logs of a site; both empty: of the provider's processes."""
        ...
