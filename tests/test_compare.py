"""What studies.compare, scaling and tokens promise: the same for each codec, whatever interrupts it, and measures that
equal their closed forms."""

import json
import math
import os
import shlex
import signal
import time
from itertools import pairwise
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import pearsonr

import fid
import sample
import train
from codec import load_tokenizer
from data import prepare, vq
from data.shapes import draw
from data.stream import Stream
from plumbing.command import UserError
from plumbing.files import read_json
from studies import compare, contest, scaling, steps, tokens
from studies.contest import CONTENDERS, KEEP, Comparison, Contender, Plan, Study, long_tail, shrunk
from studies.steps import Step, Stopped, Work
from tests.benchmark import random_state

MAIN = {
    "data.vq": vq.main,
    "data.prepare": prepare.main,
    "train.py": train.main,
    "sample.py": sample.main,
    "fid.py": fid.main,
}
DO, COMMAND = Work.do, Work.command
CODECS = ["jpeg", "vq8", "pixels8"]
FLAGS = "--size 32 --config tiny --steps 3 --tokens 256 --vq-steps 3 --vq-width 32 --count 6".split()  # noqa: SIM905
TRAIN = "-- --dim 32 --layers 1 --heads 1 --kv-heads 1 --hidden 32 --samples 1".split()  # noqa: SIM905


def here(work: Work, step: Step, name: str) -> None:
    """Run a command in this process, which spares the start of another."""
    word, *arguments = step.run
    word, *arguments = [word, *arguments] if word != "-m" else arguments
    with open(work.out / "commands.txt", "a") as file:
        file.write(f"{shlex.join(step.run)}\n")
    MAIN[word](arguments)
    assert step.done, step


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """20 drawings to learn from and 4 to compare with, of each of three classes."""
    folder = tmp_path_factory.mktemp("drawings")
    for split, count in (("train", 20), ("test", 4)):
        for i in range(3 * count):
            path = folder / split / "abc"[i % 3] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(i, 32, seed=len(split))).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_state(64), path)
    return path


def in_turn(work: Work, chains: list[list[Step]], title: str) -> None:
    for chain in chains:
        work.chain(chain)


@pytest.fixture(scope="module")
def quick(module_patch) -> None:
    module_patch.setattr(Work, "command", here)
    module_patch.setattr(Work, "do", in_turn)
    for module in (contest, compare):
        module_patch.setattr(module, "DIMS", 64)
        module_patch.setattr(module, "FREE_COUNT", 4)
        module_patch.setattr(module, "TOP_P", (0.9,))
    module_patch.setitem(CONTENDERS, "pixels8", Contender("pixels, 8x8", "pixels8", "--codec pixels", side=8))


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def compared(quick, data, weights, tmp_path_factory) -> Path:
    """A comparison of three codecs that was stopped after its ninth command, and went on."""
    out, count = tmp_path_factory.mktemp("compare") / "out", 0

    def stopping(work: Work, step: Step, name: str) -> None:
        nonlocal count
        count += 1
        if count == 10:
            work.stop.set()
            raise Stopped
        here(work, step, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "command", stopping)
        compare.main(arguments(out, data, weights))
    assert not (out / "table.json").exists()
    compare.main(arguments(out, data, weights))
    return out


def arguments(out: Path, data: Path, weights: Path, *more: str, train: list[str] = TRAIN) -> list[str]:
    given = ["--data", str(data), "--weights", str(weights), "--codecs", *CODECS, "--small", *FLAGS, *more]
    return [str(out), *given, *train]


def test_a_comparison_that_was_stopped_goes_on_and_does_nothing_twice(compared):
    commands = (compared / "commands.txt").read_text().splitlines()
    assert len(commands) == len(set(commands)) > 30


