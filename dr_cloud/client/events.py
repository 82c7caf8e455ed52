"""The stream of events, followed through cuts: what was seen last is told at each new connection, so nothing is missed.

The format is Server-Sent Events: lines `id:`, `event:`, `data:`, comments that begin with a colon, an empty line after
each event.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Final

from dr_cloud.client.session import Session
from dr_cloud.model.errors import UnavailableError
from dr_cloud.model.watch import Event

_SILENCE_SECONDS: Final = 45.0
"""Three keep-alive comments missed: the connection is dead."""
_AGAIN_SECONDS: Final = 1.0


def parse_events(lines: Iterable[str]) -> Iterator[tuple[int | None, Event | None]]:
    """Turn the lines of a stream into (where it is now, what happened there); either may be absent."""
    data: list[str] = []
    number: int | None = None
    for line in lines:
        if not line:
            if data or number is not None:
                yield number, Event.model_validate_json("\n".join(data)) if data else None
            data, number = [], None
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif line.startswith("id:"):
            number = int(line.removeprefix("id:"))


class EventSource:
    """One follower of the stream."""

    def __init__(self, session: Session, after: int | None) -> None:
        self._session = session
        self._last = after

    def events(self) -> Iterator[Event]:
        """Yield events for ever. Raises `UnauthenticatedError` once the token is no longer valid."""
        while True:
            try:
                headers = {} if self._last is None else {"Last-Event-ID": str(self._last)}
                with self._session.stream("/v1/events", headers, _SILENCE_SECONDS) as response:
                    for number, event in parse_events(response.iter_lines()):
                        self._last = self._last if number is None else number
                        if event is not None:
                            yield event
            except UnavailableError:
                pass
            time.sleep(_AGAIN_SECONDS)
