"""fio over NBD: one run, and what it measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple

from dr_cloud.model.errors import DrCloudError

Pattern = Literal["read", "write", "randread", "randwrite"]


class Measured(NamedTuple):
    """What one run of fio found."""

    requests_per_second: float
    mib_per_second: float
    latency_us: float
    """The mean, from handing a request over to its answer."""


def run(
    uri: str, pattern: Pattern, size: str, depth: int, seconds: float, work_dir: Path, rate_mib: int = 0
) -> Measured:
    """Load one NBD export. `DrCloudError` tells what fio said.

    Args:
        uri: The export.
        pattern: What is done.
        size: Bytes of each request, as fio writes it.
        depth: Requests under way at a time.
        seconds: How long it measures, after a fifth of that unmeasured.
        work_dir: Where it may leave its state.
        rate_mib: MiB/s at most; 0 for as much as there is.
    """
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", f"--bs={size}",
        f"--iodepth={depth}", "--time_based", f"--runtime={seconds:g}", f"--ramp_time={seconds / 5:g}",
        "--randrepeat=0", "--norandommap", "--random_generator=tausworthe", "--thread", "--output-format=json",
    ]  # fmt: skip
    if rate_mib:
        command.append(f"--rate={rate_mib}m")
    done = subprocess.run(command, cwd=work_dir, capture_output=True, text=True, check=False)
    try:
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        if done.returncode or job["error"]:
            raise ValueError(f"error {job['error']}")
    except (ValueError, LookupError) as error:
        raise DrCloudError(f"fio failed on {uri}: {error}: {(done.stderr or done.stdout).strip()[-500:]}") from error
    side = job["read" if pattern.endswith("read") else "write"]
    return Measured(side["iops"], side["bw_bytes"] / (1 << 20), side["lat_ns"]["mean"] / 1000)
