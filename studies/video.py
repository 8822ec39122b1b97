"""What a run that was trained on clips has learned: bits, valid files, continuations, and FID over frames.

    python -m studies.video out/clips                                                    # into out/clips/video
    python -m studies.video out/clips --originals clips --weights FILE --to out/measured

It writes OUT/video.json and OUT/video.md, and shows clips as they are and as the model went on with them: OUT/true.webp
and OUT/continued.webp, and beside them film strips, .png.  The same seed gives the same numbers.
"""

import argparse
import io
from dataclasses import asdict
from itertools import pairwise, product
from pathlib import Path

import av
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

import fid
from codec import Codec, Tokenizer, load_tokenizer
from data.prepare import chunks, usable
from data.sources import find_items
from data.stream import Stream
from model import Llama
from plumbing.checkpoint import read_run
from plumbing.command import Flags, UserError, run
from plumbing.draw import save_grid
from plumbing.files import read_json, write_json, write_whole
from plumbing.processes import at_once, best_device, precision
from sample import ASKED, Sampling, generate
from train import Config, evaluate

TEMPERATURES = [0.7, 1.0, 1.5]
DIMS = 768  # features of the FID network
Table = dict[str, list]  # rows, and of each its numbers; the head has the name ""


def psnr(found: np.ndarray, truth: np.ndarray) -> list[float | None]:
    """Decibels for each frame of clips (N, T, H, W, 3), of the mean squared error over all clips and the three colours;
    None where nothing differs, for then they are infinitely many."""
    errors = np.square(found.astype(float) - truth).mean((0, 2, 3, 4)).tolist()
    return [10 * np.log10(255**2 / error).item() if error else None for error in errors]


def ssim(found: np.ndarray, truth: np.ndarray) -> list[float]:
    """Structural similarity for each frame of clips (N, T, H, W, 3), its mean over all clips: Wang et al. 2004, (13),
    over the luma of BT.601, with their Gaussian window of 11x11 and deviation 1.5 wherever it lies inside the frame."""
    x, y = (clips @ np.array([0.299, 0.587, 0.114]) for clips in (found, truth))
    mean = lambda of: gaussian_filter(of, (0, 0, 1.5, 1.5), truncate=3.5)[..., 5:-5, 5:-5]  # noqa: E731
    mx, my, c1, c2 = mean(x), mean(y), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    alike = (2 * mx * my + c1) / (mx * mx + my * my + c1) * (2 * both + c2) / (vx + vy + c2)
    return alike.mean((0, 2, 3)).tolist()


