"""Real files for the tests that want them, and a small data folder for those that train."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of all processes: bit for bit on the CPU, however many there are
os.environ["OMP_NUM_THREADS"] = "1"  # of each: tests run side by side
import torch
from hypothesis import settings
from PIL import Image

from codec import JPEG, Codec
from data.prepare import prepare
from data.shapes import draw
from model import Llama
from tests.benchmark import complete_torchvision
from train import Config, build_model, parse, train

with contextlib.suppress(ImportError):
    complete_torchvision()  # before transformers meets it
ROOT = Path(__file__).parents[1]
settings.register_profile("any machine", deadline=None)  # speed is for tests.benchmark
settings.load_profile("any machine")
SHARED = ROOT.parent / "shared" / "data"  # not part of the project: real images, where they are at hand


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    """Shapes, noise, flats and ramps, (64, 64, 3) uint8."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(4)]
    flats = [np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 255)]
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (64, 64, 3)).copy()
    return [draw(i) for i in range(60)] + noise + flats + [ramp]


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of 60 PNG drawings in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(60):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(draw(i, 32, seed=1)).save(folder / f"class{i % 2}" / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def prepared(photos, tmp_path_factory) -> Path:
    """The data folder that `photos` becomes."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(photos, out, JPEG(size=32), vocab=300, validation=0.1, workers=1)
    return out


RUN = """
    --dim 32 --layers 2 --heads 2 --kv-heads 1 --hidden 64 --context 256 --batch 4 --micro 2
    --steps 12 --every 4 --log-every 1 --samples 4 --warmup 3 --muon
""".split()  # noqa: SIM905


def config(data: Path, out: Path, *more: str) -> Config:
    return parse(["--data", str(data), "--out", str(out), *RUN, *more])[0]


def short_run(source: Path, folder: Path, codec: Codec, vocab: int | None, validation: float, *more: str) -> Path:
    """A run of two steps on the files of a folder."""
    prepare(source, folder / "data", codec, vocab=vocab, validation=validation, workers=1)
    train(config(folder / "data", folder / "run", "--steps", "2", "--every", "2", *more))
    return folder / "run"


def fresh(settings: Config) -> Llama:
    """A model as training begins with it."""
    model = build_model(settings, torch.device("cpu"))
    model.init_weights(settings.seed)
    return model


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def validation(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record["val_bits_per_file"] for record in records if "val_bits_per_file" in record]


@pytest.fixture(scope="session")
def finished(prepared, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(config(prepared, out))
    return out


def torchrun(processes: int, *arguments: object) -> tuple[object, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *arguments)


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run one of the project's commands as a user would."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture
def browser():
    """A real Chromium without a window, driven by selenium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("Debian's chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1240,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()
