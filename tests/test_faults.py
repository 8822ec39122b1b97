"""Nothing lost, nothing silently wrong: every fault is made for real, most of them with kill."""

import contextlib
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import train as module
from codec import load_tokenizer
from plumbing.command import UserError
from plumbing.files import digest
from sample import checkpoints, damage, newest
from tests.conftest import ROOT, RUN, command, config, losses, torchrun, validation
from train import Stream, train


def begin(*arguments: object) -> subprocess.Popen:
    """`command`, without waiting for its end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, **pipes)


def start(prepared: Path, out: Path, *more: object) -> subprocess.Popen:
    return begin("train.py", "--data", prepared, "--out", out, *RUN, *more)


def wait_for(out: Path, step: int, process: subprocess.Popen, saved: bool = False) -> None:
    """Until a step is in the log, or its checkpoint is there."""
    while process.poll() is None:
        log, checkpoint = out / "log.jsonl", out / f"step_{step:08d}"
        if checkpoint.exists() if saved else log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.005)


def running(folder: Path) -> list[int]:
    """The processes whose command line names a folder."""
    if not Path("/proc").exists():
        pytest.skip("no /proc to look for processes in")
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += [int(path.parent.name)] if str(folder).encode() in path.read_bytes() else []
    return found


# --- kill -9 --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_continues_bit_for_bit(prepared, tmp_path):
    """kill -9 at three moments, saving among them; the losses end equal to the uninterrupted run's."""
    rng = np.random.default_rng(0)
    for wanted in (2, 6, 9):
        process = start(prepared, tmp_path / "run", "--save-every", 3)
        wait_for(tmp_path / "run", wanted, process)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    for name in ("run", "whole"):
        result = command("train.py", "--data", prepared, "--out", tmp_path / name, *RUN)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert validation(tmp_path / "run") == validation(tmp_path / "whole")


SAVING = """
import os, pathlib, random, signal, sys, time
import torch
import train
from sample import checkpoints, newest
from codec import load_tokenizer

data, out = map(pathlib.Path, sys.argv[1:])
shape = "--dim 64 --layers 2 --heads 2 --kv-heads 2".split()
config = train.parse(["--data", str(data), "--out", str(out), *shape])[0]
lost = last = 0
random.seed(0)
for trial in range(50):
    child = os.fork()
    if not child:  # saves again and again, until it is killed
        model = train.build_model(config, torch.device("cpu"))
        optimizer = train.build_optimizer(model, config)
        step = train.load_checkpoint(out, model, optimizer, print)
        saver = train.Saver(out)
        while True:
            step += 1
            saver.save(model, optimizer, step, config)
    deadline, step = time.time() + 60, last
    try:
        while time.time() < deadline and step <= last:
            time.sleep(0.01)
            path = newest(checkpoints(out), str)
            step = int(path.name[5:]) if path else last
        time.sleep(random.uniform(0, 0.1))
    finally:  # whatever happens, no child is left behind
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    step = int(newest(checkpoints(out), str).name[5:])
    lost += step <= last
    last = step
print("lost", lost, "of 50, saved", last)
"""


def test_kill_while_saving_never_loses_a_checkpoint(prepared, tmp_path):
    """50 kills at random moments of one save after another: the newest whole checkpoint is always there and newer."""
    (tmp_path / "run").mkdir()
    shutil.copy(prepared / "codec.json", tmp_path / "run")
    result = command("-c", SAVING, prepared, tmp_path / "run", timeout=400)
    assert result.stdout.startswith("lost 0 of 50"), result.stderr + result.stdout


# --- other numbers of processes -------------------------------------------------------------------------------------


def test_a_run_continues_on_another_number_of_processes(prepared, finished, tmp_path):
    """Begun on two, continued on four, ended on one: the rows and losses are those of one that was never stopped."""
    for processes, steps in ((2, 4), (4, 8)):
        arguments = ("train.py", "--data", prepared, "--out", tmp_path / "run", *RUN, "--micro", 1)
        process = begin(*torchrun(processes, *arguments))
        wait_for(tmp_path / "run", steps, process, saved=True)
        while left := running(tmp_path):  # until the last has ended
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.poll()
        process.wait()
        with open(tmp_path / "run" / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # until the kernel has let go of it, too, which a write may hold up
        assert int(newest(checkpoints(tmp_path / "run")).name[5:]) >= steps, process.stdout.read()
    train(config(prepared, tmp_path / "run"))
    for step, loss in losses(finished).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, rel=1e-6)
    assert validation(tmp_path / "run") == pytest.approx(validation(finished), rel=1e-5)


