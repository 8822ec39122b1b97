"""The paper's comparison, at a size anyone can run: JPEG-LM against VQ and pixels.

    python -m studies.compare out/compare --data eurosat --views 8          # hours on a CPU; FILE as for fid.py:
    python -m studies.compare out/compare --data eurosat --views 8 --weights FILE --seeds 3 --small
    python -m studies.compare out/tail --data eurosat --views 8 --tail 0.02 --codecs jpeg vq8 vq4
    python -m studies.compare out/kinds --data eurosat cifar10 plots --size 32 --codecs jpeg vq4
    python -m studies.compare out/compare --data eurosat --config photos --steps 6000 -- --compile --lr 0.004

DATA holds the folders `train` and `test` of pictures.  For each codec, and with nothing but the codec different: learn it,
prepare, train the same Llama, sample, complete the pictures of `test`, and measure.  Each codec is trained twice: with as
many FLOPs as JPEG, and on as many pictures as JPEG (as in the paper, section 4).  What comes after `--` goes to train.py.

The same command continues; it may ask for more seeds.  OUT/table.md, table.json and grid.png are the result,
OUT/commands.txt what was run, OUT/logs what that said.
"""

import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Event, Lock

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import pearsonr
from tqdm import tqdm

import fid
from codec import load_tokenizer
from data.prepare import cores, usable
from data.sources import find_items
from data.vq import Frame
from plumbing.command import Flags, UserError, differences, run
from plumbing.draw import save_image, save_pixels
from plumbing.files import read_json, write_json, write_whole
from plumbing.plan import count, flops_of
from plumbing.run import Stop, claim, read_lines
from train import parse as parse_training

DIMS = 768  # features of the FID network; with fewer pictures KID is measured instead
KEEP = (0.25, 0.5, 0.75)  # of the pictures that are completed, as in the paper
TOP_P = (0.9, 0.95)  # tried beside 1
ROW = 64  # contexts are multiples of it
LEAST_ROW = 256  # tokens: of short documents, several to a row
LOOK = 1e10  # FLOPs of the FID network for a picture, for the progress bar

# --- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    title: str
    data: str  # its data folder, which two may share
    prepare: str  # flags of data.prepare
    vq: str = ""  # flags of data.vq, of what is learned
    train: str = ""  # flags of train.py
    side: int = 0  # pixels of its pictures, both ways; 0: as large as they are


CONTENDERS = {
    "jpeg-plain": Contender("JPEG, plain Llama", "jpeg", "--vocab 258 --restart 0", train="--no-syntax"),
    "jpeg": Contender("JPEG", "jpeg", "--vocab 258 --restart 0"),
    "vq8": Contender("VQ, 8x8 pixels a code", "vq8", "--codec vq", "--halvings 3 --codes 4096"),
    "vq4": Contender("VQ, 4x4 pixels a code", "vq4", "--codec vq", "--halvings 2 --codes 1024"),
    "pixels16": Contender("pixels, 16x16", "pixels16", "--codec pixels", side=16),
    "pixels32": Contender("pixels, 32x32", "pixels32", "--codec pixels", side=32),
}
REFERENCE = "jpeg"  # whose FLOPs and pictures the others get
SETTINGS = {"flops": "as many FLOPs", "pictures": "as many pictures"}


@dataclass(frozen=True)
class Comparison:
    size: int = 64  # pixels, both ways
    config: str = "small"  # preset of train.py
    steps: int = 2000  # optimizer steps of JPEG, from which those of the others follow
    tokens: int = 2048  # of a step, about
    views: int = 1  # of each picture: 1, 2 with its mirror image, 8 turned as well
    vq_steps: int = 6000  # of learning a codebook
    count: int = 800  # pictures of each measurement
    seeds: int = 1  # of sampling, from 0 on
    tail: float = 0.0  # the long tail: pictures of the rarest class, as a share of those of the most frequent one
    small: bool = False  # small things: also complete pictures shrunk to half on black
    jobs: int = 1  # codecs at work at once, on as many cores each as that leaves

    def __post_init__(self) -> None:
        least = {"size": 16, "steps": 1, "tokens": 64, "vq_steps": 1, "count": 2, "seeds": 1, "jobs": 1}
        for name, value in least.items():
            if not value <= getattr(self, name) < 2**31:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: choose {value} or more")
        if not 0 <= self.tail < 1:
            raise UserError(f"--tail is {self.tail}: choose a share below 1, such as 0.02, or 0 for all pictures")


