"""From a VPG's settings to its rows: places, copy numbers, disk indexes; and what is missing.

Disk indexes are given here and never again, in any VPG of that name: a disk that leaves and comes back is a new disk. A
server whose list of disks is empty has all that its tap tells; they are followed with every report. A copy number says
which of a tap's copies goes to a target, so it must be free on every server of the VPG.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.publish import Party
from dr_cloud.model.blocks import DISK_INDEX_MAX
from dr_cloud.model.errors import ConflictError, InvalidError, NotFoundError
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.model.units import SECOND_NS
from dr_cloud.model.vpg import TARGETS_MAX, TargetConfig, VpgSettings

GONE_NS: Final = 30 * SECOND_NS
"""A server that no tap has announced for so long is missing: shorter absences are restarts."""


Chooser = Callable[[TargetConfig], tuple[str, str]]
"""Finds the place of a target in a data center: (host, datastore)."""


def check_settings(session: Session, config: ProviderConfig, enterprise: str, settings: VpgSettings) -> None:
    """Raise `DrCloudError` if these settings can be no VPG's of `enterprise`."""
    _check_place(session, config, enterprise, settings.source_site)
    for target in settings.targets:
        _check_place(session, config, enterprise, target.site)
        if target.site == settings.source_site:
            raise InvalidError(f"target {target.name} is at the source itself", "Choose another site.")
        if config.data_center(target.site) is None:
            _check_site_place(session, enterprise, target)


def _check_place(session: Session, config: ProviderConfig, enterprise: str, site: str) -> None:
    if config.data_center(site) is None and session.get(tables.Site, (enterprise, site)) is None:
        raise NotFoundError(f"there is no site or data center {site!r}", "Check the name; list what there is.")


def _check_site_place(session: Session, enterprise: str, target: TargetConfig) -> None:
    site = session.get_one(tables.Site, (enterprise, target.site))
    if session.get(tables.Host, (enterprise, target.site, target.host)) is None:
        raise NotFoundError(f"site {target.site} has no host {target.host!r}", "Name one that the site has reported.")
    if target.datastore not in site.datastores:
        offered = ", ".join(site.datastores) or "none"
        raise NotFoundError(f"site {target.site} has no datastore {target.datastore!r}", f"Choose one of: {offered}.")


def apply(session: Session, config: ProviderConfig, vpg: tables.Vpg, settings: VpgSettings, choose: Chooser) -> None:
    """Make the rows of `vpg` those of `settings`, which have been checked. Raises `DrCloudError`."""
    vpg.settings = settings.model_dump(mode="json")
    vpg.source_site = settings.source_site
    vpg.source_in_center = config.data_center(settings.source_site) is not None
    _apply_members(vpg, settings)
    _apply_targets(vpg, config, settings, choose)
    session.flush()
    _give_copies(session, vpg)
    follow_disks(session, vpg, known_servers(session, vpg))


def _apply_members(vpg: tables.Vpg, settings: VpgSettings) -> None:
    have = {member.server: member for member in vpg.members}
    wanted = {server.name: server for server in settings.servers}
    for name in have.keys() - wanted.keys():
        vpg.members.remove(have[name])
    for name, server in wanted.items():
        member = have.get(name)
        if member is None:
            member = tables.VpgMember(enterprise=vpg.enterprise, server=name)
            vpg.members.append(member)
        member.site = settings.source_site
        member.all_disks = not server.disks


def _apply_targets(vpg: tables.Vpg, config: ProviderConfig, settings: VpgSettings, choose: Chooser) -> None:
    have = {target.name: target for target in vpg.targets}
    for name in have.keys() - {target.name for target in settings.targets}:
        vpg.targets.remove(have[name])
    for position, target in enumerate(settings.targets):
        row = have.get(target.name)
        if row is not None and (row.site, row.datastore) != (target.site, target.datastore):
            raise InvalidError(
                f"target {target.name} cannot be moved to another site or datastore: its journal lies where it is",
                "Add a target of another name, and remove this one when the new one has enough history.",
            )
        if row is None:
            row = tables.VpgTarget(enterprise=vpg.enterprise, name=target.name, copy_number=-1, host="")
            row.site, row.datastore, row.placed_datastore = target.site, target.datastore, target.datastore
            row.in_center = config.data_center(target.site) is not None
            row.taps = {}
            vpg.targets.append(row)
        row.position = position
        if row.host != target.host:
            if row.in_center:
                row.placed_host, datastore = choose(target)
                row.placed_datastore = row.placed_datastore if row.host else datastore
            else:
                row.placed_host = target.host
            row.host = target.host


def _give_copies(session: Session, vpg: tables.Vpg) -> None:
    """Give each target a number that is free on all servers of the VPG; one that is free stays as it is."""
    member, target = tables.VpgMember, tables.VpgTarget
    others = (
        select(target.copy_number)
        .join(member, (member.enterprise == target.enterprise) & (member.vpg == target.vpg))
        .where(
            tuple_(member.site, member.server).in_([(m.site, m.server) for m in vpg.members]),
            target.vpg != vpg.name,
        )
    )
    taken = set(session.scalars(others))
    for row in sorted(vpg.targets, key=lambda row: (row.copy_number < 0, row.position)):
        if row.copy_number in taken or row.copy_number < 0:
            free = sorted(set(range(TARGETS_MAX)) - taken)
            if not free:
                raise ConflictError(
                    f"a server of {vpg.name} is replicated to {TARGETS_MAX} targets already",
                    "A server can be in VPGs with three targets together: remove one.",
                )
            row.copy_number = free[0]
        taken.add(row.copy_number)


