"""The checkpoint object: one durable cut of the journal. The chain of them is the log, and the catalogue.

An envelope, magic "DRCC", version 1, at `<enterprise>/<vpg>/<target>/checkpoints/<number>.ckpt`; section 0 is the JSON
of `dr_cloud.model.journal.Checkpoint`. Numbers are consecutive from 0. A checkpoint is created with put-if-absent after
everything that it names is durable; so of two writers one gets each number, and what can be seen can be read whole.

A writer's claim, magic "DRCW", at `…/writers/<generation>`, says who claimed the generation and when.
"""

from __future__ import annotations

import os
import socket
from typing import Final

from pydantic import ValidationError

from dr_cloud.journal.envelope import Opened, Sealer, pack_json, unpack_json
from dr_cloud.journal.frame import Buffer
from dr_cloud.model.errors import DamagedError
from dr_cloud.model.journal import Checkpoint
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.store import layout
from dr_cloud.store.store import Store

MAGIC: Final = b"DRCC"
CLAIM_MAGIC: Final = b"DRCW"
VERSION: Final = 1


def seal_checkpoint(keys: VpgKeys, checkpoint: Checkpoint) -> tuple[str, list[Buffer]]:
    """Return (key in the store, bytes) of a checkpoint."""
    key = layout.checkpoint_key(keys.scope, checkpoint.number)
    return key, Sealer(keys, key, MAGIC, VERSION).finish([pack_json(checkpoint.model_dump())], [])


def read_checkpoint(store: Store, keys: VpgKeys, number: int) -> Checkpoint:
    """Fetch and check checkpoint `number`; `ObjectMissingError` if it is not there."""
    opened = Opened(store, keys, layout.checkpoint_key(keys.scope, number), MAGIC, VERSION)
    try:
        checkpoint = Checkpoint.model_validate(unpack_json(opened.section(0)))
    except (ValidationError, DamagedError) as error:
        raise opened.damaged(str(error)) from error
    if checkpoint.number != number:
        raise opened.damaged(f"it says it is number {checkpoint.number}")
    return checkpoint


def seal_claim(keys: VpgKeys, generation: int, now_ns: int) -> tuple[str, list[Buffer]]:
    """Return (key in the store, bytes) of a writer's claim of `generation`."""
    key = layout.writer_key(keys.scope, generation)
    claim = {"generation": generation, "created_ns": now_ns, "host": socket.gethostname(), "pid": os.getpid()}
    return key, Sealer(keys, key, CLAIM_MAGIC, VERSION).finish([pack_json(claim)], [])
