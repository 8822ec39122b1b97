"""The files below a folder, those inside its .tar files among them, and their bytes."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LARGEST_FILE = 256 << 20  # bytes


class Item(NamedTuple):
    """One file to try: where its bytes lie, and the name to report it by."""

    path: str
    offset: int
    length: int  # bytes; -1: to the end of the file
    name: str


class Unusable(Exception):
    """A file that cannot become a training image; the message is the reason under which it is counted."""


def walk(folder: Path, name: str = "") -> Iterator[Item]:
    """Every file below a folder and every member of its .tar files, in the order of their names."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = f"{name}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path), path + "/")
        elif entry.name.endswith(".tar"):
            yield from members(entry.path, path)
        else:
            yield Item(entry.path, 0, -1, path)


def members(tar: str, name: str) -> Iterator[Item]:
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                archive.members = []  # tarfile remembers them all otherwise
                if member.isfile():
                    yield Item(tar, member.offset_data, member.size, f"{name}/{member.name}")
    except (tarfile.TarError, OSError):
        yield Item(tar, -1, -1, name)  # what was before the damage is used, the archive is named


def read_file(item: Item) -> bytes:
    if item.offset < 0:
        raise Unusable("damaged .tar")
    try:
        with open(item.path, "rb") as file:
            length = os.fstat(file.fileno()).st_size if item.length < 0 else item.length
            if length > LARGEST_FILE:
                raise Unusable(f"file of more than {LARGEST_FILE >> 20} MiB")
            file.seek(item.offset)
            return file.read(length)
    except OSError:
        raise Unusable("unreadable") from None
