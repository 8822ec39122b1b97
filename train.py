"""Train a Llama on files.

    python train.py                                                   # from drawing to writing, 24 minutes on one core
    python train.py --config tiny --out out/try                       # the same in a minute, to see that it runs
    python train.py --config video                                    # clips of moving shapes, a quarter of an hour
    python train.py --config photos --data data/photos                # what `python -m data.prepare` made
    python train.py --config base --data data/photos                  # the same on a GPU
    torchrun --nproc-per-node 8 train.py --config 7b --data data/web  # eight GPUs; --nnodes for more machines

The same command continues an interrupted run, on any number of processes that divides the batch.
"""

import argparse
import hashlib
import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from codec import Tokenizer, load_tokenizer
from data.prepare import chunks
from data.shapes import BUILT_IN
from data.stream import Stream, rows_of_step
from grammar import FAR, Grammar
from model import Block, Llama, ModelConfig
from plumbing import huggingface
from plumbing.card import write_card
from plumbing.checkpoint import Saver, load, read_run
from plumbing.command import Flags, UserError, run
from plumbing.draw import draw_curves, save_grid, save_image
from plumbing.muon import Muon
from plumbing.plan import Meter, plan
from plumbing.processes import (
    ANY_LENGTH,
    add_up,
    at_once,
    barrier,
    gather,
    gathered,
    join,
    rank,
    shard,
    sync_gradients,
    world,
)
from plumbing.run import Log, Stop, claim, open_run
from plumbing.weights import LARGEST
from sample import Sampling, generate


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    data: str = "data/shapes"  # folder that data.prepare wrote; data/shapes and data/moving are drawn if absent
    out: str = ""  # run folder: checkpoints, log, samples; empty: out/CONFIG
    steps: int = 1800  # optimizer steps
    batch: int = 4  # rows of context tokens per step, over all processes
    micro: int = 4  # rows per forward pass of one process: to fit memory, or a CPU's cache
    lr: float = 1e-3  # peak learning rate
    warmup: int = 100  # steps of linear rise, before the cosine fall to zero
    embed_lr: float = 1.0  # learning rate of the embeddings, in units of lr
    muon: bool = False  # Muon, instead of AdamW, for the matrices of the blocks
    decay: float = 0.1  # weight decay of the matrices, but for embeddings
    clip: float = 1.0  # largest gradient norm
    seed: int = 0  # of the weights, the order of the rows and the samples
    log_every: int = 20  # steps from one line of the log to the next
    every: int = 600  # steps from one evaluation, grid and checkpoint to the next
    save_every: int = 0  # steps from one checkpoint to the next, besides those; 0: no others
    samples: int = 36  # files in the grid
    keep: int = 2  # checkpoints kept
    syntax: bool = False  # tell the model where in the file's syntax it stands, which plain Llama is not told
    init: str = ""  # Llama folder of Hugging Face whose weights to begin with
    z_loss: float = 0.0  # times the squared logarithm of the softmax's denominator: keeps logits from drifting
    compile: bool = False  # torch.compile every block: faster, but needs a C++ compiler
    recompute: bool = False  # redo each block's forward pass in the backward pass, to save memory
    sync_each_pass: bool = False  # exchange gradients after each pass, not once a step: less memory, more traffic


