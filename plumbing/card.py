"""A model card: RUN/README.md, what a finished run has learned, from what, how well, and how to do it again.

python -m plumbing.card out/small                                  # train.py does so at its end
python fid.py out/small/samples pictures --json >> out/small/fid.jsonl && python -m plumbing.card out/small
"""

import math
import shlex
from pathlib import Path

import numpy as np

from codec import Tokenizer, load_tokenizer
from data.shapes import BUILT_IN
from model import ModelConfig
from plumbing.checkpoint import checkpoints
from plumbing.command import Flags, UserError, run
from plumbing.files import read_json, write_whole
from plumbing.plan import count
from plumbing.run import read_lines
from plumbing.weights import model_config

CARD = """---
library_name: jpeglm
tags: [jpeg-lm, {tag}]
---
# {name}: a Llama that writes {what}

![what it writes at the end of its training]({grid})

| | |
|---|---|
{facts}

{fid}## Use it

    python sample.py {run}
    python sample.py {run} --prompt FILE --keep 0.5
    python sample.py {run} --serve 8000

## Repeat it

    {commands}

Commit {commit}, {versions}.

## Limits

- It writes {what} and nothing else, and takes no text prompt.
- {grammar}
- {fitting}
- What its pictures show, and whose they are, is what {data} shows, of which this card knows nothing.
"""


def card(out: Path) -> str:
    """The card of a run.  Errors: UserError, unless it has a whole checkpoint and a log."""
    log = read_lines(out / "log.jsonl")
    bits = [record for record in log if record.get("val_bits_per_file") is not None]
    if not checkpoints(out) or not bits:
        raise UserError(f"{out} is no run that has been evaluated: train it to its first --every, or name another")
    settings, tokenizer = read_json(out / "config.json"), load_tokenizer(out)
    codec = tokenizer.codec
    started, last = read_lines(out / "started.jsonl"), bits[-1]
    clip = len(codec.shape) == 4
    shape = "x".join(map(str, codec.shape[-2:-4:-1])) + f", {codec.shape[0]} frames" * clip
    what = f"{'clips' if clip else 'pictures'} ({shape}) as {codec.name} files"
    best = min(bits, key=lambda record: record["val_bits_per_file"])
    fitting = "It was best on new files at the end, so more training may help."
    if best["step"] < last["step"]:
        fitting = f"On new files it was best at step {best['step']:,} ({best['val_bits_per_file']:,.1f} bits): "
        fitting += "it knows those it learned from partly by heart."
    grammar = "Its files are valid because the grammar lets nothing else through; `--free` shows what it knows itself."
    versions = ", ".join(f"{name} {version}" for name, version in started[-1].get("versions", {}).items())
    config = model_config(settings, out / "config.json")
    found = facts(tokenizer, config, settings, started, log, last)
    return CARD.format(
        tag="video-generation" if clip else "image-generation",
        name=out.resolve().name,
        what=what,
        grid=f"grids/{last['step']:06d}.{'webp' if clip else 'png'}",
        facts="\n".join(f"| {name} | {value} |" for name, value in found.items()),
        fid=distances(out),
        run=out,
        commands="\n    ".join(commands(settings, started)),
        commit=started[-1].get("commit") or "unknown",
        versions=versions,
        grammar=grammar,
        fitting=fitting,
        data=settings["data"],
    )