def complaint(file: bytes, frames: int) -> str | None:
    """None if FFmpeg decodes just so many whole frames without a word, else what is wrong.  Of a slice that is missing
    it says nothing, but marks the frame; that frames have more slices than it keeps accounts of, it always says."""
    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=False) as log, av.open(io.BytesIO(file)) as video:
            video.streams.video[0].codec_context.thread_count = 1  # several threads would not mark it
            corrupt = [frame.is_corrupt for frame in video.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:  # no video in it
        return str(error)
    finally:
        av.logging.set_level(None)
    if words := [text.strip() for _, _, text in log if "Possibly too many slices" not in text]:
        return words[0]
    if any(corrupt):
        return f"frame {corrupt.index(True)} is corrupt"
    return None if len(corrupt) == frames else f"{len(corrupt)} frames, not {frames}"


def documents(stream: Stream, tokenizer: Tokenizer, count: int) -> list[np.ndarray]:
    """The symbols of so many documents, evenly spread."""
    spans = [*pairwise(stream.documents.tolist())]
    chosen = [spans[number] for number in np.linspace(0, len(spans) - 1, count).round().astype(int)]
    return [tokenizer.decode(stream.read(begin, end - begin)) for begin, end in chosen]


def write(model: Llama, tokenizer: Tokenizer, prompts: list, seed: int, what: str, how: Sampling) -> list[np.ndarray]:
    """The symbols of the files that the model writes after prompts of symbols."""
    begun, rows = [tokenizer.prompt(prompt) for prompt in prompts], []
    with tqdm(None, what, unit=" tokens", disable=None) as bar:
        count = lambda done: (bar.update(ASKED * int((~done).sum())), done.all())[1]  # noqa: E731
        for numbers in chunks(range(len(begun)), at_once(model, model.config.context)):
            tokens, due = zip(*(begun[i] for i in numbers), strict=True)
            rows += generate(model, tokenizer, tokens, [(seed, i) for i in numbers], how, count, due)
    return [tokenizer.decode(row) for row in rows]


def costs(model: Llama, tokenizer: Tokenizer, val: Stream, device: torch.device) -> Table:
    """What a validation clip costs: bits of the model, and bytes of its file, with the container and without."""
    count, codec = len(val.documents) - 1, tokenizer.codec
    bits = evaluate(model, val, tokenizer.grammar, Config(**asdict(model.config)), device)
    table = {"": [f"mean of {count}"], "bits a clip": [bits["bits_per_file"]]}
    table["bits a clip, of legal tokens alone"] = [bits["legal_bits_per_file"]]
    table["bits a frame"] = [bits["bits_per_file"] / codec.parts]
    files = [len(codec.file(symbols)) for symbols in documents(val, tokenizer, count)]
    return table | {"bytes in the sequence": [val.symbols / count], "bytes in a file": [sum(files) / count]}


def validity(model: Llama, tokenizer: Tokenizer, count: int, seed: int, name: str) -> tuple[Table, list[np.ndarray]]:
    """The share of files that `check` and FFmpeg find valid, with the grammar's mask and without; and some with it."""
    codec, prompts, shares, files = tokenizer.codec, [np.empty(0, tokenizer.dtype)] * count, {}, {}
    for free, temperature in product((False, True), TEMPERATURES):
        row, how = f"{name}, {'without' if free else 'with'} the grammar", Sampling(temperature, free=free)
        found = files[free, temperature] = write(model, tokenizer, prompts, seed, f"{row}, {temperature}", how)
        words = [codec.check(symbols) or complaint(codec.file(symbols), codec.parts) for symbols in found]
        shares.setdefault(row, []).append(words.count(None) / count)
    return shares, files[False, 1.0]


def likeness(given: int, written: np.ndarray, held: np.ndarray, pixels: np.ndarray | None) -> Table:
    """How like the true frames ahead are the model's, the last one given, and what the codec makes of the true ones."""
    last = np.repeat(held[:, given - 1 : given], held.shape[1] - given, 1)
    guesses = {"the model": written[:, given:], "the last frame given": last, "the round trip": held[:, given:]}
    table: Table = {"": [f"+{ahead}" for ahead in range(1, last.shape[1] + 1)]}
    for (to, truth), (name, guess) in product((("the round trip", held), ("the originals", pixels)), guesses.items()):
        if truth is not None and name != to:
            table[f"PSNR of {name} to {to}"] = psnr(guess, truth[:, given:])
            table[f"SSIM of {name} to {to}"] = ssim(guess, truth[:, given:])
    return table


def distances(network: fid.Inception, sets: dict[str, np.ndarray], device: torch.device) -> Table:
    """FID over frames: of samples, and as the floor below it of other true clips, or of the codec's round trip."""
    network, seen = network.to(device), {}
    for name, clips in sets.items():
        frames = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2)
        batches = tqdm(frames.split(4), f"FID of {name}", disable=None)
        with torch.inference_mode():
            features = torch.cat([network(fid.prepare(list(batch), device)).cpu() for batch in batches])
        seen[name] = fid.Statistics.of(features.numpy())
    pairs = [("samples", "validation clips"), ("training clips", "validation clips")]
    pairs += [("samples", "originals"), ("validation clips", "originals")] if "originals" in seen else []
    fids = {f"{a} to {b}": [fid.frechet_distance(seen[a], seen[b])] for a, b in pairs}
    return {"": [f"FID-{DIMS}, {len(frames):,} frames"], **fids}


def originals(source: Path, codec: Codec, held: list[np.ndarray]) -> np.ndarray:
    """The pixels that became these symbols, found among all clips of a source.  Errors: UserError."""
    waiting, clips = {symbols.tobytes() for symbols in held}, usable(find_items(source), codec)
    clips = tqdm(clips, "originals", unit=" clips", disable=None)
    found = {key: pixels for pixels in clips if (key := codec.encode(pixels).tobytes()) in waiting}
    if lacking := len(waiting - found.keys()):
        raise UserError(f"--originals {source} lacks {lacking} of {len(held)} clips: name what the data were made from")
    return np.stack([found[symbols.tobytes()] for symbols in held])


