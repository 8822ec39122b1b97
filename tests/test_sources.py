"""What data.sources promises: every file below a folder once, by a name of one line, or the reason why not."""

import io
import os
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from data import sources
from data.sources import DAMAGED, LINK, SPARSE, SPECIAL, TRUNCATED, Item, Unusable, find_items, foreign, line, read_file

BODIES = {f"{i:02d}.png": bytes([i + 1]) * (300 + 200 * i) for i in range(8)}


def outcome(folder: Path) -> dict[str, bytes | str]:
    """The bytes of each item, or the reason why there are none."""
    found = {}
    for item in find_items(folder):
        assert item.name not in found and item.name.encode().decode().splitlines() == [item.name]
        try:
            found[item.name] = read_file(item)
        except Unusable as reason:
            found[item.name] = str(reason)
    return found


def packed(format: int = tarfile.PAX_FORMAT, long: bool = False) -> tuple[bytearray, list[int]]:
    """A .tar of BODIES, and where each member begins."""
    out, starts = io.BytesIO(), []
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, body in BODIES.items():
            member = tarfile.TarInfo("long/" * 60 * long + name)
            member.size = len(body)
            starts.append(tar.offset)
            tar.addfile(member, io.BytesIO(body))
    return bytearray(out.getvalue()), starts


def whole(*lost: int, name: str = "a.tar") -> dict[str, bytes]:
    return {f"{name}/{key}": body for i, (key, body) in enumerate(BODIES.items()) if i not in lost}


@pytest.mark.parametrize("place", [0, 3, 7])
@pytest.mark.parametrize("damage", ["checksum", "zeros", "rubbish"])
def test_a_damaged_header_costs_its_member_alone_and_is_named(place, damage, tmp_path):
    data, starts = packed()
    at = starts[place]
    if damage == "checksum":
        data[at + 148] ^= 0x41
    else:
        data[at : at + 512] = bytes(512) if damage == "zeros" else bytes(range(256)) * 2
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.png").write_bytes(b"after it")
    assert outcome(tmp_path) == whole(place) | {f"a.tar at byte {at}": DAMAGED, "b.png": b"after it"}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_damage_inside_the_headers_of_a_long_name_is_survived(format, tmp_path):
    data, starts = packed(format, long=True)
    for at in (starts[2], starts[4] + 512, starts[6] + 1024):  # the header before, its content, the header proper
        data[at + 140 : at + 160] = b"\xff" * 20
    (tmp_path / "a.tar").write_bytes(data)
    found = outcome(tmp_path)
    names = {name.split("/")[-1] for name, body in found.items() if isinstance(body, bytes)}
    assert names >= {"00.png", "01.png", "03.png", "05.png", "07.png"} and "06.png" not in names
    assert [reason for reason in found.values() if isinstance(reason, str)].count(DAMAGED) >= 2


def test_a_cut_tar_names_what_is_cut(tmp_path):
    data, starts = packed()
    end = starts[5] + 512 + len(BODIES["05.png"])
    cuts = {
        starts[5]: f"a.tar at byte {starts[5]}",  # between two members: only the end of the file is missing
        starts[5] + 100: f"a.tar at byte {starts[5]}",  # inside a header
        end - 1: "a.tar/05.png",  # inside a member
    }
    for length, name in cuts.items():
        (tmp_path / "a.tar").write_bytes(data[:length])
        assert outcome(tmp_path) == whole(5, 6, 7) | {name: TRUNCATED}


def test_zeros_after_the_last_member_are_the_end_and_zeros_between_two_are_damage(tmp_path):
    data, _ = packed()
    (tmp_path / "a.tar").write_bytes(data)
    assert outcome(tmp_path) == whole()
    (tmp_path / "a.tar").write_bytes(data + bytes(50_000))
    assert outcome(tmp_path) == whole()
    (tmp_path / "a.tar").write_bytes(bytes(10_240))
    assert outcome(tmp_path) == {}
    other, _ = packed(long=True)
    (tmp_path / "a.tar").write_bytes(data + other)
    found = outcome(tmp_path)
    assert [reason for reason in found.values() if isinstance(reason, str)] == [DAMAGED]
    assert len(found) == 2 * len(BODIES) + 1


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_members_are_named(format, tmp_path):
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "a.bmp", "wb") as file:
        file.write(b"BM")
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "in" / "b.bmp").write_bytes(b"plain")
    (tmp_path / "out").mkdir()
    tar = tmp_path / "out" / "a.tar"
    pack = ["tar", f"--format={format}", "-C", tmp_path / "in", "-S", "-cf", tar, "a.bmp", "b.bmp"]
    if subprocess.run(pack, capture_output=True).returncode or tar.stat().st_size > 1 << 20:
        pytest.skip("no GNU tar, or no file system with holes, at hand")
    assert outcome(tmp_path / "out") == {"a.tar/a.bmp": SPARSE, "a.tar/b.bmp": b"plain"}


