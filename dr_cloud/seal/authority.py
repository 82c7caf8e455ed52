"""The provider's certificate authority.

Purpose
    It alone says who a certificate speaks for. From a signing request only the public key is taken; names, uses and
    life are given here. A site's certificate can only dial; a service's can also listen.

Layout
    One file, `authority.pem` (mode 0600), with the CA's key (EC P-256) and certificate; `ca-cert.pem` beside it holds
    the certificate alone, for those who are to trust it.

Consistency
    The file appears whole or not at all. Of two processes that create it at the same time, one wins and both use it.

Crash recovery
    There is no other state: serials are random (159 bits), and which of them are revoked is known to the manager's
    database, which is asked at each connection. There are no revocation lists to go stale.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import check_name
from dr_cloud.model.units import SECOND_NS
from dr_cloud.seal.identity import Credentials, Peer, fingerprint, key_pem, new_key_and_csr, replace_file

SITE_LIFE: Final = timedelta(days=90)
SERVICE_LIFE: Final = timedelta(days=365)
CA_LIFE: Final = timedelta(days=20 * 365)
_CLOCKS_APART: Final = timedelta(minutes=10)
"""Certificates begin so much earlier, for clocks that are behind."""
_CSR_LENGTH_MAX: Final = 16_384


class Issued(NamedTuple):
    """A new certificate."""

    certificate: str
    """PEM."""
    serial: str
    """Hexadecimal."""


class Authority:
    """The CA of one provider."""

    def __init__(
        self,
        provider: str,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Use `open`."""
        self.provider = provider
        self._key = key
        self._certificate = certificate
        self._clock_ns = clock_ns
        self.certificate = certificate.public_bytes(serialization.Encoding.PEM).decode()
        """Its own certificate, PEM."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its certificate, 64 hexadecimal digits."""
        return fingerprint(self.certificate)

    @classmethod
    def open(cls, folder: Path, provider: str, clock_ns: Callable[[], int] = time.time_ns) -> Authority:
        """Return the authority kept in `folder`, made now if there is none.

        Raises:
            DrCloudError: The file is damaged, readable by others, or of another provider.
            OSError: The folder cannot be used.
        """
        check_name(provider, "provider")
        path = folder / "authority.pem"
        if not path.exists():
            _create(path, provider, clock_ns)
        if path.stat().st_mode & 0o077:
            raise DrCloudError(f"{path} can be read by others", f"Run: chmod 600 {path}")
        pem = path.read_bytes()
        try:
            key = serialization.load_pem_private_key(pem, None)
            certificate = x509.load_pem_x509_certificate(pem)
        except (ValueError, TypeError):
            raise DrCloudError(f"{path} is damaged", "Restore it from its backup.") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise DrCloudError(f"{path} is damaged: key and certificate differ", "Restore it from its backup.")
        if certificate.subject != _ca_name(provider):
            raise DrCloudError(f"{path} is of another provider than {provider!r}", "Name the right state folder.")
        authority = cls(provider, key, certificate, clock_ns)
        public = folder / "ca-cert.pem"
        if not public.exists() or public.read_text() != authority.certificate:
            replace_file(public, authority.certificate, 0o644)
        return authority

    @classmethod
    def passing(cls, name: str, life: timedelta, clock_ns: Callable[[], int] = time.time_ns) -> Authority:
        """Make an authority that lies in this process's memory alone: for what ends with it, such as one test's TLS.

        Args:
            name: Stands for the provider's, in its certificate and in those that it issues.
            life: How long it is valid.
            clock_ns: The time.
        """
        return cls(check_name(name, "authority"), *_self_signed(name, clock_ns, life), clock_ns)

    def issue_site(self, csr: str, enterprise: str, site: str, life: timedelta = SITE_LIFE) -> Issued:
        """Return a certificate with which a site can dial. Raises `DrCloudError` if the request is bad."""
        return self._issue(_public_key(csr), Peer.of_site(self.provider, enterprise, site), (), life)

    def issue_service(self, csr: str, service: str, hosts: Sequence[str], life: timedelta = SERVICE_LIFE) -> Issued:
        """Return a certificate with which a service of the provider can dial and listen.

        Args:
            csr: The request, PEM.
            service: The service's name.
            hosts: DNS names and IP addresses it is reached by.
            life: How long it is valid.

        Raises:
            DrCloudError: The request or a name is bad.
        """
        return self._issue(_public_key(csr), Peer.of_service(self.provider, service), hosts, life)

    def service_credentials(self, service: str, hosts: Sequence[str], life: timedelta = SERVICE_LIFE) -> Credentials:
        """Make a key and a certificate for a service of the provider; see `issue_service`."""
        key, csr = new_key_and_csr()
        return Credentials(key, self.issue_service(csr, service, hosts, life).certificate, self.certificate)

    def _issue(self, key: ec.EllipticCurvePublicKey, peer: Peer, hosts: Sequence[str], life: timedelta) -> Issued:
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(peer.uri), *map(_host_name, hosts)]
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if peer.service is not None:
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        serial = _new_serial()
        certificate = (
            _begun(self._clock_ns, life, serial)
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer.service or peer.site or "")]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            # Not critical: else older QEMU and libvirt want key encipherment, which EC keys must not have (RFC 8813).
            .add_extension(_key_usage(ca=False), critical=False)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Issued(certificate.public_bytes(serialization.Encoding.PEM).decode(), format(serial, "x"))


def _create(path: Path, provider: str, clock_ns: Callable[[], int]) -> None:
    key, certificate = _self_signed(provider, clock_ns, CA_LIFE)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f"authority.{secrets.token_hex(8)}.new")
    try:
        replace_file(fresh, key_pem(key) + certificate.public_bytes(serialization.Encoding.PEM).decode(), 0o600)
        with contextlib.suppress(FileExistsError):  # Another process was faster: its authority is the one.
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _self_signed(
    provider: str, clock_ns: Callable[[], int], life: timedelta
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _begun(clock_ns, life, _new_serial())
        .subject_name(_ca_name(provider))
        .issuer_name(_ca_name(provider))
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _begun(clock_ns: Callable[[], int], life: timedelta, serial: int) -> x509.CertificateBuilder:
    now = datetime.fromtimestamp(clock_ns() // SECOND_NS, UTC)
    return (
        x509.CertificateBuilder()
        .serial_number(serial)
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(now + life)
    )


def _new_serial() -> int:
    # One bit is always set, so that all serials are of one length in hexadecimal.
    return secrets.randbits(158) | 1 << 158


def _ca_name(provider: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, provider),
            x509.NameAttribute(NameOID.COMMON_NAME, "dr_cloud CA"),
        ]
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise DrCloudError(f"{host!r} is no host name", "Use an IP address, or a DNS name in ASCII.") from None


def _public_key(csr: str) -> ec.EllipticCurvePublicKey:
    """Return the request's key, once its owner has shown to hold it."""
    remedy = "Send a PKCS#10 request in PEM, signed by its own EC P-256 key."
    if len(csr) > _CSR_LENGTH_MAX:
        raise DrCloudError(f"a signing request of {len(csr)} characters is too long", remedy)
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        valid = request.is_signature_valid
    except Exception:  # The library raises several kinds for what is no request; all mean the same here.
        raise DrCloudError("the signing request cannot be read", remedy) from None
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DrCloudError("the signing request has no valid EC P-256 key", remedy)
    return key
