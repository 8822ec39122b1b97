"""What data/vq.py promises: nearest codes, total decoding, exact resume, a collapse that is said, codes that travel."""

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
from codec import Tokenizer, load_tokenizer, save_tokenizer
from data import prepare, vq
from data.shapes import draw
from data.sources import find_items
from data.stream import Stream
from data.vq import VQ, Codebook, Learning, Network, NetworkConfig
from plumbing.command import UserError
from plumbing.files import read_json
from plumbing.weights import write_safetensors
from tests.conftest import RUN
from train import main, parse, train

SMALL = {"size": 32, "width": 32, "blocks": 1, "codes": 16, "batch": 4, "warmup": 1}


@pytest.fixture(scope="module")
def learned(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vq") / "out"
    vq.learn(photos, out.parent / "first", Learning(**SMALL, steps=8, every=4))
    shutil.copytree(out.parent / "first", out)
    return out


@pytest.fixture(scope="module")
def codec(learned) -> VQ:
    return VQ(str(learned))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return vq.load(folder / vq.FILE)[0].state_dict()


def test_the_number_of_a_vector_is_that_of_the_nearest_code():
    """By distances in float64, of vectors and codes of any length scaled to 1."""
    torch.manual_seed(0)
    book, z = Codebook(50, 8), torch.randn(3, 8, 5, 7) * 3
    a, b = (
        x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in (z.double().movedim(1, -1).numpy(), book.weight.detach().double().numpy())
    )
    expected = np.square(a[..., None, :] - b).sum(-1).argmin(-1)
    assert np.array_equal(book.numbers(z).numpy(), expected)
    assert torch.equal(
        book.vectors(book.numbers(z)).movedim(1, -1)[0, 0, 0],
        torch.nn.functional.normalize(book.weight, dim=1)[expected[0, 0, 0]],
    )


def test_gradients_pass_the_codebook_as_if_it_were_not_there():
    torch.manual_seed(0)
    book, z = Codebook(50, 8), torch.nn.functional.normalize(torch.randn(2, 8, 3, 3), dim=1).requires_grad_()
    weights = torch.randn(2, 8, 3, 3)
    (book(z)[0] * weights).sum().backward()
    passed, z.grad = z.grad, None
    (torch.nn.functional.normalize(z, dim=1) * weights).sum().backward()
    torch.testing.assert_close(passed, z.grad)


def test_codes_that_nobody_uses_are_moved_to_where_vectors_are():
    """All vectors lie near four directions: without revival most codes stay far from them."""
    torch.manual_seed(0)
    book = Codebook(32, 8)
    centres = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    for _ in range(3):
        book(centres[torch.randint(4, (2, 6, 6))].movedim(-1, 1) + 0.01 * torch.randn(2, 8, 6, 6))
    nearest = (torch.nn.functional.normalize(book.weight, dim=1) @ centres.T).amax(1)
    assert (nearest > 0.98).all()


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_a_picture_becomes_a_grid_of_codes_and_a_picture_again(halvings):
    network = Network(NetworkConfig(size=32, codes=20, halvings=halvings, width=32))
    pixels = torch.from_numpy(np.stack([draw(i, 32) for i in range(3)]))
    codes = network.encode(pixels)
    assert codes.shape == (3, 32 >> halvings, 32 >> halvings) and codes.max() < 20
    assert network.decode(codes).shape == pixels.shape and network.decode(codes).dtype == torch.uint8


@settings(max_examples=30)
@given(data=st.lists(st.integers(0, 65_535), max_size=80))
def test_any_symbols_decode_to_a_picture_of_the_right_shape(codec, data):
    symbols = np.array(data, np.uint16)
    assert codec.decode(symbols).shape == codec.shape
    assert (codec.check(symbols) is None) == (len(data) == 64 and all(symbol < 16 for symbol in data))


def test_a_picture_has_the_same_codes_on_any_number_of_threads(codec):
    pictures, before = [draw(i, 32, seed=5) for i in range(6)], torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([codec.encode(picture).tolist() for picture in pictures])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_codec_is_itself_after_a_journey_between_processes_and_folders(codec, tmp_path):
    """By pickle, as to the workers of data.prepare, and by codec.json, as with data and runs."""
    save_tokenizer(tmp_path, Tokenizer(codec))
    for other in (pickle.loads(pickle.dumps(codec)), load_tokenizer(tmp_path).codec):
        assert other == codec and Tokenizer(other).hash == Tokenizer(codec).hash
        assert np.array_equal(other.encode(draw(3, 32)), codec.encode(draw(3, 32)))
        assert other.fingerprint == codec.fingerprint


def test_codes_are_refused_with_another_network_than_theirs(codec, tmp_path):
    save_tokenizer(tmp_path, Tokenizer(codec))
    vq.save(tmp_path / vq.FILE, Network(NetworkConfig(size=32, codes=16, width=32)))
    with pytest.raises(UserError, match="not the network that wrote the codes"):
        load_tokenizer(tmp_path)
    (tmp_path / vq.FILE).write_bytes((tmp_path / vq.FILE).read_bytes()[:-9])
    with pytest.raises(UserError, match="no whole safetensors"):
        load_tokenizer(tmp_path)
    (tmp_path / vq.FILE).unlink()
    with pytest.raises(UserError, match=r"holds no vq.safetensors: run `python -m data.vq"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_an_interrupted_learning_ends_with_the_weights_of_a_whole_one(stop, learned, photos, tmp_path, monkeypatch):
    advance, out = vq.State.advance, tmp_path / "out"

    def interrupted(state: vq.State, pixels: torch.Tensor) -> torch.Tensor:
        if state.step == stop:
            raise KeyboardInterrupt
        return advance(state, pixels)

    monkeypatch.setattr(vq.State, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vq.learn(photos, out, Learning(**SMALL, steps=8, every=4))
    assert not (out / vq.FILE).exists()
    monkeypatch.setattr(vq.State, "advance", advance)
    vq.learn(photos, out, Learning(**SMALL, steps=8, every=4))
    found, expected = tensors(out), tensors(learned)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not [*out.glob("training*")]


def test_another_learning_in_the_same_folder_is_refused_with_the_difference(learned, photos, tmp_path, capsys):
    vq.main([str(photos), str(learned), *flags(SMALL), "--steps", "8", "--every", "4"])
    assert "is learned already" in capsys.readouterr().out
    with pytest.raises(UserError, match="codes: 16, now 32"):
        vq.learn(photos, learned, Learning(**SMALL | {"codes": 32}, steps=8, every=4))


def flags(values: dict[str, int]) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def test_a_codebook_that_collapses_is_said(tmp_path, capsys):
    for i in range(20):
        Image.new("RGB", (32, 32), (120, 80, 40)).save(tmp_path / f"{i}.png")
    vq.main(
        [str(tmp_path), str(tmp_path.parent / "flat"), *flags(SMALL | {"codes": 64}), "--steps", "4", "--every", "2"]
    )
    assert "of 64 codes are used: the codebook has collapsed" in capsys.readouterr().out
    assert read_json(tmp_path.parent / "flat" / "report.json")["used"] <= 6


def test_learning_lowers_the_error(learned, photos):
    """From what an untrained network makes of them, by 3 dB at least in 60 steps."""
    pictures, _ = vq.pictures_of([*find_items(photos)], Learning(**SMALL))
    state = vq.State(learned / "nowhere", Learning(**SMALL | {"codes": 64}, steps=60), {}, torch.device("cpu"))
    errors = [state.advance(vq.batch_of(pictures, step, state.config)) for step in range(60)]
    assert vq.decibels(torch.cat(errors[-5:])) > vq.decibels(torch.cat(errors[:3])) + 3


def test_every_picture_and_view_is_seen_once_an_epoch():
    pictures = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    pictures[:, 0, 0] += 100  # a corner, which tells the views apart but for two that turn and mirror onto one another
    config = Learning(size=8, batch=4, views=8)
    seen = Counter(bytes(x.numpy()) for step in range(12) for x in vq.batch_of(pictures, step, config))
    expected = Counter(view.tobytes() for picture in pictures for view in prepare.views_of(picture, 8))
    assert seen == expected


def test_files_of_codes_are_prepared_learned_and_written(learned, photos, tmp_path):
    """With two worker processes; all samples have a code for each place, and a prompt stays as it was."""
    for workers in (1, 2):
        source = ["--codec", "vq", "--network", str(learned), "--val", "0.1", "--workers", str(workers)]
        prepare.main([str(photos), str(tmp_path / f"data{workers}"), *source])
    one, two = (Stream(tmp_path / f"data{workers}", "train", 2) for workers in (1, 2))
    assert one.sha256 == two.sha256
    run = tmp_path / "run"
    train(parse(["--data", str(tmp_path / "data1"), "--out", str(run), *RUN, "--syntax"])[0])
    sample.main([str(run), "--count", "4"])
    assert not (run / "samples" / "invalid.txt").exists() and len([*(run / "samples").glob("0*.png")]) == 4
    sample.main([str(run), "--prompt", str(photos / "class0"), "--keep", "0.5"])
    tokenizer = load_tokenizer(run)
    assert tokenizer.codec == VQ(str(learned))
    rows = sample.generate(
        *_model(run), [tokenizer.prompt(codes := tokenizer.codec.encode(draw(1, 32))[:32])[0]], [(0, 0)]
    )
    assert np.array_equal(tokenizer.decode(rows[0])[:32], codes)


def _model(run: Path) -> tuple:
    return sample.read_run(run, torch.device("cpu"))[:2]


def test_a_llama_of_codes_goes_to_hugging_face_and_back(learned, photos, tmp_path):
    """Its network lies beside the weights, and is not taken for them; a run without checkpoints is no such folder."""
    prepare.main([str(photos), str(tmp_path / "data"), "--codec", "vq", "--network", str(learned), "--val", "0.1"])
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *RUN, "--no-syntax"]
    train(parse(flags)[0])
    main([*flags, "--export", str(tmp_path / "hf")])
    (model, tokenizer), (other, theirs) = _model(tmp_path / "run"), _model(tmp_path / "hf")
    assert tokenizer == theirs and all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    for path in (tmp_path / "run").glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        _model(tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--size", "30"], "the size in steps of 4"),
        (["--codes", "1"], "--codes is 1: choose 2 to 32768"),
        (["--val", "1"], "choose the first two between 0 and 1"),
        (["--views", "3"], "--views 3"),
        (["--steps", "0"], "--steps is 0: choose 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, said, photos, tmp_path):
    with pytest.raises(UserError, match=said):
        vq.main([str(photos), str(tmp_path), *given])


def test_of_very_many_pictures_some_are_drawn_and_the_same_validate(photos, monkeypatch):
    """Those that data.prepare holds back are never learned from."""
    items, config = [*find_items(photos)], Learning(**SMALL, val=0.1)
    learned, held = vq.pictures_of(items, config)
    assert [len(learned), len(held)] == [54, 6]
    monkeypatch.setattr(vq, "MOST", 40)
    fewer, others = vq.pictures_of(items, config)
    assert len(fewer) + len(others) == 40 and len(others)
    assert {x.tobytes() for x in fewer} <= {x.tobytes() for x in learned}
    assert {x.tobytes() for x in others} <= {x.tobytes() for x in held}


def test_a_small_file_that_says_it_is_large_allocates_nothing(codec, tmp_path):
    about = {"network": json.dumps({"size": 64, "width": 1024, "blocks": 64, "code_dim": 256})}
    write_safetensors(tmp_path / vq.FILE, codec.learned.state_dict(), about)
    with pytest.raises(UserError, match="holds no network of this version"):
        VQ(str(tmp_path))


def test_a_vq_without_its_network_says_what_to_do(photos, tmp_path):
    with pytest.raises(UserError, match="--network is missing: name a folder"):
        prepare.main([str(photos), str(tmp_path / "data"), "--codec", "vq"])
    with pytest.raises(UserError, match=r"holds no vq.safetensors"):
        prepare.main([str(photos), str(tmp_path / "data"), "--codec", "vq", "--network", str(tmp_path)])
