"""The keys of one scope in the object store: the only place that makes or reads them.

All keys of a scope begin with `<enterprise>/<vpg>/<target>/`. Numbers have ten digits, so that keys sort as they do::

    writers/<generation>                a writer's claim       acme/erp/dc1/writers/0000000003
    journal/<generation>-<number>.jrn   a journal object       acme/erp/dc1/journal/0000000003-0000000042.jrn
    replica/<number>-<generation>.map   a keyframe             acme/erp/dc1/replica/0000000128-0000000003.map
    checkpoints/<number>.ckpt           a checkpoint           acme/erp/dc1/checkpoints/0000000128.ckpt
    artefacts/<test>/<digest>           a probe's artefact     acme/erp/dc1/artefacts/3f0c5a…/9b74c9897bac770ffc02…

`<generation>` counts the writers of the scope from 1. `<number>` of a journal object counts objects, of a keyframe and
a checkpoint it counts checkpoints. A checkpoint's key has no generation on purpose: two writers that both believe
they own the journal meet at the same key, and the store lets one of them pass. `<test>` is a recovery test's id,
`<digest>` the enterprise's keyed digest of the artefact's path, for file names are whatever a program called them.
"""

from __future__ import annotations

import re
from typing import Final

from dr_cloud.model.errors import DamagedError
from dr_cloud.model.ids import Scope, check_name

NUMBER_MAX: Final = 10**10 - 1

_WRITER = re.compile(r".+/writers/(\d{10})")
_JOURNAL = re.compile(r".+/journal/(\d{10})-(\d{10})\.jrn")
_KEYFRAME = re.compile(r".+/replica/(\d{10})-(\d{10})\.map")
_CHECKPOINT = re.compile(r".+/checkpoints/(\d{10})\.ckpt")


def writer_prefix(scope: Scope) -> str:
    """Return the folder of the writers' claims."""
    return f"{scope.prefix}/writers/"


def writer_key(scope: Scope, generation: int) -> str:
    """Return the key by which a writer claims `generation`."""
    return f"{writer_prefix(scope)}{_digits(generation)}"


def parse_writer_key(key: str) -> int:
    """Return the generation of a writer's claim."""
    return _parse(_WRITER, key)[0]


def journal_prefix(scope: Scope) -> str:
    """Return the folder of the journal objects."""
    return f"{scope.prefix}/journal/"


def journal_key(scope: Scope, generation: int, number: int) -> str:
    """Return the key of journal object `number`, made by the writer of `generation`."""
    return f"{journal_prefix(scope)}{_digits(generation)}-{_digits(number)}.jrn"


def parse_journal_key(key: str) -> tuple[int, int]:
    """Return `(generation, number)` of a journal object."""
    generation, number = _parse(_JOURNAL, key)
    return generation, number


def keyframe_prefix(scope: Scope) -> str:
    """Return the folder of the keyframes of the replica map."""
    return f"{scope.prefix}/replica/"


def keyframe_key(scope: Scope, number: int, generation: int) -> str:
    """Return the key of the keyframe after checkpoint `number`, made by the writer of `generation`."""
    return f"{keyframe_prefix(scope)}{_digits(number)}-{_digits(generation)}.map"


def parse_keyframe_key(key: str) -> tuple[int, int]:
    """Return `(number, generation)` of a keyframe."""
    number, generation = _parse(_KEYFRAME, key)
    return number, generation


def checkpoint_prefix(scope: Scope) -> str:
    """Return the folder of the checkpoints."""
    return f"{scope.prefix}/checkpoints/"


def checkpoint_key(scope: Scope, number: int) -> str:
    """Return the key of checkpoint `number`."""
    return f"{checkpoint_prefix(scope)}{_digits(number)}.ckpt"


def parse_checkpoint_key(key: str) -> int:
    """Return the number of a checkpoint."""
    return _parse(_CHECKPOINT, key)[0]


def artefact_prefix(scope: Scope, test: str) -> str:
    """Return the folder of the artefacts of a recovery test. Raises `DrCloudError` for what is no test's id."""
    return f"{scope.prefix}/artefacts/{check_name(test, 'test')}/"


def artefact_key(scope: Scope, test: str, digest: bytes) -> str:
    """Return the key of the artefact whose path has this keyed digest."""
    return f"{artefact_prefix(scope, test)}{digest.hex()}"


def _digits(number: int) -> str:
    if not 0 <= number <= NUMBER_MAX:
        raise ValueError(f"{number} has no ten digits")
    return f"{number:010d}"


def _parse(pattern: re.Pattern[str], key: str) -> list[int]:
    match = pattern.fullmatch(key)
    if match is None:
        raise DamagedError(f"{key}: not a key of this folder", "Move objects that dr_cloud did not make elsewhere.")
    return [int(part) for part in match.groups()]
