"""How a VPG is shown."""

from __future__ import annotations

from sqlalchemy.orm import Session

from dr_cloud.manager import tables
from dr_cloud.manager.health import history_seconds, lag_now, promised_seconds
from dr_cloud.model.cloud import Vpg, VpgDisk, VpgTarget
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.model.vpg import VpgSettings, VpgStatus, state_of


def vpg_view(row: tables.Vpg, now_ns: int, *, to_provider: bool) -> Vpg:
    """Return a VPG; where its replicas were put is shown to the provider's own people only."""
    settings = VpgSettings.model_validate(row.settings)
    status = VpgStatus(row.status)
    return Vpg(
        enterprise=row.enterprise,
        name=row.name,
        settings=settings,
        status=status,
        state=state_of(status),
        paused=row.paused,
        problem=row.problem,
        created_ns=row.created_ns,
        last_passed_test_ns=row.last_passed_test_ns,
        targets=[_target(target, settings, now_ns, to_provider) for target in row.targets],
        disks=[VpgDisk(server=d.server, name=d.name, index=d.index, size_bytes=d.size_bytes) for d in row.disks],
    )


def _target(row: tables.VpgTarget, settings: VpgSettings, now_ns: int, to_provider: bool) -> VpgTarget:
    shown = to_provider and row.in_center
    return VpgTarget(
        name=row.name,
        site=row.site,
        host=row.host,
        datastore=row.datastore,
        placed_host=row.placed_host if shown else None,
        placed_datastore=row.placed_datastore if shown else None,
        linked=bool(row.linked),
        denied=row.denied or "",
        problem=row.problem or row.target_problem or "",
        lag_seconds=lag_now(row.lag_seconds, row.reported_ns or 0, now_ns),
        lag_bytes=row.lag_bytes or 0,
        newest_ns=row.newest_ns,
        horizon_ns=row.horizon_ns,
        journal_bytes=row.journal_bytes or 0,
        history_seconds=history_seconds(row.newest_ns, row.horizon_ns),
        history_promised_seconds=promised_seconds(settings.history_hours),
        history_forecast_seconds=row.forecast_seconds,
        servers={str(name): str(state) for name, state in (row.taps or {}).items()},
        checkpoints=row.checkpoints or 0,
        skipped=row.skipped or 0,
        resyncs=row.resyncs or 0,
    )


def target_gone(session: Session, config: ProviderConfig, target: tables.VpgTarget) -> str:
    """Return what of a target's place is gone, in words; empty if all is there."""
    if target.in_center:
        center = config.data_center(target.site)
        if center is None:
            return f"data center {target.site} is gone"
        if target.placed_host not in {host.name for host in center.hosts}:
            return f"host {target.host} is gone from {target.site}"
        if target.placed_datastore not in {store.name for store in center.datastores}:
            return f"datastore {target.datastore} is gone from {target.site}"
        return ""
    host = session.get(tables.Host, (target.enterprise, target.site, target.placed_host))
    if host is None or not host.present:
        return f"host {target.host} is gone from {target.site}"
    site = session.get(tables.Site, (target.enterprise, target.site))
    if site is None or target.placed_datastore not in site.datastores:
        return f"datastore {target.datastore} is gone from {target.site}"
    return ""
