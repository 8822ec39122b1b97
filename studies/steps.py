"""Long work in steps, of which several go on at once: what is done already is not done again.

Each step is a command of this project, as one would type it, or a call, and is done if what it makes is there.
"""

import math
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock

from tqdm import tqdm

from data.prepare import cores
from plumbing.command import UserError, differences
from plumbing.files import read_json, write_json
from plumbing.run import Stop


@dataclass
class Step:
    made: Path  # is there when it is done, and
    run: list[str] | Callable[[], None]  # arguments of Python, or a call
    flops: float  # about, for the progress bar
    also: tuple[Path, ...] = ()  # these are

    @property
    def done(self) -> bool:
        return all(map(Path.exists, (self.made, *self.also)))


def words(text: str, **values: object) -> list[str]:
    """The words of a command, into which values are put as they are, spaces and all."""
    return [word.format(**values) for word in text.split()]


def training(run: Path, steps: int, command: list[str], flops: float) -> Step:
    """A training is done when its last checkpoint is there, and the grid that comes after its last evaluation."""
    return Step(run / f"step_{steps:08d}", command, flops, (run / "grids" / f"{steps:06d}.png",))


def refuse_decided(extra: list[str], decided: str) -> None:
    """Errors: UserError, where flags for train.py would change what a study decides itself."""
    if odd := [flag for flag in extra if flag.split("=")[0] in decided.split()]:
        raise UserError(f"{odd[0]} after -- is decided by the study itself: leave it out")


def split(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    """What stands before `--` on the command line, and after it, for train.py."""
    arguments = sys.argv[1:] if arguments is None else arguments
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def refuse_another(out: Path, settings: dict[str, object], free: set[str]) -> None:
    """Errors: UserError, where OUT/settings.json has others, but for `free` ones."""
    path = out / "settings.json"
    if path.exists() and (changed := differences(read_json(path), settings, free)):
        raise UserError(f"{out} holds another study ({changed}): choose another folder, or delete it")


def table_of(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


class Stopped(Exception):
    """The user has had enough."""


class Work:
    """Steps in OUT.  OUT/commands.txt is what was run, OUT/logs what that said, OUT/times.json how many seconds each
    took."""

    def __init__(self, out: Path, jobs: int):
        self.out, self.jobs, self.cores = out, jobs, max(1, cores() // jobs)  # of each that is at work
        self.stop, self.lock, self.bar = Event(), Lock(), tqdm(disable=True)
        self.making: defaultdict[Path, Lock] = defaultdict(Lock)  # two chains may have a step in common

    def do(self, chains: list[list[Step]], title: str) -> None:
        """Do chains of steps, `jobs` of them at once.  Errors: UserError; Stopped, also after SIGTERM and Ctrl-C."""
        steps = [step for chain in chains for step in chain]
        total, begun = (sum(step.flops for step in some) / 1e12 for some in (steps, [x for x in steps if x.done]))
        self.bar = tqdm(None, title, total, initial=begun, unit=" TFLOP", disable=None, smoothing=0)
        with self.bar, Stop() as stop, ThreadPoolExecutor(self.jobs) as pool:
            waiting = [pool.submit(self.chain, steps) for steps in chains]
            while waiting:
                done, waiting = wait(waiting, 0.5)
                errors = [error for each in done if (error := each.exception())]
                if errors or stop.asked < math.inf:
                    self.stop.set()
                    wait(waiting)
                    raise errors[0] if errors and stop.asked == math.inf else Stopped

    def chain(self, steps: list[Step]) -> None:
        for step in steps:
            name = step.made.relative_to(self.out).as_posix()
            with self.making[step.made]:
                if step.done:
                    continue
                if self.stop.is_set():
                    raise Stopped
                self.bar.set_postfix_str(name)
                step.made.parent.mkdir(parents=True, exist_ok=True)
                begun = time.perf_counter()
                try:
                    step.run() if callable(step.run) else self.command(step, name)
                finally:
                    self.add_time(name, time.perf_counter() - begun)
            self.bar.update(step.flops / 1e12)

    def add_time(self, name: str, seconds: float) -> None:
        path = self.out / "times.json"
        with self.lock:
            times = read_json(path) if path.exists() else {}
            write_json(path, times | {name: round(times.get(name, 0) + seconds, 1)})

    def command(self, step: Step, name: str) -> None:
        """Run a command until it ends, or until all must.  Errors: UserError, with the last line of what it said."""
        log = self.out / "logs" / f"{name.replace('/', '_')}.txt"
        log.parent.mkdir(exist_ok=True)
        with self.lock, open(self.out / "commands.txt", "a") as file:
            file.write(f"python {shlex.join(step.run)}\n")
        threads = os.environ | {"OMP_NUM_THREADS": str(self.cores)}
        with open(log, "ab") as file:
            child = subprocess.Popen([sys.executable, *step.run], stdout=file, stderr=file, env=threads)
            while child.poll() is None:
                if self.stop.wait(0.2):
                    child.terminate()
                    child.wait()
                    raise Stopped
        if child.returncode or not step.done:
            lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
            said = next((line for line in reversed(lines) if line.strip()), "nothing")
            command = f"python {shlex.join(step.run)}"
            raise UserError(f"`{command}` ended with {child.returncode} ({said}): see {log}, mend it, and go on")
