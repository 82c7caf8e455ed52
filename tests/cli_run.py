"""The command, run in this process: what it prints and how it exits."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any, NamedTuple
from unittest.mock import patch

import structlog

from dr_cloud.cli.main import main


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one document on standard output."""
        return json.loads(self.stdout)


def run_cli(*arguments: str) -> Done:
    """Run `dr-cloud` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    logging = structlog.get_config()
    argv = patch.object(sys, "argv", ["dr-cloud", *arguments])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        finally:
            structlog.configure(**logging)
    return Done(code, out.getvalue(), err.getvalue())
