"""How a probe says that its disks are bad."""

from __future__ import annotations


class FailedError(Exception):
    """The test has failed; the message is its reason, one sentence for the person who reads the report."""


class CannotRunError(FailedError):
    """The probe cannot tell how the disks are: what it needs is not there. The test has failed all the same."""