def test_each_codec_has_a_row_for_each_setting_and_reference_one_for_both(compared):
    rows = read_json(compared / "table.json")["rows"]
    assert [(row["codec"], row["setting"]) for row in rows] == [
        ("jpeg", "flops"),
        ("vq8", "flops"),
        ("vq8", "pictures"),
        ("pixels8", "flops"),
        ("pixels8", "pictures"),
    ]
    jpeg, *others = rows
    for row in others:  # steps are whole, and here few
        of_a_step = row["cost"] * row["batch"] * row["context"]
        if row["setting"] == "flops":
            assert abs(row["flops"] - jpeg["flops"]) <= of_a_step / 2
        else:
            assert abs(row["pictures"] - jpeg["pictures"]) <= row["batch"] * row["context"] / row["length"] / 2 + 1
    assert {row["codec"]: round(row["length"]) for row in others} == {"vq8": 16 + 2, "pixels8": 64 + 2}
    assert {row["codec"]: round(row["file_bits"]) for row in others} == {"vq8": 16 * 12, "pixels8": 64 * 9}


def test_rows_hold_what_fid_py_says_of_the_folders(compared, weights, capsys):
    row = read_json(compared / "table.json")["rows"][0]
    folder = compared / "samples" / "jpeg-flops" / "whole-0"
    capsys.readouterr()
    fid.main([str(folder), "--dims", "64", "--weights", str(weights), "--json"])
    (found,) = json.loads(capsys.readouterr().out)["completions"]  # at 32 pixels JPEG has two rows of MCUs
    assert found["count"] == 6 and found["keep"] == "0.5"
    network = fid.load(weights, 64)
    sets = [fid.extract(fid.Images(path), network)[0] for path in (folder / "keep_0.5", compared / "test" / "whole")]
    assert row["originals"]["0.5"] == [pytest.approx(compare.kernel_distance(*sets))]
    came_back = np.stack([np.float64(Image.open(path)) for path in sorted((folder / "roundtrip").iterdir())])
    given = np.stack([np.float64(Image.open(path)) for path in sorted((compared / "test/whole").iterdir())])
    errors = ((came_back - given) ** 2).mean((1, 2, 3))
    assert row["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean())
    assert read_json(compared / "table.json")["measure"] == "KID x 1000"
    assert "fewer than 64 features: KID x 1000 instead of FID" in (compared / "table.md").read_text()


def test_all_pictures_are_compared_at_one_size(compared):
    folders = [path for path in (compared / "samples").rglob("*-large")]
    assert len(folders) == 2 * (2 + 1 + 1 + 1 + 1)
    for path in (file for folder in folders for file in folder.iterdir()):
        small = Image.open(path.parent.with_name(path.parent.name.removesuffix("-large")) / path.name)
        assert small.size == (8, 8)
        assert np.array_equal(
            np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)), np.asarray(Image.open(path))
        )


def test_the_grid_has_a_row_for_each_model_and_one_for_the_originals(compared):
    grid = Image.open(compared / "grid.png")
    assert grid.height == 26 + 6 * (64 + 6)
    assert np.asarray(grid).std() > 10


def test_more_seeds_go_on_from_there_and_another_setting_is_refused(compared, data, weights, quick):
    compare.main(arguments(compared, data, weights, "--codecs", "jpeg", "--seeds", "2"))
    row = read_json(compared / "table.json")["rows"][0]
    assert len(row["free"]) == len(row["originals"]["0.5"]) == 2 and row["free"][0] != row["free"][1]
    assert "±" in (compared / "table.md").read_text()
    with pytest.raises(UserError, match="steps: 3, now 4"):
        compare.main(arguments(compared, data, weights, "--steps", "4"))
    with pytest.raises(UserError, match="train:"):
        compare.main(arguments(compared, data, weights, train=[*TRAIN, "--lr", "0.1"]))


