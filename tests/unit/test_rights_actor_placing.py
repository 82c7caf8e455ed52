"""Where actors may run that touch an enterprise's data: selectors, made of decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from ray._private.label_utils import validate_label_selector_value

from dr_cloud.actors.placing import Placing
from dr_cloud.actors.settings import load_provider
from dr_cloud.model.errors import DeniedError
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.model.rights import Action, Answer, Facts, PolicySources, Question, RightsState
from dr_cloud.rights.rights import GrantRequest

CONFIG = ProviderConfig.model_validate(
    {
        "data_centers": [
            {
                "name": name,
                "jurisdiction": jurisdiction,
                "datastores": [{"name": "ds", "store": f"file:///{name}"}],
                "hosts": [{"name": "h", "datastores": ["ds"]}],
            }
            for name, jurisdiction in (("us-east", "USA"), ("eu-west", "EU-FR"))
        ]
    }
)


class Judge:
    """A rights manager that answers as it is told, and notes what it is asked."""

    def __init__(self, answer: Callable[[Question], Answer]) -> None:
        self.answer = answer
        self.asked: list[Question] = []

    def decide(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        return [self.answer(question) for question in questions]

    def grant(self, requests: Sequence[GrantRequest]) -> list[tuple[Answer, str]]:
        raise NotImplementedError

    def state(self) -> RightsState:
        raise NotImplementedError

    def put_facts(self, facts: Facts) -> str:
        raise NotImplementedError

    def put_sources(self, sources: PolicySources) -> str:
        raise NotImplementedError

    def what_if(self, sources: PolicySources, questions: Sequence[Question]) -> list[Answer]:
        raise NotImplementedError

    def bundle(self) -> tuple[str, bytes]:
        raise NotImplementedError


def placing(*jurisdictions: str, allow: bool = True, revision: str = "r") -> Placing:
    answer = Answer(allow=allow, reasons=["because"], revision=revision, jurisdictions=list(jurisdictions))
    return Placing(CONFIG, Judge(lambda question: answer))


def test_a_data_centers_own_nodes_are_named_by_both_labels() -> None:
    """R13.1: a node that claims the data center from another jurisdiction is none of it."""
    labels = placing().at_center("us-east")
    assert labels == {"data-center": "us-east", "jurisdiction": "in(USA)"}
    validate_label_selector_value(labels["jurisdiction"])


def test_data_is_placed_by_the_answer_and_by_nothing_without_one() -> None:
    """R13.1: where the answer says; a no, no answer and a yes that names no place select nothing."""
    assert placing("USA").for_data(Action.TEST, "acme", "us-east") == placing().at_center("us-east")
    for closed in (placing("USA", allow=False), placing("USA", allow=False, revision=""), placing()):
        with pytest.raises(DeniedError, match="because"):
            closed.for_data(Action.TEST, "acme", "us-east")


@pytest.mark.parametrize(
    ("reach", "selector"),
    [
        (["USA", "UK"], "in(USA)"),
        (["UK", "EU-FR"], "in(EU-FR, UK)"),
        ([], "in(USA)"),
    ],
)
def test_a_door_stands_at_home_or_where_its_sites_may_send(reach: list[str], selector: str) -> None:
    labels = placing(*reach).for_door("acme", "USA", ["chicago"])
    assert labels == {"jurisdiction": selector}
    validate_label_selector_value(selector)


def test_a_door_of_which_nobody_decides_stands_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dr_cloud.actors.placing._PATIENCE_SECONDS", 0.0)
    assert placing("UK", allow=False, revision="").for_door("acme", "USA", ["chicago"]) == {"jurisdiction": "in(USA)"}


def test_the_configurations_policies_lie_beside_it(tmp_path: Path) -> None:
    """Their path counts from the configuration's own folder, as every other."""
    document = {**CONFIG.model_dump(mode="json", exclude_none=True), "rights": {"policies": "rules"}}
    path = tmp_path / "provider.yaml"
    path.write_text(yaml.safe_dump(document))
    assert load_provider(path).rights.policies == tmp_path / "rules"
