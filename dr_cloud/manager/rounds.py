"""A thread that looks at something every few seconds, until it is closed. What fails is logged, and tried anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog

log = structlog.get_logger(__name__)


class Rounds:
    """See the module's docstring."""

    def __init__(self, name: str, seconds: float, acts: Sequence[Callable[[], object]]) -> None:
        """Prepare; `start` begins.

        Args:
            name: Of the thread, and in the log.
            seconds: Between two rounds.
            acts: What is done in each round, one after another. One that fails does not keep the others back.
        """
        self._name = name
        self._seconds = seconds
        self._acts = acts
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin with the rounds."""
        self._thread.start()

    def close(self) -> None:
        """End them, after the act that is under way."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            for act in self._acts:
                try:
                    act()
                except Exception:
                    log.exception("round", of=self._name, act=getattr(act, "__name__", ""))
