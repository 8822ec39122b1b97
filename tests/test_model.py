"""What model.py promises: Hugging Face's Llama, and a cache that changes nothing."""

import numpy as np
import pytest
import torch

from codec import JPEG, Tokenizer
from model import Cache, Llama, ModelConfig
from plumbing import huggingface
from plumbing.draw import grid
from sample import Sampling, choose, generate

FREE, HOW = Tokenizer(JPEG(restart=0), ((0, 0),) * 42), Sampling(free=True)  # 300 tokens in any order
SMALL = {"vocab": 300, "context": 96, "dim": 48, "layers": 3, "heads": 4, "hidden": 112}


def small(kv_heads: int = 4, **changes) -> Llama:
    model = Llama(ModelConfig(**{**SMALL, "kv_heads": kv_heads, **changes}))
    model.init_weights(1)
    return model.eval()


def assert_logits_equal(model: Llama, reference: torch.nn.Module) -> None:
    """Our weights fit theirs by name, and give the same logits."""
    weights = {name if name.startswith("lm_head") else f"model.{name}": w for name, w in model.state_dict().items()}
    reference.eval().load_state_dict(weights)  # strict: the names are the same
    tokens = torch.randint(0, 300, (3, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_logits_equal_transformers_llama(kv_heads, theta):
    transformers = pytest.importorskip("transformers")
    model = small(kv_heads, rope_theta=theta)
    theirs = transformers.LlamaConfig(**huggingface.settings(model.config))
    assert_logits_equal(model, transformers.LlamaForCausalLM(theirs))


def test_qk_norm_is_that_of_qwen3():
    transformers = pytest.importorskip("transformers")
    model = small(2, qk_norm=True)
    theirs = transformers.Qwen3Config(**huggingface.settings(model.config), head_dim=12)
    assert_logits_equal(model, transformers.Qwen3ForCausalLM(theirs))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cache_gives_what_a_full_pass_gives(kv_heads):
    model = small(kv_heads)
    tokens = torch.randint(0, 300, (2, 96), generator=torch.Generator().manual_seed(0))
    cache = Cache(model.config, 2, 96)
    with torch.no_grad():
        steps = [model(tokens[:, :40], cache=cache)] + [model(tokens[:, i : i + 1], cache=cache) for i in range(40, 96)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-4, atol=1e-5)


def test_the_cache_is_allocated_once():
    model, cache = small(), Cache(ModelConfig(**{**SMALL, "kv_heads": 4}), 1, 96)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
        place = cache.keys.data_ptr()
        for _ in range(95):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    assert cache.keys.data_ptr() == place and cache.length == 96


def test_no_token_sees_those_after_it():
    model = small()
    tokens = torch.randint(0, 300, (1, 96), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 50:] = 0
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :50], model(changed)[:, :50])


def test_weights_depend_on_seed_and_name_alone():
    """A deeper model begins with the same first layer, up to the scale of the residual's writers."""
    a, b, deep = small(), small(), small(layers=5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(a.layers[2].mlp.up_proj.weight, deep.layers[2].mlp.up_proj.weight)
    assert a.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert a.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)


# --- drawing tokens -------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_with_their_probability():
    """20,000 even numbers give each of six tokens its share of the softmax, at three temperatures."""
    logits = torch.tensor([1.0, 3.0, -1.0, 2.0, 0.0, 2.5])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    for temperature in (0.5, 1.0, 2.0):
        drawn = choose(logits.expand(20_000, 6), uniform, Sampling(temperature))
        share = torch.bincount(drawn, minlength=6) / 20_000
        torch.testing.assert_close(share, (logits / temperature).softmax(0), rtol=0, atol=2e-4)


def test_what_is_impossible_is_never_drawn():
    """At both ends of the row too, where rounding could lead there: the largest number below one, and zero."""
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, [0, 1, 20, 38, 39]] = -torch.inf
    for number in (0.0, 0.5, 1 - 2**-24):
        for sampling in (Sampling(), Sampling(top_p=0.9), Sampling(top_k=30)):
            drawn = choose(logits, torch.full((500,), number), sampling)
            assert logits.gather(1, drawn[:, None]).isfinite().all()


def test_top_k_and_top_p_keep_the_likeliest():
    logits, uniform = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)), torch.rand(64)
    assert torch.equal(choose(logits, uniform, Sampling(1.0, 1, 1.0)), logits.argmax(-1))
    assert torch.equal(choose(logits, uniform, Sampling(0.0, 0, 1.0)), logits.argmax(-1))
    assert torch.equal(choose(logits, uniform, Sampling(1.0, 0, 1e-6)), logits.argmax(-1))
    order = logits.argsort(-1, descending=True)
    sums = logits.softmax(-1).gather(-1, order).cumsum(-1)
    counts = {Sampling(top_k=3): torch.full((64,), 3), Sampling(top_p=0.5): 1 + (sums < 0.5).sum(-1)}
    for sampling, count in counts.items():
        drawn = torch.stack([choose(logits, torch.full((64,), i / 500), sampling) for i in range(500)], 1)
        for row, kept, likeliest in zip(drawn, count, order, strict=True):
            assert {*row.tolist()} == {*likeliest[:kept].tolist()}


def test_a_picture_does_not_depend_on_its_batch():
    model, prompts = small(), [np.array([298, *range(i)]) for i in (0, 3, 0, 7, 1)]
    seeds = [(5, i) for i in range(5)]
    together = generate(model, FREE, prompts, seeds, HOW)
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        alone = generate(model, FREE, [prompt], [seed], HOW)[0]
        ends = [np.append(r, 299).tolist().index(299) for r in (row, alone)]
        assert row[: ends[0]].tolist() == alone[: ends[1]].tolist()
        assert row[: len(prompt)].tolist() == prompt.tolist()
    other = generate(model, FREE, prompts[:1], [(6, 0)], HOW)[0]
    assert other.tolist() != together[0].tolist()


def test_greedy_generation_follows_the_full_pass():
    model = small()
    row = torch.from_numpy(
        generate(model, FREE, [np.array([298])], [(0, 0)], Sampling(0, free=True))[0].astype(np.int64)
    )
    with torch.no_grad():
        assert torch.equal(model(row[None, :-1]).argmax(-1)[0], row[1:])


def test_a_grid_holds_every_picture():
    pictures = [np.full((16, 16, 3), i, np.uint8) for i in range(7)]
    sheet = np.asarray(grid(pictures))
    assert set(np.unique(sheet)) == {*range(7), 255}
