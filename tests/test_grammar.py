"""What the grammar promises: samples are whole valid files, nothing valid is refused, positions are the parser's."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from codec import JPEG, Grammar, Tokenizer, learn_pairs
from data.shapes import draw
from model import Cache, Llama, ModelConfig
from plumbing.command import UserError
from sample import choose, generate, on

CODECS = [
    JPEG(size=16),
    JPEG(size=40, quality=60),
    JPEG(size=64),
    JPEG(size=24, subsampling="4:4:4"),
    JPEG(size=32, subsampling="4:4:4", header=True),
    JPEG(size=33, header=True),
]


def picture(seed: int, size: int) -> np.ndarray:
    """A drawing, with more or less noise over a part of it: files from a few bytes to thousands."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(Image.fromarray(draw(seed)).resize((size, size)), np.int64)
    noise = rng.integers(-1, 2, pixels.shape) * rng.choice([0, 0, 8, 60, 255])
    return (pixels + noise * (rng.random((size, 1, 1)) < rng.random())).clip(0, 255).astype(np.uint8)


@cache
def tokens_of(codec: JPEG, vocab: int = 300) -> Tokenizer:
    return learn_pairs(codec, [codec.encode(picture(i, codec.size)) for i in range(60)], vocab)


@cache
def plain_of(codec: JPEG) -> Tokenizer:
    return Tokenizer(codec)


@cache
def untrained(tokens: Tokenizer, context: int, told: bool = True) -> Llama:
    positions = tokens.grammar.positions if told else ()
    shape = {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "hidden": 32}
    model = Llama(ModelConfig(vocab=tokens.vocab, positions=positions, context=context, **shape))
    model.init_weights(3)
    return model.eval()


def samples(tokens: Tokenizer, count: int, context: int, **options) -> list[np.ndarray]:
    begun = [np.array([tokens.start])] * count
    return generate(untrained(tokens, context), tokens, begun, [(1, i) for i in range(count)], **options)


def padded(documents: list[np.ndarray]) -> np.ndarray:
    rows = np.zeros((len(documents), max(map(len, documents))), np.int64)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document)] = document
    return rows


def accepted(grammar: Grammar, documents: list[np.ndarray]) -> np.ndarray:
    """Which documents of tokens the automaton reads to their end."""
    states, allowed = grammar.walk(padded(documents))
    last = np.array([len(document) - 1 for document in documents])
    inside = np.arange(allowed.shape[1]) <= last[:, None]
    ended = states[np.arange(len(last)), last] % len(grammar.table) == len(grammar.table) - 1
    return (allowed | ~inside).all(1) & ended


# --- valid by construction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "count", "context"),
    [(codec, 1500 + 1000 * (codec.size == 16), min(150 + codec.size * 4, 300)) for codec in CODECS],
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


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 30.0}])
def test_no_setting_of_the_sampler_makes_an_invalid_file(options):
    for codec in CODECS[::2]:
        tokens = tokens_of(codec)
        for row in samples(tokens, 8, 300, **options):
            assert codec.check(tokens.decode(row)) is None


@pytest.mark.parametrize("codec", CODECS)
def test_the_shortest_file_fits_and_one_token_less_is_refused(codec):
    tokens = tokens_of(codec)
    grammar = tokens.grammar
    shortest = 1 + int(grammar.rest(0, grammar.first))
    for row in samples(tokens, 4, 1000, length=shortest, temperature=2.0):
        assert codec.check(tokens.decode(row)) is None
    with pytest.raises(UserError, match="the rest of the file takes"):
        samples(tokens, 1, 1000, length=shortest - 1)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_completions_begin_with_their_prompt_and_are_valid(codec):
    tokens, keep = tokens_of(codec), 1 / codec.rows
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


def test_settings_that_the_grammar_does_not_cover_are_free():
    for restart in (0, 4):
        tokens = Tokenizer(JPEG(restart=restart))
        assert tokens.grammar.positions == ()
        assert accepted(tokens.grammar, [tokens.encode([tokens.codec.encode(picture(0, 64))])[0]]).all()
        assert np.flatnonzero(~tokens.grammar.legal(np.array([0]))).tolist() == [tokens.start]
        assert len(samples(tokens, 1, 50)[0]) == 50


# --- the language is that of the format -----------------------------------------------------------------------------


def test_encoder_output_is_accepted():
    """10,000 files of every size, quality and subsampling here, as bytes and as pairs."""
    for number, codec in enumerate(CODECS):
        tokens, count = tokens_of(codec), 10_000 // len(CODECS) + 1
        files = [codec.encode(picture(number * count + i, codec.size)) for i in range(count)]
        for vocabulary in (plain_of(codec), tokens):
            assert accepted(vocabulary.grammar, [vocabulary.encode([file])[0] for file in files]).all()


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


