"""From the rows of VPGs to the orders of those who replicate them. Pure: rows in, records out.

A VPG is replicated while its servers are protected; one that is being removed, or whose servers run at the target for
good, is in nobody's orders. A paused one stays in them, with the reason, so that its taps go on by bitmap. A target
that policy has stopped is paused for its source, and its target has no orders: whoever served it lets go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from dr_cloud.manager import tables
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import SourceOrders, TargetOrders, Throttle
from dr_cloud.model.vpg import RECOVERED, VpgSettings, VpgStatus

AT_REST: Final = RECOVERED | {VpgStatus.REMOVE_IN_PROGRESS}


def replicates(vpg: tables.Vpg) -> bool:
    """Return whether the VPG is in anybody's orders."""
    return VpgStatus(vpg.status) not in AT_REST


def source_orders(vpg: tables.Vpg) -> list[SourceOrders]:
    """Return what the VPG's source is to do, one for each target."""
    if not replicates(vpg):
        return []
    settings = VpgSettings.model_validate(vpg.settings)
    members: dict[str, dict[str, int]] = {member.server: {} for member in vpg.members}
    for disk in vpg.disks:
        if disk.server in members:
            members[disk.server][disk.name] = disk.index
    return [
        SourceOrders(
            scope=Scope(vpg.enterprise, vpg.name, target.name),
            copy_number=target.copy_number,
            members=members,
            checkpoint_seconds=settings.checkpoint_seconds,
            order=settings.order,
            throttle=Throttle(bytes_per_second=settings.throttle_bytes_per_second),
            paused=vpg.paused or (f"policy denies it: {target.denied}" if target.denied else ""),
            sync_number=target.sync_number,
        )
        for target in vpg.targets
    ]


def target_orders(
    vpg: tables.Vpg, targets: Iterable[tables.VpgTarget], store_of: Callable[[tables.VpgTarget], str | None]
) -> list[TargetOrders]:
    """Return what a party is to be the target of; a target whose store is gone is left out."""
    if not replicates(vpg):
        return []
    return [
        TargetOrders(scope=Scope(vpg.enterprise, vpg.name, target.name), store=store)
        for target in targets
        if not target.denied and (store := store_of(target)) is not None
    ]
