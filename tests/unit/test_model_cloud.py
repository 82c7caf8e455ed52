import itertools
from pathlib import Path

import pytest

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.provider import EnterpriseConfig, ProviderConfig, load_yaml
from dr_cloud.model.vpg import RECOVERED, TRANSITIONS, VpgEvent, VpgState, VpgStatus, next_status, state_of

ROOT = Path(__file__).resolve().parents[2]


def test_the_providers_example_has_the_four_data_centers_and_three_enterprises() -> None:
    """R13.1: two data centers in the USA, one in the UK, one in APAC; two of three enterprises have one owner."""
    provider = load_yaml(ROOT / "infra" / "local.yaml", ProviderConfig)
    assert sorted(center.jurisdiction for center in provider.data_centers) == ["APAC", "UK", "USA", "USA"]
    tenants = [load_yaml(path, EnterpriseConfig) for path in sorted((ROOT / "tenants").glob("*.yaml"))]
    assert [tenant.jurisdiction for tenant in tenants] == ["USA", "UK", "APAC"]
    assert len({tenant.owner for tenant in tenants}) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: p\n", "data_centers"),
        ("name: p\nunknown: 1\ndata_centers: []\n", "unknown|data_centers"),
        (": :\n  - [", "no YAML"),
        (
            "data_centers: [{name: a, jurisdiction: USA, datastores: [{name: d, store: 'file:///x'}],"
            " hosts: [{name: h, datastores: [e]}]}]",
            "h of a names e",
        ),
    ],
)
def test_a_bad_configuration_names_file_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(DrCloudError, match=complaint) as caught:
        load_yaml(path, ProviderConfig)
    assert str(path) in str(caught.value)
    assert caught.value.remedy


def test_every_status_is_reached_and_left_by_the_table_alone() -> None:
    """R18: the ten statuses, as one table; what is not in it is refused and says when it would be possible."""
    reached = {VpgStatus.PROTECTING, *TRANSITIONS.values()}
    assert reached == set(VpgStatus)
    assert {before for before, _ in TRANSITIONS} == set(VpgStatus) - {VpgStatus.REMOVE_IN_PROGRESS}
    for status, event in itertools.product(VpgStatus, VpgEvent):
        if (status, event) in TRANSITIONS:
            assert next_status(status, event) is TRANSITIONS[status, event]
        else:
            with pytest.raises(DrCloudError, match=status.value) as caught:
                next_status(status, event)
            assert caught.value.remedy


def test_state_is_recovered_only_after_a_commit() -> None:
    """R18: 0 protected, 1 recovered."""
    assert state_of(VpgStatus.FAILOVER) == VpgState.PROTECTED == 0
    assert {status for status in VpgStatus if state_of(status) == 1} == RECOVERED
