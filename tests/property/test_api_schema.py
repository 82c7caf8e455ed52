"""The API keeps to its own OpenAPI document, whatever is sent: no 5xx, no answer that the document does not describe.

Schemathesis makes the requests, right ones and wrong ones. Each is sent twice: as it was made, and with its path aimed
at things that exist, so that more than "not found" is seen. The stream of events has no end and a test of its own.
The seed is hypothesis', printed when it fails; half of the calls are by a tenant, half by the provider.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import structlog
from api_world import ApiWorld, api_world, operations
from cloud_world import OPEN_LAW
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from dr_cloud.manager.cloud import SYSTEM
from dr_cloud.model.decision import PolicyChange

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    negative_data_rejection,
]
AIMED = [check for check in CHECKS if check is not negative_data_rejection]
NOTHING_ASKED = {"report_key"}
"""Takes nothing, not even a token: so nothing can be wrong."""
EXAMPLES = 5
_turns = itertools.count()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiWorld]:
    with api_world(tmp_path_factory.mktemp("world")) as made:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        yield made
        structlog.reset_defaults()


@pytest.fixture(scope="module")
def schema(world: ApiWorld) -> Any:
    # NUL is refused as a whole, which a schema can hardly say.
    project = ProjectConfig(generation=GenerationConfig(allow_x00=False))
    config = SchemathesisConfig(projects=ProjectsConfig(default=project))
    return schemathesis.openapi.from_asgi("/v1/openapi.json", world.app, config=config)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("operation", sorted(set(operations()) - {"events"}))
def test_the_api_keeps_to_its_document(world: ApiWorld, schema: Any, operation: str, mode: GenerationMode) -> None:
    """R21: no 5xx, no breach of the schema."""
    if mode is GenerationMode.NEGATIVE and operation in NOTHING_ASKED:
        return
    method, path, _ = operations()[operation]

    @settings(max_examples=EXAMPLES, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def keeps(case: schemathesis.Case) -> None:
        token = (world.token_a, world.tokens["provider-admin"])[next(_turns) % 2]
        headers = {"Authorization": f"Bearer {token}"}
        case.call_and_validate(headers=headers, checks=CHECKS)
        known = {name: world.names_a[name] for name in case.path_parameters or {} if name in world.names_a}
        if known:
            case.path_parameters = {**case.path_parameters, **known}
            if operation.startswith("wait_"):
                case.query = {"timeout_seconds": 0}
            case.call_and_validate(headers=headers, checks=AIMED)

    try:
        keeps()
    finally:
        if operation == "apply_policies":  # whatever is in force now: what follows is to find open doors
            world.cloud.apply_policies(SYSTEM, PolicyChange(regulation=OPEN_LAW))
