"""What the grammar promises: samples are whole valid files, nothing valid is refused, positions are the parser's."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import jpeg
import sample
from codec import JPEG, SCALE, Codec, Pixels, Tokenizer, standard_codes
from data.pairs import learn_pairs
from data.shapes import draw
from grammar import FAR, Grammar, State, counting
from model import Cache, Llama, ModelConfig
from plumbing.command import UserError
from sample import BANS, Sampling, choose, generate

CODECS = [
    JPEG(size=16),
    JPEG(size=40, quality=60),
    JPEG(size=64),
    JPEG(size=24, subsampling="4:4:4"),
    JPEG(size=32, subsampling="4:4:4", header=True),
    JPEG(size=33, header=True),
    JPEG(size=40, restart=3),  # a marker a row
    JPEG(size=48, restart=2, header=True),
    JPEG(size=32, restart=0),  # none
    JPEG(size=24, restart=0, subsampling="4:4:4", header=True),
    JPEG(size=24, restart=2, subsampling="4:4:4", quality=60),
]


def picture(seed: int, size: int) -> np.ndarray:
    """A drawing, with more or less noise over a part of it: files from a few bytes to thousands."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(Image.fromarray(draw(seed)).resize((size, size)), np.int64)
    noise = rng.integers(-1, 2, pixels.shape) * rng.choice([0, 0, 8, 60, 255])
    return (pixels + noise * (rng.random((size, 1, 1)) < rng.random())).clip(0, 255).astype(np.uint8)


@cache
def tokens_of(codec: Codec, vocab: int = 300) -> Tokenizer:
    return learn_pairs(codec, [codec.encode(picture(i, codec.size)) for i in range(60)], vocab)


@cache
def plain_of(codec: Codec) -> Tokenizer:
    return Tokenizer(codec)


@cache
def untrained(tokens: Tokenizer, context: int, told: bool = True) -> Llama:
    positions = tokens.grammar.sizes if told else ()
    shape = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "hidden": 32}
    model = Llama(ModelConfig(vocab=tokens.vocab, positions=positions, context=context, **shape))
    model.init_weights(3)
    return model.eval()


def samples(tokens: Tokenizer, count: int, context: int, **options) -> list[np.ndarray]:
    begun = [np.array([tokens.start])] * count
    return generate(untrained(tokens, context), tokens, begun, [(1, i) for i in range(count)], Sampling(**options))


def accepted(grammar: Grammar, documents: list[np.ndarray]) -> np.ndarray:
    """Which documents of tokens are read to their end."""
    return grammar.walk(documents).illegal == [len(document) for document in documents]


def states_of(grammar: Grammar, document: np.ndarray) -> State:
    return grammar.walk([document]).states[0]


# --- valid by construction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "count", "context"),
    [(codec, 900 + 1000 * (codec.size == 16), min(150 + codec.size * 4, 300)) for codec in CODECS],
)
def test_every_sample_of_an_untrained_model_is_a_whole_valid_file(codec, count, context):
    """10,000 in all, at temperature 2, some cut short by the context: `check` and djpeg -strict find nothing."""
    tokens = tokens_of(codec)
    files = [tokens.decode(row) for row in samples(tokens, count, context, temperature=2.0)]
    assert [wrong for symbols in files if (wrong := codec.check(symbols))] == []
    assert len({symbols.tobytes() for symbols in files}) > 0.99 * count
    if shutil.which("djpeg"):
        with ThreadPoolExecutor(4) as pool:
            runs = list(pool.map(lambda symbols: strict(codec, symbols), files))
        assert [run.stderr for run in runs if run.returncode or run.stderr] == []


def strict(codec: JPEG, symbols: np.ndarray) -> subprocess.CompletedProcess:
    return subprocess.run(["djpeg", "-strict", "-outfile", "/dev/null"], input=codec.file(symbols), capture_output=True)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 30}])
def test_no_setting_of_the_sampler_makes_an_invalid_file(options):
    for codec in CODECS[::2]:
        tokens = tokens_of(codec)
        for row in samples(tokens, 8, 300, **options):
            assert codec.check(tokens.decode(row)) is None


