"""The policies' own tests, run by OPA itself."""

from __future__ import annotations

import json
import subprocess

import pytest

from dr_cloud.rights.regulation import POLICIES

pytestmark = pytest.mark.system
COVERAGE_MIN = 95.0


def run(opa, *arguments):
    return subprocess.run([opa, *arguments], capture_output=True, text=True, check=False, cwd=POLICIES.parent)


def test_the_policies_tests_pass_and_leave_little_out(require_tool):
    """R13: both sides of every rule; at least 95 % of every file."""
    opa = require_tool("opa")
    done = run(opa, "test", "policies")
    assert done.returncode == 0, done.stdout
    report = json.loads(run(opa, "test", "policies", "--coverage", "--format=json").stdout)
    policies = {path.name for path in POLICIES.glob("*.rego")}
    assert {name.split("/")[-1] for name in report["files"]} == policies
    assert {name: f["coverage"] for name, f in report["files"].items() if f["coverage"] < COVERAGE_MIN} == {}


def test_each_policy_has_its_tests():
    names = {path.name for path in POLICIES.glob("*.rego")}
    assert names == {n for name in names if not name.endswith("_test.rego") for n in (name, f"{name[:-5]}_test.rego")}


def test_the_policies_are_strict_and_in_form(require_tool):
    opa = require_tool("opa")
    checked = run(opa, "check", "--strict", "policies")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert run(opa, "fmt", "--list", "policies").stdout == ""