FREE = {"seeds", "small", "jobs", "codecs"}  # may grow or change in the same OUT


@dataclass
class Step:
    """A command, which is done if `made` is there."""

    made: Path
    run: str | Callable[[], None]
    flops: float  # about, for the progress bar


class Stopped(Exception):
    """Another codec failed, or the user has had enough."""


@dataclass(frozen=True)
class Plan:
    """How one model is trained."""

    data: Path
    context: int
    batch: int  # rows a step
    micro: int
    steps: int
    length: float  # tokens of a document, on average
    cost: int  # FLOPs of training on a token

    @property
    def flops(self) -> int:
        return self.steps * self.batch * self.context * self.cost

    @property
    def pictures(self) -> float:
        return self.steps * self.batch * self.context / self.length


# --- one folder of pictures -----------------------------------------------------------------------------------------


@dataclass
class Study:
    """The comparison on the pictures of DATA, in OUT."""

    out: Path
    data: Path
    config: Comparison
    codecs: list[str]
    extra: list[str]  # flags of train.py
    weights: Path  # of the FID network
    stop: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)

    def go(self) -> None:
        """Do what is not done yet, and write the table.  Errors: UserError; Stopped."""
        self.open()
        self.references()
        names = [*dict.fromkeys([REFERENCE, *self.codecs])]
        chains = {CONTENDERS[name].data: self.preparation(name) for name in names}
        self.work([*chains.values()], "prepare")
        common = [
            step for kind in self.kinds for step in self.look(self.test(kind), self.config.size, self.features(kind))
        ]
        self.work([common], "look")
        chains = [self.steps(name, setting) for name in self.codecs for setting in settings_of(name)]
        self.work(sorted(chains, key=lambda steps: -sum(step.flops for step in steps)), "compare")
        write_table(self)

    def open(self) -> None:
        """Errors: UserError, where OUT holds another comparison."""
        settings = {**asdict(self.config), "codecs": self.codecs, "train": self.extra, "data": str(self.data.resolve())}
        path = self.out / "settings.json"
        if path.exists() and (changed := differences(read_json(path), settings, FREE)):
            raise UserError(f"{self.out} holds another comparison ({changed}): choose another folder, or delete it")
        write_json(path, settings)

    # the pictures

    @property
    def kinds(self) -> list[str]:
        return ["whole", "small"] if self.config.small else ["whole"]

    def test(self, kind: str) -> Path:
        """What is completed and compared with: pictures as they are, or shrunk to half on black."""
        return self.out / "test" / kind

    def references(self) -> None:
        """Errors: UserError."""
        if all(map(Path.is_dir, map(self.test, self.kinds))):
            return
        items = [*find_items(self.data / "test")]
        items = items[:: max(1, len(items) // self.config.count)][: self.config.count]
        found = [(item, picture) for item in items for picture in usable([item], Frame(self.config.size))]
        if len(found) < self.config.count:
            advice = f"pass --count {len(found)} or less, or give it more"
            raise UserError(
                f"{self.data}/test has {len(found)} usable pictures for --count {self.config.count}: {advice}"
            )
        classes = [item.name.split("/")[0] if "/" in item.name else "" for item, _ in found]
        for kind, change in (("whole", np.asarray), ("small", shrunk)):
            part = self.test(f"{kind}.part")
            if kind in self.kinds and not self.test(kind).exists():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                for number, (_, picture) in enumerate(found):
                    save_pixels(part / f"{number:05d}", change(picture))
                part.rename(self.test(kind))
        write_json(self.out / "classes.json", {"classes": classes})

    @cached_property
    def source(self) -> Path:
        """The pictures to learn from: DATA/train, or a long tail of it.  Errors: UserError."""
        whole = self.data / "train"
        return long_tail(whole, self.out / "train", self.config.tail) if self.config.tail else whole

    # the steps

    def preparation(self, name: str) -> list[Step]:
        contender = CONTENDERS[name]
        folder, network = self.out / "data" / contender.data, self.out / "vq" / contender.data
        size, views, steps = contender.side or self.config.size, f"--views {self.config.views}", []
        shape = f"--size {size}"
        if contender.vq:
            learn = f"-m data.vq {self.source} {network} {contender.vq} {shape} {views} --steps {self.config.vq_steps}"
            steps, shape = [Step(network / "report.json", learn, 1e10 * self.config.vq_steps)], f"--network {network}"
        prepare = f"-m data.prepare {self.source} {folder} {contender.prepare} {shape} {views} --workers {self.cores}"
        return [*steps, Step(folder / "report.json", prepare, 1e13)]

    def plan(self, name: str, setting: str) -> Plan:
        """As many FLOPs, or as many pictures, as the reference takes."""
        reference, plan = replace(self.plan_a_step(REFERENCE), steps=self.config.steps), self.plan_a_step(name)
        ratio = reference.flops / plan.flops if setting == "flops" else reference.pictures / plan.pictures
        return replace(plan, steps=max(1, round(ratio)))

    def plan_a_step(self, name: str) -> Plan:
        """Rows hold the longest document, and a step about as many tokens for all.  What looking up embeddings takes is
        not counted."""
        data = self.out / "data" / CONTENDERS[name].data
        shards = [shard for key, shard in read_json(data / "report.json")["shards"].items() if key.startswith("train")]
        longest = max(shard["longest"] for shard in shards)
        context = max(LEAST_ROW, -(-longest // ROW) * ROW)
        batch, tokenizer = max(1, round(self.config.tokens / context)), load_tokenizer(data)
        config, _ = parse_training(["--config", self.config.config, *CONTENDERS[name].train.split(), *self.extra])
        micro = max(number for number in range(1, min(batch, config.micro) + 1) if batch % number == 0)
        sizes = tokenizer.grammar.sizes if config.syntax else ()
        config = replace(config, vocab=tokenizer.vocab, positions=sizes, context=context)
        computing = count(config)[0] - config.dim * (config.vocab + sum(sizes))
        length = sum(shard["tokens"] for shard in shards) / sum(shard["documents"] for shard in shards)
        return Plan(data, context, batch, micro, 1, length, flops_of(config, computing))

    def steps(self, name: str, setting: str) -> list[Step]:
        """All that is done for one trained model, in order."""
        plan, run, samples = self.plan(name, setting), self.run_of(name, setting), self.samples_of(name, setting)
        flags = shlex.join([*CONTENDERS[name].train.split(), *self.extra])
        train = f"train.py --config {self.config.config} --data {plan.data} --out {run} --context {plan.context} "
        train += f"--batch {plan.batch} --micro {plan.micro} --steps {plan.steps} {flags}"
        steps = [Step(run / f"step_{plan.steps:08d}", train, plan.flops)]
        write, pictures = plan.cost / 3 * plan.length, self.config.count  # FLOPs of a picture
        codec, side = load_tokenizer(plan.data).codec, CONTENDERS[name].side or self.config.size
        last = f"{pictures - 1:05d}{codec.suffix}"
        for to, how in self.draws():
            sample = f"sample.py {run} --count {pictures} --to {samples / to} {how}"
            steps.append(Step(samples / to / last, sample, write * pictures))
            if to != "free":
                steps += self.look(samples / to, side, self.features(f"{name}-{setting}", to))
        for kind, seed, keep in self.completions():
            to = samples / f"{kind}-{seed}"
            kept = [f"{codec.kept(each):g}" for each in keep]
            sample = f"sample.py {run} --prompt {self.test(kind)} --keep {' '.join(kept)} --seed {seed} --to {to}"
            steps.append(
                Step(to / f"keep_{kept[-1]}" / last, sample, write * pictures * sum(1 - each for each in keep))
            )
            for ratio, each in zip(keep, kept, strict=True):
                features = self.features(f"{name}-{setting}", f"{kind}-{seed}-{ratio}")
                steps += self.look(to / f"keep_{each}", side, features)
            steps += self.look(to / "roundtrip", side, self.features(CONTENDERS[name].data, kind))
        return steps

    def draws(self) -> Iterator[tuple[str, str]]:
        """The folders of free samples, and how they are drawn; those without the grammar show what it is worth."""
        for seed in range(self.config.seeds):
            yield f"seed-{seed}", f"--seed {seed}"
        for top_p in TOP_P:
            yield f"top-p-{top_p:g}", f"--top-p {top_p:g}"
        yield "free", "--free"

    def completions(self) -> Iterator[tuple[str, int, tuple[float, ...]]]:
        """Which pictures are completed, with which seed, from how much of them."""
        for seed in range(self.config.seeds):
            yield "whole", seed, KEEP
        if self.config.small:
            yield "small", 0, KEEP[1:2]

    def look(self, folder: Path, side: int, features: Path) -> list[Step]:
        """To the statistics of a folder of pictures, enlarged to the size of all others where they are smaller."""
        steps, large = [], folder.with_name(f"{folder.name}-large")
        if side != self.config.size:
            steps, folder = [Step(large, partial(enlarge, folder, large, self.config.size), 1e11)], large
        look = f"fid.py {folder} --save {features} --dims {DIMS} --weights {self.weights}"
        return [*steps, Step(features, look, LOOK * self.config.count)]

    def run_of(self, name: str, setting: str) -> Path:
        return self.out / "runs" / f"{name}-{setting}"

    def samples_of(self, name: str, setting: str) -> Path:
        return self.out / "samples" / f"{name}-{setting}"

    def features(self, *names: str) -> Path:
        """Of the samples of a model; of the round trip of a codec; of the test pictures."""
        return self.out / "features" / f"{'-'.join(names)}.npz"

    # doing them

    @property
    def cores(self) -> int:
        """Of each codec that is at work."""
        return max(1, cores() // self.config.jobs)

    def work(self, chains: list[list[Step]], title: str) -> None:
        """Do chains of steps, `jobs` of them at once.  Errors: UserError; Stopped, when the user has had enough."""
        total = sum(step.flops for steps in chains for step in steps) / 1e12
        with tqdm(None, title, total, unit=" TFLOP", disable=None, smoothing=0) as bar, Stop() as stop:
            self.bar = bar
            with ThreadPoolExecutor(self.config.jobs) as pool:
                waiting = [pool.submit(self.chain, steps) for steps in chains]
                while waiting:
                    done, waiting = wait(waiting, 0.5)
                    if stop.asked < math.inf or any(each.exception() for each in done):
                        self.stop.set()
                    errors = [error for each in done if (error := each.exception())]
                    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
                        wait(waiting)
                        raise error

    def chain(self, steps: list[Step]) -> None:
        for step in steps:
            if self.stop.is_set():
                raise Stopped
            name = step.made.relative_to(self.out).as_posix()
            self.bar.set_postfix_str(name)
            if not step.made.exists():
                step.made.parent.mkdir(parents=True, exist_ok=True)
                begun = time.perf_counter()
                try:
                    step.run() if callable(step.run) else self.command(step, name)
                finally:
                    self.add_time(name, time.perf_counter() - begun)
            self.bar.update(step.flops / 1e12)

    def add_time(self, name: str, seconds: float) -> None:
        """Note how long a step has taken, in all its runs."""
        path = self.out / "times.json"
        with self.lock:
            times = read_json(path) if path.exists() else {}
            write_json(path, times | {name: round(times.get(name, 0) + seconds, 1)})

    def command(self, step: Step, name: str) -> None:
        """Run a command until it ends, or until all must.  Errors: UserError, with the last line of what it said."""
        log = self.out / "logs" / f"{name.replace('/', '_')}.txt"
        log.parent.mkdir(exist_ok=True)
        with self.lock, open(self.out / "commands.txt", "a") as file:
            file.write(f"python {step.run}\n")
        threads = os.environ | {"OMP_NUM_THREADS": str(self.cores)}
        with open(log, "ab") as file:
            child = subprocess.Popen([sys.executable, *shlex.split(step.run)], stdout=file, stderr=file, env=threads)
            while child.poll() is None:
                if self.stop.wait(0.2):
                    child.terminate()
                    child.wait()
                    raise Stopped
        if child.returncode or not step.made.exists():
            lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
            said = next((line for line in reversed(lines) if line.strip()), "nothing")
            raise UserError(
                f"`python {step.run}` ended with {child.returncode} ({said}): see {log}, mend it, and go on"
            )


def settings_of(name: str) -> list[str]:
    """JPEG gives the measure in both."""
    return ["flops"] if CONTENDERS[name].data == CONTENDERS[REFERENCE].data else [*SETTINGS]


def shrunk(pixels: np.ndarray) -> np.ndarray:
    """A picture of half the size in the middle of black."""
    height, width, _ = pixels.shape
    sheet = Image.new("RGB", (width, height))
    sheet.paste(
        Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BICUBIC), (width // 4, height // 4)
    )
    return np.asarray(sheet)


def enlarge(folder: Path, to: Path, size: int) -> None:
    """The numbered pictures of a folder, bicubically enlarged, as the paper's ImageGPT needs them."""
    part = to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for path in numbered(folder):
        save_pixels(part / path.stem, opened(path, size))
    part.rename(to)


def numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.stem.isdecimal())


def opened(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def long_tail(source: Path, to: Path, share: float) -> Path:
    """Links to some pictures of each class: all of the most frequent, `share` of them of the rarest, and between the two
    as a geometric series; which class is how frequent is drawn.  Errors: UserError."""
    classes = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 3:
        raise UserError(
            f"{source} has {len(classes)} folders, and --tail needs one for each class of pictures, 3 at least"
        )
    order, part = np.random.default_rng(0).permutation(len(classes)), to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for place, number in enumerate(order.tolist()):
        files = sorted(path for path in classes[number].rglob("*") if path.is_file())
        wanted = max(1, round(len(files) * share ** (place / (len(classes) - 1))))
        (part / classes[number].name).mkdir(parents=True)
        for i in range(wanted):
            path = files[i * len(files) // wanted]
            (part / classes[number].name / f"{i:05d}{path.suffix}").symlink_to(path.resolve())
    shutil.rmtree(to, ignore_errors=True)
    part.rename(to)
    return to


# --- the tables -----------------------------------------------------------------------------------------------------


def write_table(study: Study) -> None:
    """OUT/table.json, table.md and grid.png."""
    rows = []
    for name in tqdm(study.codecs, "measure", disable=None):
        rows += [row_of(study, name, setting) for setting in settings_of(name)]
    table = {"measure": measure(study), "keep": KEEP, "rows": rows, "reductions": reductions(rows)}
    if study.config.tail:
        table["tail"] = tail_of(study)
    write_json(study.out / "table.json", table)
    write_whole(study.out / "table.md", in_words(study, table).encode())
    save_image(study.out / "grid.png", picture(study))
    print(in_words(study, table))


def measure(study: Study) -> str:
    return f"FID-{DIMS}" if study.config.count > DIMS else "KID x 1000"


def distance(study: Study, a: Path, b: Path) -> float:
    """FID; KID where there are fewer pictures than features, for then FID says little."""
    a, b = (fid.open_set(path, DIMS) for path in (a, b))
    if study.config.count > DIMS:
        return fid.frechet_distance(a, b)
    return 1000 * fid.kernel_distance(a.features, b.features)[0]


def row_of(study: Study, name: str, setting: str) -> dict:
    contender, plan, run = CONTENDERS[name], study.plan(name, setting), study.run_of(name, setting)
    tokenizer, model, key = load_tokenizer(plan.data), f"{name}-{setting}", f"samples/{name}-{setting}"
    log = read_lines(run / "log.jsonl")
    speed = np.median([record["tokens_per_second"] for record in log if "tokens_per_second" in record])
    bits = [record["val_bits_per_file"] for record in log if "val_bits_per_file" in record]
    times = read_json(study.out / "times.json")
    samples, seeds, originals = study.samples_of(name, setting), range(study.config.seeds), study.features("whole")
    wrong = samples / "free" / "invalid.txt"
    free = [distance(study, study.features(model, f"seed-{seed}"), originals) for seed in seeds]
    top_p = {each: distance(study, study.features(model, f"top-p-{each:g}"), originals) for each in TOP_P} | {
        1: free[0]
    }
    row = {"codec": name, "setting": setting, "title": contender.title, **asdict(plan), "data": plan.data.name}
    row |= {"flops": plan.flops, "pictures": round(plan.pictures), "parameters": parameters_of(run)}
    row |= {
        "file_bits": (plan.length - 2) * math.log2(tokenizer.codec.symbols),
        "model_bits": bits[-1],
        "best_bits": min(bits),
    }
    row |= {"training_seconds": plan.steps * plan.batch * plan.context / speed}
    row |= {"sampling_seconds": times.get(f"{key}/seed-0/{study.config.count - 1:05d}{tokenizer.codec.suffix}")}
    row |= {
        "valid_without_grammar": 1 - (len(wrong.read_text().splitlines()) if wrong.exists() else 0) / study.config.count
    }
    row |= {"floor": distance(study, study.features(contender.data, "whole"), originals)}
    row |= {"free": free, "top_p": top_p, "best_top_p": min(top_p, key=top_p.get)}
    for against, other in (("originals", originals), ("roundtrip", study.features(contender.data, "whole"))):
        row[against] = {
            keep: [distance(study, study.features(model, f"whole-{seed}-{keep}"), other) for seed in seeds]
            for keep in KEEP
        }
    if study.config.small:
        small, back = study.features("small"), study.features(contender.data, "small")
        row["small_floor"] = distance(study, back, small)
        row["small_originals"] = distance(study, study.features(model, f"small-0-{KEEP[1]}"), small)
    return row


def parameters_of(run: Path) -> int:
    """Those of the model that a run trained."""
    from plumbing.weights import model_config

    return count(model_config(read_json(run / "config.json"), run / "config.json"))[0]


def reductions(rows: list[dict]) -> dict[str, float]:
    """How much lower JPEG's distance of completions is than another's, as the mean over the ratios kept; the paper's is
    31%, over ImageNet and FFHQ, against VQ."""
    ours, found = next((row for row in rows if row["codec"] == REFERENCE), None), {}
    for row in rows if ours else []:
        if row["codec"] != REFERENCE:
            shares = [1 - np.mean(ours["originals"][keep]) / np.mean(row["originals"][keep]) for keep in KEEP]
            found[f"{row['codec']}, {SETTINGS[row['setting']]}"] = float(np.mean(shares))
    return found


def tail_of(study: Study) -> dict:
    """Of each class, how many pictures were there to learn from, and the KID x 1000 of its completions, mean over the
    ratios; and how the difference of JPEG's and another codec's goes with rarity."""
    classes = np.array(read_json(study.out / "classes.json")["classes"])
    originals = fid.open_set(study.features("whole"), DIMS).features
    found = {each: {"pictures": len([*(study.source / each).iterdir()])} for each in np.unique(classes).tolist()}
    fewest = min((classes == each).sum() for each in found)
    for name in study.codecs:
        setting = settings_of(name)[-1]
        sets = [fid.open_set(study.features(f"{name}-{setting}", f"whole-0-{keep}"), DIMS).features for keep in KEEP]
        for each in found:
            rows = np.flatnonzero(classes == each)[:fewest]
            kids = [fid.kernel_distance(features[rows], originals[rows])[0] for features in sets]
            found[each][name] = 1000 * float(np.mean(kids))
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
    """The table in Markdown."""
    config, rows, lines = study.config, table["rows"], []
    if config.count <= DIMS:
        lines += [f"warning: {config.count} pictures are fewer than {DIMS} features: KID x 1000 instead of FID", ""]
    for setting, title in SETTINGS.items():
        shown = [row for row in rows if row["setting"] == setting or len(settings_of(row["codec"])) == 1]
        lines += [f"**{title[0].upper()}{title[1:]} as JPEG:** {table['measure']}, {config.count:,} pictures", ""]
        head = ["codec", "tokens", "bits of a file", "bits the model needs", "pictures seen", "PFLOP", "training, min"]
        head += [
            "sampling, s",
            "valid without grammar",
            "round trip",
            "free",
            "best top-p",
            *(f"from {keep:g}" for keep in KEEP),
        ]
        head += [f"from {keep:g}, to round trip" for keep in KEEP]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in shown:
            best = row["best_top_p"]
            cells = [row["title"], f"{row['length'] - 2:,.0f}", f"{row['file_bits']:,.0f}", f"{row['model_bits']:,.0f}"]
            cells += [f"{row['pictures']:,}", f"{row['flops'] / 1e15:.3g}", f"{row['training_seconds'] / 60:.0f}"]
            cells += [
                f"{row['sampling_seconds']:.0f}" if row["sampling_seconds"] else "",
                f"{row['valid_without_grammar']:.1%}",
            ]
            cells += [f"{row['floor']:.3f}", spread(row["free"]), f"{row['top_p'][best]:.3f} at {best:g}"]
            cells += [spread(row[against][keep]) for against in ("originals", "roundtrip") for keep in KEEP]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    for other, share in table["reductions"].items():
        lines.append(
            f"- completions by JPEG: {share:.1%} lower than by {other} (the paper: 31% than VQ, as many pictures)"
        )
    if config.small:
        lines += [
            "",
            "| codec | | round trip, whole | shrunk to half | from 0.5, whole | shrunk to half |",
            "|" + "---|" * 6,
        ]
        for row in rows:
            cells = [row["floor"], row["small_floor"], row["originals"][KEEP[1]][0], row["small_originals"]]
            lines.append(
                f"| {row['title']} | {SETTINGS[row['setting']]} | " + " | ".join(f"{x:.3f}" for x in cells) + " |"
            )
    if "tail" in table:
        tail = table["tail"]
        lines += ["", f"KID x 1000 of completions by class, {tail['count']} pictures of each", ""]
        lines += [f"| class | pictures | {' | '.join(study.codecs)} |", "|" + "---|" * (2 + len(study.codecs))]
        for name, each in sorted(tail["classes"].items(), key=lambda item: -item[1]["pictures"]):
            values = " | ".join(f"{each[codec]:.2f}" for codec in study.codecs)
            lines.append(f"| {name} | {each['pictures']} | {values} |")
        lines.append("")
        for name, each in tail["correlations"].items():
            lines.append(
                f"- JPEG minus {name}, with rarity: r {each['r']:.2f}, p {each['p']:.2g} (the paper, over VQ: p 0.0002)"
            )
    return "\n".join(lines) + "\n"


SHOWN = 8  # pictures of each kind in a row of the grid


def picture(study: Study) -> Image.Image:
    """A row for each model: free samples, and pictures completed from their upper half; at the top what these were."""
    size, kept = study.config.size, f"keep_{KEEP[1]:g}"
    scale = max(1, 64 // size)
    side, left = size * scale, 250
    models = [(name, setting) for name in study.codecs for setting in settings_of(name)]
    sheet = Image.new("RGB", (left + 2 * SHOWN * (side + 2) + 16, (len(models) + 1) * (side + 6)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)

    def row(number: int, label: str, free: list[Path], completed: list[Path]) -> None:
        top = number * (side + 6) + 3
        pen.multiline_text((8, top + 8), label, "black", font)
        for at, path in [*enumerate(free), *enumerate(completed, SHOWN)]:
            place = left + at * (side + 2) + 16 * (at >= SHOWN), top
            sheet.paste(Image.fromarray(opened(path, size)).resize((side, side), Image.Resampling.NEAREST), place)

    every = max(1, study.config.count // SHOWN)
    row(0, "from the test set", [], numbered(study.test("whole"))[::every][:SHOWN])
    for number, (name, setting) in enumerate(models, 1):
        samples, label = study.samples_of(name, setting), CONTENDERS[name].title
        label += f"\n{SETTINGS[setting]} as JPEG" if len(settings_of(name)) > 1 else ""
        row(number, label, numbered(samples / "seed-0")[:SHOWN], numbered(next_to(samples, kept))[::every][:SHOWN])
    return sheet


def next_to(samples: Path, kept: str) -> Path:
    """The folder of completions whose ratio is nearest to what was asked for."""
    wanted = float(kept.removeprefix("keep_"))
    folders = [path for path in (samples / "whole-0").glob("keep_*") if not path.name.endswith("-large")]
    return min(folders, key=lambda path: abs(float(path.name.removeprefix("keep_")) - wanted))


# --- the command ----------------------------------------------------------------------------------------------------


def write_kinds(out: Path, studies: list[Study]) -> None:
    """OUT/kinds.md and kinds.json: what kinds of pictures cost, and how well they are completed."""
    rows = []
    for study in studies:
        for row in read_json(study.out / "table.json")["rows"]:
            completed = float(np.mean(row["originals"][str(KEEP[1])]))
            rows.append(
                {"pictures": study.out.name, "measure": measure(study), "share": row["model_bits"] / row["file_bits"]}
                | {key: row[key] for key in ("title", "setting", "file_bits", "model_bits", "floor")}
                | {"completed": completed, "above_floor": completed - row["floor"]}
            )
    write_json(out / "kinds.json", {"rows": rows})
    head = [
        "pictures",
        "codec",
        "",
        "bits of a file",
        "bits the model needs",
        "share",
        "round trip",
        "from 0.5",
        "above",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row["pictures"],
            row["title"],
            SETTINGS[row["setting"]],
            f"{row['file_bits']:,.0f}",
            f"{row['model_bits']:,.0f}",
        ]
        cells += [f"{row['share']:.0%}", *(f"{row[key]:.3f}" for key in ("floor", "completed", "above_floor"))]
        lines.append("| " + " | ".join(cells) + " |")
    write_whole(out / "kinds.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Flags(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    text = "folder that holds train and test, folders of pictures; several are compared one by one"
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=text)
    text = f"some of {', '.join(CONTENDERS)} (default: all)"
    parser.add_argument("--codecs", nargs="+", default=[*CONTENDERS], choices=CONTENDERS, metavar="CODEC", help=text)
    parser.add_argument("--weights", type=Path, help="of the FID network (default: downloaded once, see fid.py)")
    parser.add_fields(Comparison())
    flags, extra = parser.parse(arguments[:at]), arguments[at + 1 :]
    config = Comparison(**{each.name: getattr(flags, each.name) for each in fields(Comparison) if each.name in flags})
    for folder in (data / name for data in flags.data for name in ("train", "test")):
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder: --data holds `train` and `test`, to learn from and to compare with"
            )
    if len({data.name for data in flags.data}) < len(flags.data):
        raise UserError(f"--data {' '.join(map(str, flags.data))}: two folders of one name, so rename one")
    parse_training(["--config", config.config, *extra])
    several = len(flags.data) > 1
    weights, studies = fid.weights_file(flags.weights), []
    with claim(flags.out):
        for data in flags.data:
            out = flags.out / data.name if several else flags.out
            out.mkdir(exist_ok=True)
            studies.append(Study(out, data, config, flags.codecs, extra, weights))
        try:
            for study in studies:
                study.go()
        except Stopped:
            print(f"{flags.out}: stopped, and the same command continues")
            return
        if several:
            write_kinds(flags.out, studies)


if __name__ == "__main__":
    run(main)