def test_a_long_tail_is_compared_class_by_class(compared, data, weights, quick, tmp_path):
    """Of completions that are there, as if these had been what their models learned from."""
    study = Study(compared, data, Comparison(tail=0.1), ["jpeg", "vq8"], [], weights)
    assert study.models == [("jpeg", "flops"), ("vq8", "pictures")]  # as many pictures, as in the paper
    study.source = long_tail(data / "train", tmp_path / "tail", 0.1)
    found, originals = compare.tail_of(study), fid.open_set(study.features("whole"), 64).features
    assert read_json(compared / "classes.json")["classes"] == ["a", "a", "b", "b", "c", "c"] and found["count"] == 2
    completed = fid.open_set(study.features("jpeg-flops", "whole-0-0.5"), 64).features
    assert found["classes"]["b"]["jpeg"] == pytest.approx(compare.kernel_distance(completed[2:4], originals[2:4]))
    assert sorted(each["pictures"] for each in found["classes"].values()) == [2, 6, 20]
    rarity = [-math.log(each["pictures"]) for each in found["classes"].values()]
    gap = [each["jpeg"] - each["vq8"] for each in found["classes"].values()]
    assert found["correlations"]["vq8"]["r"] == pytest.approx(np.corrcoef(rarity, gap)[0, 1])
    assert found["correlations"]["vq8"]["p"] == pytest.approx(pearsonr(rarity, gap).pvalue)


def test_the_context_holds_pictures_to_complete_that_are_longer_than_any_to_learn_from(quick, data, weights, tmp_path):
    for folder in ("pictures/test", "out"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pictures/train").symlink_to(data / "train")
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"pictures/test/{number}.png")
    study = Study(tmp_path / "out", tmp_path / "pictures", Comparison(size=32, count=6), ["jpeg"], [], weights)
    study.references()
    in_turn(study.work, [study.preparation("jpeg")], "")
    longest = max(len(load_tokenizer(tmp_path / "out/data/jpeg").codec.encode(pixels)) + 2 for pixels in noise)
    assert longest > 256 >= np.diff(Stream(tmp_path / "out/data/jpeg", "train", 0).documents).max()
    assert longest <= study.plan("jpeg", "flops").context < longest + contest.ROW


def test_kinds_of_pictures_are_compared_one_by_one(quick, data, weights, tmp_path):
    (tmp_path / "others").symlink_to(data)
    compare.main(
        arguments(tmp_path / "out", data, weights, "--data", str(data), str(tmp_path / "others"), "--codecs", "jpeg")
    )
    rows = read_json(tmp_path / "out" / "kinds.json")["rows"]
    assert [row["pictures"] for row in rows] == [data.name, "others"]
    assert (
        rows[0]["model_bits"] == rows[1]["model_bits"]
        and rows[0]["share"] == rows[0]["model_bits"] / rows[0]["file_bits"]
    )


def test_a_long_tail_is_a_geometric_series_of_links(data, tmp_path):
    found = long_tail(data / "train", tmp_path / "tail", 0.05)
    counts = sorted(len([*folder.iterdir()]) for folder in found.iterdir())
    assert counts == [1, round(20 * 0.05**0.5), 20]
    assert all(path.resolve().is_relative_to(data.resolve()) for path in found.rglob("*.png"))


def test_a_long_tail_without_classes_is_refused(quick, data, weights, tmp_path):
    with pytest.raises(UserError, match="has 0 folders, and --tail needs one for each class"):
        long_tail(data / "train" / "a", tmp_path / "tail", 0.05)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(data / "train")
    (tmp_path / "data" / "test").symlink_to(data / "test" / "a")
    more = ["--data", str(tmp_path / "data"), "--tail", "0.1", "--count", "2"]
    with pytest.raises(
        UserError, match="--tail needs the same class folders in train and test, and .no folder., a, b, c differ"
    ):
        compare.main(arguments(tmp_path / "out", data, weights, *more))


def test_small_things_lie_in_the_middle_of_black():
    small = shrunk(np.full((32, 32, 3), 200, np.uint8))
    assert (small[8:24, 8:24] == 200).all() and small.sum() == 16 * 16 * 3 * 200


