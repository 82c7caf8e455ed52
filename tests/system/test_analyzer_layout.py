"""The analyzer's layout of real disks, made by the systems' own tools, beside what blkid says of them."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from zlib import crc32

import pytest
from analyzer_feed import BLOCK, feed_image, make_analyzer

MIB = 1 << 20
UUID = "6b1c5f0e-3a52-4c55-9d5a-0f5b4a1f9e01"
pytestmark = pytest.mark.system


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


def blkid(path, offset=0, size=None):
    """Return what blkid finds by looking at the bytes alone."""
    place = ["-O", offset] + (["-S", size] if size else [])
    lines = run("blkid", "-p", *place, "-o", "export", path).splitlines()
    return dict(line.replace("\\", "").split("=", 1) for line in lines if "=" in line)


def sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)
    return path


def make_ext(kind):
    return lambda path: run(f"mkfs.{kind}", "-q", "-F", "-L", "data-label", "-U", UUID, path)


def make_luks(path):
    fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--batch-mode"]
    run("cryptsetup", "luksFormat", *fast, "--uuid", UUID, "--label", "vault", path, "-", input="secret")


def make_luks1(path):
    fast = ["--type", "luks1", "--pbkdf-force-iterations", "1000", "--batch-mode"]
    run("cryptsetup", "luksFormat", *fast, "--uuid", UUID, path, "-", input="secret")


def make_lvm(path):
    """The label of a physical volume, byte by byte: pvcreate wants a block device of the kernel's."""
    body = struct.pack("<II8s", 0, 32, b"LVM2 001")[4:]
    body += b"abcdEFGHijklMNOPqrstUVWXyz012345" + struct.pack("<Q", path.stat().st_size)
    body = body.ljust(512 - 20, b"\0")

    crc = 0xF597A6CF
    table = [0x0, 0x1DB71064, 0x3B6E20C8, 0x26D930AC, 0x76DC4190, 0x6B6B51F4, 0x4DB26158, 0x5005713C]
    table += [0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C, 0x9B64C2B0, 0x86D3D2D4, 0xA00AE278, 0xBDBDF21C]
    for byte in body:
        crc ^= byte
        crc = (crc >> 4) ^ table[crc & 15]
        crc = (crc >> 4) ^ table[crc & 15]
    with path.open("r+b") as file:
        file.seek(512)
        file.write(b"LABELONE" + struct.pack("<QI", 1, crc) + body)


FILE_SYSTEMS = {
    "ext2": ("mkfs.ext2", 16, make_ext("ext2")),
    "ext3": ("mkfs.ext3", 32, make_ext("ext3")),
    "ext4": ("mkfs.ext4", 32, make_ext("ext4")),
    "xfs": ("mkfs.xfs", 400, lambda path: run("mkfs.xfs", "-q", "-L", "data-label", "-m", f"uuid={UUID}", path)),
    "btrfs": ("mkfs.btrfs", 160, lambda path: run("mkfs.btrfs", "-q", "-L", "data-label", "-U", UUID, path)),
    "fat16": ("mkfs.vfat", 32, lambda path: run("mkfs.vfat", "-F", "16", "-n", "DATA", "-i", "1A2B3C4D", path)),
    "fat32": ("mkfs.vfat", 64, lambda path: run("mkfs.vfat", "-F", "32", "-n", "DATA", "-i", "1A2B3C4D", path)),
    "fat": ("mkfs.vfat", 4, lambda path: run("mkfs.vfat", path)),
    "exfat": ("mkfs.exfat", 32, lambda path: run("mkfs.exfat", "-L", "data-label", path)),
    "ntfs": ("mkfs.ntfs", 32, lambda path: run("mkfs.ntfs", "-q", "-F", "-f", "-L", "data label", path)),
    "swap": ("mkswap", 16, lambda path: run("mkswap", "-L", "pages", "-U", UUID, path)),
    "luks2": ("cryptsetup", 32, make_luks),
    "luks1": ("cryptsetup", 32, make_luks1),
    "lvm": ("blkid", 16, make_lvm),
}


