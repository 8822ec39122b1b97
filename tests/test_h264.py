"""What h264.py promises: canonical bytes, a strict check, total decoding, and a grammar that always finds an end."""

import contextlib
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

import cavlc
from codec import Tokenizer, load_tokenizer, save_tokenizer
from data.clips import read
from data.pairs import learn_pairs
from data.shapes import move
from data.sources import Item
from grammar import FAR, LONGEST_WAY, Illegal
from h264 import H264, units
from model import Llama, ModelConfig
from plumbing.command import UserError
from sample import Sampling, generate
from studies.video import complaint
from tests.conftest import ROOT, SHARED

TINY = H264(width=32, height=48, frames=5, fps=10)
CUTS = H264(width=32, height=32, frames=8, fps=2, scene_cuts=True)


def clips(codec: H264, count: int, seed: int = 0) -> list[np.ndarray]:
    """Moving shapes, changing pictures, noise of all strengths, flats."""
    frames, height, width, _ = codec.shape
    rng, found, size = np.random.default_rng(seed), [], 64 if width <= 64 else 256
    for i in range(count):
        clip = move(i, size, frames, seed)[:, :height, :width].astype(float)
        if i % 4 == 1:
            clip[frames // 2 :] = move(1000 + i, size, frames, seed)[frames // 2 :, :height, :width]
        if i % 4 == 2:
            clip += rng.normal(0, 2 ** rng.integers(1, 8), codec.shape)
        found.append(clip.clip(0, 255).astype(np.uint8))
    return [*found, *(np.full(codec.shape, value, np.uint8) for value in (0, 255))]


def tokens_of(codec: H264, vocab: int) -> Tokenizer:
    return learn_pairs(codec, [codec.encode(clip) for clip in clips(codec, 16)], vocab)


SETTINGS = [
    TINY,
    CUTS,
    replace(TINY, qp=20),
    replace(TINY, qp=51, frames=20),
    H264(width=16, height=16, frames=1),
    H264(width=66, height=50, frames=3, fps=25),
    H264(width=256, height=144, frames=2),
    replace(CUTS, fps=1, frames=40),
]


@pytest.mark.parametrize("codec", SETTINGS, ids=str)
def test_the_reader_reads_all_that_the_encoder_writes_to_the_last_bit(codec):
    for clip in clips(codec, 12):
        symbols = codec.encode(clip)
        assert codec.check(symbols) is None
        assert complaint(codec.file(symbols), codec.frames) is None
        assert np.array_equal(symbols, codec.encode(clip))
        assert codec.decode(symbols).shape == codec.shape


def test_scene_cuts_are_read_where_they_are_allowed_and_nowhere_else():
    kinds, plain = set(), replace(CUTS, scene_cuts=False)
    for clip in clips(CUTS, 40):
        clip[5:] = 255 - clip[5:]
        symbols = CUTS.encode(clip)
        later = {unit[unit.index(1) + 1] for unit in units(bytes(symbols))[CUTS.macroblocks :]}
        kinds |= later
        assert CUTS.check(symbols) is None
        assert 0x65 not in later or plain.check(symbols) is not None
    assert kinds == {0x41, 0x65}


def test_sizes_at_which_every_clip_is_one_idr_frame_and_copies():
    for clip in clips(TINY, 8):
        found = units(bytes(TINY.encode(clip)))
        first = [unit[unit.index(1) + 1] == 0x65 for unit in found]
        assert first == [True] * TINY.macroblocks + [False] * TINY.macroblocks * (TINY.frames - 1)


def test_mutants_that_check_accepts_are_decoded_whole_and_silently():
    rng, accepted, refused = np.random.default_rng(0), 0, 0
    for codec in (TINY, CUTS, replace(TINY, qp=24)):
        good = [codec.encode(clip) for clip in clips(codec, 8)]
        for _ in range(700):
            symbols = good[rng.integers(len(good))].copy()
            for _ in range(rng.integers(1, 4)):
                symbols[rng.integers(len(symbols))] ^= 1 << rng.integers(8)
            if codec.check(symbols) is None:
                assert complaint(codec.file(symbols), codec.frames) is None
                accepted += 1
            else:
                refused += 1
    assert accepted > 50 and refused > 1000


def test_check_names_frame_and_macroblock():
    symbols = TINY.encode(clips(TINY, 1)[0])
    where = units(bytes(symbols))
    slice_at = 2 * TINY.macroblocks + 3
    cut = sum(map(len, where[:slice_at]))
    assert TINY.check(symbols[: cut + 2]) == f"byte {cut + 2}: the end, in frame 2, macroblock 3"
    damaged = symbols.copy()
    damaged[cut] = 7
    assert TINY.check(damaged) == f"byte {cut}: frame 2, macroblock 3: no such start code"
    assert TINY.check(np.append(symbols, symbols[:1])) == f"byte {len(symbols)}: after the last frame"


def test_any_bytes_are_decoded_to_a_whole_clip():
    rng = np.random.default_rng(1)
    good = TINY.encode(clips(TINY, 1)[0])
    hostile = [rng.integers(0, 256, n, dtype=np.uint8) for n in (0, 1, 3, 4, 5, 500)]
    hostile += [good[:n] for n in (1, 5, 30, len(good) // 2)] + [np.append(good, good), good[::-1], good[100:]]
    for _ in range(60):
        damaged = good.copy()
        damaged[rng.integers(len(good), size=rng.integers(1, 40))] = rng.integers(256)
        hostile.append(damaged)
    big = av.CodecContext.create("libx264", "w")
    big.width, big.height, big.pix_fmt, big.time_base = 1920, 1088, "yuv420p", Fraction(1, 10)
    sets = b"".join(bytes(packet) for packet in big.encode(av.VideoFrame(1920, 1088, "yuv420p")) + big.encode(None))
    hostile.append(np.frombuffer(sets, np.uint8))  # parameter sets of a larger picture
    for symbols in hostile:
        assert TINY.decode(symbols).shape == TINY.shape
        assert isinstance(TINY.file(symbols), bytes)


def test_a_clip_keeps_its_frames_where_slices_are_missing():
    symbols = TINY.encode(clips(TINY, 1)[0])
    found = units(bytes(symbols))
    lacking = np.frombuffer(b"".join(found[:8] + found[9:]), np.uint8)
    assert TINY.check(lacking) is not None
    decoded, whole = TINY.decode(lacking), TINY.decode(symbols)
    assert np.array_equal(decoded[0], whole[0]) and decoded.shape == whole.shape


def test_a_head_decodes_to_the_first_frames_bit_for_bit():
    for codec in (TINY, CUTS):
        symbols = codec.encode(clips(codec, 3)[2])
        whole = codec.decode(symbols)
        for count in range(codec.frames):
            head = codec.head(symbols, count / codec.frames)
            assert np.array_equal(codec.read(bytes(head)), whole[:count])


def test_a_file_holds_the_very_slices_and_players_read_as_many_frames(tmp_path):
    symbols = TINY.encode(clips(TINY, 1)[0])
    (tmp_path / "clip.mp4").write_bytes(TINY.file(symbols))
    with av.open(str(tmp_path / "clip.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.average_rate, stream.frames, stream.codec_context.name) == (TINY.fps, TINY.frames, "h264")
        held, data = b"", b"".join(bytes(packet) for packet in video.demux(stream))
    while data:  # lengths of 4 bytes have taken the place of start codes (ISO/IEC 14496-15)
        length = int.from_bytes(data[:4])
        held, data = held + data[4 : 4 + length], data[4 + length :]
    assert held == b"".join(unit[unit.index(1) + 1 :] for unit in units(bytes(symbols)))
    (again,) = read(Item(str(tmp_path / "clip.mp4"), 0, -1, "clip"), TINY, {})
    assert np.array_equal(again, TINY.decode(symbols))
    assert TINY.file(symbols) == TINY.file(symbols)


def test_a_codec_is_itself_again_elsewhere(tmp_path):
    tokenizer = tokens_of(CUTS, 300)
    save_tokenizer(tmp_path, tokenizer)
    assert load_tokenizer(tmp_path) == tokenizer
    assert "x264 - core" in tokenizer.codec.encoder


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("width", 15),
        ("width", 33),
        ("height", 2000),
        ("frames", 0),
        ("frames", 251),
        ("fps", 0),
        ("qp", 10),
        ("stride", -1.0),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(setting, value):
    with pytest.raises(UserError, match=f"{setting}.* {value}.*: choose"):
        H264(**{setting: value})


# --- the grammar ----------------------------------------------------------------------------------------------------


def random_states(tokenizer: Tokenizer, seed: int, count: int, steps: int, room: int = FAR - 1):
    """(grammar, states) after random legal tokens: what no encoder writes."""
    grammar, rng = tokenizer.grammar, np.random.default_rng(seed)
    states = grammar.begin(count)
    for step in range(steps):
        legal = ~grammar.mask(states, room - step)
        tokens = np.array([rng.choice(np.flatnonzero(row)) for row in legal])
        states, refused = grammar.accept(states, tokens, room - step)
        for _ in range(50):
            if not refused:
                break
            again = np.full(count, -1)
            again[refused] = [rng.choice(np.flatnonzero(legal[row])) for row in refused]
            states, refused = grammar.accept(states, again, room - step)
    return grammar, states


@pytest.mark.parametrize("vocab", [258, 500])
def test_the_mask_leaves_every_token_of_the_data_open_and_positions_are_those_of_sampling(vocab):
    for codec in (TINY, CUTS):
        tokenizer = tokens_of(codec, vocab)
        grammar = tokenizer.grammar
        documents = [tokenizer.encode([codec.encode(clip)])[0] for clip in clips(codec, 6, seed=1)]
        walk = grammar.walk(documents)
        assert walk.illegal.tolist() == [*map(len, documents)] and not walk.rest.any()
        told = grammar.positions(walk.states)
        assert (told.max((0, 1)) < grammar.sizes).all() and (told >= 0).all()
        for number, document in enumerate(documents):
            states = grammar.begin(1)
            for at, token in enumerate(document[1:]):
                assert np.array_equal(grammar.positions(states)[0], told[number, at])
                mask = grammar.mask(states, FAR - 1)
                assert np.array_equal(mask[0], grammar.mask(walk.states[number, at : at + 1], FAR - 1)[0])
                assert not mask[0, token]
                states, refused = grammar.accept(states, np.array([token]))
                assert not refused
            assert np.array_equal(grammar.positions(states)[0], told[number, len(document) - 1])


@pytest.mark.parametrize("spare", [0, 3, FAR])
def test_the_exact_mask_leaves_open_just_what_is_accepted(spare):
    tokenizer = tokens_of(TINY, 300)
    for seed in range(3):
        grammar, states = random_states(tokenizer, seed, 4, 12)
        for state in states:
            room = min(grammar.rest([state])[0] - 1 + spare, FAR - 1)
            exact = grammar.mask([state], room, exact=[0])[0]
            accepted = []
            for token in range(tokenizer.vocab):
                copy = grammar.read_again(state.reader.place, bytes(state.begun))
                accepted.append(not grammar.accept([copy], np.array([token]), room)[1])
            assert exact.tolist() == [not each for each in accepted]
            assert any(accepted)
            assert not (grammar.mask([state], room)[0] & ~exact).any()  # the cheap mask forbids nothing that is legal


@pytest.mark.parametrize("codec", [TINY, CUTS])
def test_the_way_to_the_end_is_short_legal_and_always_there(codec):
    tokenizer = tokens_of(codec, 300)
    for seed in range(12):
        grammar, states = random_states(tokenizer, seed, 4, 8 * seed)
        for row in states:
            rest = grammar.rest([row])[0]
            while row.ask is not None:
                room = rest - 1  # left after the next token
                mask = grammar.mask([row], room, exact=[0])[0]
                token = int(np.flatnonzero(~mask)[-1])
                assert not grammar.accept([row], np.array([token]), room)[1]
                rest = min(rest - 1, grammar.rest([row])[0])
            assert rest == 1


def bytes_at_random(grammar, rng, count: int):
    """Rows on their way through random legal bytes, and those that are legal next by the cheap mask."""
    for _ in range(count):
        (row,) = grammar.begin(1)
        while row.ask is not None:
            place, begun = row.reader.place, bytes(row.begun)
            legal = np.flatnonzero(grammar.legal[grammar.look(row)[0]])
            yield row, legal
            for byte in [0] * int(0 in legal and rng.random() < 0.7) + rng.permutation(legal).tolist():
                row = grammar.read_again(place, begun)
                if grammar.read(row, bytes([byte]), FAR - 1):
                    break


def test_no_way_to_complete_a_slice_is_longer_than_is_counted_with():
    """Bytes are chosen to make the way as long as a dozen tries allow."""
    grammar, rng, longest = Tokenizer(replace(TINY, frames=2)).grammar, np.random.default_rng(0), 0
    for _ in range(4):
        (row,) = grammar.begin(1)
        while row.ask is not None:
            place, begun = row.reader.place, bytes(row.begun)
            legal, ways = np.flatnonzero(grammar.legal[grammar.look(row)[0]]), {}
            for byte in rng.permutation(legal)[:12]:
                after = grammar.read_again(place, begun)
                if grammar.read(after, bytes([byte]), FAR - 1):
                    here = after.reader.place == place and after.ask[-1] != 3
                    ways[int(byte)] = len(grammar.guide.way(place, bytes(after.begun))[0]) if here else 0
            if not ways:
                break
            row = grammar.read_again(place, begun)
            row.push(max(ways, key=ways.get))
            longest = max(longest, *ways.values(), 0)
    assert 12 < longest < LONGEST_WAY


def test_an_escape_is_accepted_just_where_something_legal_follows():
    grammar, outcomes = Tokenizer(replace(TINY, qp=20)).grammar, []
    for row, _ in bytes_at_random(grammar, np.random.default_rng(0), 8):
        if row.ask[-1] == 2:
            place, begun, ways = row.reader.place, bytes(row.begun), 0
            for byte in range(4):
                with contextlib.suppress(Illegal):
                    grammar.read_again(place, begun + bytes([3, byte]))
                    ways += 1
            (copy,) = [grammar.read_again(place, begun)]
            assert bool(grammar.accept([copy], np.array([3]), FAR - 1)[1]) == (ways == 0)
            outcomes.append(ways)
    assert len(outcomes) > 20 and 0 in outcomes


@pytest.mark.parametrize(("codec", "vocab", "context"), [(TINY, 300, 400), (TINY, 258, 1500), (CUTS, 400, 300)])
def test_an_untrained_model_writes_whole_clips_that_ffmpeg_decodes_without_a_word(codec, vocab, context):
    tokenizer = tokens_of(codec, vocab)
    shape = {"dim": 16, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 16}
    model = Llama(ModelConfig(vocab=tokenizer.vocab, context=context, positions=tokenizer.grammar.sizes, **shape))
    model.init_weights(0)
    prompts = [np.array([tokenizer.start])] * 12
    rows = generate(model, tokenizer, prompts, [(0, i) for i in range(12)], Sampling(temperature=2.0))
    for row in rows:
        symbols = tokenizer.decode(row)
        assert row[-1] == tokenizer.end and codec.check(symbols) is None
        assert complaint(codec.file(symbols), codec.frames) is None


def test_prompts_are_refused_where_they_begin_no_clip_or_leave_no_room():
    tokenizer = tokens_of(TINY, 300)
    tokens = tokenizer.encode([TINY.encode(clips(TINY, 1)[0])])[0]
    walk = tokenizer.grammar.walk([tokens[:20], np.array([tokenizer.start, 7, 8]), tokens[:-1], tokens])
    assert walk.illegal.tolist() == [20, 1, len(tokens) - 1, len(tokens)]
    assert walk.rest[0] > 20 and walk.rest[2] == 1 and walk.rest[3] == 0


@pytest.mark.parametrize("codec", [TINY, CUTS])
def test_a_prompt_comes_back_though_from_its_midst_no_short_way_would_fit(codec):
    tokenizer = tokens_of(codec, 1000)
    model = Llama(ModelConfig(vocab=tokenizer.vocab, context=4000, dim=16, layers=1, heads=1, kv_heads=1, hidden=16))
    model.init_weights(0)
    for clip in clips(codec, 12, seed=3)[2:12:4]:  # noisy ones
        tokens = tokenizer.encode([codec.encode(clip)])[0]
        prompts, how = [tokens[:1], tokens[:-1]], Sampling(length=len(tokens))
        begun, whole = generate(model, tokenizer, prompts, [(0, 0), (0, 1)], how)
        assert np.array_equal(whole, tokens) and codec.check(tokenizer.decode(begun)) is None


def test_places_of_nodes_do_not_depend_on_what_is_read_first():
    script = (
        "import cavlc; {}; n = lambda t, p: [t] if type(t) is not cavlc.Node else [t.id, *n(t[0], p), *n(t[1], p)]\n"
        "print(n(cavlc.coeff_token(2, 16), 0), n(cavlc.mvd('mvd_y', -256, 255), 0), n(cavlc.mb_type('P'), 0), "
        "n(cavlc.header(('P',), 7, 3, 0, 3), 0), len(cavlc.NODES))"
    )
    orders = "cavlc.header(('IDR',), 900, 0, 1, 0)", "cavlc.mvd('mvd_x', *cavlc.MV_X); cavlc.coeff_token(0, 15)"
    runs = [subprocess.check_output([sys.executable, "-c", script.format(each)], cwd=ROOT) for each in orders]
    assert runs[0] == runs[1] and len(runs[0]) > 500


def test_codewords_are_those_of_the_tables_and_complete():
    """Kraft's sum: a code that leaves no bits unused is 1."""

    def kraft(node, depth=0):
        return (
            0
            if node is None
            else 2.0**-depth
            if type(node) is not cavlc.Node
            else sum(kraft(n, depth + 1) for n in node)
        )

    assert kraft(cavlc.run_before(3)) == 1 and kraft(cavlc.total_zeros(1, 16)) < 1
    for zeros in range(1, 7):
        assert kraft(cavlc.run_before(zeros)) == 1
    for total in range(2, 16):
        assert kraft(cavlc.total_zeros(total, 16)) == 1
    assert all(0.9 < kraft(cavlc.coeff_token(table, 16)) <= 1 for table in range(4))


@pytest.mark.skipif(not (SHARED / "video").exists(), reason="no real videos are at hand")
def test_real_clips_are_read_to_the_last_bit():
    codec, count = H264(width=64, height=48, frames=15, fps=10, stride=1.0), 0
    for path in sorted((SHARED / "video").rglob("*.m*"))[::4]:
        for clip in read(Item(str(path), 0, -1, path.name), codec, {}):
            symbols = codec.encode(clip)
            assert codec.check(symbols) is None and complaint(codec.file(symbols), 15) is None
            count += 1
            if count % 20 == 0:
                break
    assert count > 10
