"""Bundles, grants, policies on a disk: what is signed, what is refused, and what a refusal changes."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from rights_engines import NOW_S, asked, center, mechanism, seed_facts, sources_with

from dr_cloud.model.errors import DamagedError, DrCloudError, ForbiddenError, InvalidError
from dr_cloud.model.ids import Scope
from dr_cloud.model.rights import PolicySources, Regulation
from dr_cloud.rights.bundle import KEY_ID, Signer, build_bundle, open_bundle
from dr_cloud.rights.grant import Grant, issue, verify
from dr_cloud.rights.regulation import (
    boundaries_s,
    check_modules,
    data_document,
    load_policies,
    load_regulation,
    revision_of,
)

SCOPE = Scope("acme-us", "erp", "t1")
GRANT = Grant(SCOPE, "us-east", "file:///a", "r1", NOW_S + 900)


def files_of(bundle):
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(bundle))) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def packed(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def signer(tmp_path):
    return Signer.open(tmp_path)


@pytest.fixture
def bundle(signer):
    return build_bundle(sources_with(), seed_facts(), signer)[1]


def test_a_bundle_gives_back_what_was_put_in(signer, bundle):
    opened = open_bundle(bundle, signer.public)
    assert opened.revision == revision_of(sources_with(), seed_facts())
    assert opened.modules == sources_with().modules
    assert opened.data == data_document(sources_with().regulation, seed_facts(), opened.revision)


def test_the_revision_names_the_content():
    """Same content, same revision; any other content, another one."""
    one = revision_of(sources_with(), seed_facts())
    assert one == revision_of(sources_with(), seed_facts())
    others = [
        revision_of(sources_with(mechanism("adequacy", "UK", "USA")), seed_facts()),
        revision_of(sources_with(modules={"rights.rego": "package dr_cloud.rights"}), seed_facts()),
        revision_of(sources_with(), seed_facts().model_copy(update={"enterprises": {}})),
    ]
    assert len({one, *others}) == 4


@pytest.mark.parametrize("name", ["rights.rego", "law.rego", "data.json", ".manifest", "batch.rego"])
def test_a_file_that_was_changed_is_found(signer, bundle, name):
    files = files_of(bundle)
    changed = files[name].replace(b"a", b"b", 1)
    assert changed != files[name]
    with pytest.raises(DamagedError, match="not as it was signed"):
        open_bundle(packed(files | {name: changed}), signer.public)


def test_a_file_that_is_missing_or_too_much_is_found(signer, bundle):
    files = files_of(bundle)
    for changed in (
        files | {"more.rego": b"package dr_cloud.more"},
        {n: c for n, c in files.items() if n != "law.rego"},
    ):
        with pytest.raises(DamagedError, match="not as it was signed"):
            open_bundle(packed(changed), signer.public)
    with pytest.raises(DamagedError, match="not signed"):
        open_bundle(packed({n: c for n, c in files.items() if n != ".signatures.json"}), signer.public)


def test_the_signature_of_another_key_is_refused(tmp_path, bundle):
    with pytest.raises(DamagedError, match="not of the rights key"):
        open_bundle(bundle, Signer.open(tmp_path / "other").public)


def test_an_unsigned_token_is_no_signature(signer, bundle):
    files = files_of(bundle)
    for token in (jwt.encode({"files": []}, None, "none"), jwt.encode({"files": []}, signer.public[:64], "HS256")):
        forged = files | {".signatures.json": b'{"signatures":["' + token.encode() + b'"]}'}
        with pytest.raises(DamagedError, match="not of the rights key"):
            open_bundle(packed(forged), signer.public)


@pytest.mark.parametrize("what", [b"", b"nonsense", gzip.compress(b"nonsense"), gzip.compress(b"")[:-3]])
def test_what_is_no_bundle_is_refused(signer, what):
    with pytest.raises(DamagedError):
        open_bundle(what, signer.public)


def test_the_key_is_kept_and_shown_to_nobody(tmp_path, signer):
    assert Signer.open(tmp_path).public == signer.public
    key = tmp_path / "rights" / "key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (tmp_path / "rights" / "public.pem").read_text() == signer.public
    assert "PRIVATE" not in repr(signer) + str(vars(signer))
    key.chmod(0o644)
    with pytest.raises(DrCloudError, match="read by others"):
        Signer.open(tmp_path)
    key.chmod(0o600)
    key.write_text("nonsense")
    with pytest.raises(DrCloudError, match="damaged"):
        Signer.open(tmp_path)


# -- grants --


def test_a_grant_is_good_where_it_says_and_while_it_lasts(signer):
    """R13.3"""
    token = issue(GRANT, signer)
    assert verify(token, signer.public, SCOPE, "us-east", "file:///a", NOW_S) == GRANT
    assert verify(token, signer.public, SCOPE, "us-east", "file:///a", GRANT.until_s - 1) == GRANT
    with pytest.raises(ForbiddenError, match="over"):
        verify(token, signer.public, SCOPE, "us-east", "file:///a", GRANT.until_s)


@pytest.mark.parametrize(
    ("scope", "data_center", "store"),
    [
        (SCOPE._replace(enterprise="brit-uk"), "us-east", "file:///a"),
        (SCOPE._replace(vpg="crm"), "us-east", "file:///a"),
        (SCOPE._replace(target="t2"), "us-east", "file:///a"),
        (SCOPE, "uk-south", "file:///a"),
        (SCOPE, "us-east", "file:///b"),
    ],
)
def test_a_grant_for_something_else_is_refused(signer, scope, data_center, store):
    """R13.3"""
    with pytest.raises(ForbiddenError, match="another scope, data center or store"):
        verify(issue(GRANT, signer), signer.public, scope, data_center, store, NOW_S)


def test_a_forged_grant_is_refused(tmp_path, signer):
    """R13.3"""
    token = issue(GRANT, signer)
    head, body, signature = token.split(".")
    claims = jwt.decode(token, options={"verify_signature": False})
    other = ec.generate_private_key(ec.SECP256R1())
    forged = [
        "",
        "nonsense",
        f"{head}.{body}.",
        f"{head}.{body[:-2]}AA.{signature}",
        issue(GRANT, Signer.open(tmp_path / "other")),
        jwt.encode(claims, None, "none"),
        jwt.encode(claims, "x" * 64, "HS256"),
        jwt.encode(claims, other, "ES256", headers={"kid": KEY_ID}),
        signer.sign({"files": []}),
        signer.sign(claims | {"use": "bundle"}),
        signer.sign({name: value for name, value in claims.items() if name != "exp"}),
        signer.sign(claims | {"exp": "never"}),
        "x" * 10_000,
    ]
    for bad in forged:
        with pytest.raises(ForbiddenError):
            verify(bad, signer.public, SCOPE, "us-east", "file:///a", NOW_S)


# -- on a disk --


def test_the_products_policies_can_be_read():
    sources = load_policies()
    assert set(sources.modules) == {"law.rego", "places.rego", "rights.rego"}
    assert {"USA", "UK", "APAC", "EU"} <= set(sources.regulation.jurisdictions)
    assert sources.regulation.mechanisms == []


def test_a_folder_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(InvalidError, match="holds no policies"):
        load_policies(tmp_path)
    (tmp_path / "rights.rego").write_text("package dr_cloud.rights\n")
    (tmp_path / "rights_test.rego").write_text("package dr_cloud.rights_test\n")
    with pytest.raises(InvalidError, match=r"regulation\.yaml cannot be read"):
        load_policies(tmp_path)
    (tmp_path / "regulation.yaml").write_text("jurisdictions: {UK: {}}\n")
    assert set(load_policies(tmp_path).modules) == {"rights.rego"}
    (tmp_path / "other.rego").write_text("package system.authz\n")
    with pytest.raises(InvalidError, match=r"other\.rego is in no package dr_cloud"):
        load_policies(tmp_path)


@pytest.mark.parametrize("name", ["../x.rego", "x.json", "a b.rego", "x_test.rego", "batch.rego", ".rego"])
def test_a_module_is_called_as_a_file_of_a_bundle_may_be(name):
    sources = PolicySources(modules={name: "package dr_cloud.x"}, regulation=Regulation(jurisdictions={"UK": {}}))
    with pytest.raises(InvalidError, match="cannot be called"):
        check_modules(sources)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("jurisdictions: {}", "jurisdictions"),
        ("jurisdictions: {uk: {}}", "jurisdictions"),
        ("nonsense", "the document"),
        ("jurisdictions: {UK: {}, USA: {}}\nmechanisms: [{kind: goodwill}]", "kind"),
        ("jurisdictions: {UK: {}}\nmechanisms: [MECH]", "names USA, which is not listed"),
        ("jurisdictions: {UK: {}, USA: {}}\nmechanisms: [MECH2]", "must be after"),
        ("jurisdictions: {UK: {}, USA: {}}\nmechanisms: [MECH3]", "is not a time"),
    ],
)
def test_a_regulation_that_cannot_be_used_names_the_field(tmp_path, text, part):
    head = "{kind: adequacy, from: UK, to: USA, reference: x, "
    text = text.replace("MECH2", head + "valid_from: '2026-01-02T00:00:00Z', valid_until: '2026-01-02T00:00:00Z'}")
    text = text.replace("MECH3", head + "valid_from: yesterday, valid_until: '2026-01-02T00:00:00Z'}")
    text = text.replace("MECH", head + "valid_from: '2026-01-01T00:00:00Z', valid_until: '2026-01-02T00:00:00Z'}")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InvalidError, match=part):
        load_regulation(tmp_path / "r.yaml")


def test_boundaries_are_whole_seconds_on_the_safe_side():
    half = mechanism("adequacy", "UK", "USA") | {
        "valid_from": "2027-01-15T08:00:00.25Z",
        "valid_until": "2027-01-15T09:01:00.9+01:00",
    }
    assert boundaries_s(sources_with(half, half).regulation.mechanisms) == [NOW_S + 1, NOW_S + 60]


def test_an_example_in_the_products_regulation_is_a_regulation(tmp_path):
    """What the comment in regulation.yaml shows can be used as it is."""
    lines = (load_policies.__defaults__[0] / "regulation.yaml").read_text().splitlines()
    shown = [line.removeprefix("#").rstrip() for line in lines if line.startswith("#   ")]
    rest = [line for line in lines if not line.startswith(("#", "mechanisms"))]
    (tmp_path / "r.yaml").write_text("\n".join([*rest, "mechanisms:", *shown]))
    kinds = [m.kind for m in load_regulation(tmp_path / "r.yaml").mechanisms]
    assert kinds == ["adequacy", "clauses", "derogation"]


def test_a_time_without_a_zone_is_refused(tmp_path):
    text = "jurisdictions: {UK: {}, USA: {}}\nmechanisms:\n- {kind: adequacy, from: UK, to: USA, reference: x, "
    for when in ("2026-01-01T00:00:00", "2026-01-01"):
        (tmp_path / "r.yaml").write_text(f"{text}valid_from: {when}, valid_until: 2027-01-01T00:00:00Z}}\n")
        with pytest.raises(InvalidError, match=r"mechanisms\.0"):
            load_regulation(tmp_path / "r.yaml")


def test_questions_say_nothing_of_where_things_lie():
    dumped = asked("keep", "acme-us", center("us-east", "ds-1")).model_dump()
    assert "USA" not in str(dumped)