def test_links_and_special_members_are_named_and_folders_are_not(tmp_path):
    kinds = {
        "s": tarfile.SYMTYPE,
        "h": tarfile.LNKTYPE,
        "p": tarfile.FIFOTYPE,
        "c": tarfile.CHRTYPE,
        "d": tarfile.DIRTYPE,
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x.png" if name in "sh" else ""
            tar.addfile(member)
    expected = {"a.tar/s": LINK, "a.tar/h": LINK, "a.tar/p": SPECIAL, "a.tar/c": SPECIAL}
    assert outcome(tmp_path) == expected


def test_what_is_no_file_is_skipped_with_its_reason_and_nothing_hangs(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "link to a pipe").symlink_to("pipe")
    (tmp_path / "nothing").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "device").symlink_to(os.devnull)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "up").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real").write_bytes(b"real")
    monkeypatch.chdir(tmp_path)  # the path of a socket is at most 108 bytes long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        found = outcome(tmp_path)
    special = dict.fromkeys(["pipe", "pipe.tar", "link to a pipe", "device", "socket"], SPECIAL)
    links = {"nothing": "link to nothing", "circle": "link to nothing"}
    links |= {"folder/up": "link to a folder: not followed"}
    assert found == special | links | {"link": b"real", "real": b"real"}


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    for name in ("a.png", "b.png", "c.tar", "shut/d.png"):
        (tmp_path / name).write_bytes(b"x" * 700)
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "shut")
        return scandir(path)

    def guarded_open(path, *rest):
        if not path.endswith("b.png"):
            raise PermissionError(13, "no rights")
        return open(path, *rest)

    monkeypatch.setattr(os, "scandir", guarded)
    monkeypatch.setattr(sources, "open", guarded_open, raising=False)
    expected = {"a.png": "unreadable", "b.png": b"x" * 700, "c.tar": "unreadable", "shut": "unreadable folder"}
    assert outcome(tmp_path) == expected
    assert [item.trouble for item in find_items(tmp_path / "shut")] == ["unreadable folder"]
    with pytest.raises(Unusable, match="unreadable"):
        read_file(Item(str(tmp_path / "gone"), 0, -1, "gone"))


def test_any_name_is_one_line_of_its_own(tmp_path):
    names = [b"a\nb\nc.txt", b"a\n\xff.txt", b"a\\n\\xff.txt", b"\t", "\u2028\x85é 猫".encode(), b"\r\x1b[2J"]
    for name in names:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(name)
    with tarfile.open(tmp_path / "z.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(os.fsdecode(name)))
    found = outcome(tmp_path)
    assert len(found) == 2 * len(names)
    assert found[r"a\n\xff.txt"] == b"a\n\xff.txt" and found[r"a\\n\\xff.txt"] == b"a\\n\\xff.txt"
    assert line("\u2028\x85\x80é 猫\udc80") == r"\u2028\u0085\u0080é 猫\x80"


def test_what_begins_with_a_dot_is_left_out(tmp_path):
    names = [".hidden.png", "._a.png", ".ipynb_checkpoints/a.png", "b/.c/d/e.png", ".x.tar", "b/f.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo("./" + name))
    assert list(outcome(tmp_path)) == ["a.tar/./b/f.png", "b/f.png"]


def test_the_order_is_that_of_the_names(tmp_path):
    names = ["B.png", "a/a/z.png", "a/b.png", "a.png", "b/a.png"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [item.name for item in find_items(tmp_path)] == names


def test_a_tar_that_is_something_else_is_named_so(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b\x08" + bytes(range(256)) * 4)
    (tmp_path / "b.TAR").write_bytes(packed()[0])
    (tmp_path / "c.tar").touch()
    old = bytearray(512)  # before there was a magic number; other kinds of file have "wide" in this place
    old[:12], old[124:136] = b"cat_wide.png", b"00000000000\0"
    old[148:156] = b"%06o\0 " % (sum(old) + 8 * 32)
    (tmp_path / "e.tar").write_bytes(old + bytes(1024))
    (tmp_path / "d.tar").write_bytes(b"text")
    found = outcome(tmp_path)
    assert "unpack it first" in found.pop("a.tar") and found.pop("c.tar") == "empty"
    assert found.pop("d.tar at byte 0") == TRUNCATED
    assert found == whole(name="b.TAR") | {"e.tar/cat_wide.png": b""}


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    for name, start in (("a", b""), ("b", b"\x1f\x8b")):
        with open(tmp_path / name, "wb") as file:
            file.write(start)
            file.truncate(sources.LARGEST_FILE + 1)
    found = outcome(tmp_path)
    assert found["a"] == "file of more than 256 MiB" and "unpack it first" in found["b"]


@pytest.mark.parametrize(
    "start, reason",
    [
        (b"PK\x03\x04", "zip"),
        (b"\x1f\x8b\x08", "gzip (like .tar.gz): unpack it first"),
        (b"\0\0\0\x18ftypheic", "HEIC: convert to JPEG or PNG first"),
        (b"\xff\x0a", "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b'<?xml version="1.0"?>\n<svg', "SVG"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"\x1a\x45\xdf\xa3", "video"),
        (b"RIFF\0\0\0\0AVI LIST", "video"),
        (bytes(packed()[0][:512]), ".tar"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(start, reason):
    assert foreign(start + bytes(100)).startswith(reason) or reason in foreign(start + bytes(100))
    assert not foreign(b"some text") and not foreign(b"\x89PNG\r\n\x1a\n") and not foreign(b"")
