"""The Llama language model, whole, in one file.

Module names are those of Hugging Face's Llama, so released weights load without renaming.
Shapes in comments: B sequences, T tokens, D width, H query heads, K key/value heads, E = D / H.

Touvron et al. 2023, Llama 2 (arXiv:2307.09288); Su et al. 2021, RoPE (arXiv:2104.09864); Zhang and Sennrich 2019,
RMSNorm (arXiv:1910.07467); Shazeer 2020, SwiGLU (arXiv:2002.05202); Ainslie et al. 2023, GQA (arXiv:2305.13245).
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    # these two come from the data: how many tokens, and how many values each syntax position has (none: plain Llama)
    vocab: int = 320
    positions: tuple[int, ...] = ()
    context: int = 2048  # longest sequence, in tokens
    dim: int = 384  # width of the residual stream
    layers: int = 6  # transformer blocks
    heads: int = 6  # query heads per block
    kv_heads: int = 6  # key/value heads per block; fewer than heads: each serves a group of query heads
    hidden: int = 1024  # width inside the feed-forward
    rope_theta: float = 10_000.0  # rotary frequencies fall from 1 towards 1 / rope_theta radians a token
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    qk_norm: bool = False  # RMSNorm of every query and key: no attention logit can grow without bound


@lru_cache
def rotary_table(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosine and sine of every (position, frequency) angle, each twice side by side, the first sine negative:
    (2, length, 1, E)."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]).unsqueeze(2).to(dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) by its position's angle.  x: (B, T, heads, E)."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@lru_cache
def first_rows(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the rows of each syntax position begin in the table that holds those of all: (F,)."""
    return torch.tensor([0, *accumulate(sizes)][:-1], device=device)


class Cache:
    """Keys and values of the tokens seen so far, so that each new token costs one step, not T.

    Room for `length` tokens of each of B sequences is taken as it is needed, in doubling steps.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int):
        self.most, self.length = length, 0
        self.keys = self.values = torch.empty(config.layers, batch, config.kv_heads, 0, config.dim // config.heads)

    def begin(self, count: int) -> slice | Tensor:
        """Where so many more tokens will stand."""
        assert self.length == 0 or count == 1, "a cache that holds tokens takes one more at a time"
        self.place = slice(self.length, self.length + count)
        self.length += count
        return self.place

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add (B, K, T, E) to a layer's keys and values, and give all that it has, and what hides some of them."""
        self.grow(k, v, self.length)
        self.keys[layer, :, :, self.place] = k
        self.values[layer, :, :, self.place] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length], None

    def grow(self, k: Tensor, v: Tensor, end: int) -> None:
        """Have room up to `end`, in the precision and on the device of what is new."""
        if end > (had := self.keys.shape[3]):
            room = min(self.most, max(2 * had, -(-end // 128) * 128))
            for name, new in (("keys", k), ("values", v)):
                copy = new.new_zeros((len(self.keys), *new.shape[:2], room, new.shape[3]))  # no NaN, hidden or not
                copy[:, :, :, :had] = getattr(self, name)
                setattr(self, name, copy)

    def keep(self, rows: Tensor) -> None:
        """Let go of all sequences but some."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.grouped, self.head_dim = layer, config.heads != config.kv_heads, config.dim // config.heads
        self.q_proj = nn.Linear(config.dim, config.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * self.head_dim, config.dim, bias=False)
        norm = partial(nn.RMSNorm, self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, table: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))  # (B, T, heads, E)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, T, E)
        causal, mask = q.shape[2] > 1, None
        if cache is not None:
            k, v, mask = cache.append(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: a gate decides, per channel, how much of `up` goes `down`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, table: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), table, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.dim)
        tables = [sum(config.positions)] * bool(config.positions)  # one for all positions, or none
        self.embed_positions = nn.ModuleList(nn.EmbeddingBag(rows, config.dim, mode="sum") for rows in tables)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Tokens (B, T), and where in the file's syntax each leads (B, T, F), to the logits of the next (B, T, vocab).

        Syntax positions are what a reader of the file knows before the next token, say which coefficient is being
        read; a plain Llama takes no notice of them.
        """
        config, count = self.config, tokens.shape[1]
        place = cache.begin(count) if cache is not None else slice(count)
        end = cache.length if cache is not None else count
        assert end <= config.context, f"{end} tokens, but the model's context is {config.context}"
        x = self.embed_tokens(tokens)
        for embed in self.embed_positions:
            rows = positions + first_rows(config.positions, tokens.device)
            x = x + embed(rows.flatten(0, 1)).view(x.shape)
        angles = rotary_table(config.context, config.dim // config.heads, config.rope_theta, x.dtype, x.device)
        table = angles[:, place]
        for block in self.layers:
            x = block(x, table, cache)
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Draw each weight from (seed, its name) alone, so that every number of processes starts alike.

        Matrices are normal(0, 0.02), as Llama's; the two that write to the residual stream are scaled by
        1/sqrt(2 layers), so that its variance does not grow with depth (Radford et al. 2019, section 2.3).
        """
        for name, weight in self.named_parameters():
            to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / (2 * self.config.layers) ** 0.5 if to_residual else 0.02
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            whole = torch.ones(weight.shape) if "norm" in name else torch.randn(weight.shape, generator=generator) * std
            fill(weight, whole)


def sharded_as(weight: Tensor, whole: Tensor) -> Tensor:
    """A whole matrix that every process has, or this process's part of it if the weight is sharded."""
    if not isinstance(weight, DTensor):
        return whole
    same = DTensor.from_local(whole.to(weight.device), weight.device_mesh, [Replicate()], run_check=False)
    return same.redistribute(placements=weight.placements)  # each process cuts its part out, without a word


@torch.no_grad()
def fill(weight: Tensor, whole: Tensor) -> None:
    """Write a whole matrix into a weight, or this process's part of it."""
    weight.copy_(sharded_as(weight, whole))


def empty(config: ModelConfig, device: torch.device) -> Llama:
    """A model on a device, whose weights are yet to be read."""
    with torch.device("meta"):
        model = Llama(config)
    return model.to_empty(device=device)
