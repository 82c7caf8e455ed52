"""`files`: files are there, with the right content, size or age. One `path`, or a list of `expect` with several."""

from __future__ import annotations

import hashlib
import stat
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.units import format_time, parse_time
from dr_cloud.recovery.probes.bench import Bench
from dr_cloud.recovery.probes.errors import FailedError
from dr_cloud.recovery.probes.root import Root


class Expected(BaseModel):
    """What is expected of one file, or of all that a pattern matches."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = None
    """In the file system that is mounted, not in the machine's tree of mounts."""
    glob: str | None = None
    """A pattern of whole paths; `*` stands for slashes too. At least one file must match."""
    count_min: Annotated[int, Field(ge=1)] = 1
    """How many files the pattern must match, at least."""
    size: int | None = None
    """Exactly, in bytes."""
    size_min: int | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None
    newer_than: str | None = None
    """RFC 3339: the file, or the newest of the pattern's, was modified after this."""

    @field_validator("newer_than")
    @classmethod
    def _is_time(cls, text: str | None) -> str | None:
        try:
            return text if text is None or parse_time(text) >= 0 else None
        except DrCloudError as error:
            raise ValueError(f"{error}. {error.remedy}") from None

    @model_validator(mode="after")
    def _path_or_glob(self) -> Self:
        if self.path is not None and self.glob is not None:
            raise ValueError("give path or glob, not both")
        if self.glob is not None and self.sha256 is not None:
            raise ValueError("sha256 is of one file: give its path")
        return self


class FilesProbe(Expected):
    """Files are there, with the right hash, size or age."""

    partition: int | None = None
    """Where there are several file systems; 0 is a whole disk."""
    expect: list[Expected] = []

    @model_validator(mode="after")
    def _something(self) -> Self:
        if any(each.path is None and each.glob is None for each in self._all()):
            raise ValueError("say which files: path=… or glob=…")
        return self

    def _all(self) -> list[Expected]:
        own = self.path is not None or self.glob is not None or not self.expect
        return ([self] if own else []) + self.expect

    def run(self, bench: Bench) -> str:
        """Look at each; the first that is wrong is the reason."""
        volume = bench.the_volume(self.partition)
        root = Root(bench.mount(volume))
        for each in self._all():
            print(_check(root, each))
        return f"as expected: {', '.join(str(each.path or each.glob) for each in self._all())}"


def _check(root: Root, each: Expected) -> str:
    if each.glob is not None:
        found = [(path, info) for path, info in root.matching(each.glob) if stat.S_ISREG(info.st_mode)]
        if len(found) < each.count_min:
            raise FailedError(f"{len(found)} files match {each.glob}, at least {each.count_min} expected")
        for path, info in found:
            _check_size(path, info.st_size, each)
        path, info = max(found, key=lambda item: item[1].st_mtime_ns)
        what = f"{each.glob}: {len(found)} files, the newest is {path}"
    else:
        path = each.path or ""
        info = root.stat(path)
        _check_size(path, info.st_size, each)
        what = f"{path}: {info.st_size} bytes"
        if each.sha256 is not None:
            with root.open(path) as file:
                try:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                except OSError as error:
                    raise FailedError(f"{path} cannot be read: {error.strerror}") from error
            if digest != each.sha256.lower():
                raise FailedError(f"{path} has the SHA-256 {digest}, not {each.sha256.lower()}")
    if each.newer_than is not None and info.st_mtime_ns <= parse_time(each.newer_than):
        raise FailedError(f"{path} was last modified at {format_time(info.st_mtime_ns)}, not after {each.newer_than}")
    return f"{what}, modified at {format_time(info.st_mtime_ns)}"


def _check_size(path: str, size: int, each: Expected) -> None:
    if each.size is not None and size != each.size:
        raise FailedError(f"{path} has {size} bytes, not {each.size}")
    if each.size_min is not None and size < each.size_min:
        raise FailedError(f"{path} has {size} bytes, fewer than {each.size_min}")
