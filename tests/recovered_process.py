"""A process that serves recovered servers, so that it can be killed: `recovered_process.py SETTINGS RECORD VDSA AGAIN`.

It answers on its standard error, for its log goes to the other: first the URIs as JSON. Then, for each line that it
reads (`promote`, `progress`, `pause REASON`, `stop`, …), one line: what it has to say, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dr_cloud.actors.node import NodeSettings
from dr_cloud.actors.recovered import RecoveredProcess
from dr_cloud.recovery.servers import RecoveredRecord


def main(settings: str, record: str, vdsa: str, again: str) -> None:
    process = RecoveredProcess(
        NodeSettings.model_validate_json(settings),
        "f1",
        Path(vdsa),
        None if again == "again" else RecoveredRecord.model_validate_json(record),
    )
    print(json.dumps(process.opened().uris), file=sys.stderr, flush=True)
    for line in sys.stdin:
        method, *arguments = line.split()
        said = getattr(process, method)(*arguments)
        print(said.model_dump_json() if said is not None else "null", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
