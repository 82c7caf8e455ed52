"""The requirements, and which tests prove each: the source of docs/requirements.md.

A test names what it proves in its docstring, before the colon: `\"\"\"R14.3, invariant 3: …\"\"\"`.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Final

REQUIREMENTS: Final = {
    "R1": "tap: production I/O first; a copy of every write to the VDSA",
    "R2": "VDSA stages: hash and store once, transmit, analyse",
    "R3": "journal",
    "R3.1": "every write kept with sequence and time",
    "R3.2": "a checkpoint every few seconds",
    "R3.3": "checkpoints by hand, with a description",
    "R3.4": "cyclic: after the retention time the oldest makes room",
    "R4.1": "mirror moved forward at each checkpoint",
    "R4.2": "fail over to the latest",
    "R4.3": "roll back to an earlier checkpoint",
    "R5": "write-order fidelity over disks, servers and hosts",
    "R6": "many sites and hosts; managers that talk to each other",
    "R7": "mobility of servers and disks",
    "R8": "VPGs and targets",
    "R9": "both directions at once",
    "R10": "failover, move, failback, commit, rollback",
    "R11": "isolation of enterprises; encryption; mutual authentication",
    "R12": "four architectures",
    "R12.1": "a manager per enterprise, a VDSA per host",
    "R12.2": "a manager per enterprise, a VDSA per enterprise and host",
    "R12.3": "one manager, a VDSA per host, a connector per enterprise in the cloud",
    "R12.4": "the same with a paired connector at the enterprise: through NAT",
    "R13": "jurisdiction",
    "R13.1": "data centers by jurisdiction; an enterprise is kept from those that regulation forbids",
    "R13.2": "a VPG's territory restriction is checked when a target is chosen",
    "R13.3": "the same for failover, failback, tests, keys and operators",
    "R14": "recovery tests at many points in time",
    "R14.1": "any number of arbitrary times",
    "R14.2": "a stack per time, in parallel",
    "R14.3": "a read returns the disk's data at that time",
    "R14.4": "no copy of the disk",
    "R14.5": "writes in a log of that test alone, gone when it ends",
    "R14.6": "replication goes on during tests",
    "R14.7": "each test stops on its own, with a summary and a verdict",
    "R14.8": "old results discarded, oldest first",
    "R14.9": "several hosts may use one stack's disk",
    "R15": "screens",
    "R16": "site controller",
    "R17": "host controller",
    "R18": "protection-group controller",
    "R19": "command tracker",
    "R20": "log collector",
    "R21": "everything through the API",
    "Invariant 1": "production first",
    "Invariant 2": "nothing lost silently",
    "Invariant 3": "an object is written once; what can be seen can be read; a bad byte is an error",
    "Invariant 4": "one writer",
    "Invariant 5": "the bucket is enough",
    "Invariant 6": "fail closed",
    "Invariant 7": "a tenant is a wall",
    "Invariant 8": "a running test pins its history",
    "Invariant 9": "a failed test fails alone",
}
_NAMES: Final = re.compile(r"R\d+(?:\.\d+)?|invariants? \d(?:(?:,| and) \d)*", re.IGNORECASE)
HEAD: Final = """# Requirements and the tests that prove them

Made by `make docs` from the docstrings of the tests. A requirement without a test is not met yet.

| | requirement | tests |
|---|---|---|
"""


def proofs(tests: Path) -> dict[str, list[str]]:
    """Return for each requirement the tests that name it, as `file::test`."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test_"):
                continue
            head, colon, _ = (ast.get_docstring(node) or "").partition(":")
            if not colon or not _NAMES.match(head):
                continue
            for name in _NAMES.findall(head):
                digits = re.findall(r"\d", name)
                keys = [f"Invariant {d}" for d in digits] if name[0] in "iI" else [name]
                for key in keys:
                    if key not in REQUIREMENTS:
                        raise ValueError(f"{path.name}::{node.name} names {key}, which is no requirement")
                    found[key].append(f"{path.relative_to(tests.parent)}::{node.name}")
    return found


def page(root: Path) -> str:
    """Return docs/requirements.md as the tests have it now."""
    found = proofs(root / "tests")
    rows = [
        f"| {key} | {words} | {'<br>'.join(f'`{test}`' for test in found[key]) if key in found else '–'} |"
        for key, words in REQUIREMENTS.items()
    ]
    return HEAD + "\n".join(rows) + "\n"
