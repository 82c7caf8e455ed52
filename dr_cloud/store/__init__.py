"""The object store: one interface over a local directory, memory and S3, and the layout of the keys in it."""

from __future__ import annotations

from dr_cloud.store.errors import ObjectExistsError, ObjectMissingError, StoreUnavailableError
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store

__all__ = ["ObjectExistsError", "ObjectMissingError", "Store", "StoreUnavailableError", "open_store"]
