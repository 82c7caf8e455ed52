"""Probes as they are named and listed; plug-ins; what is kept of an output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dr_cloud.model.errors import InvalidError
from dr_cloud.model.probe import ProbeSpec
from dr_cloud.recovery.probes.bench import MOUNT_OPTIONS
from dr_cloud.recovery.probes.command import variable
from dr_cloud.recovery.probes.output import Output
from dr_cloud.recovery.probes.probe import kinds, load_kind, make_probe
from dr_cloud.recovery.probes.runner import run_probes
from dr_cloud.recovery.probes.spec import parse_spec, read_specs, with_names

DISKS = {"root": "nbd+unix:///root?socket=/nowhere"}


def test_a_short_text_names_a_probe():
    assert parse_spec("fsck") == ProbeSpec(kind="fsck")
    assert parse_spec("fsck:disk=db/*,timeout=9,output=10,name=a") == ProbeSpec(
        kind="fsck", name="a", disk="db/*", timeout_seconds=9, output_bytes_max=10
    )
    text = "sqlite:path=/a b,query=select a, b from t where c = 1,expect=1|2"
    assert parse_spec(text).parameters == {
        "path": "/a b",
        "query": "select a, b from t where c = 1",
        "expect": "1|2",
    }
    assert parse_spec("command:/bin/prog 'a b' name=x,disk=y").parameters == {
        "argv": ["/bin/prog", "a b", "name=x,disk=y"]
    }


def test_a_file_lists_probes(tmp_path: Path):
    listed = ["fsck", {"kind": "files", "parameters": {"expect": [{"path": "/a"}, {"glob": "/b/*"}]}}]
    path = tmp_path / "probes.json"
    path.write_text(json.dumps(listed))
    assert [spec.kind for spec in read_specs(path)] == ["fsck", "files"]
    path = tmp_path / "probes.yaml"
    path.write_text("- fsck:timeout=5\n- kind: sqlite\n  timeout_seconds: 3\n  parameters: {path: /a}\n")
    assert [spec.timeout_seconds for spec in read_specs(path)] == [5, 3]
    assert all(make_probe(spec) for spec in read_specs(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "kind"),
        ("fsck:quick", "not name=value"),
        ("fsck:timeout=0", "timeout_seconds"),
        ("fsck:timeout=x", "timeout_seconds"),
        ("command:'a", "not a command line"),
        ("command:", "argv"),
        ("nothing", "there is no probe"),
        ("fsck:depth=3", "depth"),
        ("sqlite", "path"),
        ("sqlite:path=/a,expect=1", "needs a query"),
        ("files", "say which files"),
        ("files:path=/a,glob=/b", "not both"),
        ("files:path=/a,sha256=12", "sha256"),
        ("files:path=/a,newer_than=today", "RFC 3339"),
        ("boot:match=(", "no regular expression"),
        ("entropy:share_max=2", "share_max"),
        ("fsck:disk=data*", "names disk 'data*'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(text: str, said: str, tmp_path: Path):
    with pytest.raises(InvalidError) as caught:
        run_probes([parse_spec("entropy"), parse_spec(text)], DISKS, tmp_path)
    assert said in f"{caught.value}. {caught.value.remedy}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "fsck: 1", "- fsck: 1", "- [fsck]", "- {kind: fsck, depth: 2}", "- 3"])
def test_a_file_that_is_no_list_of_probes(text: str, tmp_path: Path):
    (tmp_path / "probes").write_text(text)
    with pytest.raises(InvalidError):
        read_specs(tmp_path / "probes")
    with pytest.raises(InvalidError):
        read_specs(tmp_path / "missing")


def test_every_probe_gets_a_name():
    specs = [parse_spec(text) for text in ("fsck", "fsck:name=fsck-2", "fsck", "boot")]
    assert [spec.name for spec in with_names(specs)] == ["fsck", "fsck-2", "fsck-3", "boot"]
    with pytest.raises(InvalidError, match="two probes"):
        with_names([parse_spec("fsck:name=a"), parse_spec("boot:name=a")])


def test_every_kind_says_what_it_does():
    assert {"boot", "command", "entropy", "files", "fsck", "mount", "postgres", "sqlite"} <= set(kinds())
    assert all((load_kind(kind).__doc__ or "").strip() for kind in kinds())


def test_a_plug_in_cannot_take_the_place_of_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dr_cloud.probes]\nfsck = other:Fsck\nown = other:Own\ngone = other:Gone\n")
    (tmp_path / "other.py").write_text("class Own:\n    def __init__(self, depth=1): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert kinds()["fsck"] == "dr_cloud.recovery.probes.fsck:FsckProbe"
    make_probe(parse_spec("own:depth=2"))
    with pytest.raises(InvalidError, match="unexpected keyword"):
        make_probe(parse_spec("own:width=2"))
    with pytest.raises(InvalidError, match="cannot be loaded"):
        make_probe(parse_spec("gone"))


def test_no_superblock_makes_this_kernel_panic():
    """A guest's ext or FAT may ask for a panic on errors: the mount's own option goes first. XFS has no such wish."""
    assert {kind for kind, (_, options) in MOUNT_OPTIONS.items() if "errors=remount-ro" in options} == {
        *("ext2", "ext3", "ext4", "vfat")
    }


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_an_output_keeps_its_beginning_and_its_end(piece: int):
    output = Output(10)
    data = bytes(range(ord("a"), ord("z") + 1))
    for at in range(0, len(data), piece):
        output.take(data[at : at + piece])
    assert output.cut
    assert output.text() == "abcde\n… 16 bytes left out …\nvwxyz"


def test_an_output_that_fits_is_kept_whole():
    output = Output(10)
    output.take(b"0123456")
    output.take(b"789")
    assert (output.text(), output.cut) == ("0123456789", False)
    output.take(b"!")
    assert output.cut
    nothing = Output(0)
    nothing.take(b"x")
    assert nothing.cut
    raw = Output(100)
    raw.take(b"\x1b[31m\xff\r\n\tok")
    assert raw.text() == "\ufffd[31m\ufffd\n\tok"


def test_a_disk_has_a_variable():
    assert variable("erp-db/root") == "DRC_DISK_ERP_DB_ROOT_URI"
