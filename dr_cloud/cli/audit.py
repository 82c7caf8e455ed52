"""`dr-cloud audit`: what was changed, or tried to be, and by whom."""

from __future__ import annotations

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, command

app = group("What was changed, or tried to be, and by whom.")


@command(app, "list")
def list_entries(call: Call) -> None:
    """List the audit log."""
    call.out.rows(call.client.audit(), "at_ns principal_name role enterprise operation subject outcome reason")