@pytest.mark.skipif(not shutil.which("djpeg"), reason="djpeg of libjpeg-turbo-progs is not installed")
def test_mutants_that_djpeg_warns_of_are_rejected():
    rng, codec, mutants = np.random.default_rng(1), JPEG(), []
    for i in range(500):
        mutants.append(codec.encode(picture(i, 64)).copy())
        mutants[-1][rng.integers(len(mutants[-1]))] ^= rng.integers(1, 256)
    with ThreadPoolExecutor(4) as pool:
        warned = np.array([bool(run.returncode) for run in pool.map(lambda mutant: strict(codec, mutant), mutants)])
    tokens = tokens_of(codec)
    assert warned.sum() > 200
    assert not accepted(tokens.grammar, [tokens.encode([mutant])[0] for mutant in mutants])[warned].any()


@given(seed=st.integers(0, 10_000), number=st.integers(0, len(CODECS) - 1), vocab=st.sampled_from([300, 420]))
@settings(max_examples=60)
def test_pairs_lead_where_their_bytes_lead(seed, number, vocab):
    codec = CODECS[number]
    tokens, plain = tokens_of(codec, vocab), plain_of(codec)
    stream = tokens.encode([codec.encode(picture(seed, codec.size))])[0]
    states = tokens.grammar.walk(stream[None].astype(np.int64))[0][0]
    single = np.array([plain.start, *tokens.decode(stream), plain.end])
    wanted = plain.grammar.walk(single[None])[0][0]
    ends = np.cumsum([1, *(len(tokens.expansions[token]) for token in stream[1:-1]), 1]) - 1
    assert np.array_equal(states, wanted[ends])


@given(seed=st.integers(0, 10_000), number=st.integers(0, len(CODECS) - 1), data=st.data())
@settings(max_examples=60)
def test_legal_names_exactly_the_tokens_that_advance_allows(seed, number, data):
    codec = CODECS[number]
    tokens = tokens_of(codec)
    grammar = tokens.grammar
    stream = tokens.encode([codec.encode(picture(seed, codec.size))])[0].astype(np.int64)
    state = grammar.walk(stream[None])[0][0][data.draw(st.integers(0, len(stream) - 1))]
    every = np.arange(tokens.vocab)
    assert np.array_equal(grammar.legal(np.array([state]))[0], grammar.advance(np.full(len(every), state), every)[1])


# --- generation -----------------------------------------------------------------------------------------------------


def test_masked_greedy_is_greedy_as_long_as_greedy_is_legal():
    tokens = tokens_of(CODECS[2])
    grammar, generator = tokens.grammar, torch.Generator().manual_seed(0)
    stream = tokens.encode([tokens.codec.encode(picture(3, 64))])[0].astype(np.int64)
    state = torch.from_numpy(grammar.walk(stream[None])[0][0])
    legal = on(torch.device("cpu"), grammar).legal(state)
    logits = torch.randn(legal.shape, generator=generator) + 2 * legal
    greedy = logits.argmax(-1)
    masked = choose(logits.masked_fill(~legal, -torch.inf), torch.zeros(len(logits)), 0.0, 0, 1.0)
    allowed = legal.gather(-1, greedy[:, None])[:, 0]
    assert 0 < allowed.sum() < len(allowed)
    assert torch.equal(masked[allowed], greedy[allowed])
    model = untrained(tokens, 400)
    free, bound = (generate(model, tokens, [stream[:40]], [(0, 0)], 0.0, free=free)[0] for free in (True, False))
    until = 1 + int(grammar.walk(free[None].astype(np.int64))[1][0].argmin())
    assert until > 40 and np.array_equal(free[: until - 1], bound[: until - 1])


@pytest.mark.parametrize("free", [False, True])
def test_positions_while_sampling_are_those_of_the_finished_file(free):
    tokens = tokens_of(CODECS[3])
    model, seen = untrained(tokens, 120), []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    row = samples(tokens, 1, 120, free=free)[0]
    handle.remove()
    wanted = tokens.grammar.position(tokens.grammar.walk(row[None].astype(np.int64))[0][0])
    seen = torch.cat(seen, 1)[0].numpy()
    assert len(seen) > 30 and np.array_equal(seen, wanted[: len(seen)])
    assert (wanted < np.array(tokens.grammar.positions)).all()


def test_a_model_that_is_told_positions_keeps_its_cache_exact():
    tokens = tokens_of(CODECS[2])
    model = untrained(tokens, 400)
    stream = tokens.encode([tokens.codec.encode(picture(3, 64))])[0].astype(np.int64)[None, :200]
    where = torch.from_numpy(tokens.grammar.position(tokens.grammar.walk(stream)[0]))
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