SYNTAX = partial(Config, syntax=True, muon=True, embed_lr=4.0)
MOVING = partial(SYNTAX, muon=False, embed_lr=1.0, data="data/moving", samples=16, steps=1900, every=950)
PAPER = partial(Config, context=12_288, lr=3e-4, warmup=2000, steps=36_240, batch=512, micro=1, save_every=50)
LARGE = partial(PAPER, samples=1, compile=True, recompute=True)
SHORT, LONG, LONGER = ({"steps": steps, "every": 1000} for steps in (3000, 6000, 20_000))
CONFIGS = {  # Llama's own shapes from 1b on; there the context and the learning rate are the paper's, the rest is ours
    "tiny":  SYNTAX(dim=64, layers=2, heads=2, kv_heads=2, hidden=176, context=512, steps=200, every=100, lr=3e-3),
    "small": SYNTAX(dim=128, layers=4, heads=4, kv_heads=4, hidden=344, context=704, batch=3, lr=6e-3, **SHORT),
    "photos": SYNTAX(dim=192, layers=4, heads=6, kv_heads=6, hidden=512, context=1024, batch=2, lr=6e-3, **LONG),
    "video": MOVING(dim=128, layers=4, heads=4, kv_heads=4, hidden=344, context=640, lr=3e-3),
    "base":  SYNTAX(dim=768, layers=14, heads=12, kv_heads=12, hidden=2048, batch=64, micro=16, **LONGER),
    "1b":    LARGE(dim=2048, layers=16, heads=32, kv_heads=8, hidden=8192),
    "7b":    LARGE(dim=4096, layers=32, heads=32, kv_heads=32, hidden=11_008),
    "13b":   LARGE(dim=5120, layers=40, heads=40, kv_heads=40, hidden=13_824, sync_each_pass=True),
    "70b":   LARGE(dim=8192, layers=80, heads=64, kv_heads=8, hidden=28_672, sync_each_pass=True, every=2000),
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """A preset, and over it every field that has a flag; and what to do instead of training.  Errors: UserError."""
    parser = Flags(__doc__)
    text = "preset that the flags below change (default: small, whose values they show)"
    parser.add_argument("--config", choices=CONFIGS, default="small", help=text)
    parser.add_argument("--plan", action="store_true", help="print size, memory and days of training, and end")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write a Llama folder of Hugging Face, and end")
    parser.add_fields(CONFIGS["small"])
    flags = parser.parse(arguments)
    given = {name: value for name, value in vars(flags).items() if name in Config.__dataclass_fields__}
    config = replace(CONFIGS[flags.config], **given)
    for name, value in asdict(config).items():
        least = 0 if name in ("seed", "warmup", "decay", "z_loss", "save_every") else 1 if type(value) is int else 1e-30
        most = 2**63 if name in ("seed", "steps") or type(value) is float else LARGEST
        if type(value) in (int, float) and not least <= value < most:  # which nan is not
            choice = f"below {most}" if value >= most else "above 0" if least else "from 0"
            raise UserError(f"--{name.replace('_', '-')} is {value}: choose a number {choice}")
    if config.dim % config.heads or config.heads % config.kv_heads or config.dim // config.heads % 2:
        shape = f"--dim {config.dim} --heads {config.heads} --kv-heads {config.kv_heads}"
        raise UserError(f"{shape}: each must divide the one before, and dim / heads be even")
    return replace(config, out=config.out or f"out/{flags.config}"), flags


def main(arguments: list[str] | None = None) -> None:
    config, flags = parse(arguments)
    if flags.plan:
        print(plan(config))
    elif flags.export:
        model, tokenizer, _ = read_run(Path(config.out), torch.device("cpu"))
        huggingface.write(flags.export, model, tokenizer)
    else:
        train(config)


# --- data ----------------------------------------------------------------------------------------------------------


def batch_of(stream: Stream, starts: np.ndarray, context: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, T), where in the syntax each of their tokens leads (B, T, F), and the tokens that follow (B, T)."""
    tokens = np.stack([stream.read(int(start), context + 1) for start in starts]).astype(np.int64)
    syntax = np.stack([stream.read_syntax(int(start), context) for start in starts]).astype(np.int64)
    tokens, syntax = map(torch.from_numpy, (tokens, syntax))
    if device.type == "cuda":  # from pinned memory it is copied while the GPU computes
        tokens, syntax = tokens.pin_memory(), syntax.pin_memory()
    tokens, syntax = (tensor.to(device, non_blocking=True) for tensor in (tokens, syntax))
    return tokens[:, :-1], syntax, tokens[:, 1:]


# --- optimization ---------------------------------------------------------------------------------------------------


def learning_rate(step: int, config: Config) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.5 + 0.5 * math.cos(math.pi * progress))


def build_optimizers(model: Llama, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW, the field's usual betas, and if asked for Muon for the blocks' matrices; embeddings and gains are not
    decayed.  A group's `scale` is its learning rate in units of the schedule's."""
    embeddings = [*model.embed_tokens.parameters(), *model.embed_positions.parameters()]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    inner = [weight for weight in model.layers.parameters() if weight.dim() == 2 and config.muon]
    known = {*embeddings, *gains, *inner}
    others = [weight for weight in model.parameters() if weight not in known]
    groups = [
        {"params": others, "weight_decay": config.decay, "scale": 1.0},
        {"params": embeddings, "weight_decay": 0.0, "scale": config.embed_lr},
        {"params": gains, "weight_decay": 0.0, "scale": 1.0},
    ]
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    muon = [Muon([{"params": inner, "scale": 1.0}], lr=config.lr, weight_decay=config.decay)] if inner else []
    return [adam, *muon]


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """In nats, from float32 logits; targets of -100 do not count."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


def backward(
    model: Llama, stream: Stream, starts: np.ndarray, micro: int, config: Config, device: torch.device
) -> Tensor:
    """Add the gradients of the mean loss over some rows, `micro` of them a pass, and give that loss."""
    loss = torch.zeros((), device=device)
    for at in range(0, len(starts), micro):
        x, syntax, y = batch_of(stream, starts[at : at + micro], config.context, device)
        sync_gradients(model, config.sync_each_pass or at + micro == len(starts))  # else add up here, exchange once
        logits, share = model(x, syntax), micro / len(starts)
        mean = objective = cross_entropy(logits, y) * share
        if config.z_loss:
            objective = mean + config.z_loss * share * logits.float().logsumexp(-1).square().mean()
        (objective / world()).backward()  # each process divides, and the sum over them is the mean
        loss += mean.detach()
    return loss


@torch.no_grad()
@sdpa_kernel(ANY_LENGTH)
def evaluate(model: Llama, stream: Stream, grammar: Grammar, config: Config, device: torch.device) -> dict[str, float]:
    """Bits a file and bits a symbol over the whole validation set, each document in a row of its own; `legal` bits are
    those of the tokens that the grammar's mask leaves.  `bits_per_byte` are bits a symbol, which of pixels and VQ is no
    byte."""
    model.eval()
    batches, found = validation_batches(stream, config), []
    rounds = -(-len(batches) // world())  # as many for each process, for sharded weights need all of them
    for i in range(rank(), rounds * world(), world()):  # a surplus round repeats a batch, and counts for nothing
        x, syntax, y, illegal = validation_batch(stream, grammar, batches[i % len(batches)], config.vocab)
        logits = model(x.to(device), syntax.to(device))
        masked = logits.masked_fill(illegal.to(device), -math.inf)
        losses = torch.stack([cross_entropy(each, y.to(device), "sum") for each in (logits, masked)])
        found.append(losses * (i < len(batches)))
    plain, legal = (add_up(torch.stack(found).cpu().double().sum(0)) / math.log(2)).tolist()
    model.train()
    documents = len(stream.documents) - 1
    bits = {"bits_per_byte": plain / stream.symbols, "bits_per_file": plain / documents}
    return bits | {"legal_bits_per_file": legal / documents}


Piece = tuple[int, int, int]  # number of a document, and the first token and the end of a piece of it


def validation_batches(stream: Stream, config: Config) -> list[list[Piece]]:
    """All documents in pieces of context + 1 tokens at most, the longest first, so that there is little padding."""
    pieces, batches = [], []
    for number, (begin, end) in enumerate(pairwise(stream.documents.tolist())):
        starts = range(begin, end - 1, config.context)
        pieces += [(number, start, min(start + config.context + 1, end)) for start in starts]
    pieces.sort(key=lambda piece: piece[1] - piece[2])
    while pieces:
        count = max(1, config.micro * config.context // (pieces[0][2] - pieces[0][1]))
        batches.append(pieces[:count])
        pieces = pieces[count:]
    return batches


def validation_batch(
    stream: Stream, grammar: Grammar, batch: list[Piece], vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (B, T), where their tokens lead (B, T, F), the tokens that follow (B, T), -100 for none, and which of all
    are illegal there (B, T, vocab)."""
    shape = len(batch), batch[0][2] - batch[0][1] - 1
    tokens, illegal = np.full((shape[0], shape[1] + 1), -100, np.int64), np.zeros((*shape, vocab), bool)
    syntax = np.zeros((*shape, stream.read_syntax(0, 1).shape[1]), np.int64)
    spans = [stream.documents[number : number + 2] for number, _, _ in batch]
    states = grammar.walk([stream.read(begin, end - begin) for begin, end in spans], tell=False).states
    for row, (_, start, end) in enumerate(batch):
        tokens[row, : end - start] = stream.read(start, end - start)
        syntax[row, : end - start - 1] = stream.read_syntax(start, end - start - 1)
        inside = slice(start - spans[row][0], end - 1 - spans[row][0])
        illegal[row, : end - start - 1] = grammar.mask(states[row, inside], FAR - 1)
    tokens, syntax, illegal = map(torch.from_numpy, (tokens, syntax, illegal))
    return tokens[:, :-1].clamp(min=0), syntax, tokens[:, 1:], illegal


# --- the loop -------------------------------------------------------------------------------------------------------


def train(config: Config) -> None:
    """Train, or continue to train, into config.out.  Errors: UserError."""
    device = join()
    try:
        if config.data in BUILT_IN and rank() == 0 and not Path(config.data, "report.json").exists():
            BUILT_IN[config.data](Path(config.data))
        barrier()
        with claim(Path(config.out)), Stop() as stop, Saver(Path(config.out)) as saver:
            loop(set_up(config, device), stop, saver)
    except RuntimeError as error:
        raise explained(error) from None
    finally:
        if dist.is_initialized() and world() == 1:  # after an error, others may wait for this one
            dist.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()


def explained(error: RuntimeError) -> Exception:
    """What a user can mend of PyTorch's errors, in a sentence; others as they are."""
    what = str(error).strip().split("\n")[0]
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return UserError(f"--compile failed ({what}): install a C++ compiler, or pass --no-compile")
    if "allocate" in what:  # where memory runs out, but only on a GPU has that a class of its own
        return UserError(f"no memory is left ({what}): lower --micro or --context, or share it")
    return error


@dataclass
class Run:
    """What a training works with."""

    config: Config
    device: torch.device
    tokenizer: Tokenizer
    train: Stream
    val: Stream
    model: Llama
    optimizers: list[torch.optim.Optimizer]
    step: int  # that is done
    log: Log
    say: Callable[[str], object]

    @property
    def due(self) -> bool:
        """Whether it is time to evaluate, to draw and to save."""
        return self.step % self.config.every == 0 or self.step == self.config.steps


def set_up(config: Config, device: torch.device) -> Run:
    """Load, check, build, and continue where the run's last checkpoint is.  Errors: UserError."""
    out, say = Path(config.out), tqdm.write if rank() == 0 else lambda *_, **__: None
    tokenizer = load_tokenizer(Path(config.data))
    sizes = tokenizer.grammar.sizes if config.syntax else ()
    train, val = (Stream(Path(config.data), split, len(sizes)) for split in ("train", "val"))
    config = replace(config, vocab=tokenizer.vocab, positions=sizes)
    refuse_misfit(config, train)
    model = build_model(config, device)
    optimizers = build_optimizers(model, config)
    if rank() == 0:
        holds = hashlib.sha256("".join(train.sha256 + val.sha256).encode()).hexdigest()
        open_run(out, config, tokenizer, holds)
    barrier()
    step = load(out, model, optimizers, say)
    if not step:
        model.init_weights(config.seed)
        if config.init:
            say(huggingface.begin_from(model, tokenizer, Path(config.init)))
    if long := (np.diff(train.documents) > config.context).mean():
        say(f"note: {long:.0%} of the files are longer than --context {config.context}: the model never sees one whole")
    parameters, rows = sum(weight.numel() for weight in model.parameters()), len(train.row_starts(config.context))
    epochs = config.steps * config.batch / rows
    say(f"{parameters:,} parameters; {rows:,} rows of {config.context} tokens, {epochs:.1f} epochs")
    say(f"step {step} of {config.steps} on {world()} x {device.type}")
    return Run(config, device, tokenizer, train, val, model, optimizers, step, Log(out, step), say)


def refuse_misfit(config: Config, stream: Stream) -> None:
    """Errors: UserError, unless the data hold a row, and the batch divides into processes and passes."""
    if (total := stream.bounds[-1]) <= config.context:
        row = f"--context {config.context}"
        raise UserError(f"{config.data} has {total:,} tokens, not one row of {row}: prepare more files, or lower it")
    share = config.batch // world()
    if config.batch % world() or share % min(config.micro, share):
        passes = f"{world()} processes and passes of --micro {config.micro}"
        shares = {n: config.batch // n for n in range(1, config.batch + 1) if config.batch % n == 0}
        fits = ", ".join(str(n) for n, share in shares.items() if share % min(config.micro, share) == 0)
        raise UserError(f"--batch {config.batch} does not divide into {passes}: take {fits} processes, or change one")


def loop(run: Run, stop: Stop, saver: Saver) -> None:
    """Read rows, add up their gradients, step; log, save, evaluate and draw when it is time."""
    config, model, optimizers = run.config, run.model, run.optimizers
    starts, micro = run.train.row_starts(config.context), min(config.micro, config.batch // world())
    if run.step and run.due and not any("val_bits_per_byte" in record for record in run.log.records[-1:]):
        report(run)  # a kill came between the checkpoint and this
    meter, stopping = Meter(run, config.batch * config.context), False
    unchecked = deque()  # norms that a GPU may still be computing while the next step is on its way to it
    while run.step < config.steps and not stopping:
        for group in (group for each in optimizers for group in each.param_groups):
            group["lr"] = group["scale"] * learning_rate(run.step, config)
        numbers = rows_of_step(run.step, config.batch, len(starts), config.seed)
        loss = backward(model, run.train, starts[numbers[rank() :: world()]], micro, config, run.device)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        unchecked.append((run.step, numbers, loss, norm))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        stopping = stop.agreed()
        saving = stopping or run.due or run.step % (config.save_every or config.every) == 0
        logging = saving or run.step % config.log_every == 0
        while len(unchecked) > (not logging):
            refuse_divergence(*unchecked.popleft())
        saver.look()
        meter.count(run, loss, norm, logging)
        if saving:
            saver.save(model, optimizers, run.step, config, run.tokenizer)
        if run.due:
            with meter.pause():
                report(run)
    meter.bar.close()
    saver.wait()
    if run.step < config.steps:
        run.say(f"stopped and saved at step {run.step}: the same command continues")
        return
    if rank() == 0:
        write_card(Path(config.out))
    made = "checkpoint, log.jsonl, loss.png, grids and a model card, README.md"
    run.say(f"{config.out}: {made}; `python sample.py {config.out}` writes files")


def refuse_divergence(step: int, rows: np.ndarray, loss: Tensor, norm: Tensor) -> None:
    """Nothing of such a step has been written yet.  Errors: UserError."""
    if not torch.isfinite(norm):
        found = f"{norm.item()}, the loss {loss.item()} at step {step}, rows {rows.tolist()}"
        raise UserError(f"the gradient is {found}: lower --lr or look at them")


def build_model(config: Config, device: torch.device) -> Llama:
    """Meta, shard, then allocate: no process ever holds more than its part.  Drawing or reading weights comes next."""
    with torch.device("meta"):
        model = Llama(config)
    for block in model.layers:
        if config.recompute:
            block.forward = MethodType(recomputed, block)  # on the instance, where compile finds it
        if config.compile:
            block.compile()
    if dist.is_initialized():
        shard(model, device)
    return model.to_empty(device=device).train()


def recomputed(block: Block, *arguments: object) -> Tensor:
    """A block's forward pass that keeps its input alone, and is taken again in the backward pass."""
    return checkpoint(Block.forward, block, *arguments, use_reentrant=False, preserve_rng_state=False)


def report(run: Run) -> None:
    """Evaluate, log it, and draw: OUT/grids/STEP.png (of clips .webp too), what it writes now, and OUT/loss.png."""
    with torch.compiler.set_stance("force_eager"):  # lengths vary: compiling anew for each would take longer
        result = evaluate(run.model, run.val, run.tokenizer.grammar, run.config, run.device)
        run.log.write({"step": run.step, **{f"val_{name}": value for name, value in result.items()}})
        run.say(VALIDATION.format(step=run.step, **result))
        written = write(run)
    if rank() == 0:
        out = Path(run.config.out)
        (out / "grids").mkdir(exist_ok=True)
        save_grid(out / "grids" / f"{run.step:06d}", written, run.tokenizer.codec.fps)
        curves = {
            name: [(record["step"], record[key]) for record in run.log.records if record.get(key) is not None]
            for name, key in (("training", "bits_per_byte"), ("validation", "val_bits_per_byte"))
        }
        save_image(out / "loss.png", draw_curves(curves, "bits per byte"))


VALIDATION = (
    "step {step}  validation: {bits_per_file:.1f} bits a file ({legal_bits_per_file:.1f} of legal tokens alone), "
    "{bits_per_byte:.3f} bits a byte"
)


def write(run: Run) -> list[np.ndarray]:
    """The pixels of some files that the model writes now."""
    config, tokenizer, written = run.config, run.tokenizer, []
    start = [np.array([tokenizer.start])]
    whole = 1 + tokenizer.grammar.walk(start, tell=False).rest[0] <= config.context  # else none fits
    run.model.eval()
    with gathered(run.model, run.device):
        for numbers in chunks(range(config.samples), min(gather(at_once(run.model, config.context)))):
            seeds, how = [(config.seed, i) for i in numbers], Sampling(free=not whole)
            done = lambda files: not add_up((~files).sum())  # noqa: E731
            written += generate(run.model, tokenizer, start * len(numbers), seeds, how, done)
    run.model.train()
    return [tokenizer.codec.decode(tokenizer.decode(row[1:])) for row in written]


if __name__ == "__main__":
    run(main)
