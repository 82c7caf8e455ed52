"""The `Stack` actor: one recovery test's disks, served from a process of its own.

A stack actor that dies takes its own test with it and nothing else: it is not restarted, for its write log is gone by
design. It serves one test at a time. Between tests it may be kept for its own enterprise, never for another: a process
that held one tenant's data or keys is not given to the next.

Probes run in a thread here and in processes of their own, so that the stack answers meanwhile. They end with the test,
and with this process however it ends; what a dead one left on the node's disk the next one removes.

A remote test's disks are served on TCP too, over TLS alone, to whoever holds the test's credential: a client
certificate of an authority that is made for this test, here, and lies in this process's memory alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import ray
from pydantic import BaseModel, ConfigDict

from dr_cloud.actors.cluster import Where, node_address, whereabouts
from dr_cloud.actors.node import LoopThread, NodeSettings, Stores
from dr_cloud.journal.reader import JournalReader
from dr_cloud.manager.fabric import ProbeProgress
from dr_cloud.model.errors import ConflictError, DrCloudError, NotFoundError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import ImagePlan
from dr_cloud.model.probe import ProbeLimits, ProbeSpec
from dr_cloud.model.recovery import LIFETIME_SECONDS_MAX, TestCredential
from dr_cloud.recovery.artefacts import store_artefact
from dr_cloud.recovery.probing import Probing, sweep_probing
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import Credentials, new_key_and_csr
from dr_cloud.seal.keyring import Keyring
from dr_cloud.stack.cache import ObjectCache
from dr_cloud.stack.folder import CacheFolder
from dr_cloud.stack.serve import StackServer, serve_stack
from dr_cloud.stack.stack import Stack, StackStatistics

_LIFE: Final = timedelta(seconds=LIFETIME_SECONDS_MAX, days=1)
"""Of a test's certificates. Their keys end with the test; this is beyond the longest one."""
_PROBE_ENDS_SECONDS: Final = 5.0
_OWN_ADDRESS: Final = "*"


class OpenedStack(BaseModel):
    """What whoever asked for a stack gets back."""

    model_config = ConfigDict(frozen=True)

    test: str
    enterprise: str
    at_ns: int
    note: str
    uris: dict[str, list[str]]
    """The NBD URIs of each disk, by the disk's name."""
    open_seconds: float


@dataclass
class _Test:
    """The test that is served."""

    opened: OpenedStack
    scope: Scope
    store_url: str
    server: StackServer
    credential: TestCredential | None
    probing: Probing | None = None


