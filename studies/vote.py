"""A blind comparison: which of two completions of the same picture looks more like a real one?

    python -m studies.compare vote out/compare                                   # writes out/compare/vote.html
    python -m studies.compare vote out/compare --models jpeg-flops vq4-pictures --pairs 40
    python -m studies.compare vote out/compare --count ann.json bob.json         # adds up what people sent

The page is one file that asks for nothing else: open it, or send it to people.  Sides and order are shuffled, and which
is which is told after the last vote, with counts, the 95% interval of Wilson, and a file to save.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from plumbing.command import Flags, UserError
from plumbing.draw import png
from plumbing.files import write_whole
from studies.contest import CONTENDERS, REFERENCE, SETTINGS, Comparison, Study, numbered, opened
from studies.steps import table_of

LARGEST_RESULT = 1 << 20  # bytes
PREFERRED = ("jpeg", "vq8", "vq4")  # to be compared, the first that are there


def completed(out: Path) -> dict[str, Path]:
    """The models of a comparison by name, and their completions.  Errors: UserError."""
    if not (out / "settings.json").exists():
        inside = [path.parent.name for path in sorted(out.glob("*/settings.json"))]
        hint = f"name one of its folders ({', '.join(inside)})" if inside else "run `python -m studies.compare` first"
        raise UserError(f"{out} holds no comparison: {hint}")
    study, found = Study(out, out, Comparison(), [*CONTENDERS], [], out), {}  # for the names of its folders alone
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
        advice = f"choose of {', '.join(kept) or 'none yet'}, or go on with the comparison"
        raise UserError(f"{out} has {len(there)} models that completed --keep {keep:g}, and 2 are needed: {advice}")
    models = models or [*there][:2]
    if len({*models} & {*there}) < 2:
        raise UserError(f"--models {' '.join(models)}: choose two of {', '.join(there)}")
    return {name: there[name] for name in models}


def title_of(model: str) -> str:
    name, setting = model.rsplit("-", 1)
    return CONTENDERS[name].title + (f", {SETTINGS[setting]} as JPEG" if name != REFERENCE else "")


def by_number(folder: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in numbered(folder)} if folder.is_dir() else {}


def data_uri(pixels: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(Image.fromarray(pixels))).decode()}"


def page(out: Path, models: list[str] | None, keep: float, pairs: int, seed: int) -> bytes:
    """The page, the same for the same completions and seed.  Errors: UserError."""
    folders = chosen(out, models, keep)
    files = {name: by_number(folder) for name, folder in folders.items()}
    originals, rng, shown = by_number(out / "test" / "whole"), np.random.default_rng(seed), []
    there = sorted(originals.keys() & set.intersection(*map(set, files.values())))  # a study may be half done
    if (pairs := min(pairs, len(there))) < 2:
        raise UserError(f"--pairs {pairs} of {len(there)} completions: choose 2 or more, or complete more")
    with Image.open(originals[there[0]]) as first:
        size = first.width
    for number in rng.permutation([there[i * len(there) // pairs] for i in range(pairs)]).tolist():
        sides = [*folders] if rng.random() < 0.5 else [*folders][::-1]
        left, right = (data_uri(opened(files[name][number], size)) for name in sides)
        given = data_uri(opened(originals[number], size)[: round(keep * size)])
        shown.append({"picture": number, "sides": sides, "given": given, "left": left, "right": right})
    hidden = {"models": [*folders], "titles": [*map(title_of, folders)], "keep": keep, "pairs": shown}
    text = base64.b64encode(json.dumps(hidden).encode())
    template = Path(__file__).with_name("vote.html").read_bytes()
    digest = hashlib.sha256(text).hexdigest()[:16].encode()
    return template.replace(b"{{hidden}}", text).replace(b"{{page}}", digest)


# --- what was voted -------------------------------------------------------------------------------------------------


def counted(out: Path, paths: list[Path]) -> dict[str, object]:
    """The votes of several people for the page of OUT, added up.  Errors: UserError."""
    made = re.search(rb'page = "(\w+)"', (out / "vote.html").read_bytes()) if (out / "vote.html").exists() else None
    source, models, choices = {made[1].decode(): out / "vote.html"} if made else {}, {}, []
    for path in paths:
        try:
            if path.stat().st_size > LARGEST_RESULT:
                raise ValueError(f"it has more than {LARGEST_RESULT >> 20} MiB")
            result = json.loads(path.read_bytes())
            votes = [(vote["left"], vote["right"], vote["choice"]) for vote in result["votes"]]
            named = {title_of(name): name for name in result["models"]}
            if len(named) != 2 or not votes or any({*vote[:2]} != {*named.values()} for vote in votes):
                raise ValueError("its votes are none of two models")
            voted = [{"left": left, "right": right, "tie": "tie"}[choice] for left, right, choice in votes]
            page = str(result["page"])
        except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is no result of a vote ({error}): leave it out") from None
        source, models = source or {page: path}, models or named
        if page not in source or named != models:
            (other,) = source.values()
            raise UserError(f"{path} is of another page than {other}: write that page again, or leave this out")
        choices += voted
    first, second, ties = (choices.count(each) for each in (*models.values(), "tie"))
    total = {"people": len(paths), "titles": [*models], "counts": [first, second, ties]}
    if first + second:
        test = binomtest(first, first + second)
        interval = test.proportion_ci(method="wilson")
        total |= {"share": first / (first + second), "interval": [interval.low, interval.high], "p": test.pvalue}
    return total


def in_words(total: dict) -> str:
    """A line for each model and for the ties, and the verdict, as on the page."""
    counts, titles, people = total["counts"], total["titles"], total["people"]
    people = f"{people} people" if people > 1 else "one person"
    if "share" not in total:
        return "\n".join(table_of(["", "votes"], [["cannot tell", str(counts[2])]]) + ["nobody could ever tell"])
    (low, high), decided = total["interval"], counts[0] + counts[1]
    shares = [(total["share"], low, high), (1 - total["share"], 1 - high, 1 - low)]
    said = [f"{share:.0%} ({100 * low:.0f} to {high:.0%})" for share, low, high in shares]
    rows = [[title, str(count), text] for title, count, text in zip(titles, counts, said, strict=False)]
    share, low, high = max(shares)
    told = f"preferred {titles[shares.index(max(shares))]} in {share:.0%} of {decided} decided pairs"
    told = f"{people} {told} (95%: {100 * low:.0f} to {high:.0%}, p {total['p']:.2g})"
    told += "" if total["p"] < 0.05 else ": no difference can be said"
    return "\n".join(table_of(["", "votes", "of decided (95%)"], [*rows, ["cannot tell", str(counts[2]), ""]]) + [told])


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
        print(in_words(counted(flags.out, flags.count)))
        return
    write_whole(flags.out / "vote.html", page(flags.out, flags.models, flags.keep, flags.pairs, flags.seed))
    print(f"{flags.out / 'vote.html'}: open it in a browser, or send it to people")
