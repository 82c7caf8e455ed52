"""How to attach the disks of a recovery test, as texts for who will: addresses, QEMU, libvirt, Linux. Pure.

On the node itself the unix socket is enough. From elsewhere TLS and the test's credential are needed: three files in a
folder, named as libnbd, QEMU and libvirt look for them. Several clients may attach one disk at once: what one has
flushed the others read, as from a disk with two cables. That a file system bears it is for those who mount it to see
to (a cluster file system, or one writer).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

from dr_cloud.model.errors import ConflictError
from dr_cloud.model.recovery import RecoveryTest, TestCredential
from dr_cloud.nbd.uri import NbdUri, parse_uri


class Attachment(NamedTuple):
    """The texts for one test. Those by disk are in the order of the disks' names."""

    uris: dict[str, str]
    """By disk, for libnbd's tools: with the folder of the certificates where they are needed."""
    files: dict[str, str]
    """By name, what is to lie in that folder, readable by its owner alone; none where no TLS is used. Secret."""
    qemu: str
    """A command line with all disks."""
    libvirt: dict[str, str]
    """By disk, its `<disk>` element."""
    linux: dict[str, list[str]]
    """By disk, commands, each of which attaches it on a Linux machine."""

    def __repr__(self) -> str:
        return f"Attachment({', '.join(self.uris)})"


def attach(test: RecoveryTest, credential: TestCredential | None = None, folder: PurePath | None = None) -> Attachment:
    """Return the texts for the disks of a test.

    Args:
        test: A test whose disks are served.
        credential: For a client elsewhere; None for one on the node.
        folder: Where the credential's files will lie; None is `drtest-<id>` in the current folder.

    Raises:
        ConflictError: The test serves no disks now.
    """
    served: Mapping[str, list[str]] = credential.uris if credential is not None else test.uris
    if not any(served.values()):
        raise ConflictError(f"test {test.id} serves no disks now", "Attach them while it runs.")
    certificates = "" if credential is None else str(folder or PurePath(f"drtest-{test.id}"))
    uris = {disk: found[0] for disk, found in sorted(served.items()) if found}
    places = {disk: parse_uri(uri) for disk, uri in uris.items()}
    if credential is None:
        files = {}
    else:
        files = {
            "ca-cert.pem": credential.ca,
            "client-cert.pem": credential.certificate,
            "client-key.pem": credential.key,
        }
        uris = {disk: f"{uri}?tls-certificates={quote(certificates)}" for disk, uri in uris.items()}
    return Attachment(
        uris=uris,
        files=files,
        qemu=_qemu(list(places.values()), certificates),
        libvirt={disk: _libvirt(place, number) for number, (disk, place) in enumerate(places.items())},
        linux={
            disk: [_nbdfuse(uris[disk], disk), _nbd_client(place, number, certificates)]
            for number, (disk, place) in enumerate(places.items())
        },
    )


def _qemu(places: list[NbdUri], certificates: str) -> str:
    words = ["qemu-system-x86_64", "-machine", "q35", "-m", "2G"]
    if certificates:
        # In QEMU's options a comma is written twice.
        words += ["-object", f"tls-creds-x509,id=test,endpoint=client,dir={certificates.replace(',', ',,')}"]
    for number, place in enumerate(places):
        server: dict[str, str]
        if place.unix_path is not None:
            server = {"type": "unix", "path": place.unix_path}
        else:
            server = {"type": "inet", "host": place.host, "port": str(place.port)}
        node = {"driver": "nbd", "node-name": f"disk{number}", "server": server, "export": place.name}
        words += ["-blockdev", json.dumps(node | ({"tls-creds": "test"} if place.tls else {}))]
        words += ["-device", f"virtio-blk-pci,drive=disk{number},share-rw=on"]
    return shlex.join(words)


def _libvirt(place: NbdUri, number: int) -> str:
    disk = ElementTree.Element("disk", type="network", device="disk")
    # Shared disks must not be cached by one of those who share.
    ElementTree.SubElement(disk, "driver", name="qemu", type="raw", cache="none")
    source = ElementTree.SubElement(disk, "source", protocol="nbd", name=place.name)
    if place.unix_path is not None:
        ElementTree.SubElement(source, "host", transport="unix", socket=place.unix_path)
    else:
        ElementTree.SubElement(source, "host", name=place.host, port=str(place.port))
    if place.tls:
        source.set("tls", "yes")
        where = "its certificates belong into nbd_tls_x509_cert_dir of qemu.conf, /etc/pki/libvirt-nbd if not told"
        disk.insert(0, ElementTree.Comment(f" {where} "))
    ElementTree.SubElement(disk, "target", dev=f"vd{_letters(number)}", bus="virtio")
    ElementTree.SubElement(disk, "shareable")
    ElementTree.indent(disk)
    return ElementTree.tostring(disk, encoding="unicode")


def _nbdfuse(uri: str, disk: str) -> str:
    folder = f"mnt-{''.join(letter if letter.isalnum() else '-' for letter in disk)}"
    return f"mkdir -p {shlex.quote(folder)} && {shlex.join(['nbdfuse', f'{folder}/disk', uri])}"


def _nbd_client(place: NbdUri, number: int, certificates: str) -> str:
    device = f"/dev/nbd{number}"
    if place.unix_path is not None:
        return shlex.join(["nbd-client", "-unix", place.unix_path, device, "-name", place.name])
    words = ["nbd-client", place.host, str(place.port), device, "-name", place.name]
    if place.tls:
        for option, file in (("cacertfile", "ca-cert"), ("certfile", "client-cert"), ("keyfile", "client-key")):
            words += [f"-{option}", f"{certificates}/{file}.pem"]
        words += ["-tlshostname", place.host]
    return shlex.join(words)


def _letters(number: int) -> str:
    """Return how the kernel counts disks: a … z, aa, ab, …."""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters
