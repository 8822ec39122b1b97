"""fid.py: equal to pytorch_fid, exact where a closed form is known, and a sentence for every bad input.

Some tests compare with pytorch_fid or use the genuine weights in ../shared/inception; they skip where either is absent.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fid
import plumbing.command
from fid import Statistics, frechet_distance, frechet_infinity, kernel_distance, precision_recall
from plumbing.command import UserError
from tests.benchmark import published_inception, random_state
from tests.conftest import command, torchrun

ROOT = Path(__file__).parents[1]
GENUINE = ROOT.parent / "shared" / "inception" / "inception-2015-12-05-to-mixed_6e.pth"
needs_genuine = pytest.mark.skipif(
    not GENUINE.exists(), reason=f"needs the weights {GENUINE.name} in ../shared/inception"
)


@pytest.fixture(scope="session")
def state() -> dict[str, torch.Tensor]:
    return random_state()


@pytest.fixture(scope="session")
def weights(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def published(state):
    """Makes pytorch_fid's network with our weights, or skips."""

    def make(dims: int, weights: dict[str, torch.Tensor]):
        try:
            return published_inception(state | weights, dims)
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"needs pytorch-fid and torchvision, see requirements-dev.txt ({error})")

    return make


def published_distance(a: Statistics, b: Statistics, monkeypatch) -> float:
    """pytorch_fid's own function; `disp` went from SciPy's sqrtm in 1.18, so it is taken off here."""
    score = pytest.importorskip("pytorch_fid.fid_score", reason="needs pytorch-fid, see requirements-dev.txt")
    sqrtm = scipy.linalg.sqrtm
    monkeypatch.setattr(score.linalg, "sqrtm", lambda m, disp=True: sqrtm(m) if disp else (sqrtm(m), None))
    return float(score.calculate_frechet_distance(a.mu, a.sigma, b.mu, b.sigma))


def normal(count: int, dims: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dims))


def picture(rng: np.random.Generator, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def folder(path: Path, count: int = 6, seed: int = 0, suffix: str = ".png") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        picture(rng).save(path / f"image_{i:03d}{suffix}")
    return path


def run(capsys, *arguments: object) -> dict:
    fid.main([*map(str, arguments), "--dims", "64", "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: object) -> str:
    """The one sentence with which the command refuses."""
    with pytest.raises(SystemExit) as stopped:
        plumbing.command.run(lambda: fid.main([str(argument) for argument in arguments]))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Traceback" not in printed.err
    sentence = printed.err.strip().split("\n")[-1]
    assert sentence.startswith("error: ")
    return sentence.removeprefix("error: ")


# --- Equal to pytorch_fid ---------------------------------------------------------------------------------------------


def assert_same_features(network: torch.nn.Module, weights: Path, dims: int, path: Path) -> np.ndarray:
    images = fid.Images(path)
    ours, _ = fid.extract(images, fid.load(weights, dims))
    pixels = torch.stack([images[i][0] for i in range(len(images))]).float() / 255
    with torch.inference_mode():
        theirs = network(pixels)[0].mean(dim=(2, 3)).numpy()
    assert ours.shape == (len(images), dims)
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    return ours


def clouds(features: np.ndarray, count: int) -> tuple[Statistics, Statistics]:
    """Two large sets around real features, far enough from singular for a matrix square root to be right."""
    rng = np.random.default_rng(0)
    spread = features.std()
    return tuple(
        Statistics.of(
            features[rng.integers(0, len(features), count)] + spread * rng.standard_normal((count, len(mean)))
        )
        for mean in (features.mean(0), features.mean(0))
    )


@needs_genuine
def test_features_and_distance_at_768_are_pytorch_fids_with_the_genuine_weights(published, tmp_path, monkeypatch):
    network = published(768, torch.load(GENUINE, weights_only=True))
    features = assert_same_features(network, GENUINE, 768, folder(tmp_path, 8))
    a, b = clouds(features, 1500)
    assert frechet_distance(a, b) == pytest.approx(published_distance(a, b, monkeypatch), rel=1e-6)


def test_features_and_distance_at_2048_are_pytorch_fids_with_random_weights(published, weights, tmp_path, monkeypatch):
    features = assert_same_features(published(2048, {}), weights, 2048, folder(tmp_path, 6))
    a, b = clouds(features, 3000)
    assert frechet_distance(a, b) == pytest.approx(published_distance(a, b, monkeypatch), rel=1e-6)


@pytest.mark.parametrize("dims", [64, 192])
def test_features_at_the_early_layers_are_pytorch_fids(dims, published, weights, tmp_path):
    assert_same_features(published(dims, {}), weights, dims, folder(tmp_path, 4))


def test_pytorch_fid_reads_our_statistics_and_we_read_its(weights, tmp_path, capsys):
    score = pytest.importorskip("pytorch_fid.fid_score", reason="needs pytorch-fid, see requirements-dev.txt")
    run(capsys, folder(tmp_path / "a"), "--weights", weights, "--save", tmp_path / "a.npz")
    mu, sigma = score.compute_statistics_of_path(str(tmp_path / "a.npz"), None, 1, 64, "cpu")
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)  # all that pytorch_fid saves
    assert run(capsys, tmp_path / "theirs.npz", tmp_path / "a.npz")["fid"] < 1e-9


# --- Distances in closed form -----------------------------------------------------------------------------------------


@given(
    count=st.integers(2, 4096), dims=st.sampled_from([2, 3, 17, 64, 256]), whole=st.booleans(), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_a_set_is_at_no_distance_from_itself(count, dims, whole, seed):
    a = Statistics.of(normal(count, dims, seed))
    b = a if whole else Statistics(a.mu, a.sigma)  # as read from pytorch_fid's file, without features
    distance = frechet_distance(a, b)
    assert type(distance) is float and 0 <= distance <= 1e-9


@given(a=st.integers(2, 300), b=st.integers(2, 300), dims=st.integers(2, 64), rank=st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_a_distance_is_finite_symmetric_and_the_same_with_and_without_features(a, b, dims, rank):
    mix = normal(min(rank, dims), dims, 3)
    x, y = Statistics.of(normal(a, len(mix), 1) @ mix), Statistics.of(normal(b, len(mix), 2) @ mix + 1)
    distance = frechet_distance(x, y)
    assert np.isfinite(distance) and distance >= 0
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-9)
    without = frechet_distance(Statistics(x.mu, x.sigma), Statistics(y.mu, y.sigma))
    assert without == pytest.approx(distance, rel=1e-6)


@given(dims=st.integers(1, 256), count=st.integers(2, 600), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_shift_of_ones_is_a_distance_of_dims(dims, count, seed):
    x = normal(count, dims, seed)
    assert frechet_distance(Statistics.of(x), Statistics.of(x + 1)) == pytest.approx(dims, rel=1e-9)


@pytest.mark.parametrize("count", [None, 2, 50, 500])
def test_scaling_by_two_is_a_distance_of_the_trace_and_one_of_the_mean(count):
    x = normal(count or 5000, 128) @ normal(128, 128, 1) + 3
    expected = np.trace(np.cov(x, rowvar=False)) + np.square(x.mean(0)).sum()  # (2 - 1)^2 of either
    assert frechet_distance(Statistics.of(x), Statistics.of(2 * x)) == pytest.approx(expected, rel=1e-9)


def test_diagonal_covariances_are_apart_by_their_standard_deviations():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 4, (2, 200))
    a[:80] = 0  # singular, as any covariance of few images
    zero = np.zeros(200)
    distance = frechet_distance(Statistics(zero, np.diag(a)), Statistics(zero, np.diag(b)))
    assert distance == pytest.approx(np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-9)


def test_two_sets_of_two_images_are_apart_as_two_segments():
    a, b = (
        np.array([[0.0, 0.0], [2.0, 0.0]]),
        np.array([[0.0, 0.0], [0.0, 2.0]]),
    )  # variance 2 along each, at right angles
    assert frechet_distance(Statistics.of(a), Statistics.of(b)) == pytest.approx(2 + 2 + 2)
    assert frechet_distance(Statistics.of(a), Statistics.of(b[:, ::-1])) == pytest.approx(0, abs=1e-12)


def test_few_samples_of_one_distribution_are_apart_by_the_known_bias():
    dims, count = 16, 2000
    pairs = [frechet_distance(*(Statistics.of(normal(count, dims, 2 * i + j)) for j in (0, 1))) for i in range(40)]
    assert np.mean(pairs) == pytest.approx((2 * dims + dims * (dims + 1) / 2) / count, rel=0.1)


def test_infinity_takes_the_bias_out():
    a, b = (Statistics.of(normal(4000, 32, seed)) for seed in (1, 2))
    biased = frechet_distance(a, b)
    assert abs(frechet_infinity(a, b)) < biased / 3
    assert frechet_infinity(a, b, seed=5) == frechet_infinity(a, b, seed=5)
    shifted = Statistics.of(b.features + 1)
    assert frechet_infinity(a, shifted) == pytest.approx(32, rel=0.05)
    assert frechet_infinity(a, Statistics(np.ones(32), np.eye(32))) == pytest.approx(32, rel=0.05)


def test_kid_is_the_double_sum_over_pairs_and_without_bias():
    x, y = normal(5, 3, 1), normal(5, 3, 2)

    def kernel(p, q):
        return (p @ q / 3 + 1) ** 3

    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    assert kernel_distance(x, y, subsets=2)[0] == pytest.approx(
        same - 2 * np.mean([kernel(p, q) for p in x for q in y])
    )
    mean, deviation = kernel_distance(normal(2000, 16, 1), normal(2000, 16, 2), size=200)
    assert abs(mean) < deviation
    assert kernel_distance(normal(300, 4, 1), normal(200, 4, 2), seed=3, size=50) == kernel_distance(
        normal(300, 4, 1), normal(200, 4, 2), seed=3, size=50
    )


def test_precision_and_recall_see_what_is_missing_and_what_is_wrong():
    x = normal(600, 8)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    far = np.concatenate([x[:300], x[300:] + 100])
    precision, recall = precision_recall(far, x)  # half of the samples are wrong, and still cover half of the reference
    assert 0.5 <= precision < 0.6 and recall > 0.5
    assert precision_recall(np.repeat(x[:50], 5, axis=0), x[:50])[0] == 1  # balls of no radius around copies


def test_precision_and_recall_are_those_of_every_pair():
    x, y = normal(90, 5, 1).astype(np.float32), normal(70, 5, 2).astype(np.float32) * 0.7

    def share(p, q):
        radius = np.sort(np.linalg.norm(q[:, None].astype(float) - q, axis=-1), axis=1)[:, 3]
        return (np.linalg.norm(p[:, None].astype(float) - q, axis=-1) <= radius).any(1).mean()

    assert precision_recall(x, y) == pytest.approx((share(x, y), share(y, x)))


# --- Images -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_recursively_in_any_case_and_mixed_sizes(weights, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i, name in enumerate(["x.PNG", "deep/y.png", "deep/er/z.Png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(rng, 40 + 30 * i, 90 - 20 * i).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    for hidden in ("._x.png", ".cache/x.png", "deep/.git/y.png", "deep/.git/er/z.png"):  # also what macOS leaves
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_bytes(b"no image")
    (tmp_path / "grid.png").write_bytes((tmp_path / "x.PNG").read_bytes())  # no numbered samples beside it: an image
    assert run(capsys, tmp_path, "--weights", weights, "--save", tmp_path / "s.npz")["a"]["count"] == 4


def test_the_grid_beside_samples_is_not_counted(weights, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("00000.jpg", "00001.jpg", "grid.png"):
        picture(rng).save(tmp_path / name)
    result = run(capsys, tmp_path, tmp_path, "--weights", weights)
    assert result["a"]["count"] == 2 and not any("mix of file formats" in note for note in result["warnings"])


def test_images_in_an_npz_are_those_in_a_folder(weights, tmp_path, capsys):
    path = folder(tmp_path / "a", 5)
    np.savez(tmp_path / "a.npz", arr_0=np.stack([np.asarray(Image.open(p)) for p in sorted(path.iterdir())]))
    result = run(capsys, path, tmp_path / "a.npz", "--weights", weights)
    assert result["fid"] < 1e-9 and result["a"]["count"] == result["b"]["count"] == 5


def test_saved_statistics_stand_for_their_images_and_say_where_from(weights, tmp_path, capsys):
    a, b = folder(tmp_path / "a", 7, 1), folder(tmp_path / "b", 5, 2)
    direct = run(capsys, a, b, "--weights", weights, "--kid", "--pr", "--infinity", "--save", tmp_path / "a.npz")
    saved = run(capsys, tmp_path / "a.npz", b, "--weights", weights, "--kid", "--pr", "--infinity")
    for key in ("fid", "kid", "kid_std", "precision", "recall", "fid_infinity"):
        assert saved[key] == direct[key]
    with np.load(tmp_path / "a.npz") as file:
        about = {name: file[name].item() for name in file.files if file[name].ndim == 0}
    assert about == direct["a"]
    assert about["count"] == 7 and about["dims"] == 64 and about["resize"] == fid.RESIZE
    assert (
        about["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest() and len(about["files_sha256"]) == 64
    )


def test_json_holds_everything_needed_to_repeat(weights, tmp_path, capsys):
    result = run(capsys, folder(tmp_path / "a"), folder(tmp_path / "b", seed=1), "--weights", weights, "--seed", 7)
    assert {"fid", "a", "b", "dims", "resize", "seed", "warnings", "command", "versions"} <= result.keys()
    assert result["seed"] == 7 and "--seed 7" in result["command"] and result["versions"]["torch"] == torch.__version__


def test_two_processes_give_the_features_of_one(weights, tmp_path):
    a = folder(tmp_path / "a", 7)
    results = []
    for launcher in (lambda *arguments: arguments, partial(torchrun, 2)):
        target = tmp_path / f"{len(results)}.npz"
        command(*launcher("fid.py", a, "--dims", 64, "--weights", weights, "--save", target), check=True)
        with np.load(target) as file:
            results.append(dict(file))
    assert results[0]["count"] == results[1]["count"] == 7
    np.testing.assert_allclose(results[0]["features"], results[1]["features"], rtol=1e-5)
    assert results[0]["files_sha256"] == results[1]["files_sha256"]


def test_images_are_resized_as_pytorch_fid_does_and_each_alone():
    rng = np.random.default_rng(0)
    pictures = [torch.from_numpy(rng.integers(0, 256, shape, np.uint8)) for shape in ((3, 700, 450), (3, 32, 32))]
    ours = fid.prepare(pictures, torch.device("cpu"))
    for x, pixels in zip(ours, pictures, strict=True):
        theirs = torch.nn.functional.interpolate(
            pixels[None] / 255, size=(299, 299), mode="bilinear", align_corners=False
        )
        torch.testing.assert_close(x, 2 * theirs[0] - 1)


def test_work_is_never_more_than_a_few_batches_ahead_and_comes_in_order():
    started = []
    for taken, result in enumerate(fid.in_order(lambda item: started.append(item) or item, range(40), workers=3)):
        assert result == taken and len(started) <= taken + 1 + 3
    assert sorted(started) == list(range(40))


def test_memory_grows_by_the_features_alone(tmp_path):
    """Peak memory of 200 images of 3 MB each, beside that of 20; all of them at once would be 600 MB."""
    code = (
        "import resource, sys, pathlib, torch, fid; from torch import nn\n"
        "fid.extract(fid.Images(pathlib.Path(sys.argv[1])), nn.Sequential(nn.AvgPool2d(299), nn.Flatten()))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for count in (20, 200):
        path = tmp_path / str(count)
        path.mkdir()
        for i in range(count):
            Image.new("RGB", (1024, 1024), (i, 0, 0)).save(path / f"{i}.jpg")
        ended = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(ended.stdout))
    assert peaks[1] - peaks[0] < 100_000  # kB


# --- Completions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def completed(tmp_path) -> Path:
    """What sample.py leaves behind, with other things beside."""
    drawn = {"seed": 3, "temperature": 1.0, "top_k": 0, "top_p": 0.9}
    for seed, name in enumerate(("originals", "roundtrip", "keep_0.25", "keep_0.5", "keep_1e-05", "keep_1")):
        path = folder(tmp_path / "c" / name, seed=seed)
        (path / "samples.json").write_text(json.dumps(drawn))
    for name in ("keep_x", "keep_0.5.old", "keep_", "keep_nan"):
        folder(tmp_path / "c" / name)
    (tmp_path / "c" / "keep_0.75").write_text("no folder")
    return tmp_path / "c"


def test_completions_are_compared_with_the_originals_at_each_ratio(completed, weights, capsys):
    result = run(capsys, completed, "--weights", weights)
    rows = result["completions"]
    assert [row["keep"] for row in rows] == ["1e-05", "0.25", "0.5", "1"]
    half = rows[2]
    assert (half["count"], half["seed"], half["temperature"], half["top_k"], half["top_p"]) == (6, 3, 1.0, 0, 0.9)
    direct = run(capsys, completed / "keep_0.5", completed / "originals", "--weights", weights)["fid"]
    floor = run(capsys, completed / "roundtrip", completed / "originals", "--weights", weights)["fid"]
    assert half["fid_originals"] == pytest.approx(direct, rel=1e-9)
    assert half["fid_floor"] == pytest.approx(floor, rel=1e-9)
    left_out = [note for note in result["warnings"] if "is left out, as it is no folder named keep_NUMBER" in note]
    assert [Path(note.split(" is left")[0]).name for note in left_out] == [
        "keep_",
        "keep_0.5.old",
        "keep_0.75",
        "keep_nan",
        "keep_x",
    ]
    fid.main([str(completed), "--weights", str(weights), "--dims", "64"])
    assert "keep 0.5: FID-64 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("", "cannot be read"),
        ('{"count": 6', "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"count": 6}', "has no number seed"),
        ('{"seed": "six"}', "has no number seed"),
    ],
)
def test_settings_beside_completions_that_are_absent_or_damaged_are_named(content, said, completed, capsys):
    path = completed / "keep_0.5" / "samples.json"
    path.unlink() if content is None else path.write_text(content)
    assert refusal(capsys, completed).startswith(f"{path} {said}")


# --- What a user can get wrong ----------------------------------------------------------------------------------------


def test_an_absent_path_and_a_file_of_another_kind_are_refused(tmp_path, capsys):
    assert refusal(capsys, tmp_path / "nowhere", tmp_path).startswith(f"{tmp_path / 'nowhere'} does not exist: give")
    (tmp_path / "a.txt").write_text("")
    assert "is neither a folder nor an .npz: give" in refusal(capsys, tmp_path / "a.txt", tmp_path)


def test_a_missing_second_set_and_unknown_dims_are_refused(tmp_path, capsys):
    assert "B is missing: give a second set, or --save FILE" in refusal(capsys, tmp_path)
    assert "invalid choice" in refusal(capsys, tmp_path, tmp_path, "--dims", 100)


def test_flags_that_cannot_be_are_refused_before_any_work(tmp_path, capsys):
    for seed in (-1, 2**63):
        assert refusal(capsys, tmp_path, tmp_path, "--seed", seed) == f"--seed is {seed}: choose 0 to 2^63 - 1"
    assert "unknown argument --seeds: did you mean --seed?" in refusal(capsys, tmp_path, tmp_path, "--seeds", 1)
    for path in (".", tmp_path / "nowhere" / "a.npz"):
        assert f"--save {path} names no file in a folder that is there" in refusal(capsys, tmp_path, "--save", path)
    for flag in ("--kid", "--pr", "--infinity"):
        assert "compare A with a second set: give B" in refusal(capsys, tmp_path, flag, "--save", tmp_path / "a.npz")


def test_statistics_are_saved_as_the_file_that_is_named_at_the_end(weights, tmp_path, capsys):
    fid.main([str(folder(tmp_path / "a")), "--weights", str(weights), "--dims", "64", "--save", str(tmp_path / "x.y")])
    assert f"saved to {tmp_path / 'x.y.npz'}\n" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x.y.npz"]
    (tmp_path / "b.npz").mkdir()
    said = refusal(capsys, tmp_path / "a", "--weights", weights, "--dims", 64, "--save", tmp_path / "b.npz")
    assert "b.npz cannot be written (" in said and "choose another file for --save" in said


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert "holds no images: give a folder with files of .bmp, .jpeg, .jpg" in refusal(capsys, tmp_path, tmp_path)


def test_one_image_is_refused(weights, tmp_path, capsys):
    said = refusal(capsys, folder(tmp_path, 1), tmp_path, "--weights", weights, "--dims", 64)
    assert "has 1 readable image(s), and a covariance needs two: add images" in said


def test_few_images_and_fewer_than_dims_are_warned_of(weights, tmp_path, capsys):
    warnings = run(capsys, folder(tmp_path, 6), tmp_path, "--weights", weights)["warnings"]
    assert any("6 images are fewer than 10,000; FID is biased upwards" in note for note in warnings)
    assert any("6 images do not exceed 64 dims: singular covariance" in note for note in warnings)


def test_enough_images_are_not_warned_of():
    about = {"path": "x", "count": 10_000}
    assert fid.cautions(Statistics(np.zeros(2), np.eye(2), None, about), 2048) == []


@pytest.mark.parametrize("content", [b"", b"no image at all", "half"])
def test_broken_images_are_refused_by_name_or_left_out_on_request(content, weights, tmp_path, capsys):
    folder(tmp_path, 4, suffix=".jpg")
    whole = (tmp_path / "image_000.jpg").read_bytes()
    (tmp_path / "image_001.jpg").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    said = refusal(capsys, tmp_path, tmp_path, "--weights", weights, "--dims", 64)
    assert re.search(r"image_001.jpg cannot be read \(.*\): remove or mend it, or leave such files out", said)
    assert run(capsys, tmp_path, tmp_path, "--weights", weights, "--skip-broken")["a"]["count"] == 3
    for path in tmp_path.glob("*.jpg"):
        path.write_bytes(b"")
    assert "has 0 readable image(s)" in refusal(
        capsys, tmp_path, tmp_path, "--weights", weights, "--dims", 64, "--skip-broken"
    )


def test_images_of_16_bits_are_refused_rather_than_clipped(weights, tmp_path, capsys):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder(tmp_path, 3) / "deep.png")
    said = refusal(capsys, tmp_path, tmp_path, "--weights", weights, "--dims", 64)
    assert "deep.png cannot be read" in said and "more than 8 bits a sample" in said


def test_grey_and_cmyk_images_and_mixed_formats_are_warned_of(weights, tmp_path, capsys):
    rng = np.random.default_rng(0)
    picture(rng).save(folder(tmp_path, 2) / "rgb.jpg")
    picture(rng).convert("CMYK").save(tmp_path / "cmyk.jpeg")
    picture(rng).convert("L").save(tmp_path / "grey.png")
    warnings = run(capsys, tmp_path, tmp_path, "--weights", weights)["warnings"]
    assert any("2 images are not RGB and were converted (1 CMYK, 1 L)" in note for note in warnings)
    assert any("a mix of file formats (2 .jpg, 3 .png)" in note for note in warnings)


def save(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(192), "sigma": np.eye(192)}, "holds statistics of 192 dims, not 64: pass --dims 192"),
        ({"resize": "bicubic"}, "was made with resize 'bicubic', not 'bilinear to 299x299"),
        ({"mu": np.full(64, np.nan)}, "holds no finite mean and symmetric covariance"),
        ({"sigma": np.full((64, 64), np.inf)}, "holds no finite mean and symmetric covariance"),
        ({"sigma": np.eye(63)}, "holds no finite mean and symmetric covariance"),
        ({"sigma": np.triu(np.ones((64, 64)))}, "holds no finite mean and symmetric covariance"),
        ({"mu": np.zeros((64, 1))}, "holds no finite mean and symmetric covariance"),
        ({"features": np.zeros((9, 32))}, "holds features [9, 32], not finite numbers (N, 64)"),
        ({"features": np.full((9, 64), np.nan)}, "holds features [9, 64], not finite numbers (N, 64)"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(arrays, said, tmp_path, capsys):
    good = save(tmp_path / "good.npz", mu=np.zeros(64), sigma=np.eye(64))
    bad = save(tmp_path / "bad.npz", **({"mu": np.zeros(64), "sigma": np.eye(64)} | arrays))
    assert said in refusal(capsys, good, bad, "--dims", 64)


def test_statistics_without_a_source_or_of_other_weights_are_warned_of(tmp_path, capsys):
    plain = save(tmp_path / "plain.npz", mu=np.zeros(64), sigma=np.eye(64))
    notes = run(capsys, plain, plain)["warnings"]
    assert any("says neither how many images, nor which network and resize made it" in note for note in notes)
    about = {"mu": np.zeros(64), "sigma": np.eye(64), "count": 20000, "resize": fid.RESIZE}
    a = save(tmp_path / "a.npz", **about, weights_sha256="aaaaaaaaaa")
    b = save(tmp_path / "b.npz", **about, weights_sha256="bbbbbbbbbb")
    assert run(capsys, a, b)["warnings"] == ["the two sets were made with different weights (aaaaaaaa, bbbbbbbb)"]


def test_what_needs_features_refuses_statistics_without(tmp_path, capsys):
    plain = save(tmp_path / "plain.npz", mu=np.zeros(64), sigma=np.eye(64))
    for flag in ("--kid", "--pr"):
        assert f"holds no features, which {flag} needs: give the images" in refusal(
            capsys, plain, plain, flag, "--dims", 64
        )
    assert "--infinity needs the images of A or B" in refusal(capsys, plain, plain, "--infinity", "--dims", 64)


def test_an_npz_that_holds_something_else_or_is_broken_is_refused(tmp_path, capsys):
    odd = save(tmp_path / "odd.npz", x=np.zeros((2, 3)))
    assert "odd.npz holds x float64 [2, 3]: expected statistics (mu, sigma) or images" in refusal(capsys, odd, odd)
    (tmp_path / "cut.npz").write_bytes(odd.read_bytes()[:100])
    assert "cut.npz is not a readable .npz" in refusal(capsys, tmp_path / "cut.npz", odd)
    code = save(tmp_path / "code.npz", x=np.array([{}], dtype=object))
    assert "code.npz is not a readable .npz" in refusal(capsys, code, odd)


def test_weights_that_are_absent_truncated_or_of_another_network_are_refused(state, weights, tmp_path, capsys):
    images = folder(tmp_path / "a", 2)

    def said(content: object, dims: int = 64) -> str:
        path = tmp_path / "w.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return refusal(capsys, images, images, "--weights", path, "--dims", dims)

    assert "asked for by --weights, is no file: download https" in refusal(
        capsys, images, images, "--weights", tmp_path / "no.pth"
    )
    assert "is not a readable weights file" in said(weights.read_bytes()[:100_000])
    assert "is not a readable weights file" in said(b"")
    assert "is not a readable weights file (it is no table of tensors)" in said([1, 2])
    assert "holds torchvision's Inception (1,000 classes)" in said({**state, "fc.weight": torch.zeros(1000, 2048)})
    early = {name: value for name, value in state.items() if not name.startswith(("Mixed_7", "fc"))}
    assert "lacks Mixed_7a.branch3x3_1.conv.weight, needed for 2048 dims: pass --dims 768" in said(early, 2048)
    assert "lacks Conv2d_1a_3x3.conv.weight, needed for 64 dims: download" in said({})
    name = "Conv2d_2a_3x3.conv.weight"
    assert f"has {name} of shape [32, 32, 1, 1], not [32, 32, 3, 3]" in said({**state, name: torch.zeros(32, 32, 1, 1)})
    assert "has values in Conv2d_2a_3x3 that are not finite" in said({**state, name: state[name] * np.nan})


def test_weights_with_code_inside_do_not_run_it(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    images = folder(tmp_path / "a", 2)
    torch.save({"x": Trap()}, tmp_path / "trap.pth")
    assert "is not a readable weights file" in refusal(capsys, images, images, "--weights", tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


def test_other_weights_than_the_published_are_warned_of(weights, tmp_path, capsys):
    notes = run(capsys, folder(tmp_path), tmp_path, "--weights", weights)["warnings"]
    assert any("is not the published file (sha256 6726825d...)" in note for note in notes)


def test_layers_past_the_ones_asked_for_may_be_absent(state, tmp_path):
    first = {
        name: value for name, value in state.items() if name.startswith("Conv2d_1a") or name.startswith("Conv2d_2")
    }
    torch.save(first, tmp_path / "first.pth")
    assert fid.load(tmp_path / "first.pth", 64)(torch.zeros(1, 3, 299, 299)).shape == (1, 64)


# --- The download -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(fid, "CACHE", tmp_path / "cache" / "jpeglm")
    return fid.CACHE


def test_a_download_is_checked_kept_and_not_repeated(cache, tmp_path, monkeypatch):
    source = tmp_path / "weights.pth"
    source.write_bytes(b"weights")
    monkeypatch.setattr(fid, "CHECKSUM", hashlib.sha256(b"weights").hexdigest()[:8])
    path = fid.weights_file(url=source.as_uri())
    source.unlink()
    assert path == fid.weights_file(url=source.as_uri()) and path.read_bytes() == b"weights"
    assert [p.name for p in cache.iterdir()] == ["weights.pth"]


def test_a_download_that_is_not_the_file_is_refused_and_leaves_nothing(cache, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"came with sha256 [0-9a-f]{8}, not 6726825d: fetch "):
        fid.weights_file(url=(tmp_path / "weights.pth").as_uri())
    assert list(cache.iterdir()) == []


def test_offline_says_url_path_and_checksum(cache, tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(fid.urllib.request, "urlopen", offline)
    images = folder(tmp_path / "a", 2)
    said = refusal(capsys, images, images)
    assert said.startswith("the weights could not be downloaded (Network is unreachable): fetch ")
    assert fid.URL in said and "sha256 6726825d" in said and str(cache / fid.URL.rsplit("/", 1)[1]) in said


def test_a_damaged_cached_file_is_refused(cache, tmp_path, capsys):
    cache.mkdir(parents=True)
    (cache / fid.URL.rsplit("/", 1)[1]).write_bytes(b"cut short")
    images = folder(tmp_path / "a", 2)
    assert re.search(r"has sha256 [0-9a-f]{8}, not 6726825d: delete it, then fetch", refusal(capsys, images, images))


def test_the_command_ends_with_code_2_and_one_sentence(tmp_path):
    ended = command("fid.py", tmp_path, tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("error: ")


def test_under_torchrun_an_error_is_said_once_whichever_process_meets_it(weights, tmp_path):
    ended = command(*torchrun(2, "fid.py", tmp_path, tmp_path))  # both
    assert ended.returncode != 0 and "Traceback" not in ended.stdout
    assert ended.stderr.count("holds no images") == 1 and re.search(r"exitcode *: 2", ended.stderr)
    (folder(tmp_path, 3) / "image_001.png").write_bytes(b"")  # the first, once it has gathered what the second saw
    ended = command(*torchrun(2, "fid.py", tmp_path, tmp_path, "--weights", weights, "--dims", 64))
    assert ended.stderr.count("image_001.png cannot be read") == 1 and re.search(r"exitcode *: 2", ended.stderr)


def test_a_user_without_a_home_needs_weights_alone(weights, tmp_path):
    images = folder(tmp_path / "a", 2)
    nameless = (
        "import os, pwd, runpy, sys\n"
        "def getpwuid(number): raise KeyError(f'getpwuid(): uid not found: {number}')\n"
        "os.environ.pop('HOME', None); pwd.getpwuid = getpwuid\n"
        "sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ("-c", nameless, "fid.py", images, images, "--dims", 64)
    ended = command(*arguments, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "there is no home folder for the weights: set HOME, or pass --weights with https" in ended.stderr
    ended = command(*arguments, "--weights", weights, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0 and ended.stdout.startswith("FID-64 0.0000  (2 and 2 images)")
