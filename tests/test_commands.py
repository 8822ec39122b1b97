"""What all commands promise: one sentence and exit code 2 for what a user can mend; and that they run anywhere."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import data.prepare
import data.shapes
import fid
import sample
import train
from plumbing.command import run
from tests.conftest import ROOT, RUN, command

MAINS = {"train": train.main, "sample": sample.main, "prepare": data.prepare.main, "shapes": data.shapes.main}
MAINS["fid"] = fid.main
DAMAGE = [b"", b"\0" * 64, b"\xff\xfe", b"[]", b'{"settings": {', b"[" * 100_000]


@pytest.fixture
def go(capsys) -> Callable[..., str]:
    """Run a command in this process; what it printed, or the one sentence that it ended in, with exit code 2."""

    def go(name: str, *arguments: object, refused: bool = False) -> str:
        capsys.readouterr()
        if not refused:
            MAINS[name]([str(argument) for argument in arguments])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            run(lambda: MAINS[name]([str(argument) for argument in arguments]))
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        return said

    return go


# --- numbers that cannot be -----------------------------------------------------------------------------------------

NUMBERS = {
    "train": {
        "--lr": ["nan", "inf", "0", "-1"],
        "--seed": [2**64, -1],
        "--steps": [0, 2**64],
        "--dim": [0, 10**9],
        "--layers": [10**9],
        "--context": [10**9],
        "--batch": [0, 10**9],
        "--micro": [10**9],
        "--warmup": [-1],
        "--clip": ["nan"],
    },
    "prepare": {
        "--val": ["nan", "inf", "0", "1"],
        "--vocab": [5, 257, 60_000, -1],
        "--quality": ["nan", 0, 101],
        "--size": [0, 10**9],
        "--restart": [-1, 10**6],
        "--workers": [0, -1, 10**6],
        "--codec": ["nothing"],
    },
    "shapes": {"--count": [0, -1], "--size": [0, 33, 32 * 10**6]},
    "fid": {"--dims": [0, "nan"], "--seed": [-1, 2**64]},
}


@pytest.mark.parametrize("name, flag", [(name, flag) for name in NUMBERS for flag in NUMBERS[name]])
def test_numbers_that_cannot_be_are_refused(name, flag, go, photos, prepared, tmp_path):
    """Each before anything large is begun."""
    given = {
        "train": ["--data", prepared, "--out", tmp_path / "out", *RUN],
        "prepare": [photos, tmp_path / "out", "--size", 32, "--workers", 1],
        "shapes": [tmp_path / "out"],
        "fid": [photos, photos],
    }[name]
    for value in NUMBERS[name][flag]:
        said = go(name, *given, flag, value, refused=True)
        assert flag.strip("-") in said and str(value)[:3] in said, said


# --- damaged files --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    """A data folder that may be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def reports(report: dict) -> list[dict]:
    """What could be written in the place of a report."""
    train, val = report["shards"]["train-00000"], report["shards"]["val-00000"]
    shards = [[], 5, None, {"train-00000": 5, "val-00000": val}, {"train-00000": {}, "val-00000": val}]
    shards += [{"train-00000": {**train, "symbols": "x"}, "val-00000": val}]
    shards += [{"train-00000": {**train, "sha256": 5}, "val-00000": val}, {"train-00000": train}]
    return [{}, *({**report, "shards": each} for each in shards)]


def test_a_damaged_report_is_named_by_each_command_that_reads_it(go, folder, photos, tmp_path):
    path, before = folder / "report.json", json.loads((folder / "report.json").read_text())
    training = ["train", "--data", folder, "--out", tmp_path / "run", *RUN]
    preparing = ["prepare", photos, folder, "--size", 32, "--vocab", 300, "--val", 0.1, "--workers", 1]
    settings = [json.dumps({**before, "settings": value}).encode() for value in (5, [], None)]
    for content in DAMAGE + [json.dumps(each).encode() for each in reports(before)]:
        path.write_bytes(content)
        assert str(path) in go(*training, refused=True)
    for content in [*DAMAGE, b"{}", *settings]:
        path.write_bytes(content)
        assert str(path) in go(*preparing, refused=True)
        assert path.read_bytes() == content


def test_a_damaged_codec_is_named(go, folder, tmp_path):
    path, before = folder / "codec.json", json.loads((folder / "codec.json").read_text())
    merges = [5, [5], [[1]], [["a", "b"]], [[999_999, 3]], [[300, 300]], [[-1, 0]]]
    changes = [{"merges": each} for each in merges] + [{"codec": each} for each in ("x", [], 5)]
    changes += [{"size": each} for each in ("x", 5, None, 32.0, [32])]
    changes += [{"quality": "25"}, {"subsampling": []}, {"header": 5}, {"restart": 1.5}]
    for content in [*DAMAGE, b"{}", *(json.dumps({**before, **change}).encode() for change in changes)]:
        path.write_bytes(content)
        said = go("train", "--data", folder, "--out", tmp_path / "run", *RUN, refused=True)
        assert str(path) in said and not (tmp_path / "run" / "config.json").exists(), content


