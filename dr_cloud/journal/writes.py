"""When was written: the times between which a search for the last clean one chooses.

Read from the change rows of the journal's objects, only of those whose checkpoints can hold what is asked for.
"""

from __future__ import annotations

import numpy as np

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.reader import JournalReader
from dr_cloud.model.journal import Write


def list_writes(catalogue: Catalogue, reader: JournalReader, since_ns: int, until_ns: int, limit: int) -> list[Write]:
    """Return the first `limit` writes with `since_ns` ≤ time ≤ `until_ns`, ascending, each time once.

    Raises:
        DamagedError: An object is not what its checkpoint says.
    """
    found: list[Write] = []
    for checkpoint in catalogue.from_time(since_ns):
        rows = [reader.rows(ref)["time_ns"] for ref in checkpoint.objects if ref.rows]
        if rows:
            times, blocks = np.unique(np.concatenate(rows), return_counts=True)
            wanted = (times >= since_ns) & (times <= until_ns)
            found += [
                Write(time_ns=time_ns, blocks=count, exact=catalogue.exact(time_ns))
                for time_ns, count in zip(times[wanted].tolist(), blocks[wanted].tolist(), strict=True)
            ]
        if len(found) >= limit or checkpoint.time_ns >= until_ns:
            break
    return found[:limit]