def check_told(found, told):
    assert found is not None
    assert found.type == told["TYPE"]
    assert found.uuid == told.get("UUID", "")
    assert found.label == told.get("LABEL", "").strip()


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_a_whole_disk_is_known_as_blkid_knows_it(kind, tmp_path, require_tool):
    """R2: file system, label, UUID and age of a disk without partitions."""
    program, mib, make = FILE_SYSTEMS[kind]
    require_tool(program), require_tool("blkid")
    path = sparse(tmp_path / "disk", mib * MIB)
    before = time.time()
    make(path)
    analyzer = make_analyzer(path.stat().st_size)
    feed_image(analyzer, path)
    disk = analyzer.report().disks[0]
    assert (disk.table, disk.partitions) == ("", [])
    check_told(disk.file_system, blkid(path))
    if kind in ("ext2", "ext3", "ext4", "ntfs", "fat16", "fat32"):
        # FAT counts in steps of two seconds, in the machine's zone.
        zone = time.localtime().tm_gmtoff if kind.startswith("fat") else 0
        assert before - 3 <= disk.file_system.created_ns / 1e9 - zone <= time.time() + 3
    if kind not in ("luks1", "luks2", "swap", "lvm"):
        assert 0.9 * path.stat().st_size <= disk.file_system.size_bytes <= path.stat().st_size


GPT = f"""label: gpt
label-id: {UUID}
start=2048, size=8192, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="EFI System"
size=131072, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name="root — Würzel", uuid=0A1B2C3D-0000-4000-8000-000000000002
size=32768, type=0657FD6D-A4AB-43C4-84E5-0933C84B4F4F, name="swap"
size=819200, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name="data"
"""
MBR = """label: dos
label-id: 0xcafe0001
start=63, size=65473, type=7, bootable
start=65536, size=262144, type=5
start=67584, size=65536, type=83
start=135168, size=32768, type=82
start=327680, type=c
"""
PARTITIONED = {
    "gpt": (600, GPT, {1: "fat", 2: "ext4", 3: "swap", 4: "xfs"}),
    "mbr": (256, MBR, {1: "ntfs", 5: "ext4", 6: "swap", 4: "fat32"}),
}


def sfdisk_partitions(path):
    """Return (number, start, size, type, uuid, name) of each partition, as blkid sees the table."""
    entries = []
    for line in run("sfdisk", "--dump", path).splitlines():
        if line.startswith(str(path)):
            head, _, rest = line.partition(" : ")
            fields = {k.strip(): v.strip().strip('"') for k, _, v in (part.partition("=") for part in rest.split(","))}
            start, size = int(fields["start"]) * 512, int(fields["size"]) * 512
            entries.append((int(head.removeprefix(str(path))), start, size, fields))
    return entries


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory, require_tool):
    """Return a function that makes a partitioned disk with a file system in each partition."""
    made = {}

    def make(kind):
        if kind in made:
            return made[kind]
        for program in ("sfdisk", "mkfs.vfat", "mkfs.ext4", "mkfs.xfs", "mkfs.ntfs", "mkswap", "blkid"):
            require_tool(program)
        mib, script, contents = PARTITIONED[kind]
        path = sparse(tmp_path_factory.mktemp("disks") / kind, mib * MIB)
        run("sfdisk", "--quiet", path, input=script)
        for number, start, size, _ in sfdisk_partitions(path):
            if number in contents:
                part = sparse(path.with_suffix(f".{number}"), size)
                FILE_SYSTEMS[contents[number]][2](part)
                run("dd", f"if={part}", f"of={path}", "bs=64K", "conv=notrunc,sparse", f"seek={start}",
                    "oflag=seek_bytes")  # fmt: skip
                part.unlink()
        made[kind] = path
        return path

    return make


def check_partitions(disk, path, contents):
    entries = sfdisk_partitions(path)
    assert [p.number for p in disk.partitions] == [number for number, *_ in entries]
    for partition, (number, start, size, fields) in zip(disk.partitions, entries, strict=True):
        assert (partition.start_bytes, partition.size_bytes) == (start, size)
        assert partition.type == (fields["type"].lower() if "name" in fields else f"0x{int(fields['type'], 16):02x}")
        # The dump writes what is not ASCII as escaped bytes.
        assert partition.name == fields.get("name", "").encode().decode("unicode_escape").encode("latin-1").decode()
        assert partition.uuid == fields.get("uuid", partition.uuid).lower()
        if number in contents:
            check_told(partition.file_system, blkid(path, start, size))