class StackProcess:
    """Serves one stack at a time: all of the actor but Ray."""

    def __init__(self, settings: NodeSettings) -> None:
        """Make ready: what takes time and needs no plan is done here.

        Args:
            settings: The node.
        """
        self._settings = settings
        self._stores = Stores()
        self._keyring = Keyring.open(settings.keyring)
        self._loop = LoopThread("stack")
        self._caches: dict[tuple[Scope, str, int], ObjectCache] = {}
        self._turn = threading.Lock()
        self._test: _Test | None = None
        settings.make_folders()
        sweep_probing(settings.probes_dir)
        self._writelogs = settings.work_dir / "writelogs"
        self._writelogs.mkdir(exist_ok=True, mode=0o700)

    def opened(self) -> OpenedStack | None:
        """Return the test that is served; None if none is."""
        served = self._test
        return served.opened if served is not None else None

    def open(
        self,
        test: str,
        plan: ImagePlan,
        store_url: str,
        quota_bytes: int | None = None,
        asked_ns: int | None = None,
        host: str = "",
    ) -> OpenedStack:
        """Open the stack of `plan` and serve it.

        Args:
            test: The id of the test, unique. Asked again for the one it serves, it says the same again.
            plan: What to serve.
            store_url: Where the journal is.
            quota_bytes: How much the test may write.
            asked_ns: When it was asked for (monotonic clock of this machine), for the time to first byte.
            host: Name or address of this machine on which to serve it over TLS too; empty for not at all, `*` for
                the address by which Ray knows it.
        """
        with self._turn:
            served = self._test
            if served is not None and served.opened.test == test:
                return served.opened
            if served is not None:
                raise ConflictError(f"the stack serves test {served.opened.test}", "Close that test first.")
            scope = Scope(*plan.scope)
            cache = self._cache(plan, store_url)
            stack = Stack.open(
                plan,
                cache,
                self._writelogs,
                clock_ns=time.monotonic_ns,
                quota_bytes=quota_bytes,
                started_ns=asked_ns,
            )
            try:
                server, credential = self._serve(test, scope.enterprise, stack, cache, host)
            except BaseException:
                stack.close()
                raise
            opened = OpenedStack(
                test=test,
                enterprise=scope.enterprise,
                at_ns=plan.at_ns,
                note=plan.note,
                uris=server.uris,
                open_seconds=stack.statistics().open_seconds,
            )
            self._test = _Test(opened, scope, store_url, server, credential)
            return opened

    def _serve(
        self, test: str, enterprise: str, stack: Stack, cache: ObjectCache, host: str
    ) -> tuple[StackServer, TestCredential | None]:
        path = str(self._settings.socket(f"stack/{test}"))
        if not host:
            return self._loop.call(serve_stack(stack, cache, unix_path=path)), None
        host = node_address() if host == _OWN_ADDRESS else host
        own, client = _certificates(test, enterprise, host)
        try:
            server = self._loop.call(serve_stack(stack, cache, unix_path=path, host=host, tls=own.server_context()))
        except DrCloudError as error:
            raise DrCloudError(
                f"stacks cannot be served on {host}: {error}",
                "Correct `stacks` of this data center in the provider's configuration.",
            ) from error
        uris = {disk: [uri for uri in uris if uri.startswith("nbds://")] for disk, uris in server.uris.items()}
        return server, client.model_copy(update={"uris": uris})

    def _cache(self, plan: ImagePlan, store_url: str) -> ObjectCache:
        # A reader knows the writers up to its plan's: after a take-over, another is needed.
        place = (Scope(*plan.scope), plan.journal, len(plan.generations))
        if place not in self._caches:
            scope = place[0]
            reader = JournalReader(self._stores.at(store_url), self._keyring.vpg_keys(scope), scope, plan.generations)
            folder = CacheFolder(
                self._settings.cache_dir, scope, plan.journal, limit_bytes=self._settings.cache_limit_bytes
            )
            self._caches[place] = ObjectCache(folder, reader)
        return self._caches[place]

    def statistics(self) -> StackStatistics:
        """Return the counters of the test under way. Raises `NotFoundError` if there is none."""
        stack = self._stack()

        async def statistics() -> StackStatistics:
            return stack.statistics()

        return self._loop.call(statistics())

    def _stack(self) -> Stack:
        return self._served().server.stack

    def _served(self, test: str | None = None) -> _Test:
        """Return the test that is served; with an id, only that one. Raises `NotFoundError`."""
        served = self._test
        if served is None or test not in (None, served.opened.test):
            raise NotFoundError(f"the stack does not serve test {test or 'any'}", "It has ended, or was not opened.")
        return served

    def credential(self, test: str) -> TestCredential | None:
        """Return what opens a test's disks over TLS; None if it is not served there. Raises `NotFoundError`."""
        return self._served(test).credential

    def start_probes(self, test: str, specs: Sequence[ProbeSpec]) -> None:
        """Begin to run probes on the disks of a test; asked again, nothing happens.

        Raises:
            InvalidError: A probe is not known, names no disk, or the node is not run by root; nothing runs.
            NotFoundError: Another test is served, or none.
        """
        with self._turn:
            served = self._served(test)
            if served.probing is not None:
                return
            keys, store = self._keyring.vpg_keys(served.scope), self._stores.at(served.store_url)
            served.probing = Probing(
                specs,
                {disk: uris[0] for disk, uris in served.opened.uris.items()},
                self._settings.probes_dir,
                self._settings.probes_at_once or os.cpu_count() or 1,
                lambda path, content: store_artefact(store, keys, test, path, content),
                ProbeLimits(kernel_mounts=self._settings.kernel_mounts),
            )

    def probe_progress(self, test: str) -> ProbeProgress:
        """Return how the probes of a test go. Raises `NotFoundError`."""
        probing = self._served(test).probing
        if probing is None:
            return ProbeProgress(started=False, done=False, results=[])
        # In this order: nothing can come after `done`.
        done = probing.done
        return ProbeProgress(started=True, done=done, results=probing.results)

    def pause(self, reason: str) -> None:
        """Give EPERM for every request until `resume`; may be repeated. Raises `NotFoundError` if there is no test."""
        stack = self._stack()

        async def pause() -> None:
            stack.pause(reason)

        self._loop.call(pause())

    def resume(self) -> None:
        """Go on as before `pause`. Raises `NotFoundError` if there is no test."""
        stack = self._stack()

        async def resume() -> None:
            stack.resume()

        self._loop.call(resume())

    def close(self) -> StackStatistics:
        """End the test: its probes, its exports, its write log; return its last counters.

        Raises:
            NotFoundError: There is no test.
            UnavailableError: A probe does not end; the end of this process ends it.
        """
        with self._turn:
            statistics = self.statistics()
            served, self._test = self._served(), None
            probing = served.probing
            if probing is not None:
                probing.stop(_PROBE_ENDS_SECONDS)
            self._loop.call(served.server.close())
            # What hung in the disks' I/O does not any more.
            if probing is not None and not probing.stop(_PROBE_ENDS_SECONDS):
                raise UnavailableError("a probe of the test does not end", "Its process is ended.")
            return statistics


@ray.remote(max_restarts=0, num_cpus=0)
class StackActor(StackProcess):
    """A stack's process as an actor."""

    def where(self) -> Where:
        """Return where it runs."""
        return whereabouts()


def _certificates(test: str, enterprise: str, host: str) -> tuple[Credentials, TestCredential]:
    """Make the certificates of one test: the server's, and the one that opens it (without addresses yet)."""
    authority = Authority.passing(test, _LIFE)
    own = authority.service_credentials("stack", [host], _LIFE)
    key, csr = new_key_and_csr()
    certificate = authority.issue_site(csr, enterprise, test, _LIFE).certificate
    return own, TestCredential(uris={}, ca=authority.certificate, certificate=certificate, key=key)
