"""The paper's comparison, at a size anyone can run: JPEG-LM against VQ and pixels.

    python -m studies.compare out/compare --data eurosat --views 8                      # hours on a CPU
    python -m studies.compare out/compare --data eurosat --views 8 --seeds 3 --small    # then more of the same
    python -m studies.compare out/tail --data eurosat --views 8 --tail 0.02 --codecs jpeg vq8 vq4
    python -m studies.compare out/kinds --data satellite photos plots --size 32 --codecs jpeg vq4
    python -m studies.compare out/larger --data eurosat --views 8 --config photos --steps 6000 -- --compile    # a GPU
    python -m studies.compare vote out/compare           # a page to vote on, blindly; see `vote --help`

DATA holds `train` and `test`, folders of pictures.  For each codec, and with nothing but the codec different: learn it,
prepare, train the same Llama, sample, complete the pictures of `test`, and measure.  JPEG is trained once, each other
codec twice: with as many FLOPs, and on as many pictures (as in the paper, section 4; for the long tail this alone), in
both cases without what learning a codebook takes.  What comes after `--` goes to train.py.

The same command continues.  OUT/table.md, table.json and grid.png are the result so far, OUT/commands.txt is what was
run, OUT/logs what that said.
"""

import math
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import pearsonr

import fid
from codec import load_tokenizer
from data.vq import decibels, to_input
from plumbing.command import Flags, UserError, run
from plumbing.draw import save_image
from plumbing.files import read_json, write_json, write_whole
from plumbing.plan import count
from plumbing.run import claim, read_lines
from plumbing.weights import model_config
from studies import vote
from studies.contest import (
    CONTENDERS,
    DECIDED,
    DIMS,
    FREE_COUNT,
    HALF,
    REFERENCE,
    SETTINGS,
    TOP_P,
    Comparison,
    Study,
    numbered,
    opened,
)
from studies.steps import Step, Stopped, refuse_decided, split, table_of
from train import parse as parse_training

# --- the tables -----------------------------------------------------------------------------------------------------


def row_step(study: Study, name: str, setting: str) -> Step:
    """The last of a model's steps: its row, and the tables of all rows that are there by then."""

    def write() -> None:
        write_json(path, row_of(study, name, setting))
        with study.work.lock:
            write_tables(study)

    path = row_path(study, name, setting)
    return Step(path, write, 1e11)


def row_path(study: Study, name: str, setting: str) -> Path:
    return study.out / "rows" / f"{name}-{setting}-seeds{study.config.seeds}{'-small' * study.config.small}.json"


def write_tables(study: Study) -> str:
    """OUT/table.json, table.md and grid.png, of the models that are measured."""
    there = [model for model in study.models if row_path(study, *model).exists()]
    rows = [read_json(row_path(study, *model)) for model in there]
    table = {"measure": measure(study), "keep": study.keep, "rows": rows, "reductions": {}}
    if study.config.count > DIMS:  # KID may be 0, or below
        table["reductions"] = reductions(rows, study.keep)
    if study.config.tail and there == study.models:
        table["tail"] = tail_of(study)
    write_json(study.out / "table.json", table)
    text = in_words(study, table)
    write_whole(study.out / "table.md", text.encode())
    save_image(study.out / "grid.png", picture(study, there))
    return text


def measure(study: Study) -> str:
    return f"FID-{DIMS}" if study.config.count > DIMS else "KID x 1000"


