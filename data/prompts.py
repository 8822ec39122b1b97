"""Files to complete, and what their completions are compared with."""

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from codec import Codec
from data.prepare import read
from data.sources import Unusable, items_at
from plumbing.command import UserError
from plumbing.draw import save_pixels
from plumbing.files import read_json, write_whole


def read_prompts(source: Path, codec: Codec, to: Path) -> list[np.ndarray]:
    """The symbols of a file, or of every file below a folder, encoded anew with the settings of the model.

    What completions are compared with goes beside them: TO/originals, the pixels as the codec was given them, and
    TO/roundtrip, as it gives them back.
    """
    found = []
    for name in ("originals", "roundtrip"):
        (to / name).mkdir()
    for item in items_at(source):
        try:
            for pixels in read(item, codec, Counter()):
                save_pixels(to / "originals" / f"{len(found):05d}", pixels, codec.fps)
                found.append(codec.encode(pixels))
                write_whole(to / "roundtrip" / f"{len(found) - 1:05d}{codec.suffix}", codec.file(found[-1]))
        except Unusable as reason:
            print(f"skipped {item.name}: {reason}")
    if not found:
        raise UserError(f"--prompt {source} holds no usable file: name one, or a folder of them")
    return found


@contextmanager
def prompts_of(source: Path, codec: Codec, to: Path) -> Iterator[tuple[list[np.ndarray], str]]:
    """The prompts (symbols) and a digest of them; what they are compared with takes its place in TO at the end, unless
    TO holds completions of others.  Errors: UserError, after which TO is as it was."""
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prompts-", dir=to) as staging:
        prompts = read_prompts(source, codec, Path(staging))
        held = hashlib.sha256(b"".join(len(prompt).to_bytes(8) + prompt.tobytes() for prompt in prompts)).hexdigest()
        for folder in sorted(to.glob("keep_*")):
            if (folder / "samples.json").exists() and read_json(folder / "samples.json").get("prompts") != held:
                raise UserError(f"{folder} completes other files than {source}: choose another --to, or delete {to}")
        yield prompts, held
        for name in ("originals", "roundtrip"):
            shutil.rmtree(to / name, ignore_errors=True)
            os.replace(Path(staging) / name, to / name)