def facts(
    tokenizer: Tokenizer, config: ModelConfig, settings: dict, started: list[dict], log: list[dict], last: dict
) -> dict[str, str]:
    """Data, settings, hardware and minutes, and bits."""
    step = settings["batch"] * settings["context"]
    speeds = [record["tokens_per_second"] for record in log if record.get("tokens_per_second")]
    memory = max((record.get("memory_gb") or 0 for record in log), default=0)
    found = {"data": settings["data"]}
    report = Path(settings["data"], "report.json")
    if report.exists():  # it may have been moved
        shards = read_json(report)["shards"]
        train, new = ([shard for name, shard in shards.items() if name.startswith(split)] for split in ("train", "val"))
        files, tokens = (sum(shard[each] for shard in train) for each in ("documents", "tokens"))
        found["data"] += f": {files:,} files to learn from, {tokens:,} tokens, seen {last['step'] * step / tokens:.1f} "
        found["data"] += f"times; {sum(each['documents'] for each in new):,} others held back"
    found["files"] = tokenizer.codec.name + ", " + ", ".join(f"{k} {v}" for k, v in tokenizer.codec.settings.items())
    found["tokens"] = f"{tokenizer.vocab}: {tokenizer.codec.symbols} symbols, {len(tokenizer.merges)} pairs, start, end"
    shape = "layers {layers}, dim {dim}, heads {heads} ({kv_heads} of keys), hidden {hidden}, context {context}"
    told = "told where in the file it is" if config.positions else "plain Llama"
    found["model"] = f"{count(config)[0]:,} weights; {shape.format(**settings)}; {told}"
    rates = "learning rate {lr:g} after {warmup} steps, cosine to zero, {how}, decay {decay:g}, seed {seed}"
    how = "Muon and AdamW" if settings["muon"] else "AdamW"
    found["training"] = f"{last['step']:,} steps of {settings['batch']} x {settings['context']} tokens; "
    found["training"] += rates.format(how=how, **settings)
    if speeds:
        minutes = last["step"] * step / np.median(speeds) / 60
        found["took"] = f"{minutes:,.1f} minutes at {np.median(speeds):,.0f} tokens/s (median), {memory:.1f} GB, on "
        machines = [note.get("machine", "a machine that was not noted") for note in started]
        found["took"] += "; ".join(dict.fromkeys(machines))
    found["bits of a new file"] = "{val_bits_per_file:,.1f}, and {val_bits_per_byte:.3f} a symbol".format(**last)
    if (legal := last.get("val_legal_bits_per_file")) is not None:
        found["bits of a new file"] += f"; {legal:,.1f} if illegal tokens have no probability"
    return found


def distances(out: Path) -> str:
    """The lines of RUN/fid.jsonl, which `fid.py --json` gave, as a table; nothing where there is none."""
    rows = []
    for result in read_lines(out / "fid.jsonl"):
        dims = result.get("dims")
        for row in result.get("completions", []):
            fid = f"{row['fid_originals']:.3f} ({dims}) | {row['fid_floor']:.3f}"
            rows.append(f"| completions, {row['keep']} given | their originals | {row['count']:,} | {fid} | |")
        if "fid" in result and {"a", "b"} <= result.keys():
            a, b = (Path(result[side].get("path", side)) for side in ("a", "b"))
            kid = f"{result['kid']:.5f}" if math.isfinite(result.get("kid", math.nan)) else ""
            rows.append(f"| {a} | {b} | {result['a'].get('count', 0):,} | {result['fid']:.3f} ({dims}) | | {kid} |")
    head = "| what | against | files | FID (features) | floor | KID |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n\n" if rows else ""


def commands(settings: dict, started: list[dict]) -> list[str]:
    """What made the data, as far as they tell, and the run."""
    data, found = Path(settings["data"]), []
    if (data / "report.json").exists() and settings["data"] not in BUILT_IN:
        report = read_json(data / "report.json")
        words = ["python", "-m", "data.prepare", Path(report["source"]).name, str(data)]
        for name, value in report["settings"].items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words += ["--no-syntax"] * (not value) if name == "syntax" else [f"--{flag}"] * value
            elif name not in ("files", "listing") and value is not None:
                words += [f"--{flag}", str(value)]
        found = [shlex.join(words)]
    processes = started[0].get("processes", 1)
    begin = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
    return [*found, f"{begin} {shlex.join(started[0]['command'])}"]


def write_card(out: Path) -> None:
    write_whole(out / "README.md", card(out).encode())


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument("run", type=Path, help="run folder of train.py")
    flags = parser.parse(arguments)
    write_card(flags.run)
    print(f"{flags.run / 'README.md'} is written")


if __name__ == "__main__":
    run(main)
