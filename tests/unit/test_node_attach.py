"""The texts by which people attach a test's disks; that they work is shown in tests/system/test_node_remote.py."""

from __future__ import annotations

import json
import shlex
from pathlib import PurePath
from xml.etree import ElementTree

import pytest

from dr_cloud.model.errors import ConflictError
from dr_cloud.model.recovery import RecoveryTest, TestCredential
from dr_cloud.recovery.attach import attach

LOCAL = {
    "web/root": ["nbd+unix:///web%2Froot?socket=/run/a%20b.sock", "nbds://vault.example:4711/web%2Froot"],
    "db/d&ta": ["nbd+unix:///db%2Fd%26ta?socket=/run/a%20b.sock", "nbds://vault.example:4711/db%2Fd%26ta"],
}
CREDENTIAL = TestCredential(
    uris={disk: uris[1:] for disk, uris in LOCAL.items()}, ca="the ca", certificate="the certificate", key="the key"
)


def test_of(uris: dict[str, list[str]]) -> RecoveryTest:
    return RecoveryTest(
        id="0af3", enterprise="acme", vpg="shop", target="dc1", kind="test", task="1", status="running", asked_ns=1,
        started_ns=1, uris=uris,
    )  # fmt: skip


test_of.__test__ = False  # type: ignore[attr-defined]


def test_on_the_node_the_socket_is_enough() -> None:
    """R14.4: no certificates, no TLS."""
    found = attach(test_of(LOCAL))
    assert list(found.uris) == ["db/d&ta", "web/root"]
    assert found.uris["web/root"] == LOCAL["web/root"][0] and found.files == {}
    words = shlex.split(found.qemu)
    assert "-object" not in words
    first, second = (json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-blockdev")
    assert first["server"] == {"type": "unix", "path": "/run/a b.sock"} and first["export"] == "db/d&ta"
    assert second["node-name"] == "disk1" and "tls-creds" not in second
    disk = ElementTree.fromstring(found.libvirt["db/d&ta"])
    assert disk.find("source/host").attrib == {"transport": "unix", "socket": "/run/a b.sock"}  # type: ignore[union-attr]
    assert "tls" not in disk.find("source").attrib  # type: ignore[union-attr]
    fuse, kernel = found.linux["web/root"]
    assert shlex.split(fuse)[-1] == found.uris["web/root"]
    assert shlex.split(kernel) == ["nbd-client", "-unix", "/run/a b.sock", "/dev/nbd1", "-name", "web/root"]


def test_from_elsewhere_with_the_credential() -> None:
    """R14.4, R14.9: every text names the certificates, the disk's real name, and lets others attach it too."""
    found = attach(test_of(LOCAL), CREDENTIAL, PurePath("/my certs, new"))
    assert found.uris["db/d&ta"] == "nbds://vault.example:4711/db%2Fd%26ta?tls-certificates=/my%20certs%2C%20new"
    assert found.files == {
        "ca-cert.pem": "the ca", "client-cert.pem": "the certificate", "client-key.pem": "the key"
    }  # fmt: skip
    words = shlex.split(found.qemu)
    assert "tls-creds-x509,id=test,endpoint=client,dir=/my certs,, new" in words
    blockdev = json.loads(words[words.index("-blockdev") + 1])
    assert blockdev["server"] == {"type": "inet", "host": "vault.example", "port": "4711"}
    assert blockdev["tls-creds"] == "test" and blockdev["export"] == "db/d&ta"
    assert "virtio-blk-pci,drive=disk1,share-rw=on" in words
    disk = ElementTree.fromstring(found.libvirt["web/root"])
    source = disk.find("source")
    assert disk.attrib == {"type": "network", "device": "disk"} and source is not None
    assert source.attrib == {"protocol": "nbd", "name": "web/root", "tls": "yes"}
    assert source.find("host").attrib == {"name": "vault.example", "port": "4711"}  # type: ignore[union-attr]
    assert disk.find("target").attrib["dev"] == "vdb"  # type: ignore[union-attr]
    assert disk.find("shareable") is not None and "nbd_tls_x509_cert_dir" in found.libvirt["web/root"]
    kernel = shlex.split(found.linux["web/root"][1])
    assert kernel[:6] == ["nbd-client", "vault.example", "4711", "/dev/nbd1", "-name", "web/root"]
    assert kernel[6:] == [
        "-cacertfile", "/my certs, new/ca-cert.pem", "-certfile", "/my certs, new/client-cert.pem",
        "-keyfile", "/my certs, new/client-key.pem", "-tlshostname", "vault.example",
    ]  # fmt: skip


def test_the_key_is_in_no_text_but_its_file() -> None:
    found = attach(test_of(LOCAL), CREDENTIAL)
    texts = [repr(found), repr(CREDENTIAL), found.qemu, *found.uris.values(), *found.libvirt.values()]
    assert not any("the key" in text for text in [*texts, *(line for lines in found.linux.values() for line in lines)])
    assert "drtest-0af3" in found.qemu


def test_many_disks_have_names_as_the_kernel_gives() -> None:
    found = attach(test_of({f"s/{number:03}": LOCAL["web/root"] for number in range(30)}))
    names = [ElementTree.fromstring(text).find("target").attrib["dev"] for text in found.libvirt.values()]  # type: ignore[union-attr]
    assert (names[0], names[25], names[26], names[29]) == ("vda", "vdz", "vdaa", "vdad")


def test_a_test_that_serves_nothing_is_said() -> None:
    with pytest.raises(ConflictError, match="0af3"):
        attach(test_of({}))
