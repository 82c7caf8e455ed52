"""Probes on real file systems and databases, good and damaged. The NBD server refuses writes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import sqlite3
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_run import run_cli
from probe_world import MIB, World, ext4, overwrite, run, sparse, wait_until, world

from dr_cloud.nbd.memory import MemoryExport
from dr_cloud.nbd.server import NbdServer
from dr_cloud.nbd.table import ExportTable
from dr_cloud.recovery.probes.runner import run_probes
from dr_cloud.recovery.probes.spec import parse_spec

__all__ = ["world"]
pytestmark = [pytest.mark.system, pytest.mark.fuse]


def make_database(path: Path, rows: int) -> sqlite3.Connection:
    """Make a database whose last rows are in its write-ahead log only."""
    database = sqlite3.connect(path)
    database.execute("pragma journal_mode = wal")
    database.execute("pragma wal_autocheckpoint = 0")
    database.execute("create table orders (number integer primary key, note text)")
    database.executemany("insert into orders values (?, ?)", ((n, "x" * 200) for n in range(rows)))
    database.commit()
    database.execute("pragma wal_checkpoint(truncate)")
    database.execute("create index notes on orders (note, number)")
    database.execute("insert into orders values (?, 'in the log')", (rows,))
    database.commit()
    return database


@pytest.fixture(scope="module")
def tree(world: World) -> Path:
    folder = world.folder / "tree"
    (folder / "var").mkdir(parents=True)
    (folder / "etc").mkdir()
    (folder / "etc" / "name").write_text("production\n")
    (folder / "etc" / "name").chmod(0o600)
    (folder / "run").symlink_to("/var")
    (folder / "shadow").symlink_to("/etc/shadow")
    (folder / "up").symlink_to("../../../../../../etc/passwd")
    database = make_database(folder / "live.db", 2000)
    for end in ("", "-wal"):
        shutil.copy(f"{folder}/live.db{end}", f"{folder}/var/app.db{end}")
    database.close()
    (folder / "live.db").unlink()
    shutil.copy(folder / "var" / "app.db", folder / "var" / "bad.db")
    overwrite(folder / "var" / "bad.db", 20 * 4096, bytes(3 * 4096))
    (folder / "var" / "no.db").write_bytes(b"this is no database" * 100)
    os.mkfifo(folder / "var" / "pipe")
    return folder


@pytest.fixture(scope="module")
def good(world: World, tree: Path) -> str:
    return ext4(world.images / "good", tree).name


def dirty(world: World, name: str, kind: str, *make: object) -> str:
    """Make an image as a power failure leaves it: a file that is in its journal only."""
    image = sparse(world.images / name, 320 * MIB if kind == "xfs" else 32 * MIB)
    run(*make, image)
    mount = world.folder / f"{name}-mount"
    mount.mkdir()
    run("mount", "-o", "loop", "-t", kind, image, mount)
    try:
        for number in range(200):
            (mount / f"file-{number}").write_text(f"{number}")
        run("sync", "-f", mount)
        copy = world.images / f"{name}-dirty"
        run("cp", "--sparse=always", image, copy)
    finally:
        run("umount", mount)
    return copy.name


@pytest.fixture(scope="module")
def dirty_ext4(world: World) -> str:
    name = dirty(world, "ext4", "ext4", "mkfs.ext4", "-q", "-F", "-J", "size=4")
    assert "needs_recovery" in run("dumpe2fs", "-h", world.images / name)
    return name


@pytest.fixture(scope="module")
def dirty_xfs(world: World, require_tool: Callable[[str], str]) -> str:
    require_tool("mkfs.xfs")
    name = dirty(world, "xfs", "xfs", "mkfs.xfs", "-q", "-f")
    told = subprocess.run(["xfs_repair", "-n", "-f", world.images / name], capture_output=True, text=True, check=False)
    assert "metadata changes in a log" in told.stderr
    return name


def test_a_good_disk_passes_them_all(world: World, good: str, tree: Path) -> None:
    """R14.7: the verdict of each probe with its reason, by the command as people use it."""
    digest = hashlib.sha256(b"production\n").hexdigest()
    specs = [
        "fsck",
        "mount",
        f"files:path=/etc/name,sha256={digest},size=11,newer_than=2020-01-01T00:00:00Z",
        "files:glob=/var/*.db,count_min=3,size_min=100",
        "sqlite:path=/run/app.db,query=select count(*), max(number) from orders,expect=2001|2000",
        "entropy",
    ]
    done = run_cli("probe", "run", *specs, "--disk", f"db/root={world.uri(good)}", "--json")
    assert done.code == 0, done.stdout
    assert [(result["probe"], result["verdict"], result["reason"]) for result in done.json] == [
        ("fsck", "pass", "whole: ext4 on db/root"),
        ("mount", "pass", done.json[1]["reason"]),
        ("files", "pass", "as expected: /etc/name"),
        ("files-2", "pass", "as expected: /var/*.db"),
        ("sqlite", "pass", done.json[4]["reason"]),
        ("entropy", "pass", done.json[5]["reason"]),
    ]
    assert "ext4 on db/root mounts: 6 names in its root" in done.json[1]["reason"]
    assert "answers '2001|2000'" in done.json[4]["reason"]
    assert "/var/app.db-wal" in done.json[4]["output"]
    assert "Pass 5" in done.json[0]["output"]
    assert all(result["seconds"] > 0.01 and result["started_ns"] > 10**18 for result in done.json)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("files:path=/etc/gone", "/etc/gone: No such file or directory"),
        ("files:path=/etc/name,size=12", "/etc/name has 11 bytes, not 12"),
        ("files:path=/etc/name,sha256=" + "0" * 64, "has the SHA-256"),
        ("files:path=/etc/name,newer_than=2100-01-01T00:00:00Z", "not after 2100"),
        ("files:glob=/var/*.mdb", "0 files match /var/*.mdb"),
        # Paths are of the stack's machine: no link leads to this one's files, nor does a pipe block.
        ("files:path=/shadow", "/shadow: No such file or directory"),
        ("files:path=/up", "/up: No such file or directory"),
        ("files:path=/../../etc/passwd", "No such file or directory"),
        (f"files:path=/var/pipe,sha256={'0' * 64}", "/var/pipe is not a file"),
        ("sqlite:path=/shadow", "/shadow: No such file or directory"),
        ("sqlite:path=/var/bad.db", "/var/bad.db is damaged"),
        ("sqlite:path=/var/no.db", "/var/no.db is damaged: file is not a database"),
        ("sqlite:path=/var/app.db,query=select count(*) from orders,expect=2000", "answers '2001', not '2000'"),
        ("sqlite:path=/var/app.db,query=select * from gone", "no such table"),
        ("mount:partition=3", "no such partition"),
    ],
)
def test_what_is_not_as_expected_fails_with_the_reason(world: World, good: str, spec: str, reason: str) -> None:
    result = world.probe(spec, good)
    assert not result.passed
    assert reason in result.reason


def test_damage_is_found_by_fsck(world: World, tree: Path) -> None:
    image = ext4(world.images / "damaged", tree)
    bitmap = next(line for line in run("dumpe2fs", image).splitlines() if "Block bitmap at" in line)
    overwrite(image, int(bitmap.split("Block bitmap at ")[1].split()[0].rstrip(",")) * 1024, b"\x55" * 1024)
    result = world.probe("fsck", "damaged")
    assert result.reason == "ext4 on damaged is damaged (the check ends with 4)"
    assert "bitmap" in result.output


def test_a_journal_is_replayed_first(world: World, dirty_ext4: str, dirty_xfs: str) -> None:
    """R14.5: a disk of a past time is as after a power failure; it is whole, and none of its bytes is written."""
    before = [hashlib.sha256((world.images / name).read_bytes()).digest() for name in (dirty_ext4, dirty_xfs)]
    result = world.probe("fsck", dirty_ext4, dirty_xfs)
    assert result.reason == f"whole: ext4 on {dirty_ext4}, xfs on {dirty_xfs}"
    assert "the log is replayed" in result.output
    for name in (dirty_ext4, dirty_xfs):
        assert world.probe("files:path=/file-199,size=3", name).passed
        assert world.probe("mount", name).passed
    assert before == [hashlib.sha256((world.images / name).read_bytes()).digest() for name in (dirty_ext4, dirty_xfs)]


def test_a_damaged_xfs(world: World, dirty_xfs: str) -> None:
    shutil.copy(world.images / dirty_xfs, world.images / "bad-xfs")
    overwrite(world.images / "bad-xfs", 4096 * 8, b"\x55" * 4096 * 24)
    result = world.probe("fsck", "bad-xfs")
    assert not result.passed
    assert "bad-xfs" in result.reason


@pytest.mark.parametrize("kind", ["ext2", "ext3"])
def test_older_kinds_of_ext(world: World, tree: Path, kind: str) -> None:
    run(f"mkfs.{kind}", "-q", "-F", "-d", tree, sparse(world.images / kind, 24 * MIB))
    assert world.probe("fsck", kind).reason == f"whole: {kind} on {kind}"
    assert world.probe("files:path=/etc/name,size=11", kind).passed
    assert world.probe("mount", kind).passed


async def test_disks_of_the_products_own_server(world: World, good: str, tmp_socket_dir: Path) -> None:
    """What a probe writes does not reach the stack, even where the stack would take it."""
    content = (world.images / good).read_bytes()
    export = MemoryExport("root", len(content))
    export.pwrite(0, memoryview(content))
    table = ExportTable()
    table.add(export)
    server = NbdServer(table)
    await server.start(unix_path=str(tmp_socket_dir / "nbd.sock"))
    try:
        disks = {"root": server.uris("root")[0]}
        specs = [parse_spec(text) for text in ("mount", "fsck", "entropy", "sqlite:path=/var/app.db")]
        results = await asyncio.to_thread(run_probes, specs, disks, world.work)
    finally:
        await server.close(1)
    assert [result.reason for result in results if not result.passed] == []
    assert b"".join(map(bytes, export.pread(0, len(content)))) == content


def test_mounting_can_be_forbidden(world: World, dirty_xfs: str, good: str) -> None:
    """The node's kernel then reads no file system of a tenant's; what needs it says so."""
    disks = ("--disk", f"x={world.uri(dirty_xfs)}", "--disk", f"e={world.uri(good)}")
    done = run_cli("probe", "run", "fsck:disk=e", "fsck:disk=x", "mount:disk=e", *disks, "--no-kernel-mounts", "--json")
    assert done.code == 1
    assert [result["verdict"] for result in done.json] == ["pass", "fail", "fail"]
    assert all("mounting is switched off" in result["reason"] for result in done.json[1:])


def test_partitions_are_found_and_checked(world: World, tree: Path, require_tool: Callable[[str], str]) -> None:
    require_tool("mkfs.vfat")
    disk = sparse(world.images / "parts", 80 * MIB)
    table = (
        "label: gpt\nstart=2048, size=32768, type=U\nstart=34816, size=49152, type=L\nstart=83968, size=2048, type=S\n"
    )
    run("sfdisk", "-q", disk, input=table)
    fat, ext = sparse(world.folder / "fat", 16 * MIB), ext4(world.folder / "ext", tree)
    run("mkfs.vfat", "-F", "16", fat)
    swap = sparse(world.folder / "swap", MIB)
    run("mkswap", swap)
    for path, start in ((fat, 2048), (ext, 34816), (swap, 83968)):
        overwrite(disk, start * 512, path.read_bytes())
    result = world.probe("fsck", "parts")
    assert result.reason == "whole: vfat on parts partition 1, ext4 on parts partition 2"
    assert "not checked: swap on parts partition 3" in result.output
    assert "several file systems" in world.probe("mount", "parts").reason
    mounted = world.probe("mount:partition=1", "parts")
    if "vfat" in Path("/proc/filesystems").read_text():
        assert mounted.passed
    else:
        assert "unknown filesystem type 'vfat'" in mounted.reason
    assert world.probe("files:partition=2,path=/etc/name", "parts").passed
    assert "swap on parts partition 3" in world.probe("mount:partition=3", "parts").reason
    # The two copies of the allocation table differ.
    overwrite(disk, 2048 * 512 + 4 * 512 + 20, b"\x33" * 40)
    bad = world.probe("fsck:partition=1", "parts")
    assert bad.reason == "vfat on parts partition 1 is damaged (the check ends with 1)", bad.output


def test_what_cannot_be_checked_or_reached_is_no_pass(world: World) -> None:
    sparse(world.images / "blank", 8 * MIB)
    assert "no file system that can be checked" in world.probe("fsck", "blank").reason
    assert "no file system that can be mounted: unknown on blank" in world.probe("mount", "blank").reason
    assert world.probe("entropy", "blank").reason == "blank is all but empty"
    assert "refuses export 'not-there'" in world.probe("fsck", "not-there").reason


def test_an_encrypted_disk_is_seen(world: World, good: str) -> None:
    (world.images / "random").write_bytes(os.urandom(12 * MIB))
    result = world.probe("entropy", good, "random")
    assert not result.passed
    assert "random: 1536 of 1536 blocks look random (100%), at most 80% expected" in result.reason
    assert world.probe("entropy:share_max=1", "random").passed
    # Half of it encrypted, a third of the samples: the share is that of all blocks that are not empty.
    mixed = sparse(world.images / "mixed", 12 * MIB)
    overwrite(mixed, 0, b"text that is no cipher's " * (5 * MIB // 25))
    overwrite(mixed, 5 * MIB, os.urandom(5 * MIB))
    said = world.probe("entropy:share_max=0.6", "mixed")
    assert said.passed
    assert said.reason == "mixed: 640 of 1280 blocks look random (50%)"
    assert not world.probe("entropy:share_max=0.4,samples=100", "mixed").passed


def test_a_program_of_ones_own(world: World, good: str) -> None:
    """It gets each disk's address, may write to it, and keeps files; the stack's disk is not changed."""
    script = world.folder / "check"
    script.write_text(
        "#!/bin/sh -e\n"
        'test "$1" = deep\n'
        'nbdcopy "$DRC_DISK_GOOD_URI" - | head -c 2048 | sha256sum\n'
        'cp "$DRC_DISKS" "$DRC_ARTEFACTS/disks.json"\n'
        'qemu-io -f raw -c "write -P 7 0 1M" -c "read -P 7 0 1M" "$DRC_DISK_GOOD_URI" > written\n'
        "if grep -q failed written; then exit 9; fi\n"
        'exit "${2:-0}"\n'
    )
    script.chmod(0o755)
    result = world.probe(f"command:{script} deep", good)
    assert result.passed
    assert hashlib.sha256((world.images / good).read_bytes()[:2048]).hexdigest() in result.output
    assert [made.path for made in result.artefacts] == ["command/disks.json"]
    assert list(json.loads((world.work / result.artefacts[0].path).read_text())) == [good]
    assert world.probe(f"command:{script} deep 3", good).reason == f"{script} ends with 3"
    assert world.probe("command:/nowhere/prog", good).reason == "there is no program /nowhere/prog on this node"
    assert "killed by signal 11" in world.probe("command:/bin/sh -c 'kill -SEGV $$'", good).reason


def test_disks_with_tls_are_read_with_the_certificates_of_the_address(world: World, good: str) -> None:
    folder = world.folder / "tls"
    folder.mkdir()
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    run(
        "openssl",
        "req",
        "-x509",
        *key,
        "-keyout",
        folder / "ca-key.pem",
        "-out",
        folder / "ca-cert.pem",
        "-subj",
        "/CN=ca",
    )
    for role in ("server", "client"):
        request = folder / f"{role}.csr"
        run("openssl", "req", *key, "-keyout", folder / f"{role}-key.pem", "-out", request, "-subj", "/CN=localhost")
        authority = ("-CA", folder / "ca-cert.pem", "-CAkey", folder / "ca-key.pem", "-CAcreateserial")
        extensions = folder / "names"
        extensions.write_text("subjectAltName=DNS:localhost\n")
        run("openssl", "x509", "-req", "-in", request, *authority, "-out", folder / f"{role}-cert.pem", "-days", "2",
            "-extfile", extensions)  # fmt: skip
    port = 20000 + os.getpid() % 20000
    server = subprocess.Popen(
        ["nbdkit", "--exit-with-parent", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), "--tls=require",
         "--tls-verify-peer", f"--tls-certificates={folder}", "file", world.images / good]
    )  # fmt: skip
    try:
        uri = f"nbds://localhost:{port}/?tls-certificates={folder}"
        listening = f":{port:04X} 00000000:0000 0A"
        assert wait_until(lambda: listening in Path("/proc/net/tcp").read_text())
        done = run_cli(
            "probe", "run", "fsck", "command:/bin/sh -c 'nbdinfo $DRC_DISK_D_URI'", "--disk", f"d={uri}", "--json"
        )
    finally:
        server.kill()
        server.wait()
    assert [result["verdict"] for result in done.json] == ["pass", "pass"], done.stdout
    assert struct.pack("<H", 0xEF53) == (world.images / good).read_bytes()[1080:1082]