@pytest.mark.parametrize("kind", PARTITIONED)
@pytest.mark.parametrize("order", ["up", "down", "small"])
def test_partitions_are_known_as_sfdisk_and_blkid_know_them(kind, order, partitioned):
    """R2: the partition table, and what lies in each partition, in whatever order the blocks come by."""
    path = partitioned(kind)
    analyzer = make_analyzer(path.stat().st_size)
    feed_image(analyzer, path, blocks=256 if order != "small" else 4, downwards=order == "down")
    if order == "down":
        # The table leads to a superblock, that to a label: from behind, each takes another write.
        feed_image(analyzer, path, downwards=True)
        feed_image(analyzer, path, downwards=True)
    disk = analyzer.report().disks[0]
    assert (disk.table, disk.file_system) == (kind, None)
    assert disk.table_uuid == {"gpt": UUID, "mbr": "cafe0001"}[kind]
    check_partitions(disk, path, PARTITIONED[kind][2])


def test_a_layout_that_changes_is_followed_and_outlives_a_restart(partitioned):
    """R2: a disk that is formatted, wiped and partitioned while it replicates; and knowledge over a restart."""
    path = partitioned("gpt")
    analyzer = make_analyzer(path.stat().st_size)
    feed_image(analyzer, path)
    report = analyzer.report()
    again = make_analyzer(path.stat().st_size)
    again.restore(analyzer.state())
    assert again.report().disks == report.disks

    start = report.disks[0].partitions[1].start_bytes
    again.zeroed(0, start // BLOCK, 16, 2 * 10**18)
    assert [p.file_system is None for p in again.report().disks[0].partitions] == [False, True, False, False]
    again.zeroed(0, 0, 64, 3 * 10**18)
    assert (again.report().disks[0].table, again.report().disks[0].partitions) == ("", [])
    feed_image(again, path, time_ns=4 * 10**18)
    disk = again.report().disks[0]
    assert (disk.table_uuid, disk.partitions) == (report.disks[0].table_uuid, report.disks[0].partitions)


def test_damage_to_a_table_is_not_believed(partitioned):
    """R2: a GPT whose checksum is wrong is none."""
    data = bytearray(partitioned("gpt").open("rb").read(64 << 10))
    assert crc32(data[512 : 512 + 16] + bytes(4) + data[512 + 20 : 512 + 92]) == struct.unpack_from("<I", data, 528)[0]
    data[1024 + 56] ^= 1
    analyzer = make_analyzer(600 * MIB)
    analyzer.observe(0, 0, memoryview(bytes(data)), 1)
    assert analyzer.report().disks[0].table == ""


def test_the_system_of_a_linux_disk_is_known(tmp_path, require_tool):
    """R2: operating system and kernel, from files that a real file system holds."""
    require_tool("mkfs.ext4")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "boot").mkdir()
    release = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\n'
    (root / "etc" / "os-release").write_text(release)
    (root / "etc" / "container").write_text('NAME="Alpine Linux"\nID=alpine\nVERSION_ID=3.19.1\n')
    # A kernel's image: the head that boot loaders read, and the text it points to.
    kernel = bytearray(os.urandom(300_000))
    kernel[:2], kernel[0x202:0x206], kernel[0x20E:0x210] = b"MZ", b"HdrS", struct.pack("<H", 0x3A00)
    text = b"6.1.0-18-amd64 (debian-kernel@lists.example) #1 SMP PREEMPT_DYNAMIC\0"
    kernel[0x3C00 : 0x3C00 + len(text)] = text
    (root / "boot" / "vmlinuz").write_bytes(kernel)
    path = sparse(tmp_path / "disk", 64 * MIB)
    run("mkfs.ext4", "-q", "-F", "-b", "4096", "-d", root, path)
    analyzer = make_analyzer(path.stat().st_size)
    feed_image(analyzer, path)
    system = analyzer.report().system
    assert (system.family, system.name) == ("linux", "Debian GNU/Linux 12 (bookworm)")
    assert (system.id, system.version, system.kernel) == ("debian", "12", "6.1.0-18-amd64")
    assert system.evidence == ["os-release", "kernel image"]
