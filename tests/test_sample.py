"""What sample.py promises: files that do not depend on those beside them, and folders that hold what they say."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sample
from codec import JPEG, Pixels, load_tokenizer
from data.pairs import learn_pairs
from data.shapes import draw, move
from h264 import H264
from model import Llama, ModelConfig
from plumbing.command import UserError
from plumbing.replay import Replay
from sample import Sampling, generate
from tests.conftest import ROOT, command, short_run


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    """A model of pictures of 4x4 pixels, which writes one in no time."""
    return short_run(photos, tmp_path_factory.mktemp("pixels"), Pixels(size=4, colours=8), None, 0.1, "--context", "20")


@pytest.fixture
def write(run, tmp_path, capsys):
    """Let the model write, and give what was said; or what was refused, if `refused` is expected."""

    def write(*arguments: object, to: str = "s", refused: str = "") -> str:
        given = [str(run), "--to", str(tmp_path / to), *map(str, arguments)]
        capsys.readouterr()
        if refused:
            with pytest.raises(UserError, match=refused):
                sample.main(given)
        else:
            sample.main(given)
        return capsys.readouterr().out

    return write


def drawings(folder: Path, *seeds: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds):
        Image.fromarray(draw(seed, 32, seed=2)).save(folder / f"{number}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_samples_are_counted_written_and_continued(finished, tmp_path):
    result = command("sample.py", finished, "--count", 5, "--to", tmp_path / "s")
    assert result.returncode == 0 and "of 5 are whole valid files" in result.stdout, result.stderr
    first = {path.name: path.read_bytes() for path in (tmp_path / "s").glob("*.jpg")}
    assert len(first) == 5 and (tmp_path / "s" / "grid.png").exists()
    (tmp_path / "s" / "00003.jpg").unlink()
    command("sample.py", finished, "--count", 5, "--to", tmp_path / "s", "--batch", 1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").glob("*.jpg")} == first
    result = command("sample.py", finished, "--count", 5, "--to", tmp_path / "s", "--seed", 1)
    assert result.returncode == 2 and "seed: 0, now 1" in result.stderr


def test_the_model_that_comes_with_the_project_writes_pictures(tmp_path):
    """No noise and no plain colour: neighbouring pixels are alike, and pictures are not."""
    result = command("sample.py", ROOT / "assets" / "eurosat", "--count", 6, "--to", tmp_path / "s")
    assert result.returncode == 0 and "6 of 6 are whole valid files" in result.stdout, result.stderr
    pictures = [np.asarray(Image.open(path).convert("L"), float) for path in sorted((tmp_path / "s").glob("*.jpg"))]
    steps = np.mean([np.abs(np.diff(picture)).mean() for picture in pictures])
    assert {picture.shape for picture in pictures} == {(64, 64)} and np.std(pictures) > 2 * steps > 1


def test_completions_keep_the_top_of_the_picture(finished, photos, tmp_path):
    result = command("sample.py", finished, "--prompt", photos / "class0", "--keep", 0, 0.5, "--to", tmp_path / "c")
    assert result.returncode == 0, result.stderr
    codec = load_tokenizer(finished).codec
    picture = codec.encode(np.asarray(Image.open(sorted((photos / "class0").iterdir())[0])))
    written = (tmp_path / "c" / "keep_0.5" / "00000.jpg").read_bytes()
    assert codec.file(codec.head(picture, 0.5))[:-2] == written[: len(codec.file(codec.head(picture, 0.5))) - 2]
    roundtrip = Image.open(tmp_path / "c" / "roundtrip" / "00000.jpg")
    assert np.array_equal(np.asarray(roundtrip), codec.decode(picture))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "nothing.png"], "nothing.png holds no usable file"),
        (["--temperature", "-1"], "choose 0, or 0.001 to 1000"),
        (["--prompt", "PHOTO", "--keep", "1"], "below 1"),
        (["--top-q", "1"], "did you mean --top-p?"),
    ],
)
def test_mistakes_in_sampling_end_in_one_sentence(arguments, message, finished, photos, tmp_path):
    arguments = [str(next((photos / "class1").iterdir())) if a == "PHOTO" else a for a in arguments]
    with pytest.raises(UserError, match=message):
        sample.main([str(finished), "--to", str(tmp_path / "s"), *arguments])


def test_a_command_refuses_with_exit_code_2_and_one_sentence(finished, tmp_path):
    for arguments in (
        ["sample.py", tmp_path, "--count", 1],
        ["train.py", "--data", tmp_path, "--out", tmp_path / "run"],
    ):
        result = command(*arguments)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# --- a folder holds what was asked for ------------------------------------------------------------------------------


def test_more_files_are_added_and_fewer_take_nothing_away(write, tmp_path):
    assert "4 of 4 are whole" in write("--count", 4)
    four = {name: data for name, data in contents(tmp_path / "s").items() if name.startswith("0")}
    assert "8 of 8 are whole" in write("--count", 8)
    eight = {name: data for name, data in contents(tmp_path / "s").items() if name.startswith("0")}
    assert len(four) == 4 and len(eight) == 8 and four.items() <= eight.items()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("0*")}
    assert "4 of 4 are whole" in write("--count", 4)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("0*")}


def test_more_completions_of_each_prompt_are_added(write, tmp_path):
    prompts = drawings(tmp_path / "prompts", 0, 1, 2)
    assert "3 of 3 are whole" in write("--prompt", prompts)
    first = {name: data for name, data in contents(tmp_path / "s").items() if "/0" in name}
    assert "6 of 6 are whole" in write("--prompt", prompts, "--count", 2)
    assert first.items() <= contents(tmp_path / "s").items()
    assert len(list((tmp_path / "s" / "keep_0.5").glob("0*.png"))) == 6
    assert "3 of 3 are whole" in write("--prompt", prompts)


def test_what_was_kept_is_said_and_names_the_folder(write, tmp_path):
    assert JPEG(size=64).kept(0.625) == Pixels(size=4).kept(0.625) == 0.5  # of 4 rows
    said = write("--prompt", drawings(tmp_path / "prompts", 0), "--keep", 0.625, 0.75)
    assert said.startswith("note: of 0.625, the pixels codec can keep 0.5\n") and said.count("note:") == 1
    assert sorted(path.name for path in (tmp_path / "s").glob("keep_*")) == ["keep_0.5", "keep_0.75"]


def test_only_valid_files_are_counted(write, tmp_path):
    said = write("--count", 6, "--length", 9, "--free")
    assert "0 of 6 are whole" in said and "0 of 2 are whole" in write("--count", 2, "--length", 9, "--free")
    assert len((tmp_path / "s" / "invalid.txt").read_text().splitlines()) == 6


def test_a_prompt_longer_than_a_free_file_is_cut(write, tmp_path):
    said = write("--prompt", drawings(tmp_path / "prompts", 0), "--length", 1, "--free")
    assert "0 of 1 are whole" in said


# --- refusals change nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.5, 0.25])  # with completions there already, and without
def test_other_prompts_are_refused_and_nothing_changes(keep, write, tmp_path):
    write("--prompt", drawings(tmp_path / "a", 0, 1), to="c")
    before = contents(tmp_path / "c")
    write("--prompt", drawings(tmp_path / "b", 2, 3), "--keep", keep, to="c", refused="completes other files than")
    write("--prompt", drawings(tmp_path / "a", 2, 3), "--keep", keep, to="c", refused="completes other files than")
    write("--prompt", tmp_path / "nothing", "--keep", keep, to="c", refused="holds no usable file")
    write("--prompt", drawings(tmp_path / "a", 0, 1), "--seed", 1, to="c", refused="seed: 0, now 1")
    assert contents(tmp_path / "c") == before
    drawings(tmp_path / "a", 0, 1).rename(tmp_path / "renamed")  # the same pictures are no others elsewhere
    write("--prompt", tmp_path / "renamed", "--keep", keep, to="c")


def test_originals_without_completions_make_room(write, tmp_path):
    write("--prompt", drawings(tmp_path / "a", 0, 1, 2), to="c")
    shutil.rmtree(tmp_path / "c" / "keep_0.5")
    write("--prompt", drawings(tmp_path / "b", 3), to="c")
    for name in ("originals", "roundtrip", "keep_0.5"):
        assert [path.name for path in (tmp_path / "c" / name).glob("0*")] == ["00000.png"]


def test_the_advice_of_an_error_can_be_followed(write, tmp_path):
    write("--count", 4, "--length", 9, refused="raise --length, pass --free")
    assert not (tmp_path / "s" / "samples.json").exists()
    assert "0 of 4 are whole" in write("--count", 4, "--length", 9, "--free")
    assert json.loads((tmp_path / "s" / "samples.json").read_text())["length"] == 9
    write("--count", 4, refused="length: 9, now 0; free: True, now False.*choose another with --to, or delete this one")
    assert "4 of 4 are whole" in write("--count", 4, to="another")
    shutil.rmtree(tmp_path / "s")
    assert "4 of 4 are whole" in write("--count", 4)


@pytest.mark.parametrize(
    "flag, values",
    {
        "--temperature": ["inf", "nan", "1e39", "1e-40", "-1"],
        "--top-p": ["1e-46", "nan", "0", "2"],
        "--keep": ["nan", "inf", "1", "-0.1"],
        "--seed": [2**64, -1],
        "--count": [0, 10**12],
        "--batch": [0, -1],
        "--length": [-1],
        "--top-k": [-1],
    }.items(),
)
def test_numbers_that_cannot_be_are_refused(flag, values, write, tmp_path):
    for value in values:
        write(flag, value, refused=f"^{flag} is .*: choose |^--top-k .* --length .*: choose ")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\xff\xfe", b"[]", b'{"seed": 0', b"[" * 100_000])
def test_damaged_settings_beside_samples_are_named(content, write, tmp_path):
    write("--count", 1)
    write("--prompt", drawings(tmp_path / "a", 0), to="c")
    for note, more in (("s", ["--count", 2]), ("c/keep_0.5", ["--prompt", tmp_path / "a"])):
        (tmp_path / note / "samples.json").write_bytes(content)
        write(*more, to=note.split("/")[0], refused=f"{note}/samples.json (cannot be read|holds no JSON object)")


# --- a file and those beside it -------------------------------------------------------------------------------------


SOURCES = [
    (JPEG(size=32), 400, lambda i: draw(i, 32)),
    (H264(width=32, height=48, frames=5, fps=10), 700, lambda i: move(i, 64, 5)[:, 16:, 16:48]),
    (Pixels(size=8, colours=0), 300, lambda i: draw(i, 32)[12:20, 12:20]),
]


@pytest.fixture(scope="module", params=SOURCES, ids=lambda source: source[0].name)
def cut(request) -> tuple:
    """A tokenizer, files, and where each is to be cut."""
    codec, vocab, drawn = request.param
    files = [codec.encode(drawn(i)) for i in range(60)]
    tokenizer, rng = learn_pairs(codec, files[:40], vocab), np.random.default_rng(0)
    return tokenizer, [(file, int(rng.integers(len(file)))) for file in files]


def test_the_tokens_of_a_prompt_are_those_of_every_file_that_begins_with_it(cut):
    tokenizer, files = cut
    longest = max(map(len, tokenizer.spellings))
    for file, end in files:
        tokens, due = tokenizer.prompt(file[:end])
        assert np.array_equal(tokenizer.encode([file])[0][: len(tokens)], tokens) and len(due) < 2 * longest
        assert tokenizer.decode(tokens).tobytes() + due == file[:end].tobytes()


@pytest.mark.parametrize("free", [False, True])
def test_a_prompt_comes_back_wherever_it_is_cut(free, cut):
    tokenizer, files = cut
    shape = {"dim": 16, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 16}
    model = Llama(ModelConfig(vocab=tokenizer.vocab, context=1200, **shape))
    model.init_weights(0)
    begun, due = zip(*(tokenizer.prompt(file[:end]) for file, end in files[:24]), strict=True)
    how, seeds = Sampling(temperature=2.0, free=free), [(0, i) for i in range(24)]
    rows = [tokenizer.decode(row) for row in generate(model, tokenizer, begun, seeds, how, due=due)]
    for row, (file, end) in zip(rows, files, strict=False):
        assert np.array_equal(row[:end], file[:end]) and (free or tokenizer.codec.check(row) is None)


def test_a_prompt_is_taken_where_the_length_just_leaves_a_way_to_the_end(cut):
    tokenizer, files = cut
    model = Llama(ModelConfig(vocab=tokenizer.vocab, context=1200, dim=16, layers=1, heads=1, kv_heads=1, hidden=16))
    model.init_weights(0)
    for file, end in files[:6]:
        head, (begun, due) = tokenizer.encode([file[:end]])[0][:-1], tokenizer.prompt(file[:end])
        how = Sampling(length=len(head) + int(tokenizer.grammar.walk([head]).rest[0]))
        row = tokenizer.decode(generate(model, tokenizer, [begun], [(0, 0)], how, due=[due])[0])
        assert np.array_equal(row[:end], file[:end]) and tokenizer.codec.check(row) is None


def test_a_file_hardly_depends_on_its_batch(finished, tmp_path):
    """But for ties, which rounding may decide."""
    for batch in (1, 20):
        sample.main([str(finished), "--count", "20", "--batch", str(batch), "--to", str(tmp_path / str(batch))])
    alone, together = (contents(tmp_path / name) for name in ("1", "20"))
    assert sum(alone[f"{i:05d}.jpg"] == together[f"{i:05d}.jpg"] for i in range(20)) >= 18


@pytest.mark.parametrize("codec, vocab", [(JPEG(size=32, restart=0), 258), (JPEG(size=32), 300)])
def test_a_step_that_is_replayed_writes_the_same_files(codec, vocab, monkeypatch):
    """All that a GPU's recording asks of a step, but for the GPU: tensors that stay where they are, and places hidden
    that are not filled yet.  The last prompt is longer than the others."""
    symbols = [codec.encode(draw(i, 32)) for i in range(40)]
    tokenizer = learn_pairs(codec, symbols, vocab)
    model = Llama(ModelConfig(vocab=tokenizer.vocab, positions=tokenizer.grammar.sizes, dim=48, layers=2, context=300))
    model.init_weights()
    prompts = [np.array([tokenizer.start])] * 11 + [tokenizer.encode(symbols[:1])[0][:20]]
    seeds = [(3, i) for i in range(12)]
    monkeypatch.setattr(sample, "grammar_on", lambda device, tokenizer: tokenizer.grammar.tensors(device))
    wanted, calls = generate(model.eval(), tokenizer, prompts, seeds), Counter()
    once = Replay.once
    monkeypatch.setattr(Replay, "once", lambda self: calls.update(["once"]) or once(self))
    monkeypatch.setattr(Replay, "record", lambda self: calls.update(["record"]) or SimpleNamespace(replay=self.once))
    monkeypatch.setattr(sample, "can_record", lambda model, grammar: True)
    for one, other in zip(generate(model, tokenizer, prompts, seeds), wanted, strict=True):
        assert one.tolist() == other.tolist()
    assert 1 < calls["record"] < 15 and calls["once"] > 100  # anew when files have ended, and replayed in between
