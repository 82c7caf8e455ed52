"""`command`: any program; its exit code is the verdict.

It is given, for each disk, the NBD address of a layer: in `DRC_DISK_<NAME>_URI` (the name in capitals, whatever is no
letter and no digit an underscore), and all of them as a JSON object, name → address, in the file that `DRC_DISKS`
names. It may write to the disks; the stack is not changed. Files that it puts into the folder `DRC_ARTEFACTS` are kept.
It runs as a user that nobody else is, so it and what it reads must be readable by all; it has no network.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from dr_cloud.model.errors import InvalidError
from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import CannotRunError, FailedError


def variable(disk: str) -> str:
    """Return the name of the environment variable that holds a disk's address."""
    return f"DRC_DISK_{re.sub('[^A-Z0-9]', '_', disk.upper())}_URI"


class CommandProbe(BaseModel):
    """Any program, given the disks' addresses; its exit code is the verdict."""

    model_config = ConfigDict(extra="forbid")

    argv: Annotated[list[str], Field(min_length=1)]
    """The program and its arguments."""

    def run(self, bench: Bench) -> str:
        """Run it to its end."""
        if len({variable(disk) for disk in bench.disks}) < len(bench.disks):
            raise InvalidError("two disks would have the same variable", "Run the probe once for each, by disk=.")
        if shutil.which(self.argv[0]) is None:
            raise CannotRunError(f"there is no program {self.argv[0]} on this node")
        uris = {disk: bench.layer(disk) for disk in bench.disks}
        listed = bench.home / "disks.json"
        listed.write_text(json.dumps(uris))
        listed.chmod(0o644)
        done = bench.apart.run(
            *self.argv,
            env={
                **{variable(disk): uri for disk, uri in uris.items()},
                "DRC_DISKS": str(listed),
                "DRC_ARTEFACTS": str(bench.artefacts),
            },
        )
        if done.code < 0:
            raise FailedError(f"{self.argv[0]} was killed by signal {-done.code}")
        if done.code:
            raise FailedError(f"{self.argv[0]} ends with {done.code}")
        return f"{self.argv[0]} ends with 0"
