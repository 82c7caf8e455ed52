"""What probes say of one time's image, for ever: an image of the past never changes. Pure.

Kept are verdicts about the data alone. A probe that ran out of time, was stopped or could not run says nothing of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dr_cloud.model.probe import ProbeResult, ProbeSpec


def probes_digest(specs: Sequence[ProbeSpec]) -> str:
    """Return what tells lists of probes apart: SHA-256, in hexadecimal, of what they look at and for.

    Names, time-outs, limits of output and order do not change what is found, so they are not in it.
    """
    asked = {json.dumps([spec.kind, spec.disk, spec.parameters], sort_keys=True) for spec in specs}
    return hashlib.sha256("\n".join(sorted(asked)).encode()).hexdigest()


def data_verdict(probes: int, results: Sequence[ProbeResult]) -> tuple[bool, str] | None:
    """Return whether the data is clean, and the reason if it is not; None if that is not known.

    Args:
        probes: How many there are.
        results: Of those that have ended.
    """
    for result in results:
        if result.conclusive and not result.passed:
            return False, f"{result.probe}: {result.reason}"
    return (True, "") if len(results) == probes and all(result.passed for result in results) else None


def verdict_of_test(probes: int, results: Sequence[ProbeResult]) -> tuple[bool, str]:
    """Return whether a test that ends now has passed, and the reason of the first probe that failed, if one has."""
    for result in results:
        if not result.passed:
            return False, f"{result.probe}: {result.reason}"
    return len(results) == probes, ""
