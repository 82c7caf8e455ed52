"""From rows to questions for the rights manager. Pure.

There is one way to ask about each thing: what is asked when it is created, when its frames flow and when it is judged
again is the same question, so that an answer can be remembered under it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dr_cloud.manager import tables
from dr_cloud.model.ids import Scope
from dr_cloud.model.principal import Principal
from dr_cloud.model.provider import DataCenterConfig
from dr_cloud.model.rights import Action, Operator, Place, Question


def place_of_source(vpg: tables.Vpg) -> Place:
    """Return where a VPG's servers run."""
    return Place(kind="data center" if vpg.source_in_center else "site", name=vpg.source_site)


def place_of_target(target: tables.VpgTarget) -> Place:
    """Return where a target's journal lies."""
    if target.in_center:
        return Place(kind="data center", name=target.site, datastore=target.placed_datastore)
    return Place(kind="site", name=target.site)


def about_target(
    vpg: tables.Vpg, target: tables.VpgTarget, actions: Sequence[Action], operator: Operator | None = None
) -> list[Question]:
    """Return a question for each action that is done with a target's data."""
    return [
        Question(
            action=action,
            enterprise=vpg.enterprise,
            source=place_of_source(vpg),
            place=place_of_target(target),
            operator=operator,
            vpg=vpg.name,
            target=target.name,
            territory=vpg.settings.get("territory", []),
        )
        for action in actions
    ]


def keeps(vpg: tables.Vpg, target: str, data_center: str, datastore: str) -> Question:
    """Return the question whether a VPG's data may be kept in a datastore that is not chosen yet."""
    return Question(
        action=Action.KEEP,
        enterprise=vpg.enterprise,
        source=place_of_source(vpg),
        place=Place(kind="data center", name=data_center, datastore=datastore),
        vpg=vpg.name,
        target=target,
        territory=vpg.settings.get("territory", []),
    )


HELD = (Action.REPLICATE, Action.KEEP)
"""What a target is for."""


def connects(enterprise: str, site: str) -> Question:
    """Return the question whether a site's connector may connect."""
    return Question(action=Action.CONNECT, enterprise=enterprise, source=Place(kind="site", name=site))


def operator_of(who: Principal) -> Operator | None:
    """Return the person who asks; None if it is none."""
    return None if who.place is None else Operator(role=who.role.value, jurisdiction=who.place)


def by_person(who: Principal, action: Action, enterprise: str, place: Place | None = None, vpg: str = "") -> Question:
    """Return the question whether a person may do something with an enterprise's data or protection."""
    return Question(action=action, enterprise=enterprise, place=place, operator=operator_of(who), vpg=vpg)


def elsewhere(question: Question, centers: Sequence[DataCenterConfig]) -> dict[str, list[list[Question]]]:
    """Return the same question about every data center: by its name, for each datastore, what must all be a yes."""
    actions = list(dict.fromkeys([question.action, *HELD]))
    return {
        center.name: [
            [
                question.model_copy(
                    update={
                        "action": action,
                        "place": Place(kind="data center", name=center.name, datastore=store.name),
                        "operator": None if action in HELD else question.operator,
                    }
                )
                for action in actions
            ]
            for store in center.datastores
        ]
        for center in centers
    }


def subject_of(scope: Scope | tuple[str, str, str]) -> str:
    """Return how a target is named in records and alerts."""
    return f"vpg/{scope[1]}/{scope[2]}"