def study(flags: argparse.Namespace) -> dict[str, Table]:
    """All tables by their titles.  Errors: UserError."""
    model, tokenizer, checkpoint = read_run(flags.run, device := best_device())
    codec, data = tokenizer.codec, flags.data or Path(read_json(flags.run / "config.json").get("data", ""))
    if len(codec.shape) != 4:
        raise UserError(f"{flags.run} was trained on pictures ({codec.name}): name a run that was trained on clips")
    if load_tokenizer(data) != tokenizer:
        raise UserError(f"{data} holds other tokens than {flags.run} reads: name its data with --data")
    if not (kept := codec.kept(flags.keep)):
        raise UserError(f"--keep is {flags.keep}: choose {1 / codec.parts:.2g} or more, for one frame must be given")
    network = fid.load(fid.weights_file(flags.weights), DIMS) if flags.weights else None
    val, train = (Stream(data, split, len(model.config.positions)) for split in ("val", "train"))
    count, given = min(flags.count, *(len(each.documents) - 1 for each in (val, train))), round(kept * codec.parts)
    held, clips_of = documents(val, tokenizer, count), lambda found: np.stack([*map(codec.decode, found)])
    truth, pixels = clips_of(held), originals(flags.originals, codec, held) if flags.originals else None
    how = {"": ["clips", "frames", "given", "seed"], checkpoint.name: [count, codec.parts, given, flags.seed]}
    tables = {"What was measured": how, "Bits and bytes": costs(model, tokenizer, val, device)}
    model.to(precision(device))
    prompts = [codec.head(symbols, kept) for symbols in held]
    written = clips_of(write(model, tokenizer, prompts, flags.seed, "continuations", Sampling()))
    flags.to.mkdir(parents=True, exist_ok=True)
    for name, clips, share in (("true", truth, 1), ("continued", written, kept)):
        save_grid(flags.to / name, list(clips[:16]), codec.fps, share)
    tables["PSNR in dB, and SSIM, of each frame ahead"] = likeness(given, written, truth, pixels)
    shares, samples = validity(model, tokenizer, count, flags.seed, "trained")
    model.init_weights(flags.seed)
    shares |= validity(model, tokenizer, count, flags.seed, "untrained")[0]
    tables["Share of files that are whole and valid, at three temperatures"] = {"": TEMPERATURES, **shares}
    if network:
        sets = {"training clips": clips_of(documents(train, tokenizer, count)), "validation clips": truth}
        sets |= {"samples": clips_of(samples)} | ({} if pixels is None else {"originals": pixels})
        tables["FID over frames"] = distances(network, sets, device)
    return tables


def page(title: str, table: Table) -> str:
    """A table in Markdown."""
    shown = lambda x: "same" if x is None else x if isinstance(x, str) else f"{x:,.4g}"  # noqa: E731
    head, *lines = [f"| {' | '.join([name, *map(shown, row)])} |" for name, row in table.items()]
    return "\n".join([f"## {title}", "", head, "|---" * (head.count("|") - 1) + "|", *lines, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument("run", type=Path, help="run folder of train.py, trained on clips")
    parser.add_argument("--count", type=int, default=64, help="clips of a kind, at most (default: 64)")
    parser.add_argument("--keep", type=float, default=0.67, help="share of a clip that is given (default: 0.67)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--data", type=Path, help="data folder (default: the run's)")
    parser.add_argument("--originals", type=Path, metavar="SOURCE", help="folder of the videos that became the data")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of the FID network; without, there is no FID")
    parser.add_argument("--to", type=Path, metavar="OUT", help="folder to write (default: RUN/video)")
    flags = parser.parse(arguments)
    if not (flags.count > 1 and 0 <= flags.seed < 2**63):
        raise UserError(f"--count {flags.count} --seed {flags.seed}: choose a count from 2 and a seed from 0")
    if flags.weights is None:
        print("no FID without --weights: name the file of the Inception network, whose address is in fid.py")
    flags.to = flags.to or flags.run / "video"
    tables = study(flags)
    write_json(flags.to / "video.json", tables)
    text = "\n".join(page(title, table) for title, table in tables.items())
    write_whole(flags.to / "video.md", text.encode())
    print(text)


if __name__ == "__main__":
    run(main)
