"""The analyzers of all virtual servers of a site, beside the path of replication and never in its way.

Purpose
    One `ServerAnalyzer` per server, fed with the records of one of its tap's copies (one copy only, where a server is
    replicated to several targets). A bug in an analyzer ends that analyzer, is told in its report, and nothing else.

Bounds
    At most `disks_max` disks; what comes later is not analysed, and its report says so. With each at most 1.2 MiB it is
    far less as a rule: a disk keeps some dozens of blocks.

Crash recovery
    `save` writes what was learnt, a file for each server: zstd of JSON, mode 0600, as it holds blocks of the guests'
    disks. It is a cache: a file that cannot be read is left out, and the server is learnt anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import structlog
import zstandard

from dr_cloud.model.analysis import Activity, ServerAnalysis, Suspicion
from dr_cloud.model.ids import check_name
from dr_cloud.model.journal import Disk
from dr_cloud.vdsa.analysis.server import ServerAnalyzer
from dr_cloud.vdsa.feed import Record

DISKS_MAX: Final = 1024
_STATE_VERSION: Final = 1
_STATE_BYTES_MAX: Final = 64 << 20

_log = structlog.get_logger(__name__)


class Analyzers:
    """See the module's docstring. Every method may be called from any thread; none raises for what guests write."""

    def __init__(self, folder: Path | None = None, disks_max: int = DISKS_MAX) -> None:
        """Begin with what is saved in `folder`; without one nothing outlives the process."""
        self._folder = folder
        self._disks_max = disks_max
        self._analyzers: dict[str, ServerAnalyzer] = {}
        self._disks: dict[str, int] = {}
        self._problems: dict[str, str] = {}
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def announce(self, server: str, disks: Sequence[Disk]) -> None:
        """A tap of `server` has connected, with these disks and indexes."""
        others = sum(count for name, count in self._disks.items() if name != server)
        if others + len(disks) > self._disks_max:
            self._stop(server, f"not analysed: more than {self._disks_max} disks at this site")
            return
        self._disks[server] = len(disks)
        try:
            known = self._analyzers.get(server)
            if known is not None:
                known.set_disks(disks)
            else:
                self._problems.pop(server, None)
                self._analyzers[server] = self._load(server, disks)
        except Exception as error:
            self._broken(server, error)

    def take(self, server: str, records: Iterable[Record]) -> None:
        """Records of a tap of `server` pass by. Their bodies are only read."""
        analyzer = self._analyzers.get(server)
        if analyzer is None:
            return
        try:
            analyzer.take(records)
        except Exception as error:
            self._broken(server, error)

    def interval(
        self, servers: Iterable[str], checkpoint_ns: int, bytes_raw: int, bytes_sealed: int, whole: bool
    ) -> None:
        """A checkpoint of the VPG of `servers` was made; the arguments are `ServerAnalyzer.interval`'s."""
        for server in servers:
            analyzer = self._analyzers.get(server)
            if analyzer is not None:
                try:
                    analyzer.interval(checkpoint_ns, bytes_raw, bytes_sealed, whole)
                except Exception as error:
                    self._broken(server, error)

    def forget(self, server: str) -> None:
        """The server is protected no more: drop what was learnt."""
        self._analyzers.pop(server, None)
        self._disks.pop(server, None)
        self._problems.pop(server, None)
        if (path := self._path(server)) is not None:
            path.unlink(missing_ok=True)

    def servers(self) -> list[str]:
        """Return the servers there is a report of."""
        return sorted({*self._analyzers, *self._problems})

    def report(self, server: str) -> ServerAnalysis | None:
        """Return the report of one server, None if it is not known."""
        analyzer = self._analyzers.get(server)
        if analyzer is not None:
            try:
                return analyzer.report()
            except Exception as error:
                self._broken(server, error)
        if server not in self._problems:
            return None
        nothing = Activity(writes_per_second=0, bytes_per_second=0, quiet=False)
        return ServerAnalysis(
            server=server, since_ns=None, until_ns=None, activity=nothing, problem=self._problems[server]
        )

    def suspicions(self) -> dict[str, list[Suspicion]]:
        """Return the suspicions of every server that has any."""
        found = {}
        for server, analyzer in list(self._analyzers.items()):
            if suspicions := analyzer.suspicions:
                found[server] = suspicions
        return found

    def save(self) -> None:
        """Write what was learnt. An error of the disk is logged: the next time may do better."""
        for server, analyzer in list(self._analyzers.items()):
            path = self._path(server)
            if path is None:
                return
            try:
                document = {"version": _STATE_VERSION, "state": analyzer.state()}
                data = zstandard.compress(json.dumps(document).encode(), 3)
                fresh = path.with_suffix(".new")
                fresh.unlink(missing_ok=True)
                descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                fresh.replace(path)
            except OSError as error:
                _log.warning("analysis.not_saved", server=server, reason=error.strerror)
            except Exception as error:
                self._broken(server, error)

    def _path(self, server: str) -> Path | None:
        return self._folder / f"{check_name(server, 'server')}.analysis" if self._folder is not None else None

    def _load(self, server: str, disks: Sequence[Disk]) -> ServerAnalyzer:
        path = self._path(server)
        if path is not None and path.is_file():
            try:
                data = zstandard.ZstdDecompressor().decompress(path.read_bytes(), max_output_size=_STATE_BYTES_MAX)
                document = json.loads(data)
                if document["version"] != _STATE_VERSION:
                    raise ValueError(f"version {document['version']}")
                analyzer = ServerAnalyzer(server, disks)
                analyzer.restore(document["state"])
                return analyzer
            except Exception as error:
                _log.warning("analysis.begins_anew", server=server, reason=f"{type(error).__name__}: {error}")
        return ServerAnalyzer(server, disks)

    def _broken(self, server: str, error: Exception) -> None:
        # The kind alone: a message may hold bytes of the guest.
        _log.error("analysis.stopped", server=server, kind=type(error).__name__, exc_info=error)
        self._stop(
            server,
            f"the analysis stopped on an error of its own ({type(error).__name__}); it begins anew when "
            "the server's tap connects again",
        )

    def _stop(self, server: str, problem: str) -> None:
        self._problems[server] = problem
        self._analyzers.pop(server, None)
        self._disks.pop(server, None)
