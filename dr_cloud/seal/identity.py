"""Who a site or a service is: its key, its certificate, and what TLS makes of them.

Purpose
    Both ends of every connection between sites prove who they are with certificates of the provider's CA
    (`dr_cloud.seal.authority`). A certificate carries exactly one URI, which says whose it is::

        dr-cloud://<provider>/enterprise/<enterprise>/site/<site>      an enterprise's site
        dr-cloud://<provider>/service/<name>                           the provider's own: connector, VDSA, API

Layout
    `Credentials` are kept as three PEM files in one folder: `key.pem` (mode 0600), `cert.pem`, `ca-cert.pem`.

Consistency
    The key's file is written first and each file is replaced whole. After a crash in between, key and certificate may
    not match; `load` says so, and the owner pairs or enrols again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import ssl
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import check_name
from dr_cloud.model.units import SECOND_NS

_SCHEME: Final = "dr-cloud://"


class Peer(NamedTuple):
    """Who a certificate speaks for: an enterprise's site, or a service of the provider."""

    provider: str
    enterprise: str | None
    site: str | None
    service: str | None
    serial: str = ""
    """Hexadecimal; empty while there is no certificate."""
    expires_ns: int = 0

    @property
    def uri(self) -> str:
        """The URI that a certificate of this peer carries."""
        if self.service is not None:
            return f"{_SCHEME}{self.provider}/service/{self.service}"
        return f"{_SCHEME}{self.provider}/enterprise/{self.enterprise}/site/{self.site}"

    @classmethod
    def of_site(cls, provider: str, enterprise: str, site: str) -> Peer:
        """Return the peer that an enterprise's site is."""
        names = ((provider, "provider"), (enterprise, "enterprise"), (site, "site"))
        for name, what in names:
            check_name(name, what)
        return cls(provider, enterprise, site, None)

    @classmethod
    def of_service(cls, provider: str, service: str) -> Peer:
        """Return the peer that a service of the provider is."""
        return cls(check_name(provider, "provider"), None, None, check_name(service, "service"))

    @classmethod
    def of_certificate(cls, der: bytes) -> Peer:
        """Return whose certificate it is. It must have been verified. Raises `DrCloudError` if it names nobody."""
        try:
            certificate = x509.load_der_x509_certificate(der)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        except (ValueError, x509.ExtensionNotFound):
            uris = []
        match uris[0].removeprefix(_SCHEME).split("/") if len(uris) == 1 and uris[0].startswith(_SCHEME) else []:
            case [provider, "enterprise", enterprise, "site", site]:
                peer = cls.of_site(provider, enterprise, site)
            case [provider, "service", service]:
                peer = cls.of_service(provider, service)
            case _:
                raise DrCloudError("the certificate names no site and no service", "Pair the site with the provider.")
        return peer._replace(
            serial=format(certificate.serial_number, "x"), expires_ns=_ns(certificate.not_valid_after_utc)
        )