def test_processes_that_do_not_divide_the_batch_are_refused(prepared, tmp_path):
    result = command(*torchrun(3, "train.py", "--data", prepared, "--out", tmp_path / "run", *RUN))
    assert result.returncode and "--batch 4 does not divide into 3 processes" in result.stderr
    assert "take 1, 2, 4 processes" in result.stderr and 'train.py", line' not in result.stderr  # no traceback of ours


# --- damage ---------------------------------------------------------------------------------------------------------


def test_200_flipped_bytes_of_a_checkpoint_are_all_found(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    latest, said, rng = tmp_path / "run" / "step_00000012", [], np.random.default_rng(0)
    files = sorted(latest.iterdir())
    for trial in range(200):
        path = files[trial % len(files)]
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        assert damage(latest) is not None, path
        if trial < len(files):
            assert newest(checkpoints(tmp_path / "run"), said.append).name == "step_00000008"
            assert "step_00000012 is damaged" in said[-1]
            path.write_bytes(original[:-1])
            assert damage(latest) is not None, path
        path.write_bytes(original)
    assert newest(checkpoints(tmp_path / "run"), said.append) == latest


def test_a_damaged_shard_is_named(prepared, tmp_path):
    rng, grammar = np.random.default_rng(0), load_tokenizer(prepared).grammar
    for trial in range(20):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(prepared, tmp_path / "data")
        path = sorted((tmp_path / "data").glob("*.npy"))[trial % 4]
        data = bytearray(path.read_bytes())
        data[rng.integers(128, len(data))] ^= 1 << rng.integers(8)  # behind numpy's header
        path.write_bytes(data)
        name = path.name.split(".")[0]
        with pytest.raises(UserError, match=f"{name}.npy is not as it was written"):
            Stream(tmp_path / "data", name.split("-")[0], grammar)
    with pytest.raises(UserError, match="is not as it was written"):
        train(config(tmp_path / "data", tmp_path / "run"))


class Evil:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["metadata", "entry"])
def test_a_malicious_checkpoint_is_refused_and_its_code_never_runs(prepared, finished, tmp_path, where):
    shutil.copytree(finished, tmp_path / "run")
    latest, mark = tmp_path / "run" / "step_00000012", tmp_path / "ran"
    if where == "metadata":
        (latest / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    else:
        settings = config(prepared, tmp_path / "run")
        model = module.build_model(module.replace(settings, **shape(latest)), torch.device("cpu"))
        for path in (*latest.glob("*.distcp"), latest / ".metadata"):
            path.unlink()
        dcp.save({"model": model.state_dict(), "step": Evil(mark)}, checkpoint_id=latest)
    files = [path for path in sorted(latest.iterdir()) if path.name != "manifest.json"]
    (latest / "manifest.json").write_text(json.dumps({path.name: digest(path) for path in files}))
    results = [command("train.py", "--data", prepared, "--out", tmp_path / "run", *RUN)]
    if where == "metadata":  # sample.py reads the weights alone
        results.append(command("sample.py", tmp_path / "run", "--count", 1))
    for result in results:
        assert result.returncode == 2 and "do not use it" in result.stderr, result.stderr
    assert not mark.exists()


def shape(checkpoint: Path) -> dict:
    saved = json.loads((checkpoint / "config.json").read_text())
    return {"vocab": saved["vocab"], "positions": tuple(saved["positions"])}


def test_a_full_disk_while_saving_leaves_the_old_checkpoint(prepared, finished, tmp_path):
    """The run folder lies on a disk that has no room for a second checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    room = sum(path.stat().st_size for path in newest(checkpoints(finished)).iterdir()) * 3 // 2
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        result = command("train.py", "--data", prepared, "--out", disk / "run", *RUN, "--keep", 9)
        saved = sorted(path.name for path in (disk / "run").glob("step_*"))
        assert result.returncode == 2 and "could not save" in result.stderr and "Traceback" not in result.stderr
        assert saved and not any(name.endswith(".part") for name in saved)
        assert newest(checkpoints(disk / "run")).name == saved[-1]
    finally:
        subprocess.run(["umount", disk], check=True)


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_the_run_continues(prepared, finished, tmp_path, number):
    process = start(prepared, tmp_path / "run")
    wait_for(tmp_path / "run", 2, process)
    process.send_signal(number)
    assert process.wait(60) == 0
    step = int(newest(checkpoints(tmp_path / "run")).name[5:])
    assert 2 <= step < 12 and f"stopped and saved at step {step}" in process.stdout.read()
    train(config(prepared, tmp_path / "run"))
    assert losses(tmp_path / "run") == pytest.approx(losses(finished), rel=1e-6)


def test_all_processes_stop_at_the_same_step(prepared, finished, tmp_path):
    process = begin(*torchrun(2, "train.py", "--data", prepared, "--out", tmp_path / "run", *RUN))
    wait_for(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    step = int(newest(checkpoints(tmp_path / "run")).name[5:])
    assert 2 <= step < 12 and f"stopped and saved at step {step}" in process.stdout.read()
    train(config(prepared, tmp_path / "run"))
    for number, loss in losses(finished).items():
        assert losses(tmp_path / "run")[number] == pytest.approx(loss, rel=1e-6)


def test_a_second_signal_ends_at_once():
    script = """
        import os, signal, time
        from train import Stop
        with Stop() as stop:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)  # as torchrun doubles what the terminal sends
            print("alive", flush=True)
            stop.asked -= 3
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
    """
    result = command("-c", textwrap.dedent(script), timeout=60)
    assert result.returncode == -signal.SIGTERM and result.stdout == "alive\n"


# --- one process among many -----------------------------------------------------------------------------------------

FAILING = """
import os, sys, time
import train
from plumbing.command import run