@pytest.mark.parametrize("name", ["config.json", "codec.json", "manifest.json"])
def test_a_checkpoint_with_a_damaged_file_is_passed_over_and_named(name, go, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    newest, older = sorted(tmp_path.glob("run/step_*"), reverse=True)
    (newest / name).write_bytes(b"")
    said = go("sample", tmp_path / "run", "--count", 1)
    assert f"{newest} is damaged ({name} is not as it was written): using the one before" in said
    (older / name).write_bytes(b"\0" * 64)
    said = go("sample", tmp_path / "run", "--count", 1, refused=True)
    assert f"{tmp_path / 'run'} holds damaged checkpoints alone" in said


@pytest.mark.parametrize(
    "line", ['{"step": 4, "bits_per_byte": "x"}', '{"step": 4, "loss": []}', '{"step": 4, "bits_per_byte": NaN}']
)
def test_a_line_of_the_log_without_numbers_goes(line, go, prepared, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_00000012")
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write(f"{line}\n" + '{"step": 5, "bits_per_byte": null}\n')
    said = go("train", "--data", prepared, "--out", tmp_path / "run", *RUN)
    assert "1 of " in said and "are damaged and left out" in said


# --- the same data, and others --------------------------------------------------------------------------------------


def test_moved_data_continue_the_run_and_other_pictures_do_not(go, folder, photos, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_00000012")
    moved = folder.rename(tmp_path / "moved")
    assert "step 8 of 12" in go("train", "--data", f"{moved}/", "--out", tmp_path / "run", *RUN)
    shutil.rmtree(moved)
    (tmp_path / "others").mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[:50]):
        shutil.copyfile(path, tmp_path / "others" / f"{number}.png")
    given = [tmp_path / "others", moved, "--size", 32, "--vocab", 300, "--val", 0.1, "--workers", 1]
    go("prepare", *given)
    shutil.copyfile(finished / "codec.json", moved / "codec.json")  # the same byte pairs: only the pictures are others
    said = go("train", "--data", moved, "--out", tmp_path / "run", *RUN, refused=True)
    assert "are not those the run in" in said and str(moved) in said


# --- other machines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "--plan"],
        ["sample.py", "--help"],
        ["fid.py", "--help"],
        ["-m", "data.prepare", "--help"],
        ["-m", "data.shapes", "--help"],
    ],
    ids=" ".join,
)
def test_packages_of_the_same_names_do_not_come_before_ours(arguments, tmp_path, monkeypatch):
    for name in ("data", "plumbing", "studies", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('another package')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = command(*arguments)
    assert result.returncode == 0 and ("usage:" in result.stdout or "parameters" in result.stdout), result.stderr


def test_all_commands_run_where_there_are_no_locks_no_resource_and_no_sigusr1(photos, tmp_path):
    script = """
        import os, signal, sys
        sys.modules["fcntl"] = sys.modules["resource"] = None
        del signal.SIGUSR1
        if hasattr(os, "sched_getaffinity"):
            del os.sched_getaffinity
        import data.prepare, sample, train
        photos, folder, *flags = sys.argv[1:]
        data.prepare.main([photos, f"{folder}/data", "--size", "32", "--val", "0.1", "--workers", "2"])
        train.main(["--data", f"{folder}/data", "--out", f"{folder}/run", *flags, "--steps", "2", "--every", "2"])
        sample.main([f"{folder}/run", "--count", "1"])
    """
    result = command("-c", textwrap.dedent(script), photos, tmp_path, *RUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("1 of 1 are whole valid files\n")
    assert result.stdout.count("note: this system has no locks of files") == 2


def test_of_two_first_runs_the_second_waits_for_the_data(tmp_path):
    script = "import data.shapes, pathlib, sys; data.shapes.make(pathlib.Path(sys.argv[1]), 60, 32)"
    start = [sys.executable, "-c", script, str(tmp_path / "shapes")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(start, cwd=ROOT, **pipes) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("is prepared already" in out for out, _ in said) == 1


def test_compiling_without_a_compiler_is_refused_with_what_to_do(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    result = command("train.py", "--data", prepared, "--out", tmp_path / "run", *RUN, "--compile")
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert last.startswith("error: --compile failed") and last.endswith("install a C++ compiler, or pass --no-compile")


def test_memory_that_does_not_suffice_is_refused_with_what_to_do(go, prepared, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "build_model", full)
    said = go("train", "--data", prepared, "--out", tmp_path / "run", *RUN, refused=True)
    assert "Tried to allocate 2.00 GiB" in said and "lower --micro" in said
