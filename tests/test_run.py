"""What a run folder promises: one process at a time, its own settings and data, files that survive a full disk."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codec import load_tokenizer
from plumbing.command import UserError
from plumbing.draw import draw_curves, save_grid, save_pixels
from plumbing.plan import peak_flops
from plumbing.run import Log, claim, line_of, open_run
from tests.conftest import ROOT, command, config

STEPS = [{"step": 2, "loss": 3.5}, {"step": 4, "loss": 3.25}, {"step": 6, "loss": 3.0}]
DAMAGE = {
    "NUL bytes before a line": b'\0\0\0\0{"step": 4}\n',
    "NUL bytes alone": b"\0" * 512 + b"\n",
    "two lines in one": b'{"step": 4, "lo{"step": 4}\n',
    "no UTF-8": b"\xff\xfe\n",
    "a line that was cut": b'{"step": 4, "loss": 3.\n',
    "JSON, but no object": b"[4]\n",
    "no step": b'{"loss": 3.0}\n',
    "a step that is no number": b'{"step": "4"}\n',
    "brackets without end": b"[" * 100_000 + b"\n",
}

# --- damaged files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_damaged_line_of_the_log_goes_and_the_others_stay(damage, at, tmp_path, capsys):
    lines = [json.dumps(record).encode() + b"\n" for record in STEPS]
    (tmp_path / "log.jsonl").write_bytes(b"".join([*lines[:at], DAMAGE[damage], *lines[at:]]))
    assert Log(tmp_path, 4).records == STEPS[:2]
    assert f"1 of 4 lines of {tmp_path}/log.jsonl are damaged" in capsys.readouterr().out
    log = Log(tmp_path, 4)
    log.write(STEPS[2])
    assert capsys.readouterr().out == ""  # it was said once
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == STEPS


def test_an_empty_log_is_a_new_one(tmp_path):
    (tmp_path / "log.jsonl").touch()
    assert Log(tmp_path, 4).records == []


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\xff", b"[]", b'{"dim": 32'])
def test_a_damaged_config_is_one_sentence_that_names_the_file(content, prepared, tmp_path):
    settings, tokens = config(prepared, tmp_path), load_tokenizer(prepared)
    open_run(tmp_path, settings, tokens, "a")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json (cannot be read|holds no)"):
        open_run(tmp_path, settings, tokens, "a")
    assert (tmp_path / "config.json").read_bytes() == content


def test_a_start_is_noted_behind_damaged_ones(prepared, tmp_path):
    settings, tokens = config(prepared, tmp_path), load_tokenizer(prepared)
    open_run(tmp_path, settings, tokens, "a")
    with open(tmp_path / "started.jsonl", "ab") as file:
        file.write(b'\0\0\xff{"time": "20')
    open_run(tmp_path, settings, tokens, "a")
    notes = [json.loads(line) for line in (tmp_path / "started.jsonl").read_text().splitlines()]
    assert len(notes) == 2 and notes[1]["processes"] == 1 and notes[1]["versions"]["torch"] == torch.__version__


# --- the data -------------------------------------------------------------------------------------------------------


def test_data_are_known_by_what_they_hold_not_by_where_they_lie(prepared, tmp_path):
    run, tokens = tmp_path / "run", load_tokenizer(prepared)
    open_run(run, config(prepared, run), tokens, "a")
    shutil.copytree(prepared, tmp_path / "moved")
    for data in (f"{prepared}/", os.path.relpath(prepared), str(tmp_path / "moved")):
        open_run(run, replace(config(prepared, run), data=data), tokens, "a")
    assert json.loads((run / "config.json").read_text())["data_holds"] == "a"
    with pytest.raises(UserError, match="the data in .*moved are not those the run in .* began with"):
        open_run(run, config(tmp_path / "moved", run), tokens, "b")


def test_a_run_that_has_not_noted_its_data_notes_them(prepared, tmp_path):
    open_run(tmp_path, config(prepared, tmp_path), load_tokenizer(prepared), "a")
    before = json.loads((tmp_path / "config.json").read_text())
    del before["data_holds"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    open_run(tmp_path, config(prepared, tmp_path), load_tokenizer(prepared), "b")
    assert json.loads((tmp_path / "config.json").read_text())["data_holds"] == "b"


# --- one process at a time ------------------------------------------------------------------------------------------

CLAIM = """
import sys
from pathlib import Path
from plumbing.run import claim
with claim(Path(sys.argv[1]), wait=True):
    print("held", flush=True)
    sys.stdin.readline()
