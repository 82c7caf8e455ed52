"""R11: which role may call which operation, said here once more, apart from the manager's own table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_world import BODIES, OPEN, QUERIES, ApiWorld, api_world, filled, operations

PROVIDER_ADMIN, PROVIDER_OPERATOR, ADMIN, OPERATOR, AUDITOR = (
    "provider-admin",
    "provider-operator",
    "enterprise-admin",
    "enterprise-operator",
    "auditor",
)
ALL = {PROVIDER_ADMIN, PROVIDER_OPERATOR, ADMIN, OPERATOR, AUDITOR}
ADMINS = {PROVIDER_ADMIN, ADMIN}
OPERATORS = ALL - {AUDITOR}
TABLE: list[tuple[set[str], str]] = [
    (
        ALL,
        "enterprises enterprise sites site hosts servers server_report data_centers data_center health alerts events",
    ),
    (ALL, "vpgs vpg vpg_status vpg_state reverse_settings checkpoints writes inserted_checkpoint wait_checkpoint"),
    (ALL, "tests test test_artefact tasks task wait_task active_task active_task_at_site"),
    (OPERATORS, "pause resume force_sync insert_checkpoint failover commit_failover rollback_failover"),
    (OPERATORS, "start_tests find_clean test_credential stop_test discard_tests abort_task collect_logs log_archive"),
    (ADMINS | {AUDITOR}, "audit tokens"),
    (ADMINS, "create_token revoke_token update_site create_vpg update_vpg remove_vpg add_server remove_server"),
    (ADMINS, "release_failover"),
    (ADMINS, "unpair"),
    (ADMINS | {PROVIDER_OPERATOR}, "create_pairing deploy_vdsa undeploy_vdsa"),
    ({PROVIDER_ADMIN}, "register_enterprise update_enterprise remove_enterprise"),
    ({PROVIDER_ADMIN}, "deploy_center_vdsa undeploy_center_vdsa"),
    ({PROVIDER_ADMIN, PROVIDER_OPERATOR}, "center_hosts"),
    (ALL, "drills drill test_report tests_report"),
    (OPERATORS, "put_drill remove_drill run_drill"),
    (ALL, "rights_state rights_matrix explain"),
    (ADMINS | {AUDITOR}, "decisions verify_decisions"),
    ({PROVIDER_ADMIN, PROVIDER_OPERATOR}, "policies what_if rights_bundle"),
    ({PROVIDER_ADMIN}, "apply_policies"),
]
WHO = {operation: roles for roles, names in TABLE for operation in names.split()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiWorld]:
    with api_world(tmp_path_factory.mktemp("world")) as made:
        yield made


def test_every_operation_is_in_the_table() -> None:
    assert set(WHO) == set(operations()) - OPEN


@pytest.mark.parametrize("operation", sorted(set(WHO) - {"events"}))
def test_only_these_roles_may(world: ApiWorld, operation: str) -> None:
    """Aimed at things that are not there, so that nothing is changed: allowed means that they are looked for.

    Tokens and tasks are known by ids alone, so whose they are is known only where they exist.
    """
    method, path, _ = operations()[operation]
    names = {**world.names_a, **world.names_missing, "enterprise": "acme", "task": world.names_a["task"]}
    allowed = set()
    for role, client in world.by_role.items():
        names["token"] = world.spare_token()
        body = filled(BODIES.get(operation), names)
        response = client.request(method, path.format(**names) + QUERIES.get(operation, ""), json=body)
        assert response.status_code not in (401, 500, 503), response.text
        if response.status_code != 403:
            allowed.add(role)
        else:
            assert response.json()["remedy"].startswith("Ask ")
    assert allowed == WHO[operation]