def test_a_kernel_distance_knows_no_pairs():
    """Of the same pictures in the same order it is as far below 0 as the mean allows; of others, that of fid.py."""
    a, b = np.random.default_rng(0).normal(size=(2, 40, 8))
    k = lambda x, y: (x @ y / 8 + 1) ** 3  # noqa: E731
    others = [(i, j) for i in range(40) for j in range(40) if i != j]
    expected = [k(a[i], a[j]) + k(b[i], b[j]) - 2 * k(a[i], b[j]) for i, j in others]
    assert compare.kernel_distance(a, b) == pytest.approx(1000 * np.mean(expected))
    assert compare.kernel_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("flag", ["--batch", "--steps=4", "--no-syntax"])
def test_flags_that_a_comparison_decides_are_refused(quick, flag, data, weights, tmp_path):
    with pytest.raises(UserError, match="after -- is decided by the study itself"):
        compare.main(arguments(tmp_path, data, weights, train=["--", flag, "8"]))


def test_a_training_without_its_last_evaluation_is_not_done(tmp_path):
    step = steps.training(tmp_path, 4, [], 1.0)
    step.made.mkdir()
    assert not step.done
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "000004.png").touch()
    assert step.done


def test_a_reduction_is_the_mean_of_those_at_each_ratio():
    rows = [
        {
            "codec": name,
            "setting": "pictures",
            "originals": {str(keep): [value] for keep, value in zip(KEEP, values, strict=True)},
        }
        for name, values in (("jpeg", (6, 3, 1)), ("vq8", (12, 4, 1)))
    ]
    assert compare.reductions(rows, KEEP) == {"vq8, as many pictures": pytest.approx((0.5 + 0.25 + 0) / 3)}


def test_a_plan_counts_flops_and_pictures():
    plan = Plan(Path(), context=256, batch=8, micro=4, steps=10, length=64.0, cost=1000, at_once=1)
    assert plan.flops == 10 * 8 * 256 * 1000 and plan.pictures == 10 * 8 * 256 / 64


def test_a_command_that_fails_is_named_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(Work, "do", DO)
    monkeypatch.setattr(Work, "command", COMMAND)
    step = Step(tmp_path / "x", ["train.py", "--lr", "nan"], 1.0)
    with pytest.raises(UserError, match=r"`python train.py --lr nan` ended with 2 \(error: --lr is nan"):
        Work(tmp_path, 1).do([[step]], "try")


