"""A test's disks for machines elsewhere: outside clients with its credential, and all that is refused."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from node_world import DISK_NAME, LETTER, Node, node, nothing_left

from dr_cloud.actors.stack import StackProcess
from dr_cloud.model.errors import DrCloudError, NotFoundError
from dr_cloud.model.recovery import RecoveryTest, TestCredential
from dr_cloud.nbd.client import NbdClient
from dr_cloud.nbd.tls import client_context
from dr_cloud.recovery.attach import Attachment, attach
from dr_cloud.seal.identity import fingerprint

__all__ = ["node", "nothing_left"]
pytestmark = [pytest.mark.system, pytest.mark.fuse]
Run = Callable[..., str]
HOST = "127.0.0.1"


@pytest.fixture
def run(require_tool: Callable[[str], str], tmp_path: Path) -> Run:
    def call(program: str, *arguments: object, fails: bool = False) -> str:
        command = [require_tool(program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path, check=False)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


def record(test: str, stack: StackProcess) -> RecoveryTest:
    opened = stack.opened()
    assert opened is not None
    return RecoveryTest(
        id=test, enterprise="acme", vpg="shop", target="dc1", kind="test", task="1", status="running", asked_ns=1,
        started_ns=1, uris=opened.uris, remote=True,
    )  # fmt: skip


def attached(test: str, stack: StackProcess, folder: Path) -> tuple[TestCredential, Attachment]:
    """Do as a client does: ask for the credential, write its files."""
    credential = stack.credential(test)
    assert credential is not None
    attachment = attach(record(test, stack), credential, folder)
    folder.mkdir()
    for name, text in attachment.files.items():
        (folder / name).write_text(text)
    return credential, attachment


def test_outside_clients_read_and_write(node: Node, run: Run, tmp_path: Path) -> None:
    """R14.3, R14.4: libnbd's tools, QEMU's, and ours, from the texts that are given to people."""
    stack = node.open("remote", HOST)
    _, attachment = attached("remote", stack, tmp_path / "certs")
    uri = attachment.uris[DISK_NAME]
    told = json.loads(run("nbdinfo", "--json", uri))
    assert told["TLS"] is True
    assert told["exports"][0]["can_multi_conn"] is True and told["exports"][0]["export-size"] == 8 << 20
    run("nbdcopy", uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == node.history.disk_at(0, node.history.time_ns)
    assert LETTER in (tmp_path / "copy").read_bytes()
    words = shlex.split(attachment.qemu)
    blockdev = json.loads(words[words.index("-blockdev") + 1])
    image = "json:" + json.dumps({"driver": "raw", "file": {k: v for k, v in blockdev.items() if k != "node-name"}})
    creds = words[words.index("-object") + 1]
    run("qemu-img", "info", "--object", creds, image)
    run("qemu-io", "--object", creds, "-c", "write -P 7 4M 64k", "-c", "flush", image)
    with NbdClient.connect(uri) as client:
        assert client.pread(4 << 20, 64 << 10) == b"\7" * (64 << 10)
    run("qemu-img", "compare", "--object", creds, image, tmp_path / "copy", fails=True)


def test_the_qemu_line_starts_a_machine_with_the_disk(node: Node, run: Run, tmp_path: Path) -> None:
    """R14.4: as it is printed; here it is stopped before its first instruction, and asked for its disks."""
    stack = node.open("machine", HOST)
    _, attachment = attached("machine", stack, tmp_path / "certs")
    words = shlex.split(attachment.qemu)
    asked = "".join(json.dumps({"execute": it}) for it in ("qmp_capabilities", "query-named-block-nodes", "quit"))
    done = subprocess.run(
        [*words, "-S", "-display", "none", "-qmp", "stdio", "-accel", "tcg"],
        input=asked, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    (disk,) = next(answer["return"] for answer in answers if answer.get("return"))
    assert (disk["node-name"], disk["drv"], disk["image"]["virtual-size"]) == ("disk0", "nbd", 8 << 20)


def test_two_clients_see_each_others_writes_after_a_flush(node: Node, tmp_path: Path) -> None:
    """R14.9: over TLS and over the unix socket; and a flush of one holds for what the other wrote."""
    stack = node.open("shared", HOST)
    credential, attachment = attached("shared", stack, tmp_path / "certs")
    local = record("shared", stack).uris[DISK_NAME][0]
    assert local.startswith("nbd+unix:") and credential.uris[DISK_NAME][0].startswith(f"nbds://{HOST}:")
    with (
        NbdClient.connect(attachment.uris[DISK_NAME]) as one,
        NbdClient.connect(attachment.uris[DISK_NAME]) as two,
        NbdClient.connect(local) as three,
    ):
        for number in range(50):
            writer, readers = [(one, (two, three)), (two, (three, one)), (three, (one, two))][number % 3]
            data = os.urandom(4096)
            writer.pwrite(number * 512, data)
            readers[0].flush()
            assert all(reader.pread(number * 512, 4096) == data for reader in readers)


def test_all_others_are_refused(node: Node, run: Run, tmp_path: Path) -> None:
    """R11, R14.9: no certificate, another test's, plain NBD; and who holds one is not fooled by another server."""
    stack, other = node.open("mine", HOST), node.open("other", HOST)
    _, attachment = attached("mine", stack, tmp_path / "mine")
    credential, rival = attached("other", other, tmp_path / "other")
    uri, plain_uri = attachment.uris[DISK_NAME], attachment.uris[DISK_NAME].partition("?")[0]
    run("nbdinfo", uri)
    # The right authority, the wrong client: each in a folder of its own.
    nobody, stranger = tmp_path / "nobody", tmp_path / "stranger"
    for folder, files in ((nobody, {}), (stranger, rival.files)):
        folder.mkdir()
        for name, text in (files | {"ca-cert.pem": attachment.files["ca-cert.pem"]}).items():
            (folder / name).write_text(text)
        run("nbdinfo", f"{plain_uri}?tls-certificates={folder}", fails=True)
        with pytest.raises(OSError):
            NbdClient.connect(plain_uri, tls=client_context(folder))
    run("nbdinfo", plain_uri.replace("nbds:", "nbd:"), fails=True)
    run("nbdinfo", "--list", plain_uri.replace("nbds:", "nbd:"), fails=True)
    run("qemu-img", "info", plain_uri.replace("nbds:", "nbd:"), fails=True)
    assert "certificate" in run("nbdinfo", f"{plain_uri}?tls-certificates={tmp_path / 'other'}", fails=True).lower()
    assert fingerprint(credential.ca) != fingerprint(attachment.files["ca-cert.pem"])
    run("nbdinfo", uri)


def test_the_credential_ends_with_the_test(node: Node, run: Run, tmp_path: Path) -> None:
    """R14.5: it is in no file and no text of the node, and the next test of the same process has another."""
    stack = node.open("first", HOST)
    credential, attachment = attached("first", stack, tmp_path / "certs")
    key = credential.key.splitlines()[2]
    assert key not in repr(credential) + repr(attachment) + repr(stack.opened())
    for path in node.settings.work_dir.parent.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes()
    stack.close()
    run("nbdinfo", attachment.uris[DISK_NAME], fails=True)
    with pytest.raises(NotFoundError):
        stack.credential("first")
    assert node.open("second") is stack
    assert stack.credential("second") is None
    assert all(uri.startswith("nbd+unix:") for uri in record("second", stack).uris[DISK_NAME])


def test_a_host_that_is_not_this_machines_is_said(node: Node) -> None:
    stack = StackProcess(node.settings)
    for host, why in (("192.0.2.1", "192.0.2.1"), ("no host", "no host")):
        with pytest.raises(DrCloudError, match=why) as caught:
            stack.open("nowhere", node.plan, node.store_url, host=host)
        assert caught.value.remedy
    assert stack.opened() is None
    stack.open("here", node.plan, node.store_url)
    stack.close()
