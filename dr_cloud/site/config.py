"""The configuration file of `dr-cloud site up`, and what its relative paths mean: they count from the file's folder.

state: state                        # everything the site must keep; one folder for each site
token_file: pairing-token           # or `token: drp1.…`; used once, at the first start
proxy: http://proxy.example:3128    # only if there is no way out without it
hosts:
  - {name: h1, listen: unix:h1.sock}
  - {name: h2, listen: tls:10.0.0.5:9800, certificate: h2.pem, key: h2.key, ca: taps-ca.pem}
datastores:                         # only if VPGs from elsewhere are to be replicated here
  - {name: ds-1, store: file://ds-1}
"""

from __future__ import annotations

import os
import ssl
from collections import Counter
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote, unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.provider import DatastoreConfig, Name, load_yaml

_UNIX_PATH_BYTES_MAX: Final = 107


def _listen(address: str) -> str:
    scheme, _, rest = address.partition(":")
    host, _, port = rest.rpartition(":")
    if scheme == "unix" and rest:
        return address
    if scheme == "tls" and host and port.isdecimal() and 0 < int(port) < 1 << 16:
        return address
    raise ValueError(f"{address!r} is no address for taps: write unix:PATH or tls:HOST:PORT")


def _proxy(url: str) -> str:
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or (parts.username is None) != (parts.password is None)
    ):
        # It is not repeated: it may hold a password.
        raise ValueError("that is no proxy: write http://host:port or http://user:password@host:port")
    return url


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TapHost(_Config):
    """One host of the site, and where its taps find its VDSA."""

    name: Name
    listen: Annotated[str, AfterValidator(_listen)]
    """unix:PATH or tls:HOST:PORT."""
    certificate: Path | None = None
    """PEM, what taps see. Only with tls."""
    key: Path | None = None
    ca: Path | None = None
    """PEM: taps show a certificate of this authority."""

    @model_validator(mode="after")
    def _whole(self) -> TapHost:
        given = [self.certificate, self.key, self.ca]
        if self.listen.startswith("tls:") and None in given:
            raise ValueError(f"host {self.name}: tls needs certificate, key and ca")
        if self.listen.startswith("unix:") and any(given):
            raise ValueError(f"host {self.name}: certificate, key and ca have no meaning on a unix socket")
        return self

    def tls(self) -> ssl.SSLContext | None:
        """Return how taps are met over TLS 1.3, None on a unix socket. Raises `DrCloudError`."""
        if self.certificate is None or self.key is None or self.ca is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as error:
            raise DrCloudError(
                f"the certificate, key or CA of host {self.name} cannot be used: {error}", "Name three PEM files."
            ) from error
        return context


class SiteSettings(_Config):
    """The file as a whole."""

    state: Path
    token: str = Field(default="", repr=False)
    token_file: Path | None = None
    proxy: Annotated[str, AfterValidator(_proxy)] | None = Field(default=None, repr=False)
    hosts: list[TapHost] = Field(min_length=1)
    datastores: list[DatastoreConfig] = []

    @model_validator(mode="after")
    def _each_once(self) -> SiteSettings:
        for kind, names in (
            ("host", [host.name for host in self.hosts]),
            ("address", [host.listen for host in self.hosts]),
            ("datastore", [store.name for store in self.datastores]),
        ):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"{kind} {twice[0]} is named twice")
        if self.token and self.token_file:
            raise ValueError("give token or token_file, not both")
        return self

    def pairing_token(self) -> str:
        """Return the text of the token, empty if there is none. Raises `DrCloudError`."""
        if self.token_file is None:
            return self.token
        try:
            return self.token_file.read_text().strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise DrCloudError(
                f"{self.token_file} cannot be read: {type(error).__name__}", "Correct token_file."
            ) from error


def load_settings(path: Path) -> SiteSettings:
    """Return the settings in the file at `path`, every path in it absolute. Raises `DrCloudError`."""
    settings = load_yaml(path, SiteSettings)
    folder = path.resolve().parent

    def absolute(given: Path | None) -> Path | None:
        return None if given is None else folder / given.expanduser()

    hosts = [
        host.model_copy(
            update={
                "listen": _absolute_listen(folder, host),
                "certificate": absolute(host.certificate),
                "key": absolute(host.key),
                "ca": absolute(host.ca),
            }
        )
        for host in settings.hosts
    ]
    datastores = [
        store.model_copy(update={"store": absolute_store(folder, store.store)}) for store in settings.datastores
    ]
    changed = {
        "state": absolute(settings.state),
        "token_file": absolute(settings.token_file),
        "hosts": hosts,
        "datastores": datastores,
    }
    return settings.model_copy(update=changed)


def _absolute_listen(folder: Path, host: TapHost) -> str:
    scheme, _, rest = host.listen.partition(":")
    if scheme != "unix":
        return host.listen
    path = folder / Path(rest).expanduser()
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
        raise DrCloudError(
            f"host {host.name}: {path} is too long for a unix socket",
            f"Its path, from the root, may have {_UNIX_PATH_BYTES_MAX} bytes; write a shorter one, like unix:/run/x.",
        )
    return f"unix:{path}"


def absolute_store(folder: Path, url: str) -> str:
    """Return a store's URL with `file://a/b` (two slashes: relative) made absolute from `folder`."""
    parts = urlsplit(url)
    if parts.scheme != "file" or not parts.netloc:
        return url
    return f"file://{quote(str(folder / unquote(parts.netloc + parts.path)))}"
