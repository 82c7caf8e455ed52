"""The engine that is an OPA server, asked through opa-python-client.

Consistency
    The server fetches bundles by itself and checks their signatures; a refused one leaves the old one in force. Every
    answer names the revision it was made under, so an answer is never taken for one of another revision.

Retries
    A request is tried again once where the connection broke or the server failed. All of it together takes
    `ANSWER_SECONDS` at most: whoever has not answered by then is cut off, and its late word is never read.

Crash recovery
    None is needed: the server is looked at every second, and what it says then is how it stands.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

import aiohttp
from opa_client.errors import PolicyNotFoundError  # type: ignore[import-untyped]
from opa_client.opa_async import AsyncOpaClient  # type: ignore[import-untyped]

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.rights import Answer
from dr_cloud.rights.engine import no_answer, read_answer

ANSWER_SECONDS: Final = 1.5
"""How long one request may take, with what is tried again."""
LOOK_SECONDS: Final = 0.5
"""How often the server is looked at."""
_CLOSE_SECONDS: Final = 1.0
AT_A_TIME: Final = 200
"""Questions in one request."""
_FAILURES: Final = (OSError, TimeoutError, ValueError, aiohttp.ClientError, PolicyNotFoundError)
"""ValueError: what came is no JSON."""

_T = TypeVar("_T")


class OpaEngine:
    """An OPA server somewhere."""

    kind: Final[Literal["opa"]] = "opa"

    def __init__(self, url: str) -> None:
        """Begin to look at the server.

        Args:
            url: http(s)://HOST:PORT, nothing after it.

        Raises:
            DrCloudError: The URL cannot be used.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise DrCloudError(f"{url!r} is no OPA server's URL", "Write it like http://127.0.0.1:8181.")
        secure = parts.scheme == "https"
        self._client = AsyncOpaClient(
            parts.hostname, parts.port or (443 if secure else 80), ssl=secure, retries=1, timeout=2 * ANSWER_SECONDS
        )
        self._revision = ""
        self._unheard = "the OPA server has not answered yet"
        self._refused = ""
        self._says_status = True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="opa", daemon=True)
        self._closed = threading.Event()
        self._thread.start()

    @property
    def revision(self) -> str:
        """The revision of its last answer; empty while it does not answer."""
        return self._revision

    @property
    def problem(self) -> str:
        """Why it does not answer, or which bundle it refused; empty if all is well."""
        return self._unheard or self._refused

    def load(self, bundle: bytes, public: str) -> None:
        """Do nothing: the server fetches its bundles, from where its own configuration says."""

    def answer(self, inputs: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answer each input, `AT_A_TIME` in one request. Never raises. What follows on a failure is not asked."""
        answers: list[Answer] = []
        while len(answers) < len(inputs):
            part = inputs[len(answers) : len(answers) + AT_A_TIME]
            decided = self._wait(self._ask(part))
            if decided is None:
                return answers + [no_answer(self._unheard)] * (len(inputs) - len(answers))
            answers += [read_answer(decided.get(str(i))) for i in range(len(part))]
        return answers

    def close(self) -> None:
        """End the connections. Idempotent."""
        if not self._closed.is_set():
            self._closed.set()
            self._revision, self._unheard = "", "the engine is closed"
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # -- on the loop of its own thread --

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._client.__aenter__())
            looking = self._loop.create_task(self._look())
            self._loop.run_forever()
            for task in (left := {looking, *asyncio.all_tasks(self._loop)}):
                task.cancel()
            # A timer of the client that goes off just now can swallow the cancellation: it is not waited for.
            self._loop.run_until_complete(asyncio.wait(left, timeout=_CLOSE_SECONDS))
            self._loop.run_until_complete(self._client.close_connection())
        finally:
            self._loop.close()

    def _wait(self, coroutine: Coroutine[Any, Any, _T]) -> _T | None:
        if self._closed.is_set():
            coroutine.close()
            return None
        asked = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return asked.result(2 * ANSWER_SECONDS)
        except TimeoutError:
            asked.cancel()
            return None

    async def _look(self) -> None:
        while not self._closed.is_set():
            await self._ask([])
            await self._read_status()
            await asyncio.sleep(LOOK_SECONDS)

    async def _ask(self, inputs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Return decisions by position; None, and why in `_unheard`, if the server gave none."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                said = await self._client.query_rule({"questions": list(inputs)}, "dr_cloud.batch", "answers")
            result = said["result"]
            revision, decided = result["revision"], result["decisions"]
            if not (isinstance(revision, str) and revision and isinstance(decided, dict)):
                raise ValueError("this is no answer")
        except TimeoutError:
            why = f"the OPA server has not answered in {ANSWER_SECONDS} s"
        except (aiohttp.ClientConnectionError, OSError):
            why = "the OPA server cannot be reached"
        except (*_FAILURES, LookupError, TypeError, AttributeError):
            why = "the OPA server has no policies, or its answer is none"
        else:
            self._revision, self._unheard = revision, ""
            return decided
        self._revision, self._unheard = "", why
        return None

    async def _read_status(self) -> None:
        """Note a bundle that was refused, if the server tells of its bundles."""
        if not self._says_status or self._unheard:
            return
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                bundles = (await self._client.get_status())["result"]["bundles"]
            problems = [f"{b['code']}: {b.get('message', '')}" for b in bundles.values() if b.get("code")]
        except aiohttp.ClientResponseError:
            self._says_status = False
        except (*_FAILURES, LookupError, TypeError, AttributeError):
            return
        else:
            self._refused = f"the OPA server refused a bundle: {problems[0]}" if problems else ""
