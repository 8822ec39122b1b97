"""The comparisons of the README: what syntax positions are worth, and how often a free model writes a valid file.

python -m studies.positions positions OUT --data data/shapes data/eurosat     # plain and told, at two sizes
python -m studies.positions without OUT --data data/shapes data/eurosat       # each position held back in turn
python -m studies.positions validity RUN                                      # of every checkpoint (train.py --keep 9)
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.stream import Stream
from plumbing.checkpoint import checkpoints, read_model
from plumbing.command import Flags, UserError, run
from plumbing.draw import draw_curves
from sample import Sampling, generate
from train import parse, train

DC = ("zero", "left", "above", "above-right")  # of the block that is due, and of the one that is here
NAMES = ("block", "coefficient", "node", "row", "column", *(f"{of}-{each}" for of in ("due", "here") for each in DC))
SIZES = {
    "dim 96, 2 layers": "--dim 96 --layers 2 --heads 3 --kv-heads 3 --hidden 256",
    "dim 192, 4 layers": "--dim 192 --layers 4 --heads 6 --kv-heads 6 --hidden 512",
}


def positions(out: Path, folders: list[Path], steps: int) -> None:
    """Train what is not trained yet, print bits a file at the end, and draw OUT/positions.png."""
    panels = []
    for folder in folders:
        for size, shape in SIZES.items():
            curves = {}
            for name, flag in (("plain", "--no-syntax"), ("told its positions", "--syntax")):
                to = out / f"{folder.name}-{size.split(',')[0].replace(' ', '')}{flag[1:]}"
                arguments = f"--data {folder} --out {to} --steps {steps} --every {max(1, steps // 4)} --samples 16"
                subprocess.run([sys.executable, "train.py", *arguments.split(), *shape.split(), flag], check=True)
                records = [json.loads(line) for line in (to / "log.jsonl").read_text().splitlines()]
                curves[name] = [(r["step"], r["val_bits_per_file"]) for r in records if "val_bits_per_file" in r]
                speed = np.median([r["tokens_per_second"] for r in records if "tokens_per_second" in r])
                legal = [r["val_legal_bits_per_file"] for r in records if "val_legal_bits_per_file" in r][-1]
                print(
                    json.dumps(
                        {
                            "data": folder.name,
                            "size": size,
                            "model": name,
                            "bits_per_file": curves[name][-1][1],
                            "legal": legal,
                            "tokens_per_second": speed,
                        }
                    )
                )
            panels.append(draw_curves(curves, f"{folder.name}, {size}: bits a file over steps"))
    sheet = Image.new("RGB", (2 * panels[0].width, -(-len(panels) // 2) * panels[0].height), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % 2 * panel.width, i // 2 * panel.height))
    sheet.save(out / "positions.png")


def without(out: Path, folders: list[Path], steps: int) -> None:
    """Train the small config with all positions, and with all but one; print bits a file at the end."""
    pieces = Stream.read_syntax
    for folder in folders:
        for number, name in enumerate(("nothing", *NAMES)):
            told = np.arange(1, 1 + len(NAMES)) != number
            Stream.read_syntax = lambda self, start, count, told=told: pieces(self, start, count) * told
            to = out / f"{folder.name}-without-{name}"
            arguments = f"--data {folder} --out {to} --steps {steps} --every {steps} --samples 1"
            train(parse(arguments.split())[0])
            bits = json.loads((to / "log.jsonl").read_text().splitlines()[-1])["val_bits_per_file"]
            print(json.dumps({"data": folder.name, "without": name, "bits_per_file": round(bits, 1)}))
    Stream.read_syntax = pieces


def validity(out: Path, count: int) -> None:
    """Print the share of whole valid files of the untrained model and of each checkpoint, at three temperatures."""
    for number, checkpoint in enumerate([None, *reversed(checkpoints(out))]):
        model, tokens = read_model(checkpoint or checkpoints(out)[0], torch.device("cpu"))
        if checkpoint is None:
            model.init_weights(0)
        shares = {}
        for temperature in (0.7, 1.0, 1.3):
            begun, seeds = [np.array([tokens.start])] * count, [(number, i) for i in range(count)]
            rows = generate(model, tokens, begun, seeds, Sampling(temperature, free=True))
            shares[temperature] = sum(tokens.codec.check(tokens.decode(row)) is None for row in rows) / count
        print(
            json.dumps({"checkpoint": checkpoint.name if checkpoint else "untrained", "files": count, "valid": shares})
        )


STUDIES = {"positions": positions, "without": without}


def main() -> None:
    parser = Flags(__doc__)
    parser.add_argument("study", choices=(*STUDIES, "validity"))
    parser.add_argument("out", type=Path, help="folder of the runs, or run folder")
    parser.add_argument("--data", type=Path, nargs="+", help="data folders")
    parser.add_argument("--steps", type=int, default=500, help="of each run (default: 500)")
    parser.add_argument("--count", type=int, default=128, help="files (default: 128)")
    flags = parser.parse(None)
    if flags.study in STUDIES and not flags.data or flags.study == "validity" and not checkpoints(flags.out):
        raise UserError(f"{', '.join(STUDIES)} need --data and data folders, validity a run folder with checkpoints")
    if flags.study in STUDIES:
        STUDIES[flags.study](flags.out, flags.data, flags.steps)
    else:
        validity(flags.out, flags.count)


if __name__ == "__main__":
    run(main)
