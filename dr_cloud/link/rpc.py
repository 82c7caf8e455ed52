"""Calls both ways over one message stream: how managers and sites talk to each other.

Layout
    Each message is text, one JSON object with a `type`::

        call     id, method, params           id: 1, 2, 3 … of each end that calls
        answer   id, result                   or id, fault {kind, message, remedy}

Time
    A caller waits as long as it says. A call that is served for over 120 s is broken off and answered with a fault.

Retries
    None here: after a time-out or a cut the caller does not know whether the call was served. Every method of the
    link may be called again (orders and reports are whole states, a renewal gives one more certificate).

Broken or hostile peers
    At most 64 calls are served at a time, further ones are answered with a fault at once. What breaks the rules raises
    `ProtocolError` from `run`. A method's own errors cross as faults; a bug in it crosses without its details.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from dr_cloud.link.fault import Fault
from dr_cloud.link.stream import MessageStream
from dr_cloud.model.errors import DrCloudError, LimitError, NotFoundError, ProtocolError, UnavailableError

CALL_SECONDS: Final = 30.0
SERVED_SECONDS_MAX: Final = 120.0
SERVED_MAX: Final = 64

Params = dict[str, JsonValue]
Method = Callable[[Params], Awaitable[JsonValue]]

_Id = Annotated[int, Field(gt=0, lt=1 << 53)]
_log = structlog.get_logger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Call(_Record):
    type: Literal["call"] = "call"
    id: _Id
    method: str = Field(pattern=r"^[a-z][a-z_]{0,62}$")
    params: Params = {}


class _Answer(_Record):
    type: Literal["answer"] = "answer"
    id: _Id
    result: JsonValue = None
    fault: Fault | None = None


_ANY: Final[TypeAdapter[_Call | _Answer]] = TypeAdapter(Annotated[_Call | _Answer, Field(discriminator="type")])


class Rpc:
    """Calls over one stream. All methods belong to one event loop."""

    def __init__(self, stream: MessageStream, methods: dict[str, Method]) -> None:
        """Serve `methods`, which may be filled later; nothing is served before `run`."""
        self._stream = stream
        self._methods = methods
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[JsonValue]] = {}
        self._served: dict[int, asyncio.Task[None]] = {}

    async def call(self, method: str, params: Params | None = None, timeout_seconds: float = CALL_SECONDS) -> JsonValue:
        """Call a method of the peer.

        Returns:
            Its result.

        Raises:
            DrCloudError: What the peer answered, of the same kind and with the same remedy.
            UnavailableError: No answer came in time, or the link was cut.
        """
        self._last_id += 1
        number = self._last_id
        text = _Call(id=number, method=method, params=params or {}).model_dump_json()
        answer: asyncio.Future[JsonValue] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        remedy = "It may have been served or not: look, then call again."
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._stream.send(text)
                result = await answer
        except TimeoutError:
            raise UnavailableError(f"{method!r} was not answered within {timeout_seconds:g} s", remedy) from None
        except OSError as error:
            raise UnavailableError(f"{method!r} was not answered: {error}", remedy) from error
        finally:
            self._waiting.pop(number, None)
        return result

    async def run(self) -> None:
        """Serve calls and hand out answers until the stream ends. Raises `ProtocolError` or `OSError`."""
        try:
            while (message := await self._stream.receive()) is not None:
                self._take(message)
        finally:
            for task in list(self._served.values()):
                task.cancel()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ConnectionResetError("the link was cut"))

    def _take(self, message: str | memoryview) -> None:
        if not isinstance(message, str):
            raise ProtocolError("a call or an answer is text")
        try:
            record = _ANY.validate_json(message)
        except ValidationError as error:
            raise ProtocolError(f"neither a call nor an answer: {_first(error)}") from None
        if isinstance(record, _Call):
            if record.id in self._served:
                raise ProtocolError("two calls with one id are under way")
            full = len(self._served) >= SERVED_MAX
            if len(self._served) >= 2 * SERVED_MAX:
                raise ProtocolError("more and more calls, and the answers are not read")
            self._served[record.id] = asyncio.create_task(self._serve(record, full=full))
            return
        if record.id > self._last_id:
            raise ProtocolError("an answer to a call that was never made")
        answer = self._waiting.get(record.id)
        if answer is not None and not answer.done():
            if record.fault is not None:
                answer.set_exception(record.fault.error())
            else:
                answer.set_result(record.result)

    async def _serve(self, call: _Call, *, full: bool) -> None:
        try:
            try:
                if full:
                    raise LimitError(f"{SERVED_MAX} calls are being served", "Call again later.")
                answer = _Answer(id=call.id, result=await self._result(call))
                await self._stream.send(answer.model_dump_json())
            except DrCloudError as error:
                await self._stream.send(_Answer(id=call.id, fault=Fault.of(error)).model_dump_json())
        except OSError:
            pass  # The link is cut: nobody waits for the answer.
        finally:
            self._served.pop(call.id, None)

    async def _result(self, call: _Call) -> JsonValue:
        method = self._methods.get(call.method)
        if method is None:
            raise NotFoundError(f"there is no method {call.method!r} here", "Bring both sides to the same release.")
        try:
            async with asyncio.timeout(SERVED_SECONDS_MAX):
                return await method(call.params)
        except DrCloudError:
            raise
        except ValidationError as error:
            raise DrCloudError(f"bad parameters of {call.method!r}: {_first(error)}", "Correct them.") from None
        except TimeoutError:
            raise UnavailableError(f"{call.method!r} took too long", "Call again later.") from None
        except Exception:
            _log.exception("link.call_failed", method=call.method)
            raise DrCloudError(f"{call.method!r} failed", "The other side's log tells more.") from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
