"""Bundles: policies and data in one file that is signed, as OPA defines it.

Layout
    A tar.gz of `.manifest` (revision, roots), the modules, `data.json`, and `.signatures.json`: a JWT (ES256, key
    `dr-cloud`) that lists the SHA-256 of every other file. JSON is hashed in its canonical form, everything else as
    it is. The same bytes feed both engines.

Consistency
    A bundle is taken whole or not at all: the signature must verify, every file must be listed with its digest, and no
    file may be there that is not listed. Whoever refuses one goes on with what they have.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dr_cloud.model.errors import DamagedError, DrCloudError
from dr_cloud.model.rights import Facts, PolicySources
from dr_cloud.rights.engine import BATCH, BATCH_FILE
from dr_cloud.rights.regulation import ROOTS, canonical_json, documents
from dr_cloud.seal.identity import key_pem, replace_file

KEY_ID: Final = "dr-cloud"
ALGORITHM: Final = "ES256"
_BUNDLE_LENGTH_MAX: Final = 64 << 20
_SIGNATURES: Final = ".signatures.json"


class Signer:
    """The rights key. It signs bundles and grants; it is in no representation."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        """Use `open`."""
        self._key = key
        self.public = (
            key.public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            .decode()
        )
        """The public key, PEM."""

    def __repr__(self) -> str:
        return "Signer()"

    @classmethod
    def open(cls, state: Path) -> Signer:
        """Return the key kept in `state`/rights (key.pem, mode 0600; public.pem), made now if there is none.

        Raises:
            DrCloudError: The key is damaged or readable by others.
            OSError: The folder cannot be used.
        """
        folder = state / "rights"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "key.pem"
        if not path.exists():
            replace_file(path, key_pem(ec.generate_private_key(ec.SECP256R1())), 0o600)
        if path.stat().st_mode & 0o077:
            raise DrCloudError(f"{path} can be read by others", f"Run: chmod 600 {path}")
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise DrCloudError(f"{path} is damaged", "Restore it from its backup.")
        signer = cls(key)
        public = folder / "public.pem"
        if not public.exists() or public.read_text() != signer.public:
            replace_file(public, signer.public, 0o644)
        return signer

    def sign(self, claims: dict[str, Any]) -> str:
        """Return the claims as a signed JWT."""
        return jwt.encode(claims, self._key, ALGORITHM, headers={"kid": KEY_ID})


class Bundle(NamedTuple):
    """What is in a bundle that was found good, without what is not policy."""

    revision: str
    modules: dict[str, str]
    data: dict[str, Any]


def build_bundle(sources: PolicySources, facts: Facts, signer: Signer) -> tuple[str, bytes]:
    """Return (revision, bundle)."""
    revision, data = documents(sources, facts)
    manifest = {"revision": revision, "roots": list(ROOTS), "rego_version": 1}
    files = {name: text.encode() for name, text in sorted(sources.modules.items())}
    files |= {BATCH_FILE: BATCH.encode(), "data.json": canonical_json(data), ".manifest": canonical_json(manifest)}
    listed = [
        {"name": name, "hash": hashlib.sha256(content).hexdigest(), "algorithm": "SHA-256"}
        for name, content in files.items()
    ]
    files[_SIGNATURES] = canonical_json({"signatures": [signer.sign({"files": listed})]})
    return revision, _packed(files)


def open_bundle(bundle: bytes, public: str) -> Bundle:
    """Return what a bundle holds.

    Args:
        bundle: The tar.gz.
        public: The key that must have signed it, PEM.

    Raises:
        DamagedError: It is no bundle, or not signed by this key, or not as it was when it was signed.
    """
    files = _unpacked(bundle)
    try:
        signatures = json.loads(files.pop(_SIGNATURES))["signatures"]
        (token,) = signatures
        claims = jwt.decode(token, public, [ALGORITHM])
        listed = {entry["name"]: entry["hash"] for entry in claims["files"]}
    except jwt.InvalidTokenError:
        raise DamagedError("the bundle's signature is not of the rights key", "Build it again.") from None
    except (KeyError, ValueError, TypeError):
        raise DamagedError("the bundle is not signed", "Build it again.") from None
    if {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} != listed:
        raise DamagedError("the bundle is not as it was signed", "Build it again.")
    try:
        policies = {name for name in files if name.endswith(".rego")} - {BATCH_FILE}
        modules = {name: files[name].decode() for name in sorted(policies)}
        return Bundle(json.loads(files[".manifest"])["revision"], modules, json.loads(files["data.json"]))
    except (KeyError, ValueError, TypeError):
        raise DamagedError("the bundle lacks a manifest or its data", "Build it again.") from None


def _packed(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o644
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


def _unpacked(bundle: bytes) -> dict[str, bytes]:
    try:
        with gzip.open(io.BytesIO(bundle)) as packed:
            content = packed.read(_BUNDLE_LENGTH_MAX + 1)
        if len(content) > _BUNDLE_LENGTH_MAX:
            raise DamagedError("the bundle is too large", "Take out what policies do not need.")
        files: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for entry in archive:
                file = archive.extractfile(entry)
                if file is None or entry.name in files:
                    raise DamagedError(f"the bundle has {entry.name!r} twice, or it is no file", "Build it again.")
                files[entry.name] = file.read()
        return files
    except (OSError, EOFError, tarfile.TarError, ValueError):
        raise DamagedError("this is no bundle", "Build it again.") from None