real, steps = train.cross_entropy, iter(range(10**6))
def broken(logits, targets, reduction="mean"):
    loss = real(logits, targets, reduction)
    if os.environ["RANK"] == "1" and reduction == "mean" and next(steps) == 5:
        print("fault at", time.time(), flush=True)
        {fault}
    return loss
train.cross_entropy = broken
run(lambda: train.train(train.parse(sys.argv[1:])[0]))
"""


def fail(prepared: Path, tmp_path: Path, fault: str) -> tuple[subprocess.CompletedProcess, float]:
    """Two processes, the second with a fault in its sixth step; how it ended, and seconds from the fault to the end."""
    (tmp_path / "failing.py").write_text(FAILING.format(fault=fault))
    arguments = torchrun(2, tmp_path / "failing.py", "--data", prepared, "--out", tmp_path / "run", *RUN)
    result = command(*arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    return result, time.time() - float(result.stdout.split("fault at ")[1].split()[0])


def test_a_nan_on_one_process_stops_all_before_the_step(prepared, tmp_path):
    result, seconds = fail(prepared, tmp_path, "loss = loss * float('nan')")
    assert result.returncode and seconds < 20  # 1 to 2 s, and torchrun's own, when nothing else runs
    assert result.stderr.count("the gradient is nan, the loss") == 2  # both say so
    assert newest(checkpoints(tmp_path / "run")).name == "step_00000004" and max(losses(tmp_path / "run")) == 5


def test_one_dead_process_leaves_none_behind(prepared, tmp_path):
    result, seconds = fail(prepared, tmp_path, "os._exit(9)")
    assert result.returncode and seconds < 60
    assert running(tmp_path) == []
    assert newest(checkpoints(tmp_path / "run")).name == "step_00000004"


def test_a_gradient_that_is_not_finite_stops_before_the_step(prepared, tmp_path, monkeypatch):
    settings, real = config(prepared, tmp_path / "run"), module.cross_entropy
    passes = iter(range(10**6))  # two a step

    def broken(logits, targets, reduction="mean"):
        loss = real(logits, targets, reduction)
        return loss * float("nan") if reduction == "mean" and next(passes) == 8 else loss

    monkeypatch.setattr(module, "cross_entropy", broken)
    with pytest.raises(UserError, match=r"the gradient is nan, the loss nan at step 4, rows \[\d+"):
        train(settings)
    assert newest(checkpoints(tmp_path / "run")).name == "step_00000004"


# --- two runs -------------------------------------------------------------------------------------------------------


def test_a_second_run_on_the_folder_is_refused_and_names_the_first(prepared, tmp_path):
    process = start(prepared, tmp_path / "run", "--steps", 10_000)
    wait_for(tmp_path / "run", 3, process)
    result = command("train.py", "--data", prepared, "--out", tmp_path / "run", *RUN, "--steps", 10_000)
    process.kill()
    process.wait()
    assert result.returncode == 2 and f"is in use by process {process.pid} on " in result.stderr, result.stderr
