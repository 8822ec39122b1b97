"""The run folder: what a training leaves on disk besides its checkpoints, and how it is kept from harm.

    lock           held while a process works on the folder, so that no second one does
    config.json    the settings of the run, its codec, and a digest of the data: another run in the folder is refused
    started.jsonl  a line for each start: when, by which command, commit and versions, on what and how many processes
    log.jsonl      a line for each measurement: the step, the loss, the speed
    README.md      at the end: the model card

A full disk or a kill may leave a file empty or a line cut.  So small files are written whole, and a log is read without
the lines that are damaged.  Where there are no file locks and no SIGUSR1, as on Windows, the rest works without them.
"""

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from codec import Tokenizer, save_tokenizer
from plumbing.command import UserError, differences
from plumbing.files import read_json, write_json, write_whole

if TYPE_CHECKING:  # data.prepare takes the lock too, and its workers have no memory to spare for torch
    from model import ModelConfig
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def rank() -> int:
    """The number of this process among those that torchrun started; alone it is 0."""
    return int(os.environ.get("RANK", 0))


# --- one process at a time ------------------------------------------------------------------------------------------


@contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for as long as this process lives, however it ends; the first process of torchrun holds it for all.

    Where another holds it, wait for that one, or refuse.  Errors: UserError that names the holder.
    """
    if rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+", errors="replace") as file:
        if fcntl:
            try:
                lock(file, folder, wait)
            except OSError as error:  # some network disks have no locks
                print(f"note: {folder} cannot be locked ({error.strerror}), so start no second process on it")
        else:
            print(f"note: this system has no locks of files, so start no second process on {folder}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}")
        file.flush()
        yield


def lock(file: TextIO, folder: Path, wait: bool) -> None:
    """Lock an open file, which ends with the process.  Errors: UserError; OSError without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read() or "another process"  # which has not said its name yet
        if not wait:
            raise UserError(f"{folder} is in use by {holder}: wait for it, or choose another folder") from None
        print(f"waiting for {holder}, which holds {folder}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


class Stop:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a stop after this step, when all processes have heard of it; a second one,
    two seconds later or more, ends at once.  (torchrun passes on what the terminal has sent already.)"""

    names = ("SIGTERM", "SIGUSR1", "SIGINT")  # Windows has no SIGUSR1

    def __enter__(self) -> "Stop":
        numbers = [getattr(signal, name) for name in self.names if hasattr(signal, name)]
        self.asked = math.inf
        self.before = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: object) -> None:
        if time.monotonic() - self.asked > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = min(self.asked, time.monotonic())

    def agreed(self) -> bool:
        """Whether any process was asked: all get the same answer, at the same step, and no GPU waits for it."""
        import torch

        from plumbing.processes import add_up

        return bool(add_up(torch.tensor(float(self.asked < math.inf))))


# --- which run it is ------------------------------------------------------------------------------------------------

FREE = {"data", "data_holds", "out", "log_every", "every", "save_every", "samples", "keep"}  # may change meanwhile;
FREE |= {"micro", "compile", "recompute", "sync_each_pass"}  # data_holds is compared apart, for a sentence of its own


def open_run(out: Path, config: "ModelConfig", tokens: Tokenizer, holds: str) -> None:
    """Make the run folder, or refuse one whose run was another; note how the run was started.

    `config` is train.py's; `holds` is a digest of the data, known by it wherever they lie.  Errors: UserError.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, now = out / "config.json", {**asdict(config), "codec": tokens.codec.settings, "vocabulary": tokens.hash}
    now = json.loads(json.dumps({**now, "data_holds": holds}))  # as it will be read back
    if path.exists():
        before = read_json(path)
        if changed := differences(before, now, FREE):
            raise UserError(f"{out} is another run ({changed}): choose another --out, or repeat its settings")
        if before.get("data_holds", holds) != holds:  # runs of older versions have not noted it
            began = f"those the run in {out} began with, in {before.get('data')}"
            raise UserError(f"the data in {config.data} are not {began}: choose another --out, or name those data")
    write_json(path, now)
    for part in out.glob("step_*.part"):  # of a save that was killed
        shutil.rmtree(part)
    git = subprocess.run("git rev-parse HEAD", shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    note = {"time": time.strftime("%F %T"), "command": sys.argv, "commit": git.stdout.strip()}
    note["processes"] = int(os.environ.get("WORLD_SIZE", 1))
    note["machine"] = machine()
    note["versions"] = {"python": platform.python_version(), "torch": version("torch")}
    write_lines(out / "started.jsonl", [*read_lines(out / "started.jsonl"), note])
    save_tokenizer(out, tokens)


def machine() -> str:
    """What computes here: a GPU, or a processor and how many threads it has for that."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"model name\s*: (.*)", listed)
    threads = torch.get_num_threads()
    return f"{named[1] if named else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


# --- the log --------------------------------------------------------------------------------------------------------


def read_lines(path: Path, valid: Callable[[dict], bool] = lambda record: True) -> list[dict]:
    """The JSON objects of a file, one a line; how many lines are damaged, which are left out, is printed."""
    lines, records = path.read_bytes().splitlines() if path.exists() else [], []
    for line in lines:
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):  # no UTF-8, no JSON
            continue
        if isinstance(record, dict) and valid(record):
            records.append(record)
    if rank() == 0 and len(records) < len(lines):
        print(f"note: {len(lines) - len(records)} of {len(lines)} lines of {path} are damaged and left out")
    return records


def write_lines(path: Path, records: list[dict]) -> None:
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def is_measurement(record: dict) -> bool:
    """Whether a record has a step, and all else in it is a number or None."""
    known = [value for value in record.values() if value is not None]
    return type(record.get("step")) is int and all(type(v) in (int, float) and math.isfinite(v) for v in known)


class Log:
    """OUT/log.jsonl; a run that continues takes back what was logged after its checkpoint.

    Damaged lines go and those behind them stay, for steps that are behind the checkpoint will not come again.
    """

    def __init__(self, out: Path, step: int):
        self.path = out / "log.jsonl"
        records = read_lines(self.path, is_measurement)
        self.records = [record for record in records if record["step"] <= step]
        if rank() == 0:
            write_lines(self.path, self.records)

    def write(self, record: dict) -> None:
        self.records.append(record)
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


LINE = {  # how the values of a record are shown, in this order
    "step": "step {}",
    "loss": "loss {:.4f}",
    "bits_per_byte": "{:.3f} bits/byte",
    "norm": "norm {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_share": "{:.0%} of peak",
    "memory_gb": "{:.1f} GB",
    "seconds_left": "{:.0f} s left",
}


def line_of(record: dict) -> str:
    """A record of training as a line to read; what this machine cannot say, which is None or absent, is left out."""
    return "  ".join(text.format(record[name]) for name, text in LINE.items() if record.get(name) is not None)