@pytest.mark.parametrize("codec", CODECS)
def test_the_shortest_file_fits_and_one_token_less_is_refused(codec):
    tokens = tokens_of(codec)
    shortest = 1 + int(tokens.grammar.walk([np.array([tokens.start])]).rest[0])
    for row in samples(tokens, 4, 1000, length=shortest, temperature=2.0):
        assert codec.check(tokens.decode(row)) is None
    with pytest.raises(UserError, match="the rest of the file takes"):
        samples(tokens, 1, 1000, length=shortest - 1)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_completions_begin_with_their_prompt_and_are_valid(codec):
    tokens, keep = tokens_of(codec), 1 / codec.parts
    prompts = [codec.head(codec.encode(picture(i, codec.size)), keep) for i in range(6)] + [np.empty(0, np.uint8)]
    begun = [tokens.encode([prompt])[0][:-1] for prompt in prompts]
    rows = generate(untrained(tokens, 4000), tokens, begun, [(0, i) for i in range(7)])
    for prompt, row in zip(prompts, rows, strict=True):
        symbols = tokens.decode(row)
        assert codec.check(symbols) is None
        assert np.array_equal(symbols[: len(prompt)], prompt)


def test_a_prompt_that_begins_no_valid_file_is_refused_with_its_place():
    tokens = plain_of(JPEG())
    wrong = np.array([tokens.start, *tokens.codec.encode(picture(0, 64))[:20], 0xFF, 0xD5])
    with pytest.raises(UserError, match=r"prompt 1 does not begin a valid file \(token 22 of 23\)"):
        generate(untrained(tokens, 500), tokens, [wrong[:1], wrong], [(0, 0), (0, 1)])


def test_free_sampling_draws_what_no_file_has():
    tokens = tokens_of(CODECS[2])
    files = samples(tokens, 20, 50, free=True)
    assert all(len(row) == 50 or row[-1] == tokens.end for row in files) and max(map(len, files)) == 50
    assert all(tokens.codec.check(tokens.decode(row)) for row in files)


# --- the language is that of the format -----------------------------------------------------------------------------


def test_encoder_output_is_accepted():
    """10,000 files of every size, quality and subsampling here, as bytes and as pairs."""
    for number, codec in enumerate(CODECS):
        tokens, count = tokens_of(codec), 10_000 // len(CODECS) + 1
        files = [codec.encode(picture(number * count + i, codec.size)) for i in range(count)]
        for vocabulary in (plain_of(codec), tokens):
            assert accepted(vocabulary.grammar, [vocabulary.encode([file])[0] for file in files]).all()