"""


def claimer(folder: Path) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", CLAIM, str(folder)], cwd=ROOT, **pipes)


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_who_waits_for_a_folder_gets_it_when_its_holder_ends(end, tmp_path):
    folder = tmp_path / "run"
    with claimer(folder) as first, claimer(tmp_path / "other") as other:
        assert first.stdout.readline() == "held\n" == other.stdout.readline()  # other folders are free
        with claimer(folder) as second:
            said = second.stdout.readline()
            assert said.startswith(f"waiting for process {first.pid} on ") and said.endswith(f"holds {folder}\n")
            with pytest.raises(UserError, match=f"is in use by process {first.pid} on "), claim(folder):
                pass
            first.kill() if end == "is killed" else first.communicate("\n")
            assert second.communicate("\n", timeout=60)[0] == "held\n"
        other.communicate("\n")
    with claim(folder):
        pass


def test_of_many_processes_the_first_holds_the_folder_for_all(tmp_path, monkeypatch):
    with claim(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with claim(tmp_path):
            pass


def test_the_lock_needs_no_torch():
    """The workers of data.prepare would each pay for it."""
    result = command("-c", "import sys, plumbing.run; print('torch' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_nothing_needs_what_windows_does_not_have(tmp_path):
    script = """
        import signal, sys
        from pathlib import Path
        sys.modules["fcntl"] = sys.modules["resource"] = None
        del signal.SIGUSR1
        import torch
        import sample, train
        from plumbing.plan import memory
        from plumbing.run import Log, Stop, claim, line_of
        folder, cpu = Path(sys.argv[1]), torch.device("cpu")
        with claim(folder, wait=True), Stop() as stop:
            assert not stop.agreed()
            signal.raise_signal(signal.SIGTERM)
            assert stop.agreed()
            Log(folder, 0).write({"step": 1, "memory_gb": memory(cpu)})
            print(line_of(Log(folder, 1).records[0]))
    """
    result = command("-c", textwrap.dedent(script), tmp_path / "run")
    assert result.returncode == 0, result.stderr
    note = f"note: this system has no locks of files, so start no second process on {tmp_path / 'run'}\n"
    assert result.stdout == note + "step 1\n"


# --- lines and pictures ---------------------------------------------------------------------------------------------


def test_a_line_leaves_out_what_the_machine_cannot_say():
    record = {"step": 20, "loss": 4.5, "peak_share": None, "seconds_left": 61.2, "lr": 1e-3}
    assert line_of(record) == "step 20  loss 4.5000  61 s left"
    assert line_of({**record, "peak_share": 0.4, "memory_gb": 1.04}) == (
        "step 20  loss 4.5000  40% of peak  1.0 GB  61 s left"
    )


def test_chips_of_one_family_have_peaks_of_their_own(monkeypatch):
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "Tesla T4": None,
    }
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_pictures_are_written_without_loss_and_whole_or_not_at_all(tmp_path, monkeypatch):
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8))
    path = save_pixels(tmp_path / "keep_0.5", pictures[0])
    assert path == tmp_path / "keep_0.5.png" and np.array_equal(np.asarray(Image.open(path)), pictures[0])
    save_grid(tmp_path / "grid", pictures)
    before = (tmp_path / "grid.png").read_bytes()

    def full(path, data):
        path.open("wb").write(data[:9])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        save_grid(tmp_path / "grid", pictures[:1])
    assert {path.name for path in tmp_path.iterdir()} == {"keep_0.5.png", "grid.png"}
    assert (tmp_path / "grid.png").read_bytes() == before


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0], [6.5, 1.25]])
def test_curves_are_drawn_of_any_values(values):
    assert draw_curves({"training": [(step + 1, y) for step, y in enumerate(values)]}, "bits").size == (960, 540)