def new_key_and_csr() -> tuple[str, str]:
    """Make a key (EC P-256) and a signing request for it, both PEM. The authority alone decides what it will say."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return key_pem(key), csr.public_bytes(serialization.Encoding.PEM).decode()


def key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a private key as PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def fingerprint(certificate_pem: str) -> str:
    """Return the SHA-256 of a certificate (DER), 64 hexadecimal digits. Raises `DrCloudError` if it is no PEM."""
    return _certificate(certificate_pem).fingerprint(hashes.SHA256()).hex()


class Credentials:
    """A key, its certificate, and the CA that both ends trust. The key is in no representation."""

    def __init__(self, key: str, certificate: str, ca: str) -> None:
        """Take PEM texts. Raises `DrCloudError` unless they belong together."""
        own = _certificate(certificate)
        try:
            public = serialization.load_pem_private_key(key.encode(), None).public_key()
        except (ValueError, TypeError):
            raise DrCloudError("the private key cannot be read", "Pair the site anew.") from None
        if public != own.public_key():
            raise DrCloudError("the private key is not the certificate's", "Pair the site anew.")
        try:
            own.verify_directly_issued_by(_certificate(ca))
        except Exception:  # ValueError, TypeError or InvalidSignature: all mean the same here.
            raise DrCloudError("the certificate is not of this CA", "Pair the site anew.") from None
        self.key = key
        self.certificate = certificate
        self.ca = ca
        self.peer = Peer.of_certificate(own.public_bytes(serialization.Encoding.DER))
        self.begins_ns = _ns(own.not_valid_before_utc)

    def __repr__(self) -> str:
        return f"Credentials({self.peer.uri}, serial {self.peer.serial})"

    @property
    def renew_at_ns(self) -> int:
        """When a third of the certificate's life is left."""
        return self.peer.expires_ns - (self.peer.expires_ns - self.begins_ns) // 3

    def save(self, folder: Path) -> None:
        """Keep them in `folder`. Raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(folder / "key.pem", self.key, 0o600)
        replace_file(folder / "cert.pem", self.certificate, 0o644)
        replace_file(folder / "ca-cert.pem", self.ca, 0o644)

    @classmethod
    def load(cls, folder: Path) -> Credentials:
        """Return what `save` kept. Raises `DrCloudError`, or `FileNotFoundError` if there is nothing."""
        if (folder / "key.pem").stat().st_mode & 0o077:
            raise DrCloudError(f"{folder / 'key.pem'} can be read by others", f"Run: chmod 600 {folder / 'key.pem'}")
        return cls(*((folder / name).read_text() for name in ("key.pem", "cert.pem", "ca-cert.pem")))

    def server_context(self, *, clients: bool = True) -> ssl.SSLContext:
        """Return a server's context: TLS 1.3 only. The CA's certificate is sent along, for peers that look it up.

        Args:
            clients: Ask for a client certificate of the same CA, and refuse who has none. Off for the REST API alone.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if clients:
            context.verify_mode = ssl.CERT_REQUIRED
        return self._prepared(context)

    def client_context(self) -> ssl.SSLContext:
        """Return a client's context: TLS 1.3 only, the server must be vouched for by the CA, by the name dialled."""
        return self._prepared(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _prepared(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self.ca)
        # The ssl module takes keys from files only. This one has no name and never touches a disk.
        fd = os.memfd_create("credentials", os.MFD_CLOEXEC)
        with open(fd, "w") as file:
            file.write(self.key + self.certificate + self.ca)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{fd}")
        return context


def trust_context(ca: str) -> ssl.SSLContext:
    """Return the context of a client that has no certificate: TLS 1.3 only, servers of the CA `ca` (PEM) alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca)
    return context


def check_site(peer: Peer, provider: str, enterprise: str, revoked: Callable[[str], bool]) -> None:
    """Refuse whoever is no site of this provider's `enterprise`, or has a certificate that is revoked.

    TLS has checked the chain and the time; this is what TLS cannot know. The answer never tells of other enterprises.

    Raises:
        DrCloudError: It is refused.
    """
    if peer.provider != provider or peer.enterprise != enterprise or peer.site is None:
        raise DrCloudError("this certificate opens nothing here", "Dial the address that came with the pairing.")
    if revoked(peer.serial):
        raise DrCloudError("the certificate is revoked", "Pair the site anew.")


def replace_file(path: Path, text: str, mode: int) -> None:
    """Put `text` in the place of `path`, so that a crash leaves the old or the new file. Raises `OSError`."""
    # A name of its own: two processes may do this at the same time.
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    with _folder(path.parent) as folder:
        os.fsync(folder)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _certificate(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError:
        raise DrCloudError("a certificate cannot be read", "It must be PEM.") from None


def _ns(moment: datetime) -> int:
    return int(moment.timestamp()) * SECOND_NS