def test_work_that_is_told_to_stop_ends_its_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(Work, "do", DO)
    monkeypatch.setattr(Work, "command", COMMAND)
    begun = time.monotonic()
    timer = Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(Stopped):
        Work(tmp_path, 2).do(
            [[Step(tmp_path / name, ["-c", "import time; time.sleep(60)"], 1.0)] for name in "abc"], "try"
        )
    assert time.monotonic() - begun < 20 and len(read_json(tmp_path / "times.json")) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tail", "1"], "--tail is 1.0: choose a share below 1"),
        (["--count", "1000", "--size", "32"], "has 12 usable pictures of 32 pixels, not --count 1000: lower it"),
        (["--codecs", "gif"], "invalid choice: 'gif'"),
        (["--size", "48"], "choose a size in steps of 32"),
        (["--views", "3"], "--views 3: choose"),
        (["--seeds", "0"], "--seeds is 0: choose 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, said, data, weights, tmp_path):
    with pytest.raises(UserError, match=said):
        compare.main([str(tmp_path), "--data", str(data), "--weights", str(weights), *given])


def test_a_folder_without_train_and_test_is_refused(data, weights, tmp_path):
    with pytest.raises(UserError, match="is not a folder: --data holds `train` and `test`"):
        compare.main([str(tmp_path), "--data", str(data / "train"), "--weights", str(weights)])


# --- scaling --------------------------------------------------------------------------------------------------------


def test_a_power_law_is_found_from_its_points():
    x = np.geomspace(1e5, 1e9, 9)
    law = scaling.power_law([*zip(x, 700 + 900 * (x / 1e5) ** -0.35, strict=True)])
    assert law == pytest.approx({"floor": 700, "a": 900, "b": 0.35, "x0": 1e5}, rel=1e-3)
    assert scaling.power_law([(1, 2), (2, 1)]) == {}


def test_sizes_are_tried_at_all_rates_and_trained_at_the_best(quick, compared, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "SIZES", [scaling.Size(8 * n, 1, 1, 16) for n in (1, 2, 3, 4)])
    arguments = [str(tmp_path), "--data", str(compared / "data" / "vq8"), "--steps", "4", "--lr", "1e-9", "0.02"]
    arguments += ["--", "--context", "64", "--batch", "1", "--micro", "1"]
    scaling.main(arguments)
    found = read_json(tmp_path / "scaling.json")
    for row in found["rows"]:
        assert row["lr"] == 0.02
        assert row["flops"]["1"] == 4 * row["flops"]["0.25"]
        dim, vocab = row["dim"], 4096 + 2
        assert row["weights"] == 4 * dim**2 + 3 * dim * 16 + dim * vocab + 3 * dim  # a block, the head, three gains
        assert row["flops"]["0.25"] == 64 * (6 * row["weights"] + 12 * dim * 64)
    assert len([*(tmp_path / "runs").iterdir()]) == 4 * (2 + 2)
    assert Image.open(tmp_path / "scaling.png").size == (1920, 540)
    before = (tmp_path / "commands.txt").read_text()
    scaling.main(arguments)
    assert (tmp_path / "commands.txt").read_text() == before
    with pytest.raises(UserError, match="holds another study"):
        scaling.main([*arguments[:3], "--steps", "8"])


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_symbols_of_a_wrong_token_may_be_right():
    """Tokens 0 to 3 are symbols, 4 is (1, 2), 5 is (1, 2, 3), then come start and end."""
    expansions = [np.array(each) for each in ([0], [1], [2], [3], [1, 2], [1, 2, 3])]
    found, truth = np.array([5, 1, 4, 7, 0, 4]), np.array([4, 4, 5, 1, 7, 5])
    assert tokens.right_symbols(found, truth, expansions) == (2 + 1 + 2 + 0 + 2, 2 + 2 + 3 + 1 + 3)


def test_accuracies_are_those_of_predictions_looked_at_one_by_one(compared, capsys):
    run = compared / "runs" / "jpeg-flops"
    tokens.main(["accuracy", str(run)])
    found = json.loads(capsys.readouterr().out)
    model, tokenizer, _ = sample.read_run(run, torch.device("cpu"))
    val, right, count = Stream(compared / "data" / "jpeg", "val", len(model.config.positions)), 0, 0
    for begin, end in pairwise(val.documents.tolist()):
        x, syntax = (
            torch.from_numpy(each.astype(np.int64))
            for each in (val.read(begin, end - begin), val.read_syntax(begin, end - begin))
        )
        with torch.no_grad():
            likeliest = model(x[None, :-1], syntax[None, :-1])[0].argmax(-1)
        right, count = right + int((likeliest == x[1:]).sum()), count + len(x) - 1
    assert found["tokens"] == count and found["right_tokens"] == pytest.approx(right / count)
    assert found["symbols"] == val.symbols


def test_costs_are_counted_by_the_formula(data):
    lines = tokens.costs(data / "test", [32], "tiny", 5).splitlines()
    cells = next([cell.strip() for cell in line.split("|")] for line in lines if "VQ, 8x8" in line)
    weights = 2 * (4 * 64**2 + 3 * 64 * 176 + 2 * 64) + 64 + 64 * 4098
    assert cells[3] == "16" and float(cells[4]) == pytest.approx(18 * (6 * weights + 12 * 2 * 64 * 18) / 1e9, rel=0.01)
    with pytest.raises(UserError, match="no usable picture of 512 pixels"):
        tokens.costs(data / "test", [512], "tiny", 5)
