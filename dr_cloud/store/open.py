"""From a store's URL to a store that is ready: `open_store`.

    memory:                                               in this process, gone with it (tests)
    file:///var/lib/dr-cloud/store                        a local directory
    s3://bucket/prefix?endpoint=http://host:port&region=eu-central-1    S3 or what speaks it

Credentials for S3 are never in the URL: they come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and
AWS_SESSION_TOKEN), or from the machine's role.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from dr_cloud.model.errors import DrCloudError
from dr_cloud.store.local import LocalObjectStore
from dr_cloud.store.objects import open_memory, open_s3
from dr_cloud.store.retry import RetryingStore
from dr_cloud.store.store import Store, check_key

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORMS: Final = "Write memory:, file:///directory or s3://bucket/prefix?endpoint=http://host:port&region=name."


def open_store(url: str) -> Store:
    """Return the store at `url`, with retries. No request is made to S3 before it is used.

    Errors: `DrCloudError` for a URL that is none, `StoreUnavailableError` for a directory that cannot be made.
    """
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        options = {name: values[-1] for name, values in query.items()}
        addresses = (parts, urlsplit(options.get("endpoint", "")))
    except ValueError as error:
        raise _bad(url, str(error)) from error
    if any(address.username is not None or address.password is not None for address in addresses):
        # The URL itself is not repeated: it holds a secret.
        raise DrCloudError(
            "a store's URL must not hold credentials", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
        )
    if unknown := sorted(set(options) - ({"endpoint", "region"} if parts.scheme == "s3" else set())):
        raise _bad(url, f"unknown option {', '.join(unknown)}")
    if parts.fragment:
        raise _bad(url, "a '#' has no meaning here")
    if parts.scheme == "memory":
        if parts.netloc or parts.path.strip("/"):
            raise _bad(url, "a store in memory has no name")
        return RetryingStore(open_memory())
    if parts.scheme == "file":
        directory = Path(unquote(parts.path))
        if parts.netloc or not directory.is_absolute() or directory == Path("/"):
            raise _bad(url, "the directory must be absolute, with three slashes")
        return RetryingStore(LocalObjectStore(directory))
    if parts.scheme == "s3":
        return RetryingStore(_s3(url, parts.netloc, parts.path.strip("/"), options))
    raise _bad(url, f"unknown kind {parts.scheme!r}")


def _s3(url: str, bucket: str, prefix: str, options: dict[str, str]) -> Store:
    if not _BUCKET.fullmatch(bucket):
        raise _bad(url, f"{bucket!r} is not a bucket's name")
    if prefix:
        check_key(prefix)
    endpoint = options.get("endpoint", "").rstrip("/")
    if endpoint:
        address = urlsplit(endpoint)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise _bad(url, "the endpoint must be like http://host:port or https://host")
    return open_s3(f"s3://{bucket}/{prefix}".rstrip("/"), bucket, prefix, endpoint, options.get("region", ""))


def _bad(url: str, why: str) -> DrCloudError:
    return DrCloudError(f"{url!r} is not a store's URL: {why}", _FORMS)
