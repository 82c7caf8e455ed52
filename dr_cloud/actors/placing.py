"""On which nodes actors may run that touch an enterprise's data: label selectors, made of decisions.

A selector names jurisdictions, and for what belongs to a data center that too: a node whose labels contradict each
other takes nothing. Ray places by it, also when it starts an actor again. Without a yes there is no selector.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from dr_cloud.model.errors import DeniedError
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.model.rights import Action, Place, Question
from dr_cloud.rights.rights import Rights

Labels = dict[str, str]
_PATIENCE_SECONDS: Final = 5.0
"""An engine may need that long to hear of an enterprise that was just registered."""
_PAUSE_SECONDS: Final = 0.2


def in_jurisdictions(jurisdictions: Sequence[str]) -> Labels:
    """Return the selector of nodes that lie in one of these."""
    return {"jurisdiction": f"in({', '.join(sorted(set(jurisdictions)))})"}


class Placing:
    """Asks the rights manager where."""

    def __init__(self, config: ProviderConfig, rights: Rights) -> None:
        """Place the actors of a provider."""
        self._config = config
        self._rights = rights

    def at_center(self, data_center: str) -> Labels:
        """Return the nodes for what no enterprise uses yet, or all do: the data center's own."""
        jurisdictions = [c.jurisdiction for c in self._config.data_centers if c.name == data_center]
        return {"data-center": data_center, **in_jurisdictions(jurisdictions)}

    def for_data(self, action: Action, enterprise: str, data_center: str) -> Labels:
        """Return the nodes of a data center where an enterprise's data may be used so. Raises `DeniedError`."""
        place = Place(kind="data center", name=data_center)
        (answer,) = self._rights.decide([Question(action=action, enterprise=enterprise, place=place)])
        if not answer.allow or not answer.jurisdictions:
            why = "; ".join(answer.reasons)
            raise DeniedError(
                f"nothing of {enterprise} may run in {data_center}: {why}",
                "Choose a data center that is open to it.",
                answer.reasons,
                answer.revision,
            )
        return {"data-center": data_center, **in_jurisdictions(answer.jurisdictions)}

    def for_door(self, enterprise: str, home: str, sites: Sequence[str]) -> Labels:
        """Return the nodes for an enterprise's door: at its home where that is open to its sites, else where it is.

        Where nothing is, or nobody answers, it is at home as well: no data comes to it then.

        Args:
            enterprise: Whose it is.
            home: The enterprise's own jurisdiction.
            sites: The names of its sites.
        """
        connects = [
            Question(action=Action.CONNECT, enterprise=enterprise, source=Place(kind="site", name=site))
            for site in sites
        ]
        deadline = time.monotonic() + _PATIENCE_SECONDS
        answers = self._rights.decide(connects)
        while not all(answer.answered for answer in answers) and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
            answers = self._rights.decide(connects)
        reach = {jurisdiction for answer in answers if answer.allow for jurisdiction in answer.jurisdictions}
        return in_jurisdictions([home] if home in reach or not reach else sorted(reach))
