"""What codec.py promises: canonical bytes, total decoding, a strict check, exact byte pairs."""

import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from codec import JPEG, Pixels, Tokenizer, foreign_encoder, load_tokenizer, save_tokenizer
from data.pairs import learn_pairs
from plumbing.command import UserError

SETTINGS = [
    JPEG(),
    JPEG(header=True),
    JPEG(subsampling="4:4:4", quality=90),
    JPEG(restart=0),
    JPEG(restart=4),
    JPEG(restart=3, header=True, quality=100),
]


def resized(picture: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size, size)))


@pytest.mark.parametrize("jpeg", SETTINGS)
def test_check_accepts_all_encoder_output(jpeg, pictures):
    for picture in pictures:
        assert jpeg.check(jpeg.encode(picture)) is None


@pytest.mark.parametrize("size", [16, 17, 20, 100, 256, 1024])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_every_size_round_trips(size, subsampling, pictures):
    jpeg = JPEG(size=size, subsampling=subsampling)
    symbols = jpeg.encode(resized(pictures[0], size))
    assert jpeg.check(symbols) is None
    assert jpeg.decode(symbols).shape == (size, size, 3)


@pytest.mark.parametrize("jpeg", SETTINGS)
def test_file_is_what_pillow_writes_whole(jpeg, pictures):
    """The tables put back give the pixels of an ordinary JPEG of the same quality."""
    for picture in pictures[::7]:
        symbols, out = jpeg.encode(picture), io.BytesIO()
        Image.fromarray(picture).save(out, "JPEG", quality=jpeg.quality, subsampling=jpeg.subsampling)
        ordinary = np.asarray(Image.open(out))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(jpeg.file(symbols)))), ordinary)
        assert np.array_equal(jpeg.decode(symbols), ordinary)


@pytest.mark.parametrize("jpeg", SETTINGS[:2])
@given(data=st.binary(max_size=700))
def test_any_bytes_decode_to_an_image_of_the_right_size(jpeg, data):
    assert jpeg.decode(np.frombuffer(data, np.uint8)).shape == (64, 64, 3)


@given(data=st.data())
@settings(max_examples=200)
def test_damaged_files_decode_too(pictures, data):
    """Markers where none belong, cuts and swaps: what libjpeg would obey or stumble over."""
    jpeg = JPEG(header=data.draw(st.booleans()))
    damaged = bytearray(jpeg.encode(data.draw(st.sampled_from(pictures[::5]))).tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        marker = data.draw(
            st.sampled_from([b"\xff\xd9", b"\xff\xc4\0\4", b"\xff\xc0", b"\xff\xda", b"\xff\xff", b"\xff", b""])
        )
        damaged[at : at + data.draw(st.integers(0, 3))] = marker
    assert jpeg.decode(np.frombuffer(bytes(damaged), np.uint8)).shape == (64, 64, 3)


@pytest.mark.skipif(not shutil.which("djpeg"), reason="djpeg of libjpeg-turbo-progs is not installed")
def test_check_is_no_laxer_than_djpeg_strict(pictures):
    """Of 300 files with one byte changed, none that djpeg -strict warns of passes `check`, and most are caught by
    both."""
    rng, jpeg, rejected = np.random.default_rng(0), JPEG(), 0
    for _ in range(300):
        mutant = jpeg.encode(pictures[rng.integers(len(pictures))]).copy()
        mutant[rng.integers(len(mutant))] ^= rng.integers(1, 256)
        strict = subprocess.run(["djpeg", "-strict"], input=jpeg.file(mutant), capture_output=True).returncode == 0
        accepted = jpeg.check(mutant) is None
        assert strict or not accepted
        rejected += not accepted
    assert rejected > 150


@pytest.mark.parametrize("jpeg", SETTINGS)
def test_check_rejects_cuts_additions_and_lost_markers(jpeg, pictures):
    symbols = jpeg.encode(pictures[60])  # noise: no byte can be missed
    for wrong in (symbols[:-1], symbols[:40], symbols[:0], np.append(symbols, np.uint8(0))):
        assert jpeg.check(wrong).startswith("byte ")
    data = symbols.tobytes()
    if b"\xff\xd1" in data:
        assert "restart marker" in jpeg.check(np.frombuffer(data.replace(b"\xff\xd1", b"\xff\xd2", 1), np.uint8))
        assert jpeg.check(np.frombuffer(data.replace(b"\xff\xd1", b"", 1), np.uint8))


def test_check_rejects_what_pillow_opens():
    """Random payloads that Pillow shows as pictures are no valid files."""
    rng, jpeg = np.random.default_rng(0), JPEG()
    for _ in range(50):
        assert jpeg.check(rng.integers(0, 256, 300, np.uint8)) is not None


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5, 0.75])
def test_head_is_the_top_of_the_picture(pictures, keep):
    for jpeg in (JPEG(), JPEG(header=True), JPEG(subsampling="4:4:4")):
        symbols = jpeg.encode(pictures[0])
        head = jpeg.head(symbols, keep)
        assert np.array_equal(symbols[: len(head)], head)
        rows = int(64 * keep) - 1  # libjpeg smooths colours over the last line
        assert np.array_equal(jpeg.decode(head)[: max(rows, 0)], jpeg.decode(symbols)[: max(rows, 0)])
        rest = symbols[len(head) :].tobytes()
        assert rest.count(b"\xff\xd0") + sum(rest.count(bytes([0xFF, 0xD0 + i])) for i in range(1, 8)) == (
            jpeg.parts * (jpeg.parts - round(keep * jpeg.parts)) - 1
        )