def distance(study: Study, a: Path, b: Path) -> float:
    """FID; KID where there are fewer pictures than features, for then FID says little."""
    a, b = (fid.open_set(path, DIMS) for path in (a, b))
    return fid.frechet_distance(a, b) if study.config.count > DIMS else kernel_distance(a.features, b.features)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """KID x 1000 of as many pictures each, as in fid.py, but over all of them at once; and without the pairs of a
    picture and what was made of it, which stand at the same place in both and are more alike than chance has it."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    aa, bb, ab = (fid.mean_of_others(fid.kernel(x, y)) for x, y in ((a, a), (b, b), (a, b)))
    return 1000 * float(aa + bb - 2 * ab)


def row_of(study: Study, name: str, setting: str) -> dict:
    contender, plan, run = CONTENDERS[name], study.plan(name, setting), study.run_of(name, setting)
    model, samples, times = f"{name}-{setting}", study.samples_of(name, setting), read_json(study.out / "times.json")
    codec, log = load_tokenizer(plan.data).codec, read_lines(run / "log.jsonl")
    speed = np.median([record["tokens_per_second"] for record in log if "tokens_per_second" in record])
    bits = [record["val_bits_per_file"] for record in log if "val_bits_per_file" in record]
    row = {"codec": name, "setting": setting, "title": contender.title, **asdict(plan), "data": plan.data.name}
    row |= {"flops": plan.flops, "pictures": round(plan.pictures), "parameters": parameters_of(run)}
    val = [shard for key, shard in read_json(plan.data / "report.json")["shards"].items() if key.startswith("val")]
    symbols = sum(shard["symbols"] for shard in val) / sum(shard["documents"] for shard in val)
    row |= {"file_bits": symbols * math.log2(codec.symbols), "model_bits": bits[-1], "best_bits": min(bits)}
    row["training_seconds"] = plan.steps * plan.batch * plan.context / speed
    sampled = samples / "seed-0" / f"{study.config.count - 1:05d}{codec.suffix}"
    row["sampling_seconds"] = times.get(sampled.relative_to(study.out).as_posix(), math.nan)
    learned, wrong = study.out / "vq" / contender.data / "report.json", samples / "free" / "invalid.txt"
    row["codebook_seconds"] = read_json(learned)["seconds"] if learned.exists() else 0
    invalid = {line.split("\t")[0] for line in wrong.read_text().splitlines()} if wrong.exists() else set()
    row["valid_without_grammar"] = 1 - len(invalid) / FREE_COUNT

    originals, back, seeds = study.features("whole"), study.features(contender.data, "whole"), range(study.config.seeds)
    row["floor"], row["psnr"] = distance(study, back, originals), psnr_of(study, samples / "whole-0" / "roundtrip")
    row["free"] = [distance(study, study.features(model, f"seed-{seed}"), originals) for seed in seeds]
    drawn = {str(each): study.features(model, f"top-p-{each:g}") for each in TOP_P}
    row["top_p"] = {each: distance(study, path, originals) for each, path in drawn.items()} | {"1": row["free"][0]}
    row["best_top_p"] = min(row["top_p"], key=row["top_p"].get)
    for against, other in (("originals", originals), ("roundtrip", back)):
        row[against] = {}
        for ratio in study.keep:
            completed = [study.features(model, f"whole-{seed}-{ratio}") for seed in seeds]
            row[against][str(ratio)] = [distance(study, path, other) for path in completed]
    if study.config.small:
        small = study.features("small")
        row["small_floor"] = distance(study, study.features(contender.data, "small"), small)
        row["small_originals"] = distance(study, study.features(model, f"small-0-{HALF}"), small)
    return row


def psnr_of(study: Study, roundtrip: Path) -> float:
    """Of pictures as they come back, in dB, the mean over all."""
    folders, size = (study.test("whole"), roundtrip), study.config.size
    a, b = (torch.from_numpy(np.stack([opened(path, size) for path in numbered(each)])) for each in folders)
    return decibels((to_input(a) - to_input(b)).square().mean((1, 2, 3)))


def parameters_of(run: Path) -> int:
    """Those of the model that a run trained."""
    return count(model_config(read_json(run / "config.json"), run / "config.json"))[0]


def reductions(rows: list[dict], ratios: list[float]) -> dict[str, float]:
    """How much lower JPEG's distance of completions is than another's, as the mean over the ratios kept; the paper's is
    31%, over ImageNet and FFHQ, against VQ."""
    ours, found = next((row for row in rows if row["codec"] == REFERENCE), None), {}
    for row in rows if ours else []:
        if row["codec"] != REFERENCE:
            shares = [
                1 - np.mean(ours["originals"][str(each)]) / np.mean(row["originals"][str(each)]) for each in ratios
            ]
            found[f"{row['codec']}, {SETTINGS[row['setting']]}"] = float(np.mean(shares))
    return found


def tail_of(study: Study) -> dict:
    """Of each class, how many pictures were there to learn from, and the KID x 1000 of its completions, mean over the
    ratios; and how the difference of JPEG's and another codec's goes with rarity."""
    classes = np.array(read_json(study.out / "classes.json")["classes"])
    originals = fid.open_set(study.features("whole"), DIMS).features
    found = {each: {"pictures": len([*(study.source / each).iterdir()])} for each in np.unique(classes).tolist()}
    fewest = min((classes == each).sum() for each in found)
    for name, setting in study.models:
        sets = [
            fid.open_set(study.features(f"{name}-{setting}", f"whole-0-{keep}"), DIMS).features for keep in study.keep
        ]
        for each in found:
            rows = np.flatnonzero(classes == each)[:fewest]
            kids = [kernel_distance(features[rows], originals[rows]) for features in sets]
            found[each][name] = float(np.mean(kids))
    correlations = {}
    rarity = -np.log([each["pictures"] for each in found.values()])
    for name in study.codecs:
        if name != REFERENCE and REFERENCE in study.codecs:
            gap = [each[REFERENCE] - each[name] for each in found.values()]
            result = pearsonr(rarity, gap)
            correlations[name] = {"r": float(result.statistic), "p": float(result.pvalue)}
    return {"classes": found, "count": int(fewest), "correlations": correlations}


def spread(values: list[float], digits: int = 3) -> str:
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def in_words(study: Study, table: dict) -> str:
    """The tables in Markdown."""
    rows, keep, lines = table["rows"], table["keep"], []
    if study.config.count <= DIMS:
        lines += [
            f"warning: {study.config.count} pictures are fewer than {DIMS} features: KID x 1000 instead of FID",
            "",
        ]
    for setting in study.equal:
        title = SETTINGS[setting]
        shown = [row for row in rows if row["setting"] == setting or len(study.settings_of(row["codec"])) == 1]
        lines += [f"{title[0].upper()}{title[1:]} as JPEG: {table['measure']}, {study.config.count:,} pictures", ""]
        lines += results(shown, keep) + costs(shown) + to_round_trip(shown, keep)
    for other, share in table["reductions"].items():
        lines.append(f"- completions by JPEG: {share:.1%} lower than by {other} (the paper: 31% than by VQ)")
    lines.append("")
    if study.config.small:
        lines += small_things(rows)
    if "tail" in table:
        lines += long_tail(study, table["tail"])
    return "\n".join(lines)


def results(rows: list[dict], keep: list[float]) -> list[str]:
    head = ["codec", "tokens", "bits of a file", "bits the model needs", "round trip, dB", "round trip"]
    head += ["free", "best top-p"]
    found = []
    for row in rows:
        cells = [row["title"], f"{row['length'] - 2:,.0f}", f"{row['file_bits']:,.0f}", f"{row['model_bits']:,.0f}"]
        cells += [f"{row['psnr']:.1f}", f"{row['floor']:.3f}", spread(row["free"])]
        cells.append(f"{row['top_p'][row['best_top_p']]:.3f} ({row['best_top_p']})")
        found.append(cells + [spread(row["originals"][str(ratio)]) for ratio in keep])
    return table_of([*head, *(f"from {ratio:g}" for ratio in keep)], found)


def costs(rows: list[dict]) -> list[str]:
    head = ["codec", "weights", "steps x rows x tokens", "pictures", "PFLOP", "codebook, min", "training, min"]
    head += ["sampling, s", "valid without grammar"]
    found = []
    for row in rows:
        cells = [row["title"], f"{row['parameters']:,}", f"{row['steps']:,} x {row['batch']} x {row['context']:,}"]
        cells += [f"{row['pictures']:,}", f"{row['flops'] / 1e15:.3g}"]
        cells += [f"{row['codebook_seconds'] / 60:.0f}", f"{row['training_seconds'] / 60:.0f}"]
        found.append([*cells, f"{row['sampling_seconds']:.0f}", f"{row['valid_without_grammar']:.0%}"])
    return table_of(head, found)


def to_round_trip(rows: list[dict], keep: list[float]) -> list[str]:
    """Distances of completions to what the codec gives back of the originals, which no model could do better than."""
    found = [[row["title"], *(spread(row["roundtrip"][str(ratio)]) for ratio in keep)] for row in rows]
    return table_of(["to the codec's own round trip", *(f"from {ratio:g}" for ratio in keep)], found)


def small_things(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        pairs = (row["floor"], row["small_floor"]), (row["originals"][str(HALF)][0], row["small_originals"])
        cells = [text for a, b in pairs for text in (f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}")]
        found.append([row["title"], SETTINGS[row["setting"]], *cells])
    head = ["small things", "", "round trip", "of small ones", "change", f"from {HALF:g}", "of small ones", "change"]
    return table_of(head, found)


def long_tail(study: Study, tail: dict) -> list[str]:
    found = []
    for name, each in sorted(tail["classes"].items(), key=lambda item: -item[1]["pictures"]):
        found.append([name, f"{each['pictures']:,}", *(f"{each[codec]:.2f}" for codec in study.codecs)])
    head = [f"KID x 1000 of {tail['count']} completions", "pictures to learn from", *study.codecs]
    lines = table_of(head, found)
    for name, each in tail["correlations"].items():
        gap = f"r {each['r']:.2f}, p {each['p']:.2g}"
        lines.append(f"- JPEG minus {name}, with rarity: {gap} (the paper, minus VQ: p 0.0002)")
    return [*lines, ""]


SHOWN, LEFT, TOP = 6, 200, 26  # pictures of each kind in a row of the grid; pixels for the names beside and above them


def picture(study: Study, models: list[tuple[str, str]]) -> Image.Image:
    """A row for each model: what it writes by itself, and how it goes on with the upper half of pictures of the test
    set, also of small ones where there are; above it other pictures of the test set, and those."""
    size = study.config.size
    side = size * max(1, 64 // size)
    titles = ["written by itself", "completed from the upper half", "the same of small ones"][: 1 + len(study.kinds)]
    lefts = [LEFT + i * (SHOWN * (side + 2) + 16) for i in range(len(titles) + 1)]
    sheet = Image.new("RGB", (lefts[-1] - 16, TOP + (len(models) + 1) * (side + 6)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for left, title in zip(lefts, titles, strict=False):
        pen.text((left, 5), title, "black", font)

    def row(number: int, label: str, *groups: list[Path]) -> None:
        top = TOP + number * (side + 6) + 3
        pen.multiline_text((8, top + 8), label, "black", font)
        for left, paths in zip(lefts, groups, strict=False):
            for at, path in enumerate(paths[:SHOWN]):
                shown = Image.fromarray(opened(path, size)).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(shown, (left + at * (side + 2), top))

    every = max(1, study.config.count // SHOWN)
    others = numbered(study.test("whole"))[every // 2 :: every]
    row(0, "the test set", others, *(numbered(study.test(kind))[::every] for kind in study.kinds))
    for number, (name, setting) in enumerate(models, 1):
        samples, label = study.samples_of(name, setting), CONTENDERS[name].title
        label += f"\n{SETTINGS[setting]} as JPEG" if len(study.settings_of(name)) > 1 else ""
        completed = (numbered(samples / f"{kind}-0" / f"keep_{HALF}")[::every] for kind in study.kinds)
        row(number, label, numbered(samples / "seed-0"), *completed)
    return sheet


# --- the command ----------------------------------------------------------------------------------------------------


def write_kinds(out: Path, studies: list[Study]) -> None:
    """OUT/kinds.md and kinds.json: what kinds of pictures cost, and how well they are completed."""
    rows = []
    for study in studies:
        for row in read_json(study.out / "table.json")["rows"]:
            completed, same = (
                float(np.mean(row["originals"][str(HALF)])),
                ("title", "setting", "file_bits", "model_bits", "floor"),
            )
            values = {"share": row["model_bits"] / row["file_bits"], "completed": completed}
            values |= {"above_floor": completed - row["floor"], "measure": measure(study)}
            rows.append({"pictures": study.out.name, **{key: row[key] for key in same}, **values})
    write_json(out / "kinds.json", {"rows": rows})
    head = ["pictures", "codec", "", "bits of a file", "bits the model needs", "share"]
    head += ["round trip", f"from {HALF:g}", "above"]
    found = []
    for row in rows:
        cells = [row["pictures"], row["title"], SETTINGS[row["setting"]]]
        cells += [f"{row['file_bits']:,.0f}", f"{row['model_bits']:,.0f}", f"{row['share']:.0%}"]
        found.append([*cells, *(f"{row[key]:.3f}" for key in ("floor", "completed", "above_floor"))])
    text = "\n".join([f"{rows[0]['measure']}, {studies[0].config.count:,} pictures", "", *table_of(head, found)])
    write_whole(out / "kinds.md", text.encode())
    print(text)


def main(arguments: list[str] | None = None) -> None:
    arguments, extra = split(arguments)
    if arguments[:1] == ["vote"]:
        return vote.main(arguments[1:])
    parser = Flags(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    text = "folder that holds train and test, folders of pictures; several are compared one by one"
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=text)
    text = f"some of {', '.join(CONTENDERS)} (default: all)"
    parser.add_argument("--codecs", nargs="+", default=[*CONTENDERS], choices=CONTENDERS, metavar="CODEC", help=text)
    parser.add_argument("--weights", type=Path, help="of the FID network (default: downloaded once, see fid.py)")
    parser.add_fields(Comparison())
    flags = parser.parse(arguments)
    config = Comparison(**{each.name: getattr(flags, each.name) for each in fields(Comparison) if each.name in flags})
    for folder in (data / name for data in flags.data for name in ("train", "test")):
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder: --data holds `train` and `test`, to learn from and to compare with"
            )
    if len({data.name for data in flags.data}) < len(flags.data):
        raise UserError(f"--data {' '.join(map(str, flags.data))}: two folders of one name, so rename one")
    refuse_decided(extra, DECIDED)
    parse_training(["--config", config.config, *extra])
    several, codecs = len(flags.data) > 1, [*dict.fromkeys(flags.codecs)]
    weights, studies = fid.weights_file(flags.weights), []
    with claim(flags.out):
        for data in flags.data:
            out = flags.out / data.name if several else flags.out
            out.mkdir(exist_ok=True)
            studies.append(Study(out, data, config, codecs, extra, weights))
        try:
            for study in studies:
                study.go(partial(row_step, study))
                print(write_tables(study))
        except Stopped:
            print(f"{flags.out}: stopped, and the same command continues")
            return
        if several:
            write_kinds(flags.out, studies)


if __name__ == "__main__":
    run(main)
