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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train as module
from codec import load_tokenizer
from data.stream import Stream
from plumbing import checkpoint as checkpoint_module
from plumbing.checkpoint import Saver, checkpoints, damage, load, newest, read_run, state_of
from plumbing.command import UserError
from plumbing.files import digest, read_json
from plumbing.weights import model_config, read_rows, write_safetensors
from tests.conftest import ROOT, RUN, command, config, fresh, losses, torchrun, validation
from train import train


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
from codec import load_tokenizer
from plumbing.checkpoint import Saver, checkpoints, load, newest

data, out = map(pathlib.Path, sys.argv[1:])
shape = "--dim 64 --layers 2 --heads 2 --kv-heads 2".split()
config = train.parse(["--data", str(data), "--out", str(out), *shape])[0]
lost = last = 0
random.seed(0)
for trial in range(50):
    child = os.fork()
    if not child:  # saves again and again, until it is killed
        model = train.build_model(config, torch.device("cpu"))
        optimizers = train.build_optimizers(model, config)
        step = load(out, model, optimizers, print)
        saver, tokens = Saver(out), load_tokenizer(data)
        while True:
            step += 1
            saver.save(model, optimizers, step, config, tokens)
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


SHARDED = """
import sys
from pathlib import Path
import train
from codec import load_tokenizer
from plumbing import processes
from plumbing.checkpoint import Saver, load

config, device = train.parse(sys.argv[1:])[0], processes.join()
tokens = load_tokenizer(Path(config.data))
config = train.replace(config, vocab=tokens.vocab, positions=tokens.grammar.sizes)
model = train.build_model(config, device)
optimizers = train.build_optimizers(model, config)
step = load(Path(config.out), model, optimizers, print)
if not step:
    model.init_weights(config.seed)
    for weight in model.parameters():
        weight.grad = weight.detach().clone()
    for optimizer in optimizers:
        optimizer.step()
with Saver(Path(config.out)) as saver:
    saver.save(model, optimizers, step + 1, config, tokens)
if train.dist.is_initialized():  # else a thread of gloo's may still run when the process ends, and abort it
    train.dist.destroy_process_group()
"""


def whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint but the step, of all its rows."""
    shape = model_config(read_json(checkpoint / "config.json"), checkpoint)
    found = read_rows(checkpoint, shape)
    return {name: torch.cat([rows.numbers for rows in pieces]) for name, pieces in found.items() if name != "step"}


def test_sharded_checkpoints_hold_the_numbers_of_one_process(prepared, tmp_path):
    """Written by two, read and written by four, by one: bit for bit, rows that do not divide and moments included."""
    (tmp_path / "script.py").write_text(SHARDED)
    for out, processes in (("one", 1), ("many", 2), ("many", 4), ("many", 1)):
        (tmp_path / out).mkdir(exist_ok=True)
        launch = torchrun(processes) if processes > 1 else ()
        arguments = ("--data", prepared, "--out", tmp_path / out, *RUN, "--hidden", 65, "--keep", 3)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = command(*launch, tmp_path / "script.py", *arguments, env=environment)
        assert result.returncode == 0, result.stderr
    wanted, found = whole(tmp_path / "one" / "step_00000001"), checkpoints(tmp_path / "many")
    assert [len(list(path.glob("rank_*"))) for path in found] == [1, 4, 2]
    assert {name.rpartition(".")[2] for name in wanted} == {"weight", "step", "exp_avg", "exp_avg_sq", "momentum"}
    for path in found:
        assert whole(path).keys() == wanted.keys()
        assert all(torch.equal(numbers, wanted[name]) for name, numbers in whole(path).items())


def test_whatever_several_optimizers_remember_comes_back(prepared, tmp_path):
    def begin() -> tuple:
        model = fresh(settings)
        parts = [[w for w in model.parameters() if w.dim() == dim] for dim in (2, 1)]
        return model, [torch.optim.SGD(parts[0], 0.1, momentum=0.9), torch.optim.AdamW(parts[1], 0.1)]

    tokens = load_tokenizer(prepared)
    settings = module.replace(config(prepared, tmp_path), vocab=tokens.vocab)
    model, optimizers = begin()
    for weight in model.parameters():
        weight.grad = weight.detach().clone()
    for optimizer in optimizers:
        optimizer.step()
    with Saver(tmp_path) as saver:
        saver.save(model, optimizers, 5, settings, tokens)
    again, others = begin()
    assert load(tmp_path, again, others, print) == 5
    before, after = state_of(model, optimizers, 5), state_of(again, others, 5)
    assert any("momentum_buffer" in name for name in before) and any("exp_avg_sq" in name for name in before)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


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
    rng = np.random.default_rng(0)
    for trial in range(24):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(prepared, tmp_path / "data")
        path = sorted((tmp_path / "data").glob("*.npy"))[trial % 6]
        data = bytearray(path.read_bytes())
        data[rng.integers(128, len(data))] ^= 1 << rng.integers(8)  # behind numpy's header
        path.write_bytes(data)
        name = path.name.split(".")[0]
        with pytest.raises(UserError, match=f"{name}.*npy is not as it was written"):
            Stream(tmp_path / "data", name.split("-")[0], syntax=9)
    with pytest.raises(UserError, match="is not as it was written"):
        train(config(tmp_path / "data", tmp_path / "run"))


class Evil:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def seal(checkpoint: Path) -> None:
    """Write the manifest anew, so that whatever the files hold now counts as undamaged."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != "manifest.json"]
    (checkpoint / "manifest.json").write_text(json.dumps({path.name: digest(path) for path in files}))


