"""The databases of the demonstration's machines are made side by side, each on its own disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import apsw
import pytest

from dr_cloud.demo import workload
from dr_cloud.demo.disks import ByteDisk, RawFile
from dr_cloud.demo.sqlite_disk import DiskVfs, open_database
from dr_cloud.demo.workload import fill


def rows(image: Path) -> int:
    raw = RawFile(image)
    vfs = DiskVfs(f"look {image}", ByteDisk(raw))
    database = open_database(vfs)
    try:
        ((count,),) = database.execute("select count(*) from orders")
        return int(count)
    finally:
        database.close()
        raw.close()


def test_disks_are_filled_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {tmp_path / f"{number}.img": 200 + 50 * number for number in range(6)}
    for image in images:
        with image.open("wb") as file:
            file.truncate(8 << 20)
    together = Barrier(len(images))

    def open_together(vfs: DiskVfs) -> apsw.Connection:
        together.wait(30)  # every one has its disk by now
        return open_database(vfs)

    monkeypatch.setattr(workload, "open_database", open_together)
    with ThreadPoolExecutor(len(images)) as pool:
        list(pool.map(fill, images, images.values()))
    assert {image: rows(image) for image in images} == images