def known_servers(session: Session, vpg: tables.Vpg) -> dict[str, tables.Server]:
    """Return what taps have announced of the VPG's servers."""
    names = [member.server for member in vpg.members]
    wanted = select(tables.Server).where(
        tables.Server.enterprise == vpg.enterprise,
        tables.Server.site == vpg.source_site,
        tables.Server.name.in_(names),
    )
    return {server.name: server for server in session.scalars(wanted)}


def follow_disks(session: Session, vpg: tables.Vpg, servers: Mapping[str, tables.Server]) -> bool:
    """Give indexes to new disks, retire those that are gone, note sizes; return whether the orders change."""
    wanted = _wanted_disks(vpg, servers)
    held = select(tables.VpgDisk).where(
        tables.VpgDisk.enterprise == vpg.enterprise, tables.VpgDisk.vpg == vpg.name, ~tables.VpgDisk.removed
    )
    have = {(disk.server, disk.name): disk for disk in session.scalars(held)}
    changed = False
    for key in have.keys() - wanted.keys():
        have[key].removed = True
        changed = True
    for key, size_bytes in wanted.items():
        if (disk := have.get(key)) is not None and size_bytes and disk.size_bytes != size_bytes:
            disk.size_bytes = size_bytes
    if new := [key for key in wanted if key not in have]:
        changed = True
        greatest = session.scalar(
            select(func.max(tables.VpgDisk.index)).where(
                tables.VpgDisk.enterprise == vpg.enterprise, tables.VpgDisk.vpg == vpg.name
            )
        )
        first = 0 if greatest is None else greatest + 1
        if first + len(new) - 1 > DISK_INDEX_MAX:
            raise ConflictError(f"{vpg.name} has used up its disk indexes", "Protect the servers in a new VPG.")
        for index, (server, name) in enumerate(new, first):
            session.add(
                tables.VpgDisk(
                    enterprise=vpg.enterprise,
                    vpg=vpg.name,
                    index=index,
                    server=server,
                    name=name,
                    size_bytes=wanted[server, name],
                    removed=False,
                )
            )
    if changed:
        session.flush()
        session.expire(vpg, ["disks"])
    return changed


def _wanted_disks(vpg: tables.Vpg, servers: Mapping[str, tables.Server]) -> dict[tuple[str, str], int]:
    """Return (server, disk) → size in bytes (0 if it is not known), in a steady order."""
    named = {server.name: server.disks for server in VpgSettings.model_validate(vpg.settings).servers}
    wanted: dict[tuple[str, str], int] = {}
    for member in sorted(vpg.members, key=lambda member: member.server):
        server = servers.get(member.server)
        sizes = {name: size for name, size in server.disks} if server is not None else {}
        if member.all_disks and server is None:
            # Not seen (any more): what it had stays.
            wanted |= {(disk.server, disk.name): 0 for disk in vpg.disks if disk.server == member.server}
        names = sizes if member.all_disks else named.get(member.server, [])
        wanted |= {(member.server, name): sizes.get(name, 0) for name in names}
    return wanted


def missing_of(
    vpg: tables.Vpg,
    servers: Mapping[str, tables.Server],
    target_gone: Callable[[tables.VpgTarget], str],
    now_ns: int,
) -> str:
    """Return what of the VPG's configuration is missing, in words; empty if nothing is."""
    found = []
    for member in vpg.members:
        server = servers.get(member.server)
        if server is None:
            found.append(f"server {member.server} has not been seen at {vpg.source_site}")
        elif not server.connected and now_ns - server.last_seen_ns > GONE_NS:
            found.append(f"server {member.server} is gone from {vpg.source_site}")
    named = {server.name: server.disks for server in VpgSettings.model_validate(vpg.settings).servers}
    for name, disks in named.items():
        if disks and (server := servers.get(name)) is not None:
            lacking = set(disks) - {disk for disk, _ in server.disks}
            found += [f"server {name} has no disk {disk}" for disk in sorted(lacking)]
    found += [gone for target in vpg.targets if (gone := target_gone(target))]
    return "; ".join(found)


def parties_of(vpg: tables.Vpg) -> list[Party]:
    """Return who follows orders about this VPG."""
    return [source_party(vpg), *(target_party(target) for target in vpg.targets)]


def source_party(vpg: tables.Vpg) -> Party:
    """Return who is the VPG's source."""
    if vpg.source_in_center:
        return Party("host", vpg.source_site, vpg.source_host)
    return Party("site", vpg.enterprise, vpg.source_site)


def target_party(target: tables.VpgTarget) -> Party:
    """Return who is one of its targets."""
    if target.in_center:
        return Party("host", target.site, target.placed_host)
    return Party("site", target.enterprise, target.site)


def only_target(vpg: tables.Vpg, name: str | None) -> tables.VpgTarget:
    """Return the target of that name, or the only one. Raises `DrCloudError`."""
    names: Sequence[str] = [target.name for target in vpg.targets]
    if name is None and len(names) > 1:
        raise InvalidError(f"{vpg.name} has several targets", f"Name one of: {', '.join(names)}.")
    found = next((target for target in vpg.targets if name in (None, target.name)), None)
    if found is None:
        raise NotFoundError(f"{vpg.name} has no target {name!r}", f"Choose one of: {', '.join(names)}.")
    return found
