"""The rights manager's service with the engine that the configuration names: for the process of its actor."""

from __future__ import annotations

from dr_cloud.actors.settings import ProviderSettings
from dr_cloud.rights.embedded import EmbeddedEngine
from dr_cloud.rights.service import RightsService


def open_service(settings: ProviderSettings) -> RightsService:
    """Return the service, with the provider's keys. Raises `DrCloudError` if the engine cannot be had."""
    return RightsService(settings.config.state, EmbeddedEngine())
