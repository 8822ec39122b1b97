"""How the bits of a file fall with the size of the model, and with what its training takes.

    python -m studies.scaling out/scaling --data data/eurosat
    python -m studies.scaling out/scaling --data data/eurosat --steps 4000 --lr 0.003 0.006 -- --context 1024 --compile

Five Llamas of 50 thousand to 8 million weights that compute (embeddings do not).  Each is trained at every learning
rate for a quarter of the steps, and at the best one for half and for all of them.  OUT/scaling.json, scaling.md and
scaling.png are the result: bits over weights, bits over FLOPs, and what fits them best, bits = floor + a x^-b (the form
of Hoffmann et al. 2022, arXiv:2203.15556).  What comes after `--` goes to train.py.  The same command continues.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.optimize import curve_fit

from codec import load_tokenizer
from plumbing.command import Flags, UserError, run
from plumbing.draw import draw_curves, save_image
from plumbing.files import write_json, write_whole
from plumbing.plan import computing_parameters, flops_of
from plumbing.run import claim, read_lines
from studies.steps import Step, Stopped, Work, refuse_another, refuse_decided, split, table_of, training, words
from train import Config
from train import parse as parse_training

DECIDED = (
    "--config --data --out --steps --every --samples --lr --dim --layers --heads --kv-heads --hidden --plan --export"
)
SHARES = (0.25, 0.5, 1)  # of the steps; the learning rates are tried on the first


@dataclass(frozen=True)
class Size:
    dim: int
    layers: int
    heads: int
    hidden: int

    @property
    def flags(self) -> str:
        shape = f"--dim {self.dim} --layers {self.layers} --hidden {self.hidden}"
        return f"{shape} --heads {self.heads} --kv-heads {self.heads}"


SIZES = [Size(32, 4, 1, 88), Size(64, 4, 2, 176), Size(128, 4, 4, 344), Size(192, 6, 6, 512), Size(288, 8, 9, 768)]


@dataclass
class Scaling:
    out: Path
    data: Path
    steps: int
    rates: list[float]
    extra: list[str]  # flags of train.py
    jobs: int

    def go(self) -> None:
        """Errors: UserError; Stopped."""
        settings = {"steps": self.steps, "rates": self.rates, "train": self.extra, "data": str(self.data.resolve())}
        refuse_another(self.out, settings, {"rates"})
        write_json(self.out / "settings.json", settings)
        work = Work(self.out, self.jobs)
        tried = [[self.step(size, SHARES[0], rate)] for size in reversed(SIZES) for rate in self.rates]
        work.do(tried, "learning rates")
        chains = [
            [self.step(size, share, self.best(size))] for size in reversed(SIZES) for share in reversed(SHARES[1:])
        ]
        work.do(chains, "sizes")
        self.report()

    def config(self, size: Size) -> Config:
        tokenizer = load_tokenizer(self.data)
        config, _ = parse_training(["--config", "small", *size.flags.split(), *self.extra])
        sizes = tokenizer.grammar.sizes if config.syntax else ()
        return replace(config, vocab=tokenizer.vocab, positions=sizes)

    def flops(self, size: Size, share: float) -> float:
        config = self.config(size)
        return flops_of(config, computing_parameters(config)) * config.batch * config.context * self.steps_of(share)

    def steps_of(self, share: float) -> int:
        return max(1, round(share * self.steps))

    def run(self, size: Size, share: float, rate: float) -> Path:
        return self.out / "runs" / f"dim{size.dim}-steps{self.steps_of(share)}-lr{rate:g}"

    def step(self, size: Size, share: float, rate: float) -> Step:
        run, steps = self.run(size, share, rate), self.steps_of(share)
        train = f"train.py --config small --data {{data}} --out {{run}} {size.flags} --lr {rate} --steps {steps} "
        train += f"--every {steps} --samples 1"
        return training(run, steps, [*words(train, data=self.data, run=run), *self.extra], self.flops(size, share))

    def bits(self, size: Size, share: float, rate: float) -> float:
        log = read_lines(self.run(size, share, rate) / "log.jsonl")
        return [record["val_bits_per_file"] for record in log if "val_bits_per_file" in record][-1]

    def best(self, size: Size) -> float:
        return min(self.rates, key=lambda rate: self.bits(size, SHARES[0], rate))

    def report(self) -> None:
        rows = []
        for size in SIZES:
            row = {
                "dim": size.dim,
                "layers": size.layers,
                "weights": computing_parameters(self.config(size)),
                "lr": self.best(size),
            }
            row["tried"] = {rate: self.bits(size, SHARES[0], rate) for rate in self.rates}
            row["bits"] = {share: self.bits(size, share, row["lr"]) for share in SHARES}
            rows.append(row | {"flops": {share: self.flops(size, share) for share in SHARES}})
        points = sorted((row["flops"][share], row["bits"][share]) for row in rows for share in SHARES)
        frontier = [point for i, point in enumerate(points) if point[1] <= min(bits for _, bits in points[: i + 1])]
        weights = [(row["weights"], row["bits"][1]) for row in rows]
        fits = {"weights": power_law(weights), "flops": power_law(frontier)}
        write_json(self.out / "scaling.json", {"rows": rows, "frontier": frontier, "fits": fits})
        write_whole(self.out / "scaling.md", in_words(rows, fits).encode())
        save_image(self.out / "scaling.png", picture(rows, frontier, fits))
        print(in_words(rows, fits))


def power_law(points: list[tuple[float, float]]) -> dict[str, float]:
    """The floor, a and b of bits = floor + a (x / x0)^-b that fits best, x0 the smallest x; of few or odd points no fit
    may be found, and then there is none."""
    x, y = np.array(points).T
    if len(points) < 4:
        return {}
    try:
        start, bounds = (0.9 * y.min(), y.max() - 0.9 * y.min(), 0.3), ([0, 0, 0.01], [y.min(), 2 * y.max(), 2])
        floor, a, b = curve_fit(lambda x, floor, a, b: floor + a * x**-b, x / x.min(), y, start, bounds=bounds)[0]
    except RuntimeError:
        return {}
    return {"floor": float(floor), "a": float(a), "b": float(b), "x0": float(x.min())}


def in_words(rows: list[dict], fits: dict[str, dict]) -> str:
    rates, shares, found = [*rows[0]["tried"]], [*rows[0]["bits"]], []
    for row in rows:
        cells = [f"{row['weights']:,}", f"{row['dim']}, {row['layers']}"]
        cells += [f"{bits:,.1f}" for bits in row["tried"].values()]
        cells += [f"{row['bits'][share]:,.1f}" for share in shares[1:]]
        found.append([*cells, f"{row['flops'][shares[-1]] / 1e15:.3g}"])
    head = ["weights", "dim, layers", *(f"a quarter, lr {rate:g}" for rate in rates)]
    lines = table_of([*head, "half the steps, best lr", "all steps", "PFLOP"], found)
    for name, fit in fits.items():
        if fit:
            law = f"{fit['floor']:,.0f} + {fit['a']:,.0f} ({name} / {fit['x0']:.3g})^-{fit['b']:.3f}"
            lines.append(f"- bits over {name}: {law}")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict], frontier: list[tuple[float, float]], fits: dict[str, dict]) -> Image.Image:
    """Two panels: bits over weights, for each number of steps; bits over FLOPs, for each size."""
    names = dict(zip(SHARES, ("a quarter of the steps", "half", "all"), strict=True))
    over = {name: [(row["weights"], row["bits"][share]) for row in rows] for share, name in names.items()}
    sizes = {f"{row['weights']:,}": [(row["flops"][share], row["bits"][share]) for share in SHARES] for row in rows}
    for curves, fit, points in ((over, fits["weights"], over["all"]), (sizes, fits["flops"], frontier)):
        if fit:
            x = np.geomspace(points[0][0], points[-1][0], 60)
            y = fit["floor"] + fit["a"] * (x / fit["x0"]) ** -fit["b"]
            curves["fit"] = [*zip(x.tolist(), y.tolist(), strict=True)]
    panels = [draw_curves(over, "bits a file", "weights that compute", logarithmic=True)]
    panels.append(draw_curves(sizes, "bits a file", "FLOPs of training", logarithmic=True))
    sheet = Image.new("RGB", (sum(panel.width for panel in panels), panels[0].height), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i * panel.width, 0))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    arguments, extra = split(arguments)
    parser = Flags(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--data", type=Path, required=True, help="data folder, as data.prepare writes it")
    parser.add_argument("--steps", type=int, default=1000, help="of the longest training of each size (default: 1000)")
    rates, text = [0.003, 0.006, 0.012], "learning rates to try (default: 0.003 0.006 0.012)"
    parser.add_argument("--lr", type=float, nargs="+", default=rates, help=text)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once (default: 1)")
    flags = parser.parse(arguments)
    for name, value in (("steps", flags.steps), ("jobs", flags.jobs)):
        if not 1 <= value < 2**31:
            raise UserError(f"--{name} is {value}: choose 1 or more")
    if not all(0 < rate < math.inf for rate in flags.lr):
        raise UserError(f"--lr is {' '.join(map(str, flags.lr))}: choose numbers above 0")
    refuse_decided(extra, DECIDED)
    load_tokenizer(flags.data)
    parse_training(["--config", "small", *extra])
    with claim(flags.out):
        try:
            Scaling(flags.out, flags.data, flags.steps, [*dict.fromkeys(flags.lr)], extra, flags.jobs).go()
        except Stopped:
            print(f"{flags.out}: stopped, and the same command continues")


if __name__ == "__main__":
    run(main)
