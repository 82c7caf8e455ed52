"""Object stores over obstore: memory, S3 and everything that speaks S3.

Layout: a key is the object's path below the bucket's prefix; nothing is added.

Consistency: put-if-absent is the store's own (`If-None-Match: *` on S3). Some S3 servers
answer 409 to a put that meets another one still on its way, and obstore calls that "exists": so "exists" from S3 is
believed only once the object can be seen, and is a temporary failure until then.

Checks: S3 requests are signed with the hash of their body, so the server refuses one that was changed or cut on its
way; an answer must have the length that the store tells for the object.

Retries: none here, obstore's own are switched off. `StoreUnavailableError.temporary` tells what may be tried again:
a connection that failed, a time-out, an answer 408, 409, 425, 429 or 5xx. Any other refusal stays until somebody acts.

Crash recovery: nothing to do. S3 shows an object when its upload is complete.
"""

from __future__ import annotations

import builtins
import re
from typing import Final

import obstore
from obstore import exceptions
from obstore.store import MemoryStore, S3Store

from dr_cloud.model.errors import DrCloudError
from dr_cloud.store.errors import ObjectExistsError, ObjectMissingError, StoreUnavailableError
from dr_cloud.store.store import Data, check_key, check_prefix, check_range, parts_of

_TEMPORARY_STATUS: Final = frozenset({408, 409, 425, 429})
_DENIED_CODES: Final = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "XAdminUserNotFound"})
"""Some servers give these a status of their own: versitygw answers 404 XAdminUserNotFound to an unknown user."""
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_CREDENTIALS_REMEDY: Final = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, if any) to those of an account that may "
    "read, write, list and delete in this bucket, and check the region."
)


class ObstoreStore:
    """A `Store` over one of obstore's. `name` is the URL by which errors call it."""

    def __init__(self, inner: MemoryStore | S3Store, name: str) -> None:
        self._inner = inner
        self.name = name

    def put_new(self, key: str, data: Data) -> None:
        """See `Store.put_new`."""
        check_key(key)
        parts = parts_of(data)
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        try:
            obstore.put(self._inner, key, whole, mode="create", use_multipart=False)
        except exceptions.AlreadyExistsError as error:
            if not self._can_be_seen(key):
                raise StoreUnavailableError(f"{self.name}: {key} is being written by another") from error
            raise ObjectExistsError(f"{self.name}: object {key} exists already") from None
        except Exception as error:
            raise self._translate(error, key, putting=True) from error

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        check_key(key)
        try:
            result = obstore.get(self._inner, key)
            size = result.meta["size"]
            data = result.bytes().to_bytes()
        except Exception as error:
            raise self._translate(error, key) from error
        return self._checked(key, data, size)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Store.get_range`."""
        check_key(key)
        check_range(start, length)
        try:
            result = obstore.get(self._inner, key, options={"range": (start, start + length)})
            size = result.meta["size"]
            data = result.bytes().to_bytes()
        except Exception as error:
            # Past the end every store answers with an error of its own wording.
            if isinstance(error, exceptions.GenericError) and "range" in str(error).lower() and start >= self.size(key):
                return b""
            raise self._translate(error, key) from error
        return self._checked(key, data, min(length, size - start))

    def size(self, key: str) -> int:
        """See `Store.size`."""
        check_key(key)
        try:
            return obstore.head(self._inner, key)["size"]
        except FileNotFoundError:
            # The answer to HEAD has no body: a missing bucket or an unknown user may look like this too.
            return len(self.get(key))
        except Exception as error:
            raise self._translate(error, key) from error

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        check_key(key)
        try:
            obstore.delete(self._inner, key)
        except Exception as error:
            translated = self._translate(error, key)
            if not isinstance(translated, ObjectMissingError):
                raise translated from error

    def list(self, prefix: str, after: str = "") -> builtins.list[tuple[str, int]]:
        """See `Store.list`."""
        folder = check_prefix(prefix)
        try:
            pages = obstore.list(self._inner, folder or None, offset=after or None, chunk_size=1000)
            return sorted((meta["path"], meta["size"]) for page in pages for meta in page)
        except Exception as error:
            raise self._translate(error, prefix) from error

    def _can_be_seen(self, key: str) -> bool:
        try:
            self.size(key)
        except ObjectMissingError:
            return False
        return True

    def _checked(self, key: str, data: bytes, length: int) -> bytes:
        if len(data) != length:
            raise StoreUnavailableError(f"{self.name}: {length} bytes of {key} asked for, {len(data)} came")
        return data

    def _translate(self, error: Exception, key: str, putting: bool = False) -> DrCloudError:
        """Return the error for a caller: what happened, whether it may pass, what to do."""
        text = str(error)
        status = int(match[1]) if (match := _STATUS.search(text)) else 0
        code = match[1] if (match := _CODE.search(text)) else ""
        said = match[1] if (match := _MESSAGE.search(text)) else text.split("\n", 1)[0]
        where = f"{self.name}: {key}: " if key else f"{self.name}: "
        if code == "NoSuchBucket" or (putting and status == 404 and not code):
            return StoreUnavailableError(
                f"{self.name}: no such bucket", "Create the bucket, or correct its name in the store's URL.", False
            )
        denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
        if denied or status in (401, 403) or code in _DENIED_CODES:
            remedy = _CREDENTIALS_REMEDY if status else "Give this user the right to read and write there."
            return StoreUnavailableError(f"{where}access denied: {code or said}", remedy, False)
        # "Missing" is an answer that callers act on, so nothing else that is a 404 may pass for it.
        if isinstance(error, FileNotFoundError) and not putting and code in ("", "NoSuchKey"):
            return ObjectMissingError(f"{self.name}: no object {key}")
        if "169.254.169.254" in text:
            return StoreUnavailableError(f"{where}no credentials were found", _CREDENTIALS_REMEDY)
        temporary = not 400 <= status < 500 or status in _TEMPORARY_STATUS
        remedy = "Check that the store's endpoint is right and can be reached." if not status else ""
        return StoreUnavailableError(f"{where}{code} {said}" if code else where + said, remedy, temporary)


def open_memory() -> ObstoreStore:
    """Return a new, empty store in this process's memory."""
    return ObstoreStore(MemoryStore(), "memory")


def open_s3(name: str, bucket: str, prefix: str, endpoint: str, region: str) -> ObstoreStore:
    """Return the store in an S3 bucket, below `prefix`. Credentials come from the environment.

    `endpoint` and `region` may be empty: AWS and the environment's then. No request is made.
    """
    options: dict[str, str] = {}
    if endpoint:
        options["endpoint"] = endpoint
    if region:
        options["region"] = region
    store = S3Store(
        bucket,
        prefix=prefix or None,
        config=options,  # type: ignore[arg-type]
        client_options={"allow_http": endpoint.startswith("http:"), "connect_timeout": "5s", "timeout": "120s"},
        retry_config={"max_retries": 0},
    )
    return ObstoreStore(store, name)
