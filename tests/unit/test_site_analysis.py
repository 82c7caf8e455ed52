"""From an analyzer at a site to the report that the API shows."""

from __future__ import annotations

from pathlib import Path

from cloud_world import World

from dr_cloud.model.analysis import ServerAnalysis
from dr_cloud.model.journal import Disk
from dr_cloud.model.replication import HostReport, SeenServer, SiteReport
from dr_cloud.vdsa.analysis.analyzers import Analyzers


def test_what_an_analyzer_finds_is_shown(tmp_path: Path) -> None:
    """R2: the analyzer's report of a server is shown; of servers that nobody announced nothing is kept."""
    disk = Disk(index=0, name="root", size_bytes=1 << 30)
    analyzers = Analyzers()
    for name in ("web", "unknown"):
        analyzers.announce(name, [disk])
    world = World(tmp_path)
    try:
        world.populate()
        seen = SeenServer(name="web", host="h1", tap="00" * 16, connected=True, disks=[disk])
        analyses = [report for name in ("web", "unknown") if (report := analyzers.report(name)) is not None]
        host = HostReport(host="h1", vdsa="installed", servers=[seen])
        plain = SiteReport(revision=1, time_ns=world.clock(), version="1", hosts=[host])
        world.cloud.site_report("acme", "acme-hq", plain)
        world.cloud.site_report("acme", "acme-hq", plain.model_copy(update={"analyses": analyses}))
        world.cloud.site_report("acme", "acme-hq", plain)
        who = world.principal("acme")
        shown = world.cloud.server_report(who, "acme", "acme-hq", "web")
        assert shown.at_ns == world.clock()
        assert ServerAnalysis.model_validate(shown.analysis) == analyses[0]
        assert [server.name for server in world.cloud.servers(who, "acme", "acme-hq").items] == ["db", "web"]
    finally:
        world.close()
