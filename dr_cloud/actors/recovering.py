"""The part of the fabric that recovers servers, by their actors' names (`dr_cloud.actors.recovered`)."""

from __future__ import annotations

import contextlib
from typing import Any

import ray

from dr_cloud.actors.cluster import START_SECONDS, UNHEARD_SECONDS, ask, ask_again
from dr_cloud.actors.placing import Labels
from dr_cloud.actors.recovered import Recovered, recovered_name
from dr_cloud.actors.settings import ProviderSettings
from dr_cloud.manager.fabric import ServedStack
from dr_cloud.model.cloud import Route
from dr_cloud.model.errors import UnavailableError
from dr_cloud.model.journal import ImagePlan
from dr_cloud.recovery.servers import RecoveredProgress, RecoveredRecord


class RecoveredActors:
    """Finds and starts them."""

    def __init__(self, settings: ProviderSettings) -> None:
        self._settings = settings
        self._placement = settings.placement

    def start(self, route: Route, failover: str, plan: ImagePlan | None, labels: Labels) -> ServedStack:
        """Have servers served; see `Fabric.recover`.

        Args:
            route: The scope and where its journal is.
            failover: The id of the failover.
            plan: What their disks begin as; None: they were there before.
            labels: On which nodes they may be.
        """
        record = RecoveredRecord(failover=failover, store=route.store, plan=plan) if plan is not None else None
        node, enterprise = self._settings.node, route.scope.enterprise
        vdsa = node.taps_socket(route.site, route.host, enterprise)
        actor = Recovered.options(  # type: ignore[attr-defined]
            **self._placement.options(recovered_name(failover), labels)
        ).remote(node, failover, vdsa, record)
        served: ServedStack = ask_again(lambda: actor.opened.remote(), "the recovered servers", START_SECONDS)
        return served

    def progress(self, failover: str) -> RecoveredProgress | None:
        """Return how they stand; None if nobody serves them. Raises `UnavailableError` if that cannot be known now."""
        with contextlib.suppress(_GoneError):
            progress: RecoveredProgress = self._ask(failover, "progress")
            return progress
        return None

    def promote(self, failover: str) -> None:
        """Begin to make their disks their own."""
        try:
            self._ask(failover, "promote")
        except _GoneError:
            raise UnavailableError("the recovered servers are not served now", "They are started again.") from None

    def tell(self, failover: str, method: str, *arguments: str) -> None:
        """Pause or resume; those that are gone are left alone."""
        with contextlib.suppress(_GoneError):
            self._ask(failover, method, *arguments)

    def discard(self, failover: str) -> None:
        """End them with what they wrote; there must be an actor of them."""
        with contextlib.suppress(_GoneError):
            self._ask(failover, "discard")
        self._placement.end(recovered_name(failover))

    def _ask(self, failover: str, method: str, *arguments: str) -> Any:
        try:
            actor = self._placement.find(recovered_name(failover))
        except UnavailableError:
            raise _GoneError from None
        try:
            return ask(getattr(actor, method).remote(*arguments), "the recovered servers", UNHEARD_SECONDS)
        except UnavailableError as error:
            if isinstance(error.__cause__, ray.exceptions.ActorDiedError):
                raise _GoneError from None
            raise


class _GoneError(Exception):
    """Nobody serves them."""
