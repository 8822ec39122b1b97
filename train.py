"""Train a Llama on files.

    python train.py                                                   # ten minutes on a laptop, from drawing to writing
    python train.py --config tiny --out out/try                       # the same in a minute, to see that it runs
    python train.py --config base --data data/photos                  # what `python -m data.prepare` made, on a GPU
    torchrun --nproc-per-node 8 train.py --config 7b --data data/web  # eight GPUs; --nnodes for more machines

The same command continues an interrupted run, on any number of processes that divides the batch.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data.shapes
from codec import Grammar, Tokenizer, describe, load_tokenizer
from data.prepare import chunks
from model import Block, Llama, ModelConfig, fill
from plumbing import huggingface
from plumbing.command import Flags, UserError, differences, run
from plumbing.files import digest, write_whole
from sample import (
    ANY_LENGTH,
    at_once,
    best_device,
    cause,
    checkpoints,
    damage,
    generate,
    grid,
    newest,
    on,
    precision,
    read_run,
    read_state,
)


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    data: str = "data/shapes"  # folder that data.prepare wrote; data/shapes is drawn if absent
    out: str = ""  # run folder: checkpoints, log, samples; empty: out/CONFIG
    steps: int = 1800  # optimizer steps
    batch: int = 4  # rows of context tokens per step, over all processes
    micro: int = 4  # rows per forward pass of one process: to fit memory, or a CPU's cache
    lr: float = 1e-3  # peak learning rate
    warmup: int = 100  # steps of linear rise, before the cosine fall to a tenth of the peak
    decay: float = 0.1  # weight decay of the matrices
    clip: float = 1.0  # largest gradient norm
    seed: int = 0  # of the weights, the order of the rows and the samples
    log_every: int = 20  # steps from one line of the log to the next
    every: int = 600  # steps from one evaluation, grid and checkpoint to the next
    save_every: int = 0  # steps from one checkpoint to the next, besides those; 0: no others
    samples: int = 36  # pictures in the grid
    keep: int = 2  # checkpoints kept
    syntax: bool = False  # tell the model where in the file's syntax it stands, which plain Llama is not told
    init: str = ""  # Llama folder of Hugging Face whose weights to begin with
    z_loss: float = 0.0  # times the squared logarithm of the softmax's denominator: keeps logits from drifting
    compile: bool = False  # torch.compile every block: faster, but needs a C++ compiler
    recompute: bool = False  # redo each block's forward pass in the backward pass, to save memory
    sync_each_pass: bool = False  # exchange gradients after each pass, not once a step: less memory, more traffic


PATIENCE = timedelta(hours=1)  # of a process for the others: large checkpoints take a while
PAPER_TOKENS, PLANNED = 228e9, 0.4  # tokens of the paper's training; share of the chips' peak that --plan counts on
TOLD = partial(Config, syntax=True)
PAPER = partial(Config, context=12_288, lr=3e-4, warmup=2000, steps=36_240, batch=512, micro=1, save_every=50)
PAPER = partial(PAPER, samples=1, compile=True, recompute=True)
CONFIGS = {  # Llama's own shapes from 1b on; there the context and the learning rate are the paper's, the rest is ours
    "tiny":  TOLD(dim=64, layers=2, heads=2, kv_heads=2, hidden=176, context=512, steps=200, every=100, lr=3e-3),
    "small": TOLD(dim=192, layers=4, heads=6, kv_heads=6, hidden=512, context=1024, batch=2, lr=3e-3),
    "base":  TOLD(dim=768, layers=14, heads=12, kv_heads=12, hidden=2048, batch=64, micro=16, steps=20_000, every=1000),
    "1b":    PAPER(dim=2048, layers=16, heads=32, kv_heads=8, hidden=8192),
    "7b":    PAPER(dim=4096, layers=32, heads=32, kv_heads=32, hidden=11_008),
    "13b":   PAPER(dim=5120, layers=40, heads=40, kv_heads=40, hidden=13_824, sync_each_pass=True),
    "70b":   PAPER(dim=8192, layers=80, heads=64, kv_heads=8, hidden=28_672, sync_each_pass=True, every=2000),
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """A preset, and over it every field that has a flag; and what to do instead of training.  Errors: UserError."""
    parser = Flags(__doc__)
    text = "preset that the flags below change (default: small, whose values they show)"
    parser.add_argument("--config", choices=CONFIGS, default="small", help=text)
    parser.add_argument("--plan", action="store_true", help="print size, memory and days of training, and end")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the trained weights as one file, and end")
    parser.add_argument("--hf", type=Path, metavar="DIR", help="write a Llama folder of Hugging Face, and end")
    parser.add_fields(CONFIGS["small"])
    flags = parser.parse(arguments)
    given = {name: value for name, value in vars(flags).items() if name in Config.__dataclass_fields__}
    config = replace(CONFIGS[flags.config], **given)
    for name, value in asdict(config).items():
        bound = "at least" if name in ("seed", "warmup", "decay", "z_loss", "save_every") else "above"
        if type(value) in (int, float) and (value < 0 or value == 0 and bound == "above"):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {bound} 0")
    if config.dim % config.heads or config.heads % config.kv_heads or config.dim // config.heads % 2:
        shape = f"--dim {config.dim} --heads {config.heads} --kv-heads {config.kv_heads}"
        raise UserError(f"{shape}: each must divide the one before, and dim / heads be even")
    return replace(config, out=config.out or f"out/{flags.config}"), flags


def main(arguments: list[str] | None = None) -> None:
    config, flags = parse(arguments)
    if flags.plan:
        print(plan(config))
    elif flags.export or flags.hf:
        model, tokens, _ = read_run(Path(config.out), torch.device("cpu"))
        if flags.hf:
            huggingface.write(flags.hf, model, tokens)
        if flags.export:
            about = {"config": asdict(model.config), "codec": json.loads(describe(tokens))}
            torch.save({**about, "model": model.state_dict()}, flags.export)
    else:
        train(config)


# --- data: which tokens step s sees is a function of (seed, s) alone ------------------------------------------------


class Stream:
    """The tokens of one split, all shards one after the other, and where its documents begin."""

    def __init__(self, folder: Path, split: str, grammar: Grammar):
        shards = json.loads((folder / "report.json").read_text())["shards"]
        names = sorted(name for name in shards if name.startswith(split))
        self.shards = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
        for name in names[rank() :: world()]:
            if digest(folder / f"{name}.npy", folder / f"{name}.lengths.npy") != shards[name]["sha256"]:
                raise UserError(f"{folder}/{name}.npy is not as it was written (sha256): prepare {folder} anew")
        lengths = np.concatenate([np.load(folder / f"{name}.lengths.npy") for name in names])
        self.grammar = grammar
        self.documents = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # where each begins, and the end
        self.symbols = sum(shards[name]["symbols"] for name in names)
        self.bounds = np.cumsum([0, *map(len, self.shards)])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens (count,) from `start` on; after the last one comes the first."""
        pieces = []
        while count:
            start %= self.bounds[-1]
            shard = int(np.searchsorted(self.bounds, start, "right")) - 1
            pieces.append(self.shards[shard][start - self.bounds[shard] :][:count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def states(self, pieces: list[tuple[int, int]]) -> list[np.ndarray]:
        """The grammar's states after the tokens of each piece (start, end), which must not go past the last token.

        All documents that the pieces touch are read side by side, each from its beginning.
        """
        spans = [
            np.arange(np.searchsorted(self.documents, start, "right") - 1, np.searchsorted(self.documents, end, "left"))
            for start, end in pieces
        ]
        numbers = np.unique(np.concatenate(spans))
        begins, lengths = self.documents[numbers], self.documents[numbers + 1] - self.documents[numbers]
        end = self.grammar.table.shape[1] - 1  # after the end, it may be said again
        padded = np.full((len(numbers), lengths.max()), end, np.int64)
        for row, begin, length in zip(padded, begins, lengths, strict=True):
            row[:length] = self.read(begin, length)
        rows = dict(zip(numbers.tolist(), self.grammar.walk(padded)[0], strict=True))
        found = []
        for (start, end), span in zip(pieces, spans, strict=True):
            whole = np.concatenate([rows[i][: self.documents[i + 1] - self.documents[i]] for i in span.tolist()])
            found.append(whole[start - self.documents[span[0]] :][: end - start])
        return found

    def rows(self, context: int) -> np.ndarray:
        """Where the rows of context + 1 tokens begin: end to end, wherever that cuts a document, as in the paper.

        Rows that begin with a document cost the same bits an image for the same compute: see the README.
        """
        return np.arange(0, int(self.bounds[-1]) - context, context)


@lru_cache(2)
def order_of(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def rows_of(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """The numbers of the rows of one step (batch,): each of `count` once an epoch, in an order drawn from (seed,
    epoch)."""
    places = range(step * batch, (step + 1) * batch)
    return np.array([order_of(place // count, count, seed)[place % count] for place in places])


def batch_of(
    stream: Stream, starts: np.ndarray, context: int, syntax: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, T), where in the syntax each of their tokens leads (B, T, F), and the tokens that follow (B, T)."""
    tokens = np.stack([stream.read(int(start), context + 1) for start in starts]).astype(np.int64)
    positions = np.zeros((len(starts), context, 0), np.int64)
    if syntax:
        positions = stream.grammar.position(np.stack(stream.states([(start, start + context) for start in starts])))
    tokens, positions = map(torch.from_numpy, (tokens, positions))
    if device.type == "cuda":  # from pinned memory it is copied while the GPU computes
        tokens, positions = tokens.pin_memory(), positions.pin_memory()
    tokens, positions = (tensor.to(device, non_blocking=True) for tensor in (tokens, positions))
    return tokens[:, :-1], positions, tokens[:, 1:]


# --- optimization ---------------------------------------------------------------------------------------------------


def learning_rate(step: int, config: Config) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def build_optimizer(model: Llama, config: Config) -> torch.optim.Optimizer:
    """AdamW, the field's usual betas; gains are not decayed."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """In nats, from float32 logits; targets of -100 do not count."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


def backward(
    model: Llama, stream: Stream, rows: np.ndarray, micro: int, config: Config, device: torch.device
) -> Tensor:
    """Add the gradients of the mean loss over some rows, `micro` of them a pass, and give that loss."""
    loss = torch.zeros((), device=device)
    for at in range(0, len(rows), micro):
        x, where, y = batch_of(stream, rows[at : at + micro], config.context, config.syntax, device)
        sync_gradients(model, config.sync_each_pass or at + micro == len(rows))  # else add them up here, exchange once
        logits, part = model(x, where), micro / len(rows)
        mean = objective = cross_entropy(logits, y) * part
        if config.z_loss:
            objective = mean + config.z_loss * part * logits.float().logsumexp(-1).square().mean()
        (objective / world()).backward()  # processes add up what they find
        loss += mean.detach()
    return loss


@torch.no_grad()
@sdpa_kernel(ANY_LENGTH)
def evaluate(model: Llama, stream: Stream, config: Config, device: torch.device) -> dict[str, float]:
    """Bits an image and bits a byte over the whole validation set, each document in a row of its own; `legal` bits are
    those of the tokens that the grammar allows."""
    model.eval()
    pieces, batches = [], []
    for begin, end in pairwise(stream.documents.tolist()):
        pieces += [(at, min(at + config.context + 1, end)) for at in range(begin, end - 1, config.context)]
    pieces.sort(key=lambda piece: piece[0] - piece[1])  # the longest first: little padding
    while pieces:
        count = max(1, config.micro * config.context // (pieces[0][1] - pieces[0][0]))
        batches.append(pieces[:count])
        pieces = pieces[count:]
    found, grammar = [], on(device, stream.grammar)
    rounds = -(-len(batches) // world())  # as many for each process, for sharded weights need all of them
    for i in range(rank(), rounds * world(), world()):
        batch = batches[i % len(batches)]
        tokens = torch.full((len(batch), batch[0][1] - batch[0][0]), -100)
        states = torch.zeros_like(tokens)
        for row, (piece, read) in enumerate(zip(batch, stream.states(batch), strict=True)):
            tokens[row, : len(read)] = torch.from_numpy(stream.read(piece[0], len(read)).astype(np.int64))
            states[row, : len(read)] = torch.from_numpy(read)
        tokens, states = tokens.to(device), states[:, :-1].to(device)
        logits = model(tokens[:, :-1].clamp(min=0), grammar.position(states))
        masked = logits.masked_fill(~grammar.legal(states), -math.inf)
        losses = torch.stack([cross_entropy(part, tokens[:, 1:], "sum") for part in (logits, masked)])
        found.append(losses * (i < len(batches)))
    plain, legal = (add_up(torch.stack(found).cpu().double().sum(0)) / math.log(2)).tolist()
    model.train()
    documents = len(stream.documents) - 1
    return {
        "bits_per_byte": plain / stream.symbols,
        "bits_per_image": plain / documents,
        "legal_bits_per_image": legal / documents,
    }


LINE = (
    "step {step}  loss {loss:.4f}  {bits_per_byte:.3f} bits/byte  norm {norm:.2f}  {tokens_per_second:,.0f} tokens/s  "
    "{peak_share:.0%} of peak  {memory_gb:.1f} GB  {seconds_left:.0f} s left"
)
VALIDATION = (
    "step {step}  validation: {bits_per_image:.1f} bits an image ({legal_bits_per_image:.1f} of legal tokens alone), "
    "{bits_per_byte:.3f} bits a byte"
)


def train(config: Config) -> None:
    """Train, or continue to train, into config.out.  Errors: UserError."""
    device = start()
    try:
        if config.data == Config.data and rank() == 0 and not Path(config.data, "report.json").exists():
            data.shapes.make(Path(config.data))
        barrier()
        with claim(Path(config.out)), Stop() as stop, Saver(Path(config.out)) as saver:
            loop(config, device, stop, saver)
    finally:
        if dist.is_initialized() and world() == 1:  # after an error, others may wait for this one
            dist.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def loop(config: Config, device: torch.device, stop: "Stop", saver: "Saver") -> None:
    """Read rows, add up their gradients, step; log, save, evaluate and draw when it is time."""
    out = Path(config.out)
    say = tqdm.write if rank() == 0 else lambda *_, **__: None
    tokens = load_tokenizer(Path(config.data))
    streams = {split: Stream(Path(config.data), split, tokens.grammar) for split in ("train", "val")}
    config = replace(config, vocab=tokens.vocab, positions=tokens.grammar.positions if config.syntax else ())
    rows = streams["train"].rows(config.context)
    if (total := streams["train"].bounds[-1]) <= config.context:
        row = f"--context {config.context}"
        raise UserError(f"{config.data} has {total:,} tokens, not one row of {row}: prepare more images, or lower it")
    share = config.batch // world()
    if config.batch % world() or share % min(config.micro, share):
        passes = f"{world()} processes and passes of --micro {config.micro}"
        shares = {n: config.batch // n for n in range(1, config.batch + 1) if config.batch % n == 0}
        fit = ", ".join(str(n) for n, share in shares.items() if share % min(config.micro, share) == 0)
        raise UserError(f"--batch {config.batch} does not divide into {passes}: take {fit} processes, or change one")
    micro = min(config.micro, share)

    model = build_model(config, device)
    if config.syntax and not tokens.grammar.positions:
        say(f"note: {tokens.codec} has no syntax positions, so --syntax changes nothing")
    optimizer = build_optimizer(model, config)
    if rank() == 0:
        open_run(out, config, tokens)
    barrier()
    step = load_checkpoint(out, model, optimizer, say)
    if not step:
        model.init_weights(config.seed)
        if config.init:
            begin_from(model, tokens, Path(config.init), say)
    if long := (np.diff(streams["train"].documents) > config.context).mean():
        say(f"note: {long:.0%} of the files are longer than --context {config.context}: the model never sees one whole")
    log = Log(out, step)
    parameters = sum(weight.numel() for weight in model.parameters())
    flops = flops_of(config, parameters)
    peak = peak_flops(device) * world()
    bytes_per_token = streams["train"].symbols / total
    epochs = config.steps * config.batch / len(rows)
    say(f"{parameters:,} parameters; {len(rows):,} rows of {config.context} tokens, {epochs:.1f} epochs")
    say(f"step {step} of {config.steps} on {world()} x {device.type}")

    def due() -> bool:
        return step % config.every == 0 or step == config.steps

    def report() -> None:
        with torch.compiler.set_stance("force_eager"):  # lengths vary: compiling anew for each would take longer
            result = evaluate(model, streams["val"], config, device)
            log.write({"step": step, **{f"val_{name}": value for name, value in result.items()}})
            say(VALIDATION.format(step=step, **result))
            show(model, tokens, out, step, config, log)

    if step and due() and not any("val_bits_per_byte" in record for record in log.records[-1:]):  # a kill came between
        report()
    started, first, waiting = time.perf_counter(), step, []
    hidden = True if rank() else None  # None: unless a terminal shows it
    bar = tqdm(total=config.steps, initial=step, unit=" steps", disable=hidden, smoothing=0.05)
    stopping = False
    while step < config.steps and not stopping:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        numbers = rows_of(step, config.batch, len(rows), config.seed)
        mine = rows[numbers[rank() :: world()]]
        loss = backward(model, streams["train"], mine, micro, config, device)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not torch.isfinite(norm):
            found = f"{norm.item()}, the loss {loss.item()} at step {step}, rows {numbers.tolist()}"
            raise UserError(f"the gradient is {found}: lower --lr or look at them")
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        waiting.append(loss)
        bar.update()
        stopping = stop.agreed(device)
        saving = stopping or due() or step % (config.save_every or config.every) == 0
        saver.look()
        if step % config.log_every == 0 or saving:
            mean = (add_up(torch.stack(waiting).mean()) / world()).item()
            pace = (time.perf_counter() - started) / (step - first)
            speed = config.batch * config.context / pace
            record = {
                "step": step,
                "loss": mean,
                "bits_per_byte": mean / math.log(2) / bytes_per_token,
                "norm": norm.item(),
                "lr": learning_rate(step - 1, config),
                "tokens_per_second": speed,
                "peak_share": speed * flops / peak,
                "memory_gb": memory(device),
                "seconds_left": pace * (config.steps - step),
            }
            waiting = []
            log.write(record)
            say(LINE.format(**record))
        if saving:
            saver.save(model, optimizer, step, config)
        if due():
            pause = time.perf_counter()
            report()
            started += time.perf_counter() - pause
    bar.close()
    saver.wait()
    if step < config.steps:
        say(f"stopped and saved at step {step}: the same command continues")
    else:
        say(f"{out}: checkpoint, log.jsonl, loss.png and grids; `python sample.py {out}` writes files")


def build_model(config: Config, device: torch.device) -> Llama:
    """Meta, shard, then allocate: no process ever holds more than its part.  Drawing or reading weights comes next."""
    with torch.device("meta"):
        model = Llama(config)
    for block in model.layers:
        if config.recompute:
            block.forward = MethodType(recomputed, block)
        if config.compile:
            block.compile()
    if dist.is_initialized():
        shard(model, device)
    return model.to_empty(device=device).train()


def recomputed(block: Block, *arguments: object) -> Tensor:
    """A block's forward pass that keeps its input alone, and is taken again in the backward pass."""
    return checkpoint(Block.forward, block, *arguments, use_reentrant=False, preserve_rng_state=False)


def begin_from(model: Llama, tokens: Tokenizer, folder: Path, say) -> None:
    """Take the weights of a Llama folder; tokens that both know, by the bytes they stand for, keep their rows."""
    theirs, known, state = huggingface.parts(folder)
    same = ("dim", "layers", "heads", "kv_heads", "hidden", "rope_theta", "norm_eps", "qk_norm")
    if any(getattr(theirs, name) != getattr(model.config, name) for name in same):
        shape = " ".join(f"--{name.replace('_', '-')} {getattr(theirs, name)}" for name in same[:-1])
        raise UserError(f"{folder} is a Llama of another shape: give {shape} --no-qk-norm")
    rows = {piece.tobytes(): row for row, piece in enumerate(known.expansions)}
    places = [rows.get(piece.tobytes(), -1) for piece in tokens.expansions] + [known.start, known.end]
    shared = torch.tensor([row >= 0 for row in places])
    for name in ("embed_tokens.weight", "lm_head.weight"):
        fresh = torch.randn(len(places), model.config.dim, generator=torch.Generator().manual_seed(0)) * 0.02
        state[name] = torch.where(shared[:, None], state[name][torch.tensor(places)], fresh)
    for name, weight in model.named_parameters():
        if name in state:
            fill(weight, state[name])
    say(f"begins with {folder}; {int(shared.sum())} of {len(places)} tokens are known there")


# --- what a run shows of itself -------------------------------------------------------------------------------------


def open_run(out: Path, config: Config, tokens: Tokenizer) -> None:
    """Make the run folder, or refuse one whose run was another; note how the run was started."""
    out.mkdir(parents=True, exist_ok=True)
    path, now = out / "config.json", {**asdict(config), "codec": asdict(tokens.codec), "vocabulary": tokens.hash}
    now = json.loads(json.dumps(now))  # as it will be read back
    if path.exists():
        free = {"out", "log_every", "every", "save_every", "samples", "keep"}  # these may change meanwhile
        free |= {"micro", "compile", "recompute", "sync_each_pass"}
        if changed := differences(json.loads(path.read_text()), now, free):
            raise UserError(f"{out} is another run ({changed}): choose another --out, or repeat its settings")
    write_whole(path, json.dumps(now, indent=1).encode() + b"\n")
    for part in out.glob("step_*.part"):  # of a save that was killed
        shutil.rmtree(part)
    git = subprocess.run("git rev-parse HEAD", shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    note = {"time": time.strftime("%F %T"), "command": sys.argv, "commit": git.stdout.strip(), "processes": world()}
    note["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    with open(out / "started.jsonl", "a") as file:
        file.write(json.dumps(note) + "\n")
    shutil.copy(Path(config.data, "codec.json"), out)


@contextmanager
def claim(out: Path) -> Iterator[None]:
    """Hold a run folder for as long as this run lives, however it ends; refuse one that another run holds."""
    if rank():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{out} is in use by {file.read()}: wait for it, or choose another --out") from None
        except OSError as error:
            print(f"note: {out} cannot be locked ({error.strerror}), so start no second run on it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}")
        file.flush()
        yield


class Stop:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for a stop after this step, when all processes have heard of it; a second one,
    two seconds later or more, ends at once.  (torchrun passes on what the terminal has sent already.)"""

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __enter__(self) -> "Stop":
        self.asked, self.before = math.inf, {number: signal.signal(number, self.ask) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: object) -> None:
        if time.monotonic() - self.asked > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = min(self.asked, time.monotonic())

    def agreed(self, device: torch.device) -> bool:
        return bool(add_up(torch.tensor(float(self.asked < math.inf), device=device)))


class Log:
    """OUT/log.jsonl; a run that continues takes back what was logged after its checkpoint."""

    def __init__(self, out: Path, step: int):
        self.path = out / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        whole = (json.loads(line) for line in lines if line.endswith("}"))  # the last may have been cut by a kill
        self.records = [record for record in whole if record["step"] <= step]
        if rank() == 0:
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in self.records).encode())

    def write(self, record: dict) -> None:
        self.records.append(record)
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


def show(model: Llama, tokens: Tokenizer, out: Path, step: int, config: Config, log: Log) -> None:
    """Write OUT/grids/STEP.png, a grid of what the model writes now, and OUT/loss.png."""
    model.eval()
    device = model.lm_head.weight.device
    written, free = [], bool(1 + tokens.grammar.rest(0, tokens.grammar.first) > config.context)  # no whole one fits
    with gathered(model, device):
        for numbers in chunks(range(config.samples), min(gather(at_once(model, config.context)))):
            begun, seeds = [np.array([tokens.start])] * len(numbers), [(config.seed, i) for i in numbers]
            written += generate(model, tokens, begun, seeds, free=free, over=lambda done: not add_up((~done).sum()))
    model.train()
    if rank() == 0:
        (out / "grids").mkdir(exist_ok=True)
        grid([tokens.codec.decode(tokens.decode(row[1:])) for row in written]).save(out / "grids" / f"{step:06d}.png")
        curves = {
            name: [(record["step"], record[key]) for record in log.records if key in record]
            for name, key in (("training", "bits_per_byte"), ("validation", "val_bits_per_byte"))
        }
        draw_curves(curves, "bits per byte").save(out / "loss.png")


COLOURS = [(60, 120, 200), (220, 90, 30), (60, 150, 80), (130, 60, 170)]


def draw_curves(curves: dict[str, list[tuple[float, float]]], title: str) -> Image.Image:
    """Lines over steps, the last value of each beside its name."""
    points = [point for curve in curves.values() for point in curve]
    width, height, right = 960, 540, max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    step = 10 ** math.floor(math.log10(max(high - low, 0.1)))  # the axis begins and ends at round numbers
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    image, small = Image.new("RGB", (width, height), "white"), ImageFont.load_default(size=16)
    pen, box = ImageDraw.Draw(image), (70, 50, width - 30, height - 60)

    def place(x: float, y: float) -> tuple[float, float]:
        return box[0] + (box[2] - box[0]) * x / right, box[3] - (box[3] - box[1]) * (y - bottom) / (top - bottom)

    for i in range(6):
        y, x = bottom + (top - bottom) * i / 5, right * i / 5
        pen.line([place(0, y), place(right, y)], fill=(225, 225, 225))
        pen.text((box[0] - 10, place(0, y)[1]), f"{y:,.4g}", "black", small, anchor="rm")
        pen.text((place(x, bottom)[0], box[3] + 10), f"{x:,.0f}", "black", small, anchor="mt")
    pen.text((box[0], 18), title, "black", ImageFont.load_default(size=18))
    pen.text((width / 2, height - 12), "steps", "black", small, anchor="mb")
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        where = [place(*point) for point in curve]
        pen.line(where, fill=colour, width=2, joint="curve")
        for x, y in where if len(where) < 40 else []:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        last = f"{name} {curve[-1][1]:,.4g}" if curve else name
        pen.text((width - 30, 18 + 22 * i), last, colour, ImageFont.load_default(size=18), anchor="rt")
    return image


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, FLOP/s


def flops_of(config: Config, parameters: int) -> int:
    """Floating-point operations of training on one token, as torchtitan counts them."""
    return 6 * parameters + 12 * config.layers * config.dim * config.context


def peak_flops(device: torch.device) -> float:
    """The chip's dense bf16 peak where it is known; else what a large float32 matrix product reaches here, FLOP/s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if peak := next((peak for chip, peak in PEAKS.items() if chip in name), None):
            return peak
    a = torch.randn(1024, 1024, device=device)
    times = []
    for _ in range(10):
        before = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - before)
    return 2 * 1024**3 / min(times)


def memory(device: torch.device) -> float:
    """The most that this process has held, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def plan(config: Config) -> str:
    """What a run takes, without allocating any of it: parameters, FLOPs, bytes a GPU, days."""
    parameters, _ = count(config)
    flops, step = flops_of(config, parameters), config.batch * config.context
    total = config.steps * step
    lines = [
        f"{parameters:,} parameters; {flops / 1e9:.3g} GFLOP a token (6 N + 12 layers dim context)",
        f"a step: {config.batch} rows of {config.context:,}, {step:,} tokens",
        f"{config.steps:,} steps: {total / 1e9:.3g} billion tokens; the paper's {PAPER_TOKENS / 1e9:.0f} billion: "
        f"{PAPER_TOKENS / step:,.0f} steps",
        f"GB a GPU, at most {config.micro} rows a pass; days of both at {PLANNED:.0%} of an H100's peak",
        "".join(f"{name:>12}" for name in ("GPUs", *memory_plan(config, 1), "days", "the paper's")),
    ]
    for gpus in (gpus for gpus in (1, 8, 64, 256) if config.batch % gpus == 0):
        gb = [size / 1e9 for size in memory_plan(config, gpus).values()]
        days = [tokens * flops / (PLANNED * PEAKS["H100"] * gpus) / 86_400 for tokens in (total, PAPER_TOKENS)]
        lines.append(f"{gpus:>12}" + "".join(f"{value:>12,.2f}" for value in (*gb, *days)))
    return "\n".join(lines)


def count(config: Config) -> tuple[int, int]:
    """Parameters of the model and of one of its blocks."""
    with torch.device("meta"):
        model = Llama(config)
    return tuple(sum(weight.numel() for weight in part.parameters()) for part in (model, model.layers[0]))


def memory_plan(config: Config, gpus: int) -> dict[str, float]:
    """Bytes a GPU, by what they hold, and in all.

    Kept in float32 and split over the GPUs: weights, two moments, and the gradients; those lie whole on each GPU while
    more than one pass is added up, unless `sync_each_pass`.  Whole in bf16: the tables of tokens, and two blocks, one
    at work and one on its way with its buffer; the gradients of one, which leave in float32 while those before are
    still under way.  Activations in bf16: see `activations`.
    """
    config = replace(config, micro=min(config.micro, max(1, config.batch // gpus)))
    parameters, block = count(config)
    kept, added_up = 4 * parameters / gpus, config.batch > gpus * config.micro and not config.sync_each_pass
    gathered = 2 * (parameters - config.layers * block) + (3 * 2 + 2 + 2 * 4) * block
    parts = {"weights": kept, "gradients": 4 * parameters if added_up else kept, "moments": 2 * kept}
    parts |= {"activations": activations(config, 2), "gathered": gathered}
    return parts | {"in all": sum(parts.values())}


def activations(config: Config, size: int) -> int:
    """Bytes that a forward pass of `micro` rows keeps for the backward pass, in numbers of `size` bytes.

    Of a block: its input, both norms' outputs, queries, keys and values as attention takes them, what it gives, the
    middle of the residual stream, and four of the feed-forward's width (gate, its SiLU, up, their product).  With
    `recompute` every block keeps its input, and one at a time the rest.  The logits are there in `size`, in float32
    and as a gradient.
    """
    tokens, kv = config.micro * config.context, config.kv_heads * (config.dim // config.heads)
    inside = tokens * size * (6 * config.dim + 2 * kv + 4 * config.hidden)
    blocks = tokens * size * config.layers * config.dim + inside * (1 if config.recompute else config.layers)
    return blocks + tokens * (size * config.dim + (size + 8) * config.vocab)


# --- checkpoints ----------------------------------------------------------------------------------------------------


class Saver:
    """Writes OUT/step_N while training goes on: the state is copied to the CPU's memory, and a thread takes it from
    there.  It is written elsewhere, then synced, then renamed: under its name a checkpoint is whole or not there."""

    def __init__(self, out: Path):
        self.out, self.thread, self.pending = out, ThreadPoolExecutor(1), None
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None  # the thread's

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(self, model: Llama, optimizer: torch.optim.Optimizer, step: int, config: Config) -> None:
        """Begin to write, when the checkpoint before is there."""
        self.wait()
        weights, moments = get_state_dict(model, optimizer)
        state, part = {"model": weights, "optimizer": moments, "step": step}, self.out / f"step_{step:08d}.part"
        writer = dcp.FileSystemWriter(part, per_thread_copy_ahead=0)  # the copy is on the CPU: no stream to wait for
        stager = DefaultStager(StagingOptions(False, False, False, False))  # a plain copy
        written = dcp.async_save(state, storage_writer=writer, async_stager=stager, process_group=self.group)
        stager.close()  # it refers to itself, and would keep the copy until garbage is collected
        self.pending = self.thread.submit(self.commit, written, part, config)

    def commit(self, written: Future, part: Path, config: Config) -> None:
        """What is left to do when the tensors are written: each process hashes its files, the first adds the rest."""
        path = part.with_suffix("")
        try:
            written.result()
            manifests = gather({file.name: digest(file) for file in part.glob(f"__{rank()}_*")}, self.group)
            if rank() == 0:
                shutil.copy(self.out / "codec.json", part)
                (part / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
                manifest = {name: sha for each in manifests for name, sha in each.items()}
                manifest |= {file.name: digest(file) for file in part.iterdir() if file.name not in manifest}
                (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
                for file in (*part.iterdir(), part):
                    sync(file)
                shutil.rmtree(path, ignore_errors=True)
                os.replace(part, path)
                sync(self.out)
                for old in checkpoints(self.out)[config.keep :]:
                    shutil.rmtree(old)
        except (OSError, CheckpointException) as error:
            shutil.rmtree(part, ignore_errors=True)
            advice = "make room and continue from the one before, which is whole"
            raise UserError(f"could not save {path} ({cause(error)}): {advice}") from None

    def look(self) -> None:
        """Whether the thread is done, or has failed: better now than at the next save.  Errors: UserError."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is there.  Errors: UserError where it could not be written."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)  # of a file or a folder
    os.fsync(descriptor)
    os.close(descriptor)


def load_checkpoint(out: Path, model: Llama, optimizer: torch.optim.Optimizer, say) -> int:
    """Continue from the newest undamaged checkpoint, if there is one, and return its step."""

    def damage_anywhere(checkpoint: Path) -> str | None:  # each process reads its share of the files
        return next(filter(None, gather(damage(checkpoint, slice(rank(), None, world())))), None)

    path = newest(gather(checkpoints(out))[0], say, damage_anywhere)
    if path is None:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    read_state(state, path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


# --- many processes: alone on a CPU, none of this happens -----------------------------------------------------------


def start() -> torch.device:
    """Join the processes that torchrun started; one GPU is a world of one, one CPU or one Mac needs none."""
    device = best_device()
    if device.type == "mps" and "RANK" in os.environ:  # weights cannot be sharded there
        device = torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    elif device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: object, group: dist.ProcessGroup | None = None) -> list:
    """What each process has, in their order."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=group)
    return values


def add_up(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def sync_gradients(model: Llama, now: bool) -> None:
    if dist.is_initialized():
        model.set_requires_gradient_sync(now)


@contextmanager
def gathered(model: Llama, device: torch.device) -> Iterator[None]:
    """Keep every block whole, for many short passes, where all of them fill no more than half a GPU."""
    size = sum(weight.numel() for weight in model.parameters()) * precision(device).itemsize
    fits = device.type != "cuda" or size <= torch.cuda.get_device_properties(device).total_memory // 2
    blocks = model.layers if dist.is_initialized() and fits else []
    for block in blocks:
        block.set_reshard_after_forward(False)
    yield
    for block in blocks:
        block.set_reshard_after_forward(True)
        block.reshard()


def shard(model: Llama, device: torch.device) -> None:
    """FSDP2: split every weight over the processes, block by block; compute in bf16 where there is a GPU for it, keep
    the weights, their gradients' sums and their moments in float32."""
    mesh = init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy(precision(device), torch.float32, cast_forward_inputs=False)
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # plain sums: averages are not to be had from every version of gloo
        module.set_force_sum_reduction_for_comms(True)


if __name__ == "__main__":
    run(main)
