from __future__ import annotations

import multiprocessing
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.units import SECOND_NS
from dr_cloud.seal.authority import SITE_LIFE, Authority
from dr_cloud.seal.identity import Credentials, Peer, check_site, fingerprint, new_key_and_csr

DAY_NS = 86_400 * SECOND_NS


def site_credentials(authority: Authority, enterprise: str = "acme-us", site: str = "chicago") -> Credentials:
    key, csr = new_key_and_csr()
    return Credentials(key, authority.issue_site(csr, enterprise, site).certificate, authority.certificate)


def test_it_is_made_once_and_opened_again(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path / "ca", "provider")
    assert Authority.open(tmp_path / "ca", "provider").fingerprint == authority.fingerprint
    assert (tmp_path / "ca" / "authority.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca" / "ca-cert.pem").read_text() == authority.certificate
    assert "PRIVATE" not in authority.certificate
    assert sorted(path.name for path in (tmp_path / "ca").iterdir()) == ["authority.pem", "ca-cert.pem"]
    assert len(authority.fingerprint) == 64 and fingerprint(authority.certificate) == authority.fingerprint


def test_it_is_refused_when_it_cannot_be_trusted(tmp_path: Path) -> None:
    Authority.open(tmp_path, "provider")
    with pytest.raises(DrCloudError, match="another provider"):
        Authority.open(tmp_path, "other")
    path = tmp_path / "authority.pem"
    path.chmod(0o640)
    with pytest.raises(DrCloudError, match="read by others"):
        Authority.open(tmp_path, "provider")
    path.chmod(0o600)
    other = tmp_path / "other"
    Authority.open(other, "provider")
    key = path.read_text().partition("-----BEGIN CERTIFICATE")[0]
    foreign = (other / "ca-cert.pem").read_text()
    for text, what in ((key + foreign, "differ"), (key, "damaged"), ("", "damaged")):
        path.write_text(text)
        with pytest.raises(DrCloudError, match=what):
            Authority.open(tmp_path, "provider")


def _open(folder: str, found: multiprocessing.Queue[str]) -> None:
    found.put(Authority.open(Path(folder), "provider").fingerprint)


def test_processes_that_make_it_at_the_same_time_share_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    found: multiprocessing.Queue[str] = context.Queue()  # type: ignore[assignment]
    processes = [context.Process(target=_open, args=(str(tmp_path), found)) for _ in range(6)]
    for process in processes:
        process.start()
    fingerprints = {found.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(30)
    assert fingerprints == {Authority.open(tmp_path, "provider").fingerprint}


def test_a_site_is_what_the_authority_says_not_what_it_asks_for(tmp_path: Path) -> None:
    """R11: nobody names himself."""
    authority = Authority.open(tmp_path, "provider")
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.UniformResourceIdentifier("dr-cloud://provider/service/manager"), x509.DNSName("api.provider")]
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=9), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )
    issued = authority.issue_site(csr, "acme-us", "chicago")
    certificate = x509.load_pem_x509_certificate(issued.certificate.encode())
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(alternative) == [x509.UniformResourceIdentifier("dr-cloud://provider/enterprise/acme-us/site/chicago")]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH], "a site's certificate cannot listen"
    assert format(certificate.serial_number, "x") == issued.serial
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "chicago"


def test_serials_never_repeat(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path, "provider")
    _, csr = new_key_and_csr()
    serials = {authority.issue_site(csr, "acme-us", "chicago").serial for _ in range(20)}
    assert len(serials) == 20 and {len(serial) for serial in serials} == {40}


def test_lives_follow_the_clock(tmp_path: Path) -> None:
    now_ns = time.time_ns()
    authority = Authority.open(tmp_path, "provider", clock_ns=lambda: now_ns)
    site = site_credentials(authority)
    assert abs(site.peer.expires_ns - now_ns - SITE_LIFE.days * DAY_NS) < 2 * SECOND_NS
    assert site.begins_ns < now_ns
    left = site.peer.expires_ns - site.renew_at_ns
    assert abs(left - (site.peer.expires_ns - site.begins_ns) / 3) <= 1


def bad_requests() -> dict[str, str]:
    def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    _, good = new_key_and_csr()
    lines = good.splitlines()
    broken = lines[-2][:-8] + ("AAAA" if lines[-2][-8:-4] != "AAAA" else "BBBB") + lines[-2][-4:]
    return {
        "empty": "",
        "no PEM": "hello",
        "a certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "another signature": "\n".join([*lines[:-2], broken, lines[-1]]) + "\n",
        "RSA": request(rsa.generate_private_key(65537, 2048)),
        "another curve": request(ec.generate_private_key(ec.SECP384R1())),
        "too long": good + "#" * 20_000,
    }


