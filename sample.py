"""Let a trained model write files.

    python sample.py out/small                                        # 64 files into out/small/samples, and a grid
    python sample.py out/small --prompt cat.png --keep 0.5            # complete the lower half of a picture
    python sample.py out/small --prompt photos --keep 0.25 0.5 0.75 --to completed
    python sample.py out/video --prompt film.mp4 --keep 0.67          # go on with clips after ten of fifteen frames
    python sample.py out/small --serve 8000                           # a page on which pictures appear as it writes
    python sample.py out/small --surprise cat.png dog.png             # where is it surprised?
    python sample.py out/small --bits photos                          # how well would it compress?

Each file has a seed of its own, (--seed, its number), and does not depend on what is drawn beside it, but for rounding:
products of larger matrices add up in another order, and between two tokens that are nearly as likely that may decide.
3 of 300 files differed between batches of 1 and 60 on a CPU in float32, and more will on a GPU in bf16.

The files hold the very symbols that the model wrote; the last line counts how many are whole valid files.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from codec import Tokenizer, foreign_encoder
from data.prepare import chunks, usable
from data.prompts import prompts_of
from data.sources import Item
from grammar import FAR, Grammar, refuse_bad_prompts
from model import Cache, Llama
from plumbing.checkpoint import read_run
from plumbing.command import Flags, UserError, differences, run
from plumbing.draw import save_grid
from plumbing.files import digest, read_json, write_json, write_whole
from plumbing.processes import ANY_LENGTH, at_once, best_device, precision
from plumbing.replay import STRIDE, Replay, Window, can_record
from show.surprise import costs, save_bits, save_surprise

# --- drawing tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that make up p
    length: int = 0  # tokens of a file at most; 0: the model's context
    free: bool = False  # let the model write what the format does not allow

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3):
            raise UserError(f"--temperature is {self.temperature}: choose 0, or 0.001 to 1000")
        if not 1e-6 <= self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}: choose 0.000001 to 1")
        if min(self.top_k, self.length) < 0:
            raise UserError(f"--top-k {self.top_k} --length {self.length}: choose 1 or more, or 0 for no limit")


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw a next token for each row of logits (B, V) with its number `uniform` (B,) in [0, 1): (B,).

    The tokens' probabilities lie end to end, and the number says where among them to look.  Sums of many may be rounded
    differently from one place to the next, so impossible tokens are left out, lest rounding give one a share.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits = likeliest(logits, sampling)
    probability = logits.softmax(-1)
    ends = probability.cumsum(-1).masked_fill(probability == 0, -1)
    place = (1 - uniform[:, None]) * ends.amax(-1, keepdim=True)  # above zero, and no more than the last end
    return (ends >= place).byte().argmax(-1)  # the first


def likeliest(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) that are -inf but for the likeliest tokens."""
    values, tokens = logits.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1]))
    probability = values.softmax(-1)
    values = values.masked_fill(probability.cumsum(-1) - probability >= sampling.top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, tokens, values)


class Dice:
    """The random numbers of each file, which its seed alone decides."""

    def __init__(self, seeds: list[tuple[int, int]], length: int, device: torch.device):
        self.files = [np.random.Generator(np.random.Philox(key=list(seed))) for seed in seeds]
        rows = np.stack([dice.random(length, np.float32) for dice in self.files])
        self.first = torch.from_numpy(rows).to(device)  # (B, length) one for each token

    def keep(self, rows: Tensor) -> None:
        self.files, self.first = [self.files[row] for row in rows.tolist()], self.first[rows]

    def more(self, rows: Sequence[int]) -> Tensor:
        """A further number of some files."""
        return self.first.new_tensor([self.files[row].random() for row in rows])


