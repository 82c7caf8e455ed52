"""`dr-cloud rights`: where data may go, policies and what a change of them would do, the record of decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, check_new, command, write_new
from dr_cloud.model.decision import PolicyChange
from dr_cloud.model.errors import DamagedError, InvalidError
from dr_cloud.rights.regulation import load_policies, load_regulation

app = group("Where data may go, and who has decided so.")
audit = group("The record of decisions.")
app.add_typer(audit, name="audit")
Folder = Annotated[
    Path | None,
    typer.Option("--policies", help="A folder with *.rego and regulation.yaml, in place of what is."),
]
Data = Annotated[Path | None, typer.Option("--data", help="Another regulation (YAML).")]


def _change(policies: Path | None, data: Path | None) -> PolicyChange:
    if policies is None and data is None:
        raise InvalidError("no change is given", "Give --policies DIR, --data FILE, or both.")
    sources = load_policies(policies) if policies is not None else None
    regulation = load_regulation(data) if data is not None else sources.regulation if sources is not None else None
    return PolicyChange(modules=sources.modules if sources is not None else None, regulation=regulation)


@command(app, "show")
def show(call: Call) -> None:
    """Show how the rights manager stands."""
    call.out.record(call.client.rights_state())


@command(app, "matrix")
def matrix(call: Call) -> None:
    """Print which enterprise's data may come to which data center. From some of its sites only: some."""
    found = call.client.rights_matrix()
    centers = [place.data_center for place in found[0].data_centers] if found else []
    rows = []
    for rights in found:
        sites = max((len(place.sources) for place in rights.data_centers), default=0)
        words = ["some" if 0 < len(p.sources) < sites else "yes" if p.open else "no" for p in rights.data_centers]
        rows.append([rights.enterprise, rights.jurisdiction, *words])
    call.out.table(found, ["enterprise", "jurisdiction", *centers], rows)


@command(app, "explain")
def explain(
    call: Call, enterprise: Annotated[str, typer.Argument(help="The enterprise; the token's own if not given.")] = ""
) -> None:
    """Tell which data centers are open to an enterprise, and why each other is not."""
    found = call.client.explain(enterprise)
    rows = [
        [place.data_center, place.jurisdiction, ", ".join(place.sources) or "closed", "; ".join(place.reasons)]
        for place in found.data_centers
    ]
    call.out.table(found, ["data center", "jurisdiction", "open to", "why"], rows)


@command(app, "what-if")
def what_if(call: Call, policies: Folder = None, data: Data = None) -> None:
    """List the groups, links and tests that a change would stop or free. Nothing is changed."""
    found = call.client.what_if(_change(policies, data))
    rows = [
        [one.enterprise, one.kind, one.subject, "freed" if one.after else "stopped", "; ".join(one.reasons)]
        for one in found
    ]
    call.out.table(found, ["enterprise", "kind", "what", "then", "why"], rows)


@command(app, "apply")
def apply(call: Call, policies: Folder = None, data: Data = None) -> None:
    """Put other policies, another regulation, or both in force."""
    made = call.client.apply_policies(_change(policies, data))
    call.out.said(made, f"policies {made.number} are in force, as revision {made.revision}")


@command(app, "policies")
def policies(call: Call) -> None:
    """List the policies that were put in force, newest first; with --json also what they are."""
    call.out.rows(call.client.policies(), "number at_ns by revision")


@command(app, "bundle")
def bundle(call: Call, out: Annotated[Path, typer.Option("--out", "-o", help="Write it to this new file.")]) -> None:
    """Download the newest signed bundle, for an OPA server of one's own."""
    check_new(out)
    revision, data = call.client.rights_bundle()
    write_new(out, data)
    call.out.said({"revision": revision, "file": str(out), "bytes": len(data)}, f"bundle {revision} is in {out}")


@command(app, "decisions")
def decisions(call: Call) -> None:
    """List the record of decisions of the enterprise, or of the provider itself."""
    call.out.rows(call.client.decisions(), "number at_ns point action subject allow reasons revision")


@command(audit, "verify")
def verify(call: Call) -> None:
    """See that nothing of the record was changed, removed or cut off."""
    found = call.client.verify_decisions()
    if not found.whole:
        raise DamagedError(f"the record is not whole: {found.problem}", "Compare it with an earlier export.")
    call.out.said(found, f"{found.last} decisions, all whole; the last one is {found.hash}")


@command(audit, "export")
def export(call: Call, out: Annotated[Path, typer.Option("--out", "-o", help="Write it to this new file.")]) -> None:
    """Write the record to a file, one JSON document in each line, oldest first."""
    check_new(out)
    lines = [decision.model_dump_json() + "\n" for decision in call.client.decisions()]
    write_new(out, "".join(lines).encode())
    call.out.said({"decisions": len(lines), "file": str(out)}, f"{len(lines)} decisions are in {out}")