@pytest.mark.parametrize("what", bad_requests())
def test_a_bad_request_is_refused(tmp_path: Path, what: str) -> None:
    authority = Authority.open(tmp_path, "provider")
    with pytest.raises(DrCloudError) as caught:
        authority.issue_site(bad_requests()[what], "acme-us", "chicago")
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["", "../x", "Acme", "a/b", "x" * 64])
def test_names_are_checked_before_they_are_signed(tmp_path: Path, name: str) -> None:
    authority = Authority.open(tmp_path, "provider")
    _, csr = new_key_and_csr()
    with pytest.raises(DrCloudError):
        authority.issue_site(csr, name, "chicago")
    with pytest.raises(DrCloudError):
        authority.issue_site(csr, "acme-us", name)
    with pytest.raises(DrCloudError):
        authority.issue_service(csr, name, ["localhost"])
    with pytest.raises(DrCloudError):
        authority.issue_service(csr, "api", ["ümlaut.example"])


def test_credentials_are_kept_and_hide_their_key(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path / "ca", "provider")
    site = site_credentials(authority)
    assert "PRIVATE" not in repr(site) and site.key.splitlines()[1] not in repr(site)
    site.save(tmp_path / "site")
    assert (tmp_path / "site" / "key.pem").stat().st_mode & 0o777 == 0o600
    again = Credentials.load(tmp_path / "site")
    assert (
        again.peer
        == site.peer
        == Peer("provider", "acme-us", "chicago", None, again.peer.serial, again.peer.expires_ns)
    )
    (tmp_path / "site" / "key.pem").chmod(0o644)
    with pytest.raises(DrCloudError, match="read by others"):
        Credentials.load(tmp_path / "site")
    with pytest.raises(FileNotFoundError):
        Credentials.load(tmp_path / "nothing")


def test_credentials_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """A crash between two files of a renewal is seen, not used."""
    one, two = Authority.open(tmp_path / "1", "provider"), Authority.open(tmp_path / "2", "provider")
    site, other = site_credentials(one), site_credentials(one)
    for parts in (
        (other.key, site.certificate, site.ca),
        (site.key, site.certificate, two.certificate),
        ("", site.certificate, site.ca),
        (site.key, "", site.ca),
    ):
        with pytest.raises(DrCloudError):
            Credentials(*parts)


def test_a_certificate_of_somebody_else_names_nobody() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    for names in (
        [],
        [x509.DNSName("localhost")],
        [x509.UniformResourceIdentifier("https://provider/service/x")],
        [x509.UniformResourceIdentifier("dr-cloud://provider/enterprise/acme")],
        [x509.UniformResourceIdentifier("dr-cloud://provider/enterprise/../site/x")],
        [x509.UniformResourceIdentifier(f"dr-cloud://provider/service/{name}") for name in ("a", "b")],
    ):
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(x509.Name([]))
            .serial_number(1)
            .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2027, 1, 1, tzinfo=UTC))
            .public_key(key.public_key())
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        with pytest.raises(DrCloudError):
            Peer.of_certificate(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER))
    with pytest.raises(DrCloudError):
        Peer.of_certificate(b"garbage")


def test_a_site_is_admitted_by_its_own_enterprise_only(tmp_path: Path) -> None:
    """R11: sites authenticate; what opens nothing is told in one and the same way."""
    authority = Authority.open(tmp_path, "provider")
    mine, other = site_credentials(authority).peer, site_credentials(authority, "brit-uk", "leeds").peer
    service = authority.service_credentials("connector-acme-us", ["localhost"]).peer
    check_site(mine, "provider", "acme-us", lambda serial: False)
    words = set()
    for peer in (other, service, mine._replace(provider="else")):
        with pytest.raises(DrCloudError) as caught:
            check_site(peer, "provider", "acme-us", lambda serial: False)
        words.add(str(caught.value))
    assert len(words) == 1
    with pytest.raises(DrCloudError, match="revoked"):
        check_site(mine, "provider", "acme-us", {mine.serial}.__contains__)


def test_contexts_speak_tls_1_3_only(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path, "provider")
    service = authority.service_credentials("api", ["localhost", "127.0.0.1"], timedelta(days=1))
    for context in (service.server_context(), service.client_context(), service.server_context(clients=False)):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert service.server_context().verify_mode is ssl.CERT_REQUIRED
    assert service.client_context().verify_mode is ssl.CERT_REQUIRED and service.client_context().check_hostname