class Due:
    """The bytes at the end of each prompt that no token holds yet: the next tokens must spell them, and may go on
    beyond them."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], symbols: Sequence[bytes]):
        self.tokenizer, self.begin, self.left = tokenizer, [*map(len, prompts)], [*symbols]

    def keep(self, rows: Tensor) -> None:
        self.begin, self.left = ([each[row] for row in rows.tolist()] for each in (self.begin, self.left))

    def rows(self, at: int) -> list[int]:
        """The rows whose token at `at` must spell such bytes."""
        return [row for row, left in enumerate(self.left) if left and self.begin[row] <= at]

    def clashes(self, rows: list[int], device: torch.device) -> Tensor:
        return torch.from_numpy(np.stack([self.tokenizer.clashes(self.left[row]) for row in rows])).to(device)

    def after(self, row: int, token: Tensor) -> bytes:
        """What is left after a token."""
        return self.left[row][len(self.tokenizer.spellings[token]) :]


BANS = 16  # refusals of a token, after which it pays to ask for all that are legal


def draw(
    grammar: Grammar,
    states: object,
    logits: Tensor,
    forced: Tensor,
    at: int | Tensor,
    room: int | Tensor,
    dice: Dice,
    sampling: Sampling,
    due: Due,
) -> tuple[Tensor, object]:
    """The token that stands at `at` in each file (B,), drawn unless `forced` (not -1), and the states after them.

    Mask what is known to be illegal, draw, ask, ban what was refused and draw again: that is drawing from what is
    legal.
    """
    spelling = due.rows(at)
    banned = torch.zeros_like(logits, dtype=torch.bool) if sampling.free else grammar.mask(states, room)
    if spelling:
        banned[spelling] |= due.clashes(spelling, banned.device)

    def rooms(tokens: Tensor) -> Tensor:
        """What is given need not take the shortest way to the end."""
        given = (forced >= 0) | sampling.free
        if spelling:  # an index of no rows would still be brought to a GPU
            given[[row for row in spelling if due.after(row, tokens[row])]] = True
        return torch.where(given, FAR - 1, room)

    tokens = choose(logits.masked_fill(banned, -math.inf), dice.first[:, at].flatten(), sampling)
    tokens = torch.where(forced >= 0, forced, tokens)
    states, refused = grammar.accept(states, tokens, rooms(tokens))
    tries = 0
    while len(refused) and not sampling.free:
        rows, tries = list(refused), tries + 1
        banned[rows, tokens[rows]] = True
        if tries == BANS and (drawing := [row for row in rows if row not in spelling]):
            banned[drawing] = grammar.mask(states, room, exact=drawing)[drawing]
            assert not banned[drawing].all(-1).any(), "a state from which no token leads on"
        again = torch.full_like(tokens, -1)  # which reads nothing
        again[rows] = choose(logits[rows].masked_fill(banned[rows], -math.inf), dice.more(rows), sampling)
        tokens[rows] = again[rows]
        states, refused = grammar.accept(states, again, rooms(again))
    for row in spelling:
        due.left[row] = due.after(row, tokens[row])
    return tokens, states


def fitted(
    tokenizer: Tokenizer, prompts: Sequence[np.ndarray], due: Sequence[bytes], length: int
) -> tuple[list[np.ndarray], list[bytes]]:
    """Prompts and what is due behind them.  Where spelling that symbol by symbol would leave no room for the end of the
    file, the prompt takes it in, in tokens as if the file ended there.  Errors: UserError, of a prompt that begins no
    valid file of `length` tokens."""
    ends = [np.frombuffer(each, tokenizer.dtype) for each in due]  # symbols are tokens too
    prompts, due, whole = [*prompts], [*due], [*map(np.append, prompts, ends)]
    walk = tokenizer.grammar.walk(whole)
    tight = np.flatnonzero(walk.rest > length - np.array([*map(len, whole)]))
    for row in tight:
        prompts[row] = whole[row] = np.append(prompts[row], tokenizer.encode([ends[row]])[0][1:-1])
        due[row] = b""
    refuse_bad_prompts(tokenizer.grammar.walk(whole) if len(tight) else walk, whole, length)
    return prompts, due


def laid_out(prompts: Sequence[np.ndarray], length: int) -> Tensor:
    """Prompts as rows (B, length), -1 where nothing is given."""
    rows = torch.full((len(prompts), length), -1, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt[:length].astype(np.int64))
    return rows


def read_given(grammar: Grammar, given: Tensor) -> tuple[object, list[Tensor]]:
    """The states after given tokens (B, T), and the syntax positions (B, F) after each of them."""
    states = grammar.begin(len(given))
    syntax = [grammar.positions(states)]
    for tokens in given[:, 1:].T:
        states, _ = grammar.accept(states, tokens, FAR - 1)
        syntax.append(grammar.positions(states))
    return states, syntax


ASKED = 16  # steps from one question whether files have ended to the next, for which a GPU waits
WORTH = 1 / 8  # share of the files in the batch that must have ended before they are dropped, which copies the cache


@lru_cache(2)
def grammar_on(device: torch.device, tokenizer: Tokenizer) -> Grammar:
    return tokenizer.grammar.to(device)


@torch.no_grad()
@sdpa_kernel(ANY_LENGTH)
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    seeds: list[tuple[int, int]],
    sampling: Sampling = Sampling(),  # noqa: B008
    all_done: Callable[[Tensor], Tensor] = torch.all,
    due: Sequence[bytes] = (),
) -> list[np.ndarray]:
    """Continue each prompt, tokens (n,), to the end of a whole valid file of `length` tokens (the context) at most.

    Only tokens that the grammar allows are drawn; if `free`, all are, and the length may cut the file.  The prompts
    may differ in length: where one is longer than the others, its tokens take the place of those drawn.  Behind each
    the bytes of the symbols that are `due` come first, as `Tokenizer.prompt` gives them.  `all_done` says whether all
    files (B,) have ended; processes that share a model must agree.
    """
    due = due or [b""] * len(prompts)
    device, length = model.lm_head.weight.device, min(sampling.length or FAR, model.config.context)
    if not sampling.free:
        prompts, due = fitted(tokenizer, prompts, due, length)
    given, written = min(length, *map(len, prompts)), laid_out(prompts, length).to(device)
    dice, grammar = Dice(seeds, length, device), grammar_on(device, tokenizer)
    cache, left = Cache(model.config, len(prompts), length), Due(tokenizer, prompts, due)
    rows = torch.arange(len(prompts), device=device)  # that are still drawn
    states, syntax = read_given(grammar, written[:, :given])
    if given > 1:
        model(written[:, : given - 1], torch.stack(syntax[:-1], 1), cache)

    def step(tokens: Tensor, ended: Tensor, states: object, at: int | Tensor) -> tuple[Tensor, Tensor, object, object]:
        """Take the last token of each file in, and draw the one that stands at `at`."""
        logits = model(tokens[:, None], grammar.positions(states)[:, None], cache)[:, -1]
        known = written[rows, at]
        forced = torch.where(known >= 0, known, torch.where(ended, tokenizer.end, -1))
        tokens, states = draw(grammar, states, logits, forced, at, length - 1 - at, dice, sampling, left)
        written[rows, at] = tokens
        return tokens, ended | (tokens == tokenizer.end), states, at + 1

    carry = written[:, given - 1], torch.zeros_like(rows, dtype=torch.bool), states, given
    replay = None
    for at in range(given, length):
        if not replay and can_record(model, grammar) and not any(left.left):
            cache, replay, carry = Window(cache, device), Replay(step), (*carry[:3], torch.full_like(rows[:1], at))
        if replay and at > cache.length:
            cache.length = min(length, at - at % -STRIDE)
            replay.forget()
        carry = (replay or step)(*carry)
        if at % ASKED == 0:
            tokens, ended, states, _ = carry
            if all_done(ended):
                break
            if len(going := torch.nonzero(~ended)[:, 0]) < (1 - WORTH) * len(rows):
                going = going if len(going) else rows[:1] * 0  # one at least, for others may wait for this process
                rows, carry = rows[going], (tokens[going], ended[going], grammar.keep(states, going), carry[3])
                for each in (cache, dice, left):
                    each.keep(going)
                if replay:
                    replay.forget()
    return [row[row >= 0] for row in written.cpu().numpy()]


# --- the command ----------------------------------------------------------------------------------------------------


def refuse_others(folder: Path, settings: dict[str, object]) -> None:
    """Refuse a folder whose files were drawn otherwise.  Errors: UserError."""
    note = folder / "samples.json"
    if note.exists() and (changed := differences(read_json(note), json.loads(json.dumps(settings)))):
        raise UserError(f"{folder} holds other samples ({changed}): choose another with --to, or delete this one")


def write(to: Path, model: Llama, tokenizer: Tokenizer, kept: float, prompts: list, settings: dict, batch: int) -> int:
    """Complete prompts (symbols of the share `kept`), write the files that are not there, and count the valid ones."""
    codec, invalid = tokenizer.codec, to / "invalid.txt"
    to.mkdir(parents=True, exist_ok=True)
    paths = [to / f"{i:05d}{codec.suffix}" for i in range(len(prompts))]
    waiting = [i for i, path in enumerate(paths) if not path.exists()]
    sampling = Sampling(**{each.name: settings[each.name] for each in fields(Sampling)})
    with tqdm(None, str(to), len(paths), initial=len(paths) - len(waiting), unit=" files", disable=None) as bar:
        for numbers in chunks(waiting, batch):
            begun, due = zip(*(tokenizer.prompt(prompts[i]) for i in numbers), strict=True)
            seeds = [(settings["seed"], i) for i in numbers]
            rows = generate(model, tokenizer, begun, seeds, sampling, due=due)
            write_json(to / "samples.json", settings)  # now that there is something to note
            for i, row in zip(numbers, rows, strict=True):
                symbols = tokenizer.decode(row)
                if wrong := codec.check(symbols):
                    with open(invalid, "a") as file:
                        file.write(f"{paths[i].name}\t{wrong}\n")
                write_whole(paths[i], codec.file(symbols))
                bar.update()
    if shown := [*usable((Item(str(path), 0, -1, path.name) for path in paths[:64]), codec)]:  # what a viewer can read
        save_grid(to / "grid", shown, codec.fps, kept)
    lines = invalid.read_text(errors="replace").splitlines() if invalid.exists() else []
    return len(paths) - len({line.split("\t")[0] for line in lines} & {path.name for path in paths})


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Sampling]:
    """The flags, and of them how to draw.  Errors: UserError."""
    parser = Flags(__doc__)
    parser.add_argument("run", type=Path, help="run folder of train.py, or a Llama folder of Hugging Face")
    parser.add_argument("--count", type=int, help="files (default: 64), or completions of each prompt (default: 1)")
    parser.add_argument("--to", type=Path, help="folder to write (default: RUN/samples or RUN/completions)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--batch", type=int, help="files at once (default: 64, or what fits the memory)")
    parser.add_argument("--prompt", type=Path, help="a file to complete, or a folder of them")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="shares that are given (default: 0.5)")
    instead = parser.add_argument_group("instead of writing files").add_mutually_exclusive_group()
    text = "a page on localhost: pictures appear while the model writes them; 0 takes any free port"
    instead.add_argument("--serve", type=int, metavar="PORT", help=text)
    text = "files or folders: bits of every part of a picture laid over it, beside its bytes (into RUN/surprise)"
    instead.add_argument("--surprise", type=Path, nargs="+", metavar="IMAGE", help=text)
    text = "a folder: bits a file beside its size, and what lossless recompressors make of it (into RUN/bits)"
    instead.add_argument("--bits", type=Path, metavar="DIR", help=text)
    parser.add_fields(Sampling())
    flags = parser.parse(arguments)
    for name, least, most in (("count", 1, 10**9), ("batch", 1, 10**6), ("seed", 0, 2**63 - 1)):
        if (value := getattr(flags, name)) is not None and not least <= value <= most:
            raise UserError(f"--{name} is {value}: choose {least} to {most}")
    if not all(0 <= keep < 1 for keep in flags.keep):
        raise UserError(f"--keep is {' '.join(map(str, flags.keep))}: choose from 0 to below 1")
    return flags, Sampling(**{each.name: getattr(flags, each.name) for each in fields(Sampling) if each.name in flags})


def main(arguments: list[str] | None = None) -> None:
    flags, sampling = parse(arguments)
    device = best_device()
    model, tokenizer, source = read_run(flags.run, device)
    model.to(precision(device))
    batch = flags.batch or at_once(model, sampling.length or model.config.context)
    if flags.serve is not None:
        from show.server import serve  # which takes from this page what draws

        return serve(flags.serve, model, tokenizer, sampling, batch)
    if sources := flags.surprise or flags.bits and [flags.bits]:
        shown, name = (save_surprise, "surprise") if flags.surprise else (save_bits, "bits")
        return shown(flags.to or flags.run / name, costs(model, tokenizer, sources))
    write_files(flags, sampling, model, tokenizer, source, batch)


def write_files(
    flags: argparse.Namespace, sampling: Sampling, model: Llama, tokenizer: Tokenizer, source: Path, batch: int
) -> None:
    """What the model writes by itself, or completions of prompts at each share kept.  Errors: UserError."""
    codec = tokenizer.codec
    held = next(path for path in (source / "manifest.json", source / "config.json") if path.exists())
    settings = {"seed": flags.seed, **asdict(sampling), "codec": codec.settings}
    settings |= {"checkpoint": source.name, "weights": digest(held)[:16]}
    if flags.prompt is None:
        jobs = {flags.to or flags.run / "samples": (0, [np.empty(0, tokenizer.dtype)] * (flags.count or 64))}
        refuse_others(*jobs, settings)
    else:
        if warning := foreign_encoder(tokenizer):
            print(f"warning: {warning}")
        to, jobs = flags.to or flags.run / "completions", {}
        with prompts_of(flags.prompt, codec, to) as (prompts, held):
            settings["prompts"] = held
            for keep in flags.keep:
                if (kept := codec.kept(keep)) != keep:
                    print(f"note: of {keep:g}, the {codec.name} codec can keep {kept:g}")
                refuse_others(folder := to / f"keep_{kept:g}", settings)
                jobs[folder] = kept, [codec.head(prompt, kept) for prompt in prompts] * (flags.count or 1)
    for folder, (kept, begun) in jobs.items():
        valid = write(folder, model, tokenizer, kept, begun, settings, batch)
        print(f"{folder}: {valid} of {len(begun)} are whole valid files")


if __name__ == "__main__":
    run(main)
