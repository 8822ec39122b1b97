"""Small files that are whole or not there, and files known by what they hold."""

import hashlib
import json
from pathlib import Path

from plumbing.command import UserError


def digest(*paths: Path) -> str:
    """The sha256 of files, one after the other; never more than a piece of them is in memory."""
    sha = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: sha)
    return sha.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write elsewhere, then rename: a kill or a full disk leaves what was there before, or all of this."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    write_whole(path, json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path) -> dict:
    """The dictionary that a file holds.  Errors: UserError that names a file which is absent, empty or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or delete its folder and begin anew") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: restore it, or delete its folder and begin anew")
    return value