def test_a_malicious_checkpoint_is_refused_and_its_code_never_runs(prepared, finished, tmp_path):
    """Each file in turn is a pickle, and the manifest says so."""
    mark = tmp_path / "ran"
    for name in [path.name for path in sorted((finished / "step_00000012").iterdir())]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(finished, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "step_00000008")
        latest = tmp_path / "run" / "step_00000012"
        (latest / name).write_bytes(pickle.dumps(Evil(mark)))
        if name != "manifest.json":
            seal(latest)
        with pytest.raises(UserError, match="damaged checkpoints alone" if name == "manifest.json" else name):
            read_run(tmp_path / "run", torch.device("cpu"))
        if name.startswith("rank"):
            arguments = ("train.py", "--data", prepared, "--out", tmp_path / "run", *RUN)
            for result in (command(*arguments), command("sample.py", tmp_path / "run", "--count", 1)):
                assert result.returncode == 2 and "do not use it" in result.stderr, result.stderr
                assert "Traceback" not in result.stderr
    assert not mark.exists()


def lie(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """A change of a safetensors file's header, which may be made in place."""

    def changed(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        text = json.dumps(change(header) or header).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return changed


def offsets(header: dict, begin: int, end: int) -> None:
    header["model.norm.weight"]["data_offsets"] = [begin, end]


def note(header: dict, **change: object) -> None:
    notes = header["__metadata__"]
    notes["model.norm.weight"] = json.dumps(json.loads(notes["model.norm.weight"]) | change)


LIES = {
    "negative offsets": lie(lambda header: offsets(header, -128, 0)),
    "overlapping": lie(lambda header: offsets(header, 0, 128)),
    "too large": lie(lambda header: offsets(header, 1 << 40, (1 << 40) + 128)),
    "offsets that are no integers": lie(lambda header: offsets(header, 0.0, True)),
    "an unknown format": lie(lambda header: header["model.norm.weight"].update(dtype="F31")),
    "a negative shape": lie(lambda header: header["model.norm.weight"].update(shape=[-8, -4])),
    "an endless shape": lie(lambda header: header["model.norm.weight"].update(shape=[0, 10**30])),
    "a list": lie(lambda header: [1, 2]),
    "numbers for tensors": lie(lambda header: {"model.norm.weight": 3}),
    "no offsets": lie(lambda header: header["model.norm.weight"].pop("data_offsets") and None),
    "notes that are no texts": lie(lambda header: header["__metadata__"].update(more=3)),
    "no notes": lie(lambda header: header.pop("__metadata__") and None),
    "other rows": lie(lambda header: note(header, first_row=1)),
    "negative rows": lie(lambda header: note(header, first_row=-1)),
    "rows that are no integers": lie(lambda header: note(header, first_row=None)),
    "a larger whole": lie(lambda header: note(header, shape=[64])),
    "another whole": lie(lambda header: note(header, shape=[16, 2])),
    "a tensor that is not there": lie(lambda header: {"__metadata__": {}}),
    "a length of 2^63": lambda data: (1 << 63).to_bytes(8, "little") + data[8:],
    "no JSON": lambda data: data[:8] + b"#" + data[9:],
    "nested without end": lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5 + data,
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"0",
}


@pytest.mark.parametrize("name", LIES)
def test_a_checkpoint_whose_headers_lie_is_refused_in_one_sentence(prepared, finished, tmp_path, name):
    latest = tmp_path / "step_00000012"
    shutil.copytree(finished / "step_00000012", latest)
    path = latest / "rank_00000.safetensors"
    path.write_bytes(LIES[name](path.read_bytes()))
    seal(latest)
    shape = model_config(read_json(latest / "config.json"), latest)
    model = fresh(module.replace(config(prepared, tmp_path), vocab=shape.vocab, positions=shape.positions))
    optimizers = [torch.optim.AdamW(model.parameters())]
    for read in (lambda: read_run(tmp_path, torch.device("cpu")), lambda: load(tmp_path, model, optimizers, print)):
        with pytest.raises(UserError, match="do not use it|delete it") as error:
            read()
        assert str(latest) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": None}, "heads is None"),
        ({"layers": "2"}, "layers is '2'"),
        ({"layers": 10**9}, "layers is 1000000000"),
        ({"hidden": -64}, "hidden is -64"),
        ({"qk_norm": 1}, "qk_norm is 1"),
        ({"positions": [4, "4"]}, "positions is"),
        ({"heads": 32, "kv_heads": 32}, "their ratio be even"),
        ({"layers": 3}, "does not hold the weights"),
        ({"hidden": 65}, "does not hold the weights"),
        ({"vocab": 301}, "other tokens than codec.json"),
        (None, "dim is missing"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_in_one_sentence(finished, tmp_path, change, message):
    latest = tmp_path / "step_00000012"
    shutil.copytree(finished / "step_00000012", latest)
    saved = read_json(latest / "config.json")
    if change is None:
        del saved["dim"]
    (latest / "config.json").write_text(json.dumps(saved | (change or {})))
    seal(latest)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"../config.json": "0"}', '{"\\u0000": "0"}', "[" * 10**5])
def test_a_damaged_manifest_is_damage(finished, tmp_path, text):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "step_00000012" / "manifest.json").write_text(text)
    said = []
    assert newest(checkpoints(tmp_path / "run"), said.append).name == "step_00000008" and "is damaged" in said[0]


def test_training_does_not_begin_anew_over_damaged_checkpoints(prepared, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for checkpoint in checkpoints(tmp_path / "run"):
        (checkpoint / "codec.json").unlink()
    with pytest.raises(UserError, match="holds damaged checkpoints alone"):
        train(config(prepared, tmp_path / "run"))


def saved(prepared: Path, out: Path, step: int) -> None:
    tokens = load_tokenizer(prepared)
    settings = module.replace(config(prepared, out), vocab=tokens.vocab)
    model = fresh(settings)
    with Saver(out) as saver:
        saver.save(model, module.build_optimizers(model, settings), step, settings, tokens)


def test_a_checkpoint_is_read_back_before_it_counts(prepared, tmp_path, monkeypatch):
    saved(prepared, tmp_path, 1)
    for change in (lambda x: x + 1, lambda x: x.double(), lambda x: x[None]):

        def broken(path, tensors, about, change=change):
            name = "model.norm.weight"
            write_safetensors(path, tensors | {name: change(tensors[name])}, about)

        monkeypatch.setattr(checkpoint_module, "write_safetensors", broken)
        with pytest.raises(UserError, match="could not save .*step_00000002 .*does not hold what was written"):
            saved(prepared, tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_folders_that_cannot_be_opened_are_no_fault(prepared, tmp_path, monkeypatch):
    def refusing(path, *arguments):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments)

    real = os.open
    monkeypatch.setattr(os, "open", refusing)
    saved(prepared, tmp_path, 1)
    assert newest(checkpoints(tmp_path)).name == "step_00000001"


BROKEN = """
import os, sys
from pathlib import Path
import train
from codec import load_tokenizer
from plumbing import checkpoint, processes
from plumbing.command import UserError

def full(*_):
    raise OSError(28, "No space left on device")

config, device = train.parse(sys.argv[1:])[0], processes.join()
tokens, out = load_tokenizer(Path(config.data)), Path(config.out)
config = train.replace(config, vocab=tokens.vocab)
model = train.build_model(config, device)
model.init_weights(0)
optimizers, saver = train.build_optimizers(model, config), checkpoint.Saver(out)
saver.save(model, optimizers, 1, config, tokens)
saver.wait()
for step, (rank, function) in enumerate([(1, "write_safetensors"), (0, "save_tokenizer")], 2):
    real = getattr(checkpoint, function)
    if processes.rank() == rank:
        setattr(checkpoint, function, full)
    try:
        saver.save(model, optimizers, step, config, tokens)
        saver.wait()
    except UserError as error:
        print(f"said {error}\\n", end="", flush=True)  # in one piece, for the other prints too
    setattr(checkpoint, function, real)
    processes.barrier()
    print(f"{sorted(path.name for path in out.iterdir())}\\n", end="", flush=True)
    processes.barrier()
"""


def test_what_one_process_cannot_write_all_processes_report(prepared, tmp_path):
    (tmp_path / "script.py").write_text(BROKEN)
    (tmp_path / "run").mkdir()
    arguments = torchrun(2, tmp_path / "script.py", "--data", prepared, "--out", tmp_path / "run", *RUN)
    result = command(*arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert result.returncode == 0, result.stderr
    for step in (2, 3):
        text = f"said could not save {tmp_path}/run/step_{step:08d} ([Errno 28] No space left on device): make room"
        assert result.stdout.count(text) == 2, result.stdout
    assert result.stdout.count("['step_00000001']") == 4 and damage(tmp_path / "run" / "step_00000001") is None


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
        from plumbing.run import Stop
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


def test_a_nan_on_one_process_stops_all_before_it_is_logged(prepared, tmp_path):
    result, seconds = fail(prepared, tmp_path, "loss = loss * float('nan')")
    assert result.returncode and seconds < 20  # 1 to 2 s, and torchrun's own, when nothing else runs
    assert result.stderr.count("the gradient is nan, the loss") == 2  # both say so
    assert newest(checkpoints(tmp_path / "run")).name == "step_00000004" and max(losses(tmp_path / "run")) == 5


def test_one_dead_process_leaves_none_behind(prepared, tmp_path):
    result, seconds = fail(prepared, tmp_path, "os._exit(9)")
    assert result.returncode and seconds < 60
    assert running(tmp_path) == []
    assert newest(checkpoints(tmp_path / "run")).name == "step_00000004"


def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(prepared, tmp_path, monkeypatch):
    settings, real = config(prepared, tmp_path / "run", "--log-every", "100"), module.cross_entropy
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
