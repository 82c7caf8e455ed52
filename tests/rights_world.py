"""A manager over a real rights manager, in a world where borders matter: for tests of what the manager enforces.

Between the USA and the UK data may go at first (`OPEN_LAW`); `world.law(LAW)` closes that. `us-west` has datastores
whose bytes lie in APAC, the key of `us-keys` is held there; nothing opens the USA to APAC. `acme` and `brit` are at
home in the USA, `isle` in Brazil, from where no data center can be reached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cloud_databases import BOTH
from cloud_world import CONFIG, World, settings

from dr_cloud.manager import tables
from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.manager.tenancy import EVERYONE
from dr_cloud.model.cloud import PageRequest, TokenRequest
from dr_cloud.model.decision import Decision, PolicyChange, PolicyRevision
from dr_cloud.model.ids import Scope
from dr_cloud.model.pairing import PairingToken, PairRequest
from dr_cloud.model.principal import Principal, Role
from dr_cloud.model.provider import DataCenterConfig, EnterpriseConfig, ProviderConfig, SiteConfig
from dr_cloud.model.rights import Regulation
from dr_cloud.model.vpg import VpgSettings
from dr_cloud.seal.identity import new_key_and_csr

UK = Scope("acme", "erp", "uk")
US = Scope("acme", "erp", "us")
BRITS = Scope("brit", "erp", "us")


def _center(name: str, **more: Any) -> DataCenterConfig:
    known = {"name": name, "jurisdiction": "USA", "hosts": [{"name": "h1", "datastores": ["ds-1"]}]}
    stores = {"datastores": [{"name": "ds-1", "store": f"file:///stores/{name}/ds-1"}]}
    return DataCenterConfig.model_validate({**known, **stores, **more})


FAR = {"name": "far", "store": "file:///stores/us-west/far", "jurisdiction": "APAC"}
NEAR = {"name": "near", "store": "file:///stores/us-west/near"}
BORDERS: ProviderConfig = CONFIG.model_copy(
    update={
        "data_centers": [
            _center(
                "us-east",
                datastores=[{"name": f"ds-{n}", "store": f"file:///stores/us-east/ds-{n}"} for n in (1, 2)],
                hosts=[{"name": f"h{n}", "datastores": ["ds-1", "ds-2"]} for n in (1, 2)],
                pools=[{"name": "gold", "datastores": ["ds-2"]}],
                clusters=[{"name": "compute", "hosts": ["h2"]}],
            ),
            *(center for center in CONFIG.data_centers if center.name == "uk-south"),
            _center(
                "us-west",
                datastores=[FAR, NEAR, {**FAR, "name": "abroad"}],
                hosts=[{"name": "h1", "datastores": ["far", "near", "abroad"]}],
                pools=[{"name": "mixed", "datastores": ["far", "near"]}],
            ),
            _center("us-keys", keys="APAC"),
            _center("apac-1", jurisdiction="APAC"),
        ]
    }
)


class RightsWorld(World):
    """See the module's docstring."""

    def __init__(self, folder: Path, url: str = "", **more: Any) -> None:
        super().__init__(folder, url, **{"config": BORDERS, **more})

    def populate(self) -> None:
        super().populate()
        self.register("isle", "BR")

    def register(self, name: str, jurisdiction: str = "USA") -> None:
        """Register an enterprise, whose site reports."""
        site = SiteConfig(name=f"{name}-hq", jurisdiction=jurisdiction)
        config = EnterpriseConfig(name=name, jurisdiction=jurisdiction, sites=[site])
        self.cloud.register_enterprise(SYSTEM, config)
        self.report(name)

    def law(self, regulation: Regulation) -> PolicyRevision:
        """Put another regulation in force."""
        return self.cloud.apply_policies(SYSTEM, PolicyChange(regulation=regulation))

    def person(self, enterprise: str | None, role: Role, place: str | None) -> Principal:
        """Return someone who sits somewhere."""
        request = TokenRequest(name=f"{role} in {place}", role=role, enterprise=enterprise, place=place)
        return self.cloud.authenticate(self.cloud.create_token(SYSTEM, request).secret)

    def two_targets(self, who: Principal) -> None:
        """Protect servers in the USA and in the UK; both have checkpoints."""
        self.protect(who, targets=[target("us", "us-east"), target("uk", "uk-south")])
        self.journal(US)
        self.journal(UK)

    def pair(self, enterprise: str, site: str) -> str:
        """Pair a site; return its certificate's serial."""
        token = PairingToken.decode(self.cloud.create_pairing(SYSTEM, enterprise, site).token)
        csr = new_key_and_csr()[1]
        request = PairRequest(enterprise=enterprise, site=site, secret=token.secret, csr=csr)
        return self.cloud.pair(request).serial

    def look(self) -> None:
        """Have what stands looked at, once."""
        self.cloud.standing.look()

    def decisions(self, enterprise: str | None = "acme") -> list[Decision]:
        """Return an enterprise's whole record."""
        return self.cloud.decisions(SYSTEM, enterprise, PageRequest(limit=1000)).items

    def written(self, act: Callable[[], Any], enterprise: str = "acme") -> list[Decision]:
        """Return the decisions that an act adds to an enterprise's record."""
        before = len(self.decisions(enterprise))
        act()
        return self.later(before, enterprise)

    def later(self, before: int, enterprise: str) -> list[Decision]:
        """Return the decisions after the first so many, but for those about what stands, which come by themselves."""
        return [decision for decision in self.decisions(enterprise)[before:] if decision.point != "standing"]

    def denied(self, scope: Scope) -> str:
        """Return why a target is stopped."""
        with self.cloud._database.read(EVERYONE) as session:
            return session.get_one(tables.VpgTarget, tuple(scope)).denied


def target(name: str, site: str, datastore: str = "ds-1") -> dict[str, str]:
    """Return a target in a data center."""
    return {"name": name, "site": site, "host": "h1", "datastore": datastore}


def to(site: str, datastore: str = "ds-1", name: str = "erp", **more: object) -> VpgSettings:
    """Return settings of a VPG with one target."""
    return settings(name, targets=[target("dr", site, datastore)], **more)


def on_both(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on PostgreSQL too; most differ in nothing that a database sees."""
    return pytest.mark.parametrize("world", BOTH, indirect=True)(test)


def until(condition: Callable[[], object], seconds: float) -> float:
    """Wait until something is so; return how many seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it does not come to pass"
        time.sleep(0.02)
    return time.monotonic() - began
