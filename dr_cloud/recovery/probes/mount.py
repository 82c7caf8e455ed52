"""`mount`: the file system mounts as it would on a machine that comes up again, and can be read and written."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict

from dr_cloud.model.units import format_size
from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import FailedError


class MountProbe(BaseModel):
    """The file system mounts, can be read and written."""

    model_config = ConfigDict(extra="forbid")

    partition: int | None = None
    """Where there are several; 0 is a whole disk."""

    def run(self, bench: Bench) -> str:
        """Mount it, list its root, write a file and unmount."""
        volume = bench.the_volume(self.partition)
        with bench.mounted(volume, bench.file(volume), write=True) as folder:
            try:
                names = sorted(os.listdir(folder))
                print("\n".join(names[:100]))
                test = folder / ".dr-cloud-mount-probe"
                with open(test, "xb") as file:
                    file.write(bytes(4096))
                    file.flush()
                    os.fsync(file.fileno())
                test.unlink()
                space = os.statvfs(folder)
            except OSError as error:
                raise FailedError(f"{volume} mounts, but: {error.strerror}") from error
        used = (space.f_blocks - space.f_bfree) * space.f_frsize
        return f"{volume} mounts: {len(names)} names in its root, {format_size(used)} used"
