"""`dr-cloud provider rebuild` without its command line."""

from __future__ import annotations

from dr_cloud.actors.settings import registry_url
from dr_cloud.manager.db import migrate, open_engine
from dr_cloud.manager.registry import rebuild
from dr_cloud.manager.tenancy import Database
from dr_cloud.model.provider import ProviderConfig
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store


def rebuild_database(config: ProviderConfig) -> dict[str, int]:
    """Fill the provider's empty database from the registry in the store; see `dr_cloud.manager.registry.rebuild`."""
    engine = open_engine(config.database)
    try:
        migrate(engine)
        return rebuild(Database(engine), open_store(registry_url(config)), Keyring.open(config.state / "keyring.json"))
    finally:
        engine.dispose()
