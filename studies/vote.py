"""A blind comparison: which of two completions of the same picture looks more like a real one?

    python -m studies.compare vote out/compare                                   # writes out/compare/vote.html
    python -m studies.compare vote out/compare --models jpeg-flops vq4-pictures --pairs 40
    python -m studies.compare vote out/compare --count ann.json bob.json         # adds up what people sent

The page is one file that asks for nothing else: open it, or send it to people.  Sides and order are shuffled, and which
is which is told after the last vote, with counts, the 95% interval of Wilson, and a file to save.
"""

import base64
import hashlib
import io
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from plumbing.command import Flags, UserError
from plumbing.files import read_json, write_whole
from studies.contest import CONTENDERS, REFERENCE, SETTINGS, Comparison, Study, numbered, opened

LARGEST_RESULT = 1 << 20  # bytes
PREFERRED = ("jpeg", "vq8", "vq4")  # to be compared, the first that are there


def completed(out: Path) -> dict[str, Path]:
    """The models of a comparison by name, and their completions.  Errors: UserError."""
    if not (out / "settings.json").exists():
        inside = [path.parent.name for path in sorted(out.glob("*/settings.json"))]
        hint = f"name one of its folders ({', '.join(inside)})" if inside else "run `python -m studies.compare` first"
        raise UserError(f"{out} holds no comparison: {hint}")
    held = read_json(out / "settings.json")
    config = Comparison(**{each.name: held[each.name] for each in fields(Comparison) if each.name in held})
    study = Study(out, Path(held["data"]), config, [*CONTENDERS], [], out)
    found = {}
    for name in (*PREFERRED, *(name for name in CONTENDERS if name not in PREFERRED)):
        for setting in ("pictures", "flops"):
            if (folder := study.samples_of(name, setting) / "whole-0").is_dir():
                found[f"{name}-{setting}"] = folder
    return found


def chosen(out: Path, models: list[str] | None, keep: float) -> dict[str, Path]:
    """Two models and their completions of the share `keep`.  Errors: UserError."""
    found = completed(out)
    there = {name: folder / f"keep_{keep:g}" for name, folder in found.items() if (folder / f"keep_{keep:g}").is_dir()}
    if len(there) < 2:
        kept = sorted({path.name.removeprefix("keep_") for each in found.values() for path in each.glob("keep_*")})
        raise UserError(f"{out} has {len(there)} models that completed --keep {keep:g}: choose of {', '.join(kept)}")
    models = models or [*there][:2]
    if len({*models} & {*there}) < 2:
        raise UserError(f"--models {' '.join(models)}: choose two of {', '.join(there)}")
    return {name: there[name] for name in models}


def title_of(model: str) -> str:
    name, setting = model.rsplit("-", 1)
    return CONTENDERS[name].title + (f", {SETTINGS[setting]} as JPEG" if name != REFERENCE else "")


def data_uri(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def page(out: Path, models: list[str] | None, keep: float, pairs: int, seed: int) -> bytes:
    """The page, the same for the same completions and seed.  Errors: UserError."""
    folders = chosen(out, models, keep)
    originals, rng = numbered(out / "test" / "whole"), np.random.default_rng(seed)
    count = min(len(originals), *(len(numbered(folder)) for folder in folders.values()))
    if (pairs := min(pairs, count)) < 2:
        raise UserError(f"--pairs {pairs} of {count} completions: choose 2 or more")
    size, shown = Image.open(originals[0]).size[0], []
    for number in rng.permutation([i * count // pairs for i in range(pairs)]).tolist():
        sides = [*folders] if rng.random() < 0.5 else [*folders][::-1]
        files = [numbered(folders[name])[number] for name in sides]
        given = opened(originals[number], size).copy()
        given[round(keep * size) :] = 128
        pair = {"given": data_uri(given), "left": data_uri(opened(files[0], size))}
        shown.append(pair | {"right": data_uri(opened(files[1], size)), "picture": number, "sides": sides})
    hidden = {"models": [*folders], "titles": [*map(title_of, folders)], "keep": keep, "pairs": shown}
    text = base64.b64encode(json.dumps(hidden).encode())
    template = Path(__file__).with_name("vote.html").read_bytes()
    digest = hashlib.sha256(text).hexdigest()[:16].encode()
    return template.replace(b"{{hidden}}", text).replace(b"{{page}}", digest)


# --- what was voted -------------------------------------------------------------------------------------------------


def counted(paths: list[Path]) -> dict[str, object]:
    """The votes of several people for the same page, added up.  Errors: UserError."""
    results = []
    for path in paths:
        if path.exists() and path.stat().st_size > LARGEST_RESULT:
            raise UserError(f"{path} has more than {LARGEST_RESULT >> 20} MiB: leave it out")
        result = read_json(path)
        try:
            page, models, titles = str(result["page"]), [*map(str, result["models"])], [*map(str, result["titles"])]
            votes = [(vote["left"], vote["right"], vote["choice"]) for vote in result["votes"]]
            right = all({*vote[:2]} == {*models} and vote[2] in ("left", "right", "tie") for vote in votes)
            if not (right and len(models) == len(titles) == 2 and votes):
                raise ValueError("its votes are none of two models")
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no result of a vote ({error}): leave it out") from None
        if results and page != results[0][0]:
            raise UserError(f"{path} is of another page than {paths[0]}: count each page by itself")
        results.append((page, models, titles, votes))
    page, models, titles, _ = results[0]
    choices = [
        {"left": left, "right": right}.get(choice, "tie") for *_, votes in results for left, right, choice in votes
    ]
    first, second, ties = (choices.count(each) for each in (*models, "tie"))
    total = {"page": page, "people": len(paths), "models": models, "titles": titles, "counts": [first, second, ties]}
    if first + second:
        test = binomtest(first, first + second)
        interval = test.proportion_ci(method="wilson")
        total |= {"share": first / (first + second), "interval": [interval.low, interval.high], "p": test.pvalue}
    return total


def in_words(total: dict) -> str:
    (first, second, ties), (one, other) = total["counts"], total["titles"]
    lines = [f"{one}: {first}", f"{other}: {second}", f"cannot tell: {ties}"]
    if "share" in total:
        low, high = total["interval"]
        lines.append(f"{one} was preferred in {total['share']:.0%} of {first + second} pairs that were decided")
        lines[-1] += f" (95%: {low:.0%} to {high:.0%}; p {total['p']:.2g}; {total['people']} people)"
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument("out", type=Path, help="folder of a comparison")
    text = "as its folders of samples are called (default: JPEG, and the first other of vq8, vq4 ...)"
    parser.add_argument("--models", nargs=2, metavar="MODEL", help=text)
    parser.add_argument("--keep", type=float, default=0.5, help="share that was given (default: 0.5)")
    parser.add_argument("--pairs", type=int, default=50, help="how many are shown (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of sides and order (default: 0)")
    text = "instead of writing the page: add up what people have saved"
    parser.add_argument("--count", type=Path, nargs="+", metavar="FILE", help=text)
    flags = parser.parse(arguments)
    if flags.seed < 0:
        raise UserError(f"--seed is {flags.seed}: choose 0 or more")
    if flags.count:
        print(in_words(counted(flags.count)))
        return
    write_whole(flags.out / "vote.html", page(flags.out, flags.models, flags.keep, flags.pairs, flags.seed))
    print(f"{flags.out / 'vote.html'}: open it in a browser, or send it to people")