def test_settings_out_of_range_are_refused():
    wrong = ({"size": 15}, {"size": 1025}, {"quality": 0}, {"subsampling": "4:1:1"}, {"restart": -1})
    for settings_ in wrong:
        with pytest.raises(UserError, match="choose"):
            JPEG(**settings_)
    with pytest.raises(UserError, match="rows of MCUs"):
        JPEG().head(np.zeros(9, np.uint8), 1.0)
    with pytest.raises(UserError, match="vocab is 257"):
        learn_pairs(JPEG(), [np.zeros(9, np.uint8)], 257)


@pytest.mark.parametrize("vocab", [258, 300, 400])
@given(documents=st.lists(st.binary(max_size=80), min_size=1, max_size=8))
def test_byte_pairs_are_invertible_on_all_bytes(vocab, documents):
    """Also for documents that the pairs were not learned on, empty ones, and 0xFF runs."""
    symbols = [np.frombuffer(document, np.uint8) for document in documents]
    for tokens in (learn_pairs(JPEG(), symbols, vocab), Tokenizer(JPEG(), ((255, 255), (0, 256), (256, 256), (1, 1)))):
        stream, lengths = tokens.encode(symbols)
        assert lengths.sum() == len(stream) and stream.max() < tokens.vocab
        for document, end in zip(symbols, np.cumsum(lengths), strict=True):
            part = stream[end - lengths[0] : end] if len(symbols) == 1 else None
            assert part is None or np.array_equal(tokens.decode(part), document)
        starts = np.cumsum(lengths) - lengths
        decoded = [tokens.decode(stream[at : at + n]) for at, n in zip(starts, lengths, strict=True)]
        assert all(np.array_equal(a, b) for a, b in zip(decoded, symbols, strict=True))


def reference_pairs(document: list[int], merges: list[tuple[int, int]]) -> list[int]:
    """Byte-pair encoding, as it is defined."""
    for token, pair in enumerate(merges, 256):
        merged, at = [], 0
        while at < len(document):
            hit = tuple(document[at : at + 2]) == pair
            merged.append(token if hit else document[at])
            at += 2 if hit else 1
        document = merged
    return document


@given(documents=st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=5))
def test_byte_pairs_equal_the_definition(documents):
    symbols = [np.array(document, np.uint8) for document in documents]
    tokens = learn_pairs(JPEG(), symbols, 270)
    stream, lengths = tokens.encode(symbols)
    expected = [[tokens.start, *reference_pairs(document, list(tokens.merges)), tokens.end] for document in documents]
    assert stream.tolist() == sum(expected, [])
    assert lengths.tolist() == [len(document) for document in expected]