@pytest.mark.parametrize("quality", [1, 10, 25, 50, 75, 90, 100])
@pytest.mark.parametrize("subsampling", SCALE)
def test_the_largest_coefficients_that_pictures_have_are_accepted(subsampling, quality):
    """Black where a wave of the transform is negative and white where it is not gives the largest coefficient there is;
    of brightness, in one colour alone, and turned round.  At every quality some have all the bits that are allowed."""
    codec = JPEG(size=16, subsampling=subsampling, quality=quality, restart=0)
    scale, files, colours = SCALE[subsampling], [], ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    waves = np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16)
    waves = np.einsum("uy,vx->uvyx", waves, waves).reshape(64, 8, 8)
    for wave, colour, sign in product(waves, colours, (1, -1)):
        shown = np.kron(np.tile(sign * wave > 0, (2 // scale,) * 2), np.ones((scale, scale)))
        files.append(codec.encode((255 * shown[..., None] * colour).astype(np.uint8)))
    assert [*map(codec.check, files)] == [None] * len(files)
    assert accepted(plain_of(codec).grammar, [plain_of(codec).encode([file])[0] for file in files]).all()
    bounds = codec.bounds
    fewer = [[max(0, bits - 1) for bits in each] for each in bounds.sizes]
    codec.__dict__["bounds"] = replace(bounds, sizes=fewer)
    assert sum(codec.check(file) is not None for file in files) > 10
    flat = [codec.encode(np.full((16, 16, 3), value, np.uint8)) for value in (0, 255)]
    colours = [codec.encode(np.full((16, 16, 3), colour, np.uint8)) for colour in ((0, 0, 255), (255, 255, 0))]
    for files, narrower in ((flat, (1, 0)), (colours, (0, 1))):  # a step less of Y, of colour
        assert [*map(codec.check, files)] == [None] * 2 or "bits" in codec.check(files[0])
        dc = [(least + less, most - less) for (least, most), less in zip(bounds.dc, narrower, strict=True)]
        codec.__dict__["bounds"] = replace(bounds, dc=dc)
        assert ["DC is" in (codec.check(file) or "") for file in files].count(True) >= 1 + (narrower[0])
        encoded = [plain_of(codec).encode([file])[0] for file in files]
        assert not accepted(codec.grammar(), encoded).all()
        codec.__dict__["bounds"] = bounds
        assert accepted(codec.grammar(), encoded).all()


def test_mutants_are_judged_as_check_judges():
    """10,000 files with a byte changed: the automaton and `check`, which parses bit by bit, agree on all of them."""
    rng, rejected = np.random.default_rng(0), 0
    for codec in CODECS:
        tokens, mutants = tokens_of(codec), []
        for i in range(10_000 // len(CODECS) + 1):
            mutant = codec.encode(picture(i % 300, codec.size)).copy()
            mutant[rng.integers(len(mutant))] ^= rng.integers(1, 256)
            mutants.append(mutant)
        valid = [codec.check(mutant) is None for mutant in mutants]
        assert accepted(tokens.grammar, [tokens.encode([mutant])[0] for mutant in mutants]).tolist() == valid
        rejected += len(valid) - sum(valid)
    assert rejected > 4000


def test_a_wrong_rule_about_the_last_coefficient_is_seen(monkeypatch):
    """Parser and automaton share no code: if the automaton lets a block run over its last coefficient, it accepts files
    that the parser does not."""

    def lax(coefficient: int, run: int, size: int) -> int:
        return 64 if coefficient and (run, size) == (0, 0) else min(coefficient + run + 1, 64)

    monkeypatch.setattr(jpeg, "following", lax)
    codec, rng, mutants = JPEG(size=16, quality=95), np.random.default_rng(0), []
    for _ in range(3000):
        mutants.append(codec.encode(rng.integers(0, 256, codec.shape, np.uint8)).copy())
        mutants[-1][rng.integers(len(mutants[-1]))] ^= rng.integers(1, 256)
    tokens, valid = Tokenizer(codec), np.array([codec.check(mutant) is None for mutant in mutants])
    read = accepted(tokens.grammar, [tokens.encode([mutant])[0] for mutant in mutants])
    assert read[valid].all() and valid.sum() > 100
    assert read[~valid].sum() > 10


@given(seed=st.integers(0, 10_000), number=st.integers(0, len(CODECS) - 1), vocab=st.sampled_from([300, 420]))
@settings(max_examples=60)
def test_pairs_lead_where_their_bytes_lead(seed, number, vocab):
    codec = CODECS[number]
    tokens, plain = tokens_of(codec, vocab), plain_of(codec)
    stream = tokens.encode([codec.encode(picture(seed, codec.size))])[0]
    states = states_of(tokens.grammar, stream)
    wanted = states_of(plain.grammar, np.array([plain.start, *tokens.decode(stream), plain.end]))
    ends = np.cumsum([1, *(len(tokens.expansions[token]) for token in stream[1:-1]), 1]) - 1
    assert np.array_equal(states.local, wanted.local[ends]) and np.array_equal(states.count, wanted.count[ends])


@given(seed=st.integers(0, 10_000), number=st.integers(0, len(CODECS) - 1), data=st.data())
@settings(max_examples=60)
def test_the_mask_names_exactly_the_tokens_that_are_not_read(seed, number, data):
    codec = CODECS[number]
    tokens = tokens_of(codec)
    grammar = tokens.grammar
    stream = tokens.encode([codec.encode(picture(seed, codec.size))])[0]
    at = data.draw(st.integers(0, len(stream) - 1))
    state, every = grammar.begin(1), np.arange(tokens.vocab)
    for token in stream[1 : at + 1]:
        state, *_ = grammar.step(state, np.array([token]))
    room = int(data.draw(st.sampled_from([FAR - 1, int(grammar.rest(state)[0]), int(grammar.rest(state)[0]) + 3])))
    many = grammar.keep(state, every * 0)
    _, legal, known = grammar.step(many, every, room)
    assert np.array_equal(~grammar.mask(state, room, exact=[0])[0], legal)
    assert np.array_equal(~grammar.mask(state, room)[0], known)
    assert np.array_equal(many.values[~legal], state.values.repeat((~legal).sum(), 0))  # as they were


@pytest.mark.parametrize("codec", CODECS)
def test_from_every_state_a_legal_token_leads_nearer_to_the_end(codec):
    """`rest` is a bound that can be kept: some legal token leaves a shorter rest, at any point of a file."""
    tokens = tokens_of(codec)
    grammar = tokens.grammar
    for seed in range(12):
        states = states_of(grammar, tokens.encode([codec.encode(picture(seed, codec.size))])[0])
        rest = grammar.rest(states)
        for at in range(len(rest) - 1):
            assert (~grammar.mask(states[at : at + 1], int(rest[at]) - 1)).any(), (seed, at)


# --- what was decoded -----------------------------------------------------------------------------------------------


Place = tuple[int, int, int]  # of a block: component, row, column


def dc_by_bit(bits: str, blocks: list[Place], behind: Place | None) -> tuple[list, dict]:
    """Of an interval that holds some blocks, by a reader of its own: after each bit the block whose DC is due, `behind`
    after the last, and what it is worth so far, then the same of the block that is read; and the DC of each."""
    track, spot, before, found = [None] * (len(bits) + 1), 0, [0, 0, 0], {}
    for block, following in pairwise([*blocks, behind]):
        worth, coefficient = before[block[0]], 0
        due = present = block, worth
        while coefficient < 64:
            track[spot], code = (due, present), ""
            while code not in standard_codes()[int(coefficient > 0), int(block[0] > 0)]:
                code, spot = code + bits[spot], spot + 1
                track[spot] = due, present
            run, size = divmod(standard_codes()[int(coefficient > 0), int(block[0] > 0)][code], 16)
            for read in range(1, size + 1):
                if not coefficient:  # figure F.12, the bits that are missing taken for zeros
                    value = int(bits[spot : spot + read].ljust(size, "0"), 2)
                    due = present = block, worth + value - (bits[spot] == "0") * (2**size - 1)
                track[spot + read] = due, present
            spot += size
            if not coefficient:
                before[block[0]] = found[block] = present[1]
                due = following, before[following[0]] if following in blocks else 0
            coefficient = 64 if coefficient and not run + size else coefficient + run + 1
        track[spot] = None
    return track[: spot + 1] + [None] * 7, found


def told_of(codec: JPEG, symbols: np.ndarray) -> list[list[int]]:
    """What is to be told after the start and after each byte."""
    scale, columns, told, dc, blocks = SCALE[codec.subsampling], codec.parts, [], {}, []
    level = jpeg.levels()
    segments = re.split(rb"\xff[\xd0-\xd7]", bytes(symbols))
    for y, x in np.ndindex(columns, columns):
        blocks += [(0, y * scale + i // scale, x * scale + i % scale) for i in range(scale**2)]
        blocks += [(1, y, x), (2, y, x)]
    rank, blocks = {block: i for i, block in enumerate(blocks)}, [*blocks, None]
    for number, segment in enumerate(segments):
        size = (codec.restart or codec.mcus) * (scale**2 + 2)
        inside, end = blocks[:-1][number * size :][:size], min((number + 1) * size, len(blocks) - 1)
        packed = segment.replace(b"\xff\x00", b"\xff")
        track, found = dc_by_bit("".join(f"{byte:08b}" for byte in packed), inside, blocks[end])
        dc |= found
        ends = [0]
        for i, byte in enumerate(segment):
            ends.append(ends[-1] + 8 * (i == 0 or segment[i - 1] != 0xFF or byte != 0))
        for at in ends:
            told.append([])
            for place, worth in track[at] or [(None, 0)] * 2:
                directions = ((0, -1), (-1, 0), (-1, 1)) if place else ()
                near = [(place[0], place[1] + down, place[2] + right) for down, right in directions]
                known = [0, *(dc[each] if rank.get(each, 1 << 30) < rank[place] else None for each in near)]
                told[-1] += [0 if each is None else level[each - worth + 4095] for each in known] if place else [0] * 4
        told += [[0] * 8] * (number + 1 < len(segments))  # after the FF of a marker
    return [*told, [0] * 8]


@pytest.mark.parametrize("codec", [codec for codec in CODECS if not codec.header])
def test_what_is_told_of_dc_is_what_another_reader_finds(codec):
    for tokens in (plain_of(codec), tokens_of(codec)):
        for seed in range(15):
            symbols = codec.encode(picture(seed, codec.size))
            stream = tokens.encode([symbols])[0]
            ends = np.cumsum([0, *(len(tokens.expansions[token]) for token in stream[1:-1]), 1])
            wanted = np.array(told_of(codec, symbols))[ends]
            found = tokens.grammar.positions(states_of(tokens.grammar, stream))[:, 5:]
            assert np.array_equal(found, wanted), (tokens.vocab, seed, np.argwhere(found != wanted)[:5])
    assert (wanted > 0).mean() > 0.3


@pytest.mark.parametrize("codec", [CODECS[1], CODECS[6], CODECS[9], Pixels(size=6, colours=0)])
def test_tensors_are_read_as_arrays_are(codec):
    """What a GPU does, tried on the CPU: masks, states, refusals of tight rooms and positions, token by token."""
    pairs = codec.symbols == 256 and isinstance(codec, JPEG)
    tokens, rng = tokens_of(codec) if pairs else plain_of(codec), np.random.default_rng(0)
    arrays, tensors = tokens.grammar, tokens.grammar.tensors("cpu")
    here, there = arrays.begin(30), tensors.begin(30)
    for at in range(120):
        room = 10_000 if at < 60 else 400
        mask = arrays.mask(here, room, exact=range(len(here.local)))
        assert np.array_equal(mask, tensors.mask(there, room).numpy())
        wrong = arrays.mask(here, room)[:, 7] & (rng.random(len(mask)) < 0.1) | mask.all(1)
        drawn = np.array([7 if bad else rng.choice(np.flatnonzero(~row)) for row, bad in zip(mask, wrong, strict=True)])
        here, there = arrays.accept(here, drawn, room)[0], tensors.accept(there, torch.from_numpy(drawn), room)[0]
        assert np.array_equal(arrays.positions(here), tensors.positions(there).numpy())
        assert np.array_equal(arrays.rest(here), tensors.rest(there).numpy())
        if at == 80:
            here, there = arrays.keep(here, np.arange(3, 9)), tensors.keep(there, torch.arange(3, 9))


# --- other grammars, and refusal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [Pixels(size=6, colours=0), Pixels(size=6, colours=4, palette=((0, 0, 0),) * 4)])
def test_pixels_are_counted(codec):
    """As many symbols as there are places, then the end; positions are row, column and channel, pairs or not."""
    tokens = Tokenizer(codec, ((0, 1), (codec.symbols, 2)))
    for vocabulary in (Tokenizer(codec), tokens):
        rows = samples(vocabulary, 30, 200, temperature=2.0)
        assert [codec.check(vocabulary.decode(row)) for row in rows] == [None] * 30
    symbols = np.zeros(np.prod(codec.places), tokens.dtype)
    walk = Tokenizer(codec).grammar.walk([np.array([tokens.start - 2, *symbols, tokens.end - 2])])
    positions = Tokenizer(codec).grammar.positions(walk.states)[0]
    assert np.array_equal(positions[: len(symbols)], np.argwhere(np.ones(codec.places)))
    assert positions[len(symbols)].tolist() == [6, *[0] * (len(codec.places) - 1)]
    assert codec.check(symbols[:-1]) and codec.check(np.append(symbols, 0))
    assert not accepted(Tokenizer(codec).grammar, [np.array([tokens.start - 2, *symbols[1:], tokens.end - 2])]).any()


class Reader:
    """The grammar of a table, asked as a reader is: its mask knows nothing, it refuses what is illegal."""

    def __init__(self, table):
        self.table, self.sizes, self.refusals, self.exact = table, table.sizes, 0, 0

    def to(self, device):
        return self

    def begin(self, count):
        return self.table.begin(count)

    def mask(self, states, room, exact=()):
        self.exact += len(exact)
        mask = self.table.mask(states, room, exact)
        mask[[row for row in range(len(mask)) if row not in exact]] = False
        return torch.from_numpy(mask)

    def accept(self, states, tokens, room):
        states, legal, _ = self.table.step(states, tokens.numpy(), np.asarray(room))
        refused = np.flatnonzero(~legal & (tokens.numpy() >= 0)).tolist()
        self.refusals += len(refused)
        return states, refused

    def keep(self, states, rows):
        return self.table.keep(states, rows.numpy())

    def positions(self, states):
        return torch.from_numpy(self.table.positions(states)).long()

    def walk(self, documents, tell=True):
        return self.table.walk(documents, tell)


def with_grammar(grammar: Grammar, monkeypatch) -> None:
    monkeypatch.setattr(Tokenizer, "grammar", grammar)
    monkeypatch.setattr(sample, "grammar_on", lambda device, _: grammar.to(device))


@pytest.mark.parametrize("codec", [CODECS[0], CODECS[7], Pixels(size=6, colours=0)])
def test_samples_of_a_grammar_that_only_refuses_are_whole_and_valid_too(codec, monkeypatch):
    tokens = Tokenizer(codec)
    reader = Reader(tokens.grammar)
    with_grammar(reader, monkeypatch)
    rows = samples(tokens, 20, 200, temperature=2.0)
    assert [codec.check(tokens.decode(row)) for row in rows] == [None] * 20
    assert reader.refusals > 20
    assert reader.exact or reader.refusals < 20 * BANS


def test_drawing_again_among_what_is_not_banned_is_drawing_from_what_is_legal(monkeypatch):
    """The first token of 4,000 files: refused or masked, each legal one comes with its share of the softmax."""
    table = counting(6, (1,))
    allowed = table.layers[0].copy()
    allowed[0, [1, 4]] = 0  # of six symbols, two are illegal
    table = replace(table, layers=(allowed,))
    tokens = Tokenizer(Pixels(size=1, colours=6, palette=((0, 0, 0),) * 6))
    model, shares = untrained_of(tokens), []
    for grammar in (table, Reader(table)):
        with_grammar(grammar, monkeypatch)
        begun, seeds = [np.array([tokens.start])] * 4000, [(9, i) for i in range(4000)]
        drawn = np.array([row[1] for row in generate(model, tokens, begun, seeds)])
        shares.append(np.bincount(drawn, minlength=6) / 4000)
    with torch.no_grad():
        logits = model(torch.tensor([[tokens.start]]))[0, -1, :6]
    logits[[1, 4]] = -torch.inf
    for share in shares:
        assert share[[1, 4]].sum() == 0
        assert np.abs(share - logits.softmax(0).numpy()).max() < 0.03


def untrained_of(tokens: Tokenizer) -> Llama:
    """A model with decided opinions."""
    model = Llama(ModelConfig(vocab=tokens.vocab, context=8, dim=16, layers=1, heads=2, kv_heads=2, hidden=32))
    model.init_weights(3)
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    return model.eval()


# --- generation -----------------------------------------------------------------------------------------------------


def test_masked_greedy_is_greedy_as_long_as_greedy_is_legal():
    tokens = tokens_of(CODECS[2])
    grammar, generator = tokens.grammar, torch.Generator().manual_seed(0)
    stream = tokens.encode([tokens.codec.encode(picture(3, 64))])[0].astype(np.int64)
    legal = torch.from_numpy(~grammar.mask(states_of(grammar, stream), FAR - 1))
    logits = torch.randn(legal.shape, generator=generator) + 2 * legal
    greedy = logits.argmax(-1)
    masked = choose(logits.masked_fill(~legal, -torch.inf), torch.zeros(len(logits)), Sampling(0))
    allowed = legal.gather(-1, greedy[:, None])[:, 0]
    assert 0 < allowed.sum() < len(allowed)
    assert torch.equal(masked[allowed], greedy[allowed])
    model = untrained(tokens, 400)
    free, bound = (
        generate(model, tokens, [stream[:40]], [(0, 0)], Sampling(0, free=free))[0] for free in (True, False)
    )
    until = 1 + int(grammar.walk([free]).illegal[0])
    assert until > 40 and np.array_equal(free[: until - 1], bound[: until - 1])


@pytest.mark.parametrize("free", [False, True])
def test_positions_while_sampling_are_those_of_the_finished_file(free):
    tokens = tokens_of(CODECS[3])
    model, seen = untrained(tokens, 120), []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    row = samples(tokens, 1, 120, free=free)[0]
    handle.remove()
    wanted = tokens.grammar.positions(states_of(tokens.grammar, row))
    seen = torch.cat(seen, 1)[0].numpy()
    assert len(seen) > 30 and np.array_equal(seen, wanted[: len(seen)])
    assert (wanted < np.array(tokens.grammar.sizes)).all()


def test_a_model_that_is_told_positions_keeps_its_cache_exact():
    tokens = tokens_of(CODECS[2])
    model = untrained(tokens, 400)
    stream = tokens.encode([tokens.codec.encode(picture(3, 64))])[0].astype(np.int64)[None, :200]
    where = torch.from_numpy(tokens.grammar.positions(tokens.grammar.walk(list(stream)).states)).long()
    stream, cache = torch.from_numpy(stream), Cache(model.config, 1, 200)
    with torch.no_grad():
        parts = [model(stream[:, i : i + 1], where[:, i : i + 1], cache) for i in range(stream.shape[1])]
        torch.testing.assert_close(torch.cat(parts, 1), model(stream, where), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(stream, where), model(stream, where * 0))


def test_a_plain_model_takes_no_notice_of_positions():
    tokens = tokens_of(CODECS[0])
    model = untrained(tokens, 50, told=False)
    stream = torch.arange(20)[None]
    assert not any("position" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(stream), model(stream, torch.ones(1, 20, 5, dtype=torch.long)))
