"""What can go wrong with an object store, in three classes that a caller can act on."""

from __future__ import annotations

from dr_cloud.model.errors import DrCloudError


class ObjectMissingError(DrCloudError):
    """No object has this key. It is an answer, not a failure: it is never retried."""


class ObjectExistsError(DrCloudError):
    """An object with this key is there already. It is an answer, not a failure: it is never retried."""


class StoreUnavailableError(DrCloudError):
    """The store did not do what it was asked. Whether a put took effect is not known.

    Attributes:
        temporary: Asking again may help (a cut connection, an overloaded server). If false it will not before
            somebody acts on the remedy (wrong credentials, no such bucket, a full disk).
    """

    def __init__(self, message: str, remedy: str = "", temporary: bool = True) -> None:
        super().__init__(message, remedy)
        self.temporary = temporary

    def __reduce__(self) -> tuple[type, tuple[str, str, bool]]:
        return type(self), (str(self.args[0]), self.remedy, self.temporary)