def test_byte_pairs_are_the_most_frequent(pictures):
    symbols = [JPEG().encode(picture) for picture in pictures]
    first = learn_pairs(JPEG(), symbols, 259).merges[0]
    pairs = np.concatenate([np.stack([s[:-1], s[1:]], 1) for s in symbols])
    values, counts = np.unique(pairs, axis=0, return_counts=True)
    assert first == tuple(values[counts.argmax()].tolist())


def test_codec_json_round_trips_and_names_a_foreign_encoder(tmp_path, pictures, monkeypatch):
    tokens = learn_pairs(JPEG(size=32), [JPEG().encode(picture) for picture in pictures], 280)
    save_tokenizer(tmp_path, tokens)
    assert load_tokenizer(tmp_path) == tokens
    assert foreign_encoder(load_tokenizer(tmp_path)) is None
    monkeypatch.setattr(JPEG, "fingerprint", "another")
    assert "were encoded by Pillow" in foreign_encoder(load_tokenizer(tmp_path))
    save_tokenizer(tmp_path, load_tokenizer(tmp_path))  # another machine does not call the data its own
    assert "were encoded by Pillow" in foreign_encoder(load_tokenizer(tmp_path))


def test_a_codec_json_that_is_not_ours_is_refused(tmp_path):
    with pytest.raises(UserError, match="run `python -m data.prepare"):
        load_tokenizer(tmp_path)
    for text in ("", "[]", json.dumps({"codec": "gif"}), json.dumps({"codec": "jpeg", "merges": []})):
        (tmp_path / "codec.json").write_text(text)
        with pytest.raises(UserError, match="not a codec.json|codec.json (cannot be read|holds no)"):
            load_tokenizer(tmp_path)


# --- pixels ---------------------------------------------------------------------------------------------------------


def few_colours(pictures: list[np.ndarray], size: int) -> list[np.ndarray]:
    return [resized(picture, size) // 64 * 64 for picture in pictures]


@pytest.mark.parametrize("colours", [0, 512])
def test_pixels_of_few_colours_come_back_as_they_were(colours, pictures):
    """A palette holds all colours where they are few; without one, nothing is lost anyway."""
    sample = few_colours(pictures, 12)
    codec = Pixels(size=12, colours=colours).learn(iter(sample))
    for pixels in sample:
        symbols = codec.encode(pixels)
        assert np.array_equal(codec.decode(symbols), pixels) and codec.check(symbols) is None
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(codec.file(symbols)))), pixels)
        head = codec.head(symbols, 0.25)
        assert np.array_equal(codec.decode(head)[:3], pixels[:3]) and (codec.decode(head)[3:] == 128).all()


def test_a_palette_is_near_to_the_pixels_and_the_same_each_time(pictures):
    sample = [resized(picture, 16) for picture in pictures]
    codec = Pixels(size=16, colours=64).learn(iter(sample))
    assert codec == Pixels(size=16, colours=64).learn(iter(sample)) and len(codec.palette) <= 64
    assert "palette" not in codec.settings
    for pixels in sample:
        every = np.abs(pixels.reshape(-1, 1, 3).astype(int) - np.array(codec.palette))
        nearest = (every**2).sum(-1).min(-1)
        found = ((codec.decode(codec.encode(pixels)).astype(int) - pixels) ** 2).sum(-1).reshape(-1)
        assert np.array_equal(found, nearest)


@given(symbols=st.lists(st.integers(0, 70), max_size=300))
def test_any_symbols_decode_to_pixels_of_the_right_size(symbols):
    for codec in (Pixels(size=8, colours=0), Pixels(size=8, colours=4, palette=((1, 2, 3), (4, 5, 6)))):
        assert codec.decode(np.array(symbols, Tokenizer(codec).dtype)).shape == (8, 8, 3)


def test_a_learned_palette_travels_in_codec_json(tmp_path, pictures):
    codec = Pixels(size=12, colours=16).learn(iter(few_colours(pictures, 12)))
    save_tokenizer(tmp_path, Tokenizer(codec))
    assert load_tokenizer(tmp_path) == Tokenizer(codec)
    other = Pixels(size=12, colours=16, palette=codec.palette[:-1] + ((1, 1, 1),))
    assert Tokenizer(other).hash != Tokenizer(codec).hash
