"""Certificates of one test's TLS: of an authority that is nowhere but in memory, and good for what they are for."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from dr_cloud.model.errors import DrCloudError
from dr_cloud.seal.authority import Authority
from dr_cloud.seal.identity import new_key_and_csr

NOW_S = 1_800_000_000
LIFE = timedelta(days=31)


def test_they_are_what_outside_clients_take() -> None:
    """R14.4, R14.9: the server's names its host, the client's cannot serve; QEMU's and libvirt's checks are met."""
    authority = Authority.passing("0af3", LIFE, clock_ns=lambda: NOW_S * 10**9)
    other = Authority.passing("0af3", LIFE, clock_ns=lambda: NOW_S * 10**9)
    assert authority.fingerprint != other.fingerprint
    ca = x509.load_pem_x509_certificate(authority.certificate.encode())
    assert ca.not_valid_after_utc.timestamp() == NOW_S + LIFE.total_seconds()
    for host, kind, name in (("127.0.0.1", x509.IPAddress, ip_address("127.0.0.1")), ("a.example", x509.DNSName, None)):
        own = x509.load_pem_x509_certificate(authority.service_credentials("stack", [host], LIFE).certificate.encode())
        own.verify_directly_issued_by(ca)
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(kind) == [name or host]
    client = x509.load_pem_x509_certificate(
        authority.issue_site(new_key_and_csr()[1], "acme", "0af3", LIFE).certificate.encode()
    )
    client.verify_directly_issued_by(ca)
    uses = client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    usage = client.extensions.get_extension_for_class(x509.KeyUsage)
    assert not usage.critical and usage.value.digital_signature and not usage.value.key_encipherment


def test_a_name_that_cannot_be_is_said() -> None:
    with pytest.raises(DrCloudError, match="authority name"):
        Authority.passing("no name", LIFE)
    with pytest.raises(DrCloudError, match="no host name"):
        Authority.passing("0af3", LIFE).service_credentials("stack", ["ä b"], LIFE)
