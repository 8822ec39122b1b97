"""The files below a folder, those inside its .tar files among them, and their bytes.

What begins with a dot (hidden files and folders, .ipynb_checkpoints, the ._files of a Mac) is left out everywhere,
inside .tar files too, and not counted.  All else is an Item, also what cannot be read, which then carries the reason;
only folders inside a .tar are nothing to count.  Links to files are followed, links to folders are not.
"""

import errno
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

LARGEST_FILE = 256 << 20  # bytes
SNIFFED = 2048  # bytes that tell what a file is
BLOCK = tarfile.BLOCKSIZE  # bytes; in a .tar everything begins at a multiple of it
LONGEST_NAME = 1 << 20  # bytes of a header that holds a long name and the like
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\]")  # in a line of UTF-8

DAMAGED, TRUNCATED = "damaged .tar header", "truncated .tar"
LINK = "link inside a .tar: pack the files that links point to (tar -h --hard-dereference)"
SPARSE = "sparse file inside a .tar: pack it without -S"
SPECIAL = "no regular file (pipe or socket or device)"
VIDEO = "video: prepare it with --codec h264, or save its frames first"

FOREIGN = [  # what a file is and what to do, and how it begins
    ("gzip (like .tar.gz): unpack it first", rb"\x1f\x8b"),
    ("zip: unpack it first", rb"PK\x03\x04"),
    ("bzip2: unpack it first", rb"BZh[1-9]"),
    ("xz: unpack it first", rb"\xfd7zXZ\0"),
    ("zstd: unpack it first", rb"\x28\xb5\x2f\xfd"),
    ("7z: unpack it first", rb"7z\xbc\xaf\x27\x1c"),
    ("rar: unpack it first", rb"Rar!\x1a\x07"),
    ("a .tar by another name: unpack it or end its name in .tar", rb".{257}ustar"),
    ("HEIC: convert to JPEG or PNG first", rb".{4}ftyp(hei|hev|mif1|msf1)"),
    ("JPEG XL: convert to JPEG or PNG first", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    ("camera raw: convert to JPEG or PNG first", rb".{4}ftypcrx|FUJIFILMCCD-RAW|IIR[OS]|IIU\0"),
    ("PDF: convert its pages to PNG first", rb"%PDF-"),
    ("PostScript: convert to PNG first", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("SVG: convert to PNG first", rb"\s*(\xef\xbb\xbf)?\s*<(svg|[?!].{,1000}<svg)"),
    (VIDEO, rb".{4}(ftyp|moov|mdat|wide)|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV\x01|OggS"),
    (VIDEO, rb"\0\0\0?\x01[\xb3\xba\x67\x09]|G(.{187}G){3}|\x30\x26\xb2\x75"),
]


class Item(NamedTuple):
    """One file to try: where its bytes lie, the name to report it by, and why it cannot be read if that is known."""

    path: str
    offset: int
    length: int  # bytes; -1: to the end of the file
    name: str  # one line of UTF-8
    trouble: str = ""


class Unusable(Exception):
    """A file that cannot become training data; the message is the reason under which it is counted."""


def items_at(source: Path) -> Iterable[Item]:
    """The items below a folder, or the one file."""
    return find_items(source) if source.is_dir() else [Item(str(source), 0, -1, source.name)]


def find_items(folder: Path) -> Iterator[Item]:
    """Every file below a folder and every member of its .tar files, in the order of their names."""
    waiting = [(str(folder), "", True)]  # a stack: folders may be nested deeper than Python's calls
    while waiting:
        path, name, is_folder = waiting.pop()
        if not is_folder:
            yield from members(path, name) if name.lower().endswith(".tar") else [Item(path, 0, -1, line(name))]
            continue
        try:
            with os.scandir(path) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
            found.sort(key=lambda entry: entry.name, reverse=True)
            inside = f"{name}/" if name else ""
            waiting += [(entry.path, inside + entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
        except OSError:
            yield Item(path, 0, 0, line(name or "."), "unreadable folder")


def members(path: str, name: str) -> Iterator[Item]:
    """The files in a .tar; what is damaged is an Item named by its place."""
    try:
        with opened(path) as file:
            if reason := no_tar(file.read(BLOCK)):
                yield Item(path, 0, 0, line(name), reason)
                return
            for at, member, reason in headers(file):
                if member is None:
                    yield Item(path, at, 0, line(f"{name} at byte {at}"), reason)
                elif not (member.isdir() or hidden(member.name)):
                    yield Item(path, member.offset_data, member.size, line(f"{name}/{member.name}"), reason)
    except Unusable as reason:
        yield Item(path, 0, 0, line(name), str(reason))
    except OSError:
        yield Item(path, 0, 0, line(name), "unreadable")


def headers(file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo | None, str]]:
    """(byte, member, why it cannot be read) for all in a .tar, and (byte, None, reason) for what is no member.

    After a damaged header the next whole one is searched, block by block.  Zeros are the end of a .tar if nothing
    comes after them.
    """
    end = os.fstat(file.fileno()).st_size
    archive = tarfile.TarFile(fileobj=file, mode="w", encoding="utf-8")  # "r" would read a header now, and may fail
    at, gap, zeros = 0, None, True
    while at < end:
        file.seek(at)
        block = file.read(BLOCK)
        member = header(archive, at, block)
        if member is None:
            gap, zeros, at = at if gap is None else gap, zeros and not any(block), at + BLOCK
            continue
        if gap is not None:
            yield gap, None, DAMAGED
        reason = trouble(member)
        if not reason and member.offset_data + member.size > end:
            yield at, member, TRUNCATED
            return
        yield at, member, reason
        at, gap, zeros = archive.offset, None, True
    if gap is None:
        yield end, None, TRUNCATED  # a whole one ends in zeros
    elif not zeros:
        yield gap, None, TRUNCATED if end - gap < BLOCK else DAMAGED


def header(archive: tarfile.TarFile, at: int, block: bytes) -> tarfile.TarInfo | None:
    """The member whose header begins at a byte, with this block; None if its checksum or content is wrong."""
    try:
        first = tarfile.TarInfo.frombuf(block, archive.encoding, archive.errors)
        if first.type in b"xgXLK" and not 0 <= first.size <= LONGEST_NAME:  # tarfile would read it whole
            return None
        archive.fileobj.seek(at)
        member = tarfile.TarInfo.fromtarfile(archive)
    except OSError:
        raise
    except Exception:  # what tarfile raises depends on what is damaged
        return None
    return member if member.size >= 0 and archive.offset > at else None


def trouble(member: tarfile.TarInfo) -> str:
    """Why a member cannot be read, if so."""
    if member.issparse():
        return SPARSE
    if member.issym() or member.islnk():
        return LINK
    return "" if member.isfile() or member.isdir() else SPECIAL


def no_tar(block: bytes) -> str:
    """What a file is that is called .tar and begins so, if it is known to be something else."""
    if not block:
        return "empty"
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        return ""
    except tarfile.HeaderError:
        return "" if block[257:262] == b"ustar" else foreign(block)  # a damaged header is no other kind of file


def hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def line(name: str) -> str:
    r"""A name as one line of UTF-8: control characters, bytes that are no UTF-8 and backslashes as \n, \xff, \\.  Two
    names never become one."""

    def escape(found: re.Match) -> str:
        code = ord(found[0])
        if 0xDC80 <= code <= 0xDCFF:  # how Python holds such a byte
            return f"\\x{code - 0xDC00:02x}"
        return found[0].encode("unicode_escape").decode() if code < 0x80 else f"\\u{code:04x}"

    return UNSAFE.sub(escape, name)


def foreign(head: bytes) -> str:
    """What a file that begins so is, and what to do with it, if it is of a known kind that is no picture here."""
    return next((reason for reason, start in FOREIGN if re.match(start, head[:SNIFFED], re.DOTALL)), "")


def opened(path: str) -> BinaryIO:
    """A file opened to read, if it is one: to open a pipe would wait for ever.  Errors: Unusable."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except OSError as error:
        nowhere = error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path)
        raise Unusable("link to nothing" if nowhere else "unreadable") from None
    raise Unusable("link to a folder: not followed" if stat.S_ISDIR(mode) else SPECIAL)


def read_file(item: Item) -> bytes:
    """The bytes of an item.  Errors: Unusable, with the reason."""
    if item.trouble:
        raise Unusable(item.trouble)
    try:
        with opened(item.path) as file:
            length = os.fstat(file.fileno()).st_size if item.length < 0 else item.length
            file.seek(item.offset)
            if length > LARGEST_FILE:
                raise Unusable(foreign(file.read(SNIFFED)) or f"file of more than {LARGEST_FILE >> 20} MiB")
            return file.read(length)
    except OSError:
        raise Unusable("unreadable") from None
