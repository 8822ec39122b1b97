"""Codecs side by side: what is compared, and the steps that takes."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image

from codec import load_tokenizer
from data.prepare import VIEWS, usable
from data.sources import find_items
from data.vq import PicturesOf
from plumbing.command import UserError
from plumbing.draw import save_pixels
from plumbing.files import digest, read_json, write_json
from plumbing.plan import computing_parameters, flops_of
from studies.steps import Step, Work, refuse_another, training, words
from train import parse as parse_training

DIMS = 768  # features of the FID network; with fewer pictures KID is measured instead
KEEP = (0.25, 0.5, 0.75)  # of the pictures that are completed, as in the paper
HALF = 0.5
TOP_P = (0.9, 0.95)  # tried beside 1
ROW = 64  # contexts are multiples of it
LEAST_ROW = 256  # tokens: of short documents, several to a row
CACHE = 8 << 30  # bytes that the keys and values of pictures that are sampled at once may take
DECIDED = "--config --data --out --context --batch --steps --syntax --no-syntax --plan --export"
FREE_COUNT = 64  # that are written without the grammar, to see how many are valid
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
    vq_batch: int = 16  # pictures a step of that
    vq_width: int = 64  # channels of the codebook's network
    count: int = 800  # pictures of each measurement
    seeds: int = 1  # of sampling, from 0 on
    tail: float = 0.0  # the long tail: pictures of the rarest class, as a share of those of the most frequent one
    small: bool = False  # small things: also complete pictures shrunk to half on black
    at_once: int = 256  # pictures that are sampled at once; a GPU takes all
    jobs: int = 1  # codecs at work at once, on as many cores each as that leaves

    def __post_init__(self) -> None:
        least = {"size": 32, "steps": 1, "tokens": 64, "vq_steps": 1, "count": 2, "seeds": 1, "at_once": 1, "jobs": 1}
        for name, value in least.items():
            if not value <= getattr(self, name) < 2**31:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: choose {value} or more")
        if self.size % 32 or self.views not in VIEWS:
            raise UserError(
                f"--size {self.size} --views {self.views}: choose a size in steps of 32, and views of {VIEWS}"
            )
        if not 0 <= self.tail < 1:
            raise UserError(f"--tail is {self.tail}: choose a share below 1, such as 0.02, or 0 for all pictures")


FREE = {"seeds", "small", "at_once", "jobs", "codecs"}  # may grow or change in the same OUT


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
    at_once: int  # pictures that are sampled at once

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
    codecs: list[str]  # names of contenders
    extra: list[str]  # flags of train.py
    weights: Path  # of the FID network

    @cached_property
    def work(self) -> Work:
        return Work(self.out, self.config.jobs)

    def go(self, last: Callable[[str, str], Step]) -> None:
        """Do what is not done yet, with a last step for each model.  Errors: UserError; Stopped, when the user has had
        enough."""
        refuse_another(self.out, self.settings, FREE)
        self.references()
        write_json(self.out / "settings.json", self.settings)
        names = [*dict.fromkeys([REFERENCE, *self.codecs])]
        chains = {CONTENDERS[name].data: self.preparation(name) for name in names}
        self.work.do([*chains.values()], "prepare")
        self.check_documents()
        common = [
            step for kind in self.kinds for step in self.look(self.test(kind), self.config.size, self.features(kind))
        ]
        self.work.do([common], "look")
        chains = [[*self.steps(*model), last(*model)] for model in self.models]
        self.work.do(sorted(chains, key=lambda steps: -sum(step.flops for step in steps)), "compare")

    @cached_property
    def settings(self) -> dict[str, object]:
        given = {"codecs": self.codecs, "train": self.extra, "data": str(self.data.resolve())}
        return {**asdict(self.config), **given, "weights": digest(self.weights)[:16]}

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
        frame, wanted = PicturesOf(self.config.size), self.config.count
        items = [item for item in find_items(self.data / "test") if any(True for _ in usable([item], frame))]
        if len(items) < wanted:
            held = f"{self.data}/test has {len(items)} usable pictures of {self.config.size} pixels"
            raise UserError(f"{held}, not --count {wanted}: lower it, or give it more")
        items = [items[i * len(items) // wanted] for i in range(wanted)]  # spread evenly
        classes = [item.name.split("/")[0] if "/" in item.name else "(no folder)" for item in items]
        if self.config.tail:
            self.check_classes(classes)
        write_json(self.out / "classes.json", {"classes": classes})
        for kind, change in (("whole", np.asarray), ("small", shrunk)):
            part = self.test(f"{kind}.part")
            if kind in self.kinds and not self.test(kind).exists():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                for number, picture in enumerate(usable(items, frame)):
                    save_pixels(part / f"{number:05d}", change(picture))
                part.rename(self.test(kind))

    def check_classes(self, classes: list[str]) -> None:
        """Errors: UserError, unless the test pictures are of the classes to learn from, ten of each at least."""
        if odd := {*classes} ^ {path.name for path in self.source.iterdir()}:
            differ = ", ".join(sorted(odd))
            raise UserError(f"{self.data}: --tail needs the same class folders in train and test, and {differ} differ")
        if (few := min(map(classes.count, classes))) < 10:
            raise UserError(f"--count {len(classes)} takes {few} pictures of a class, and --tail needs 10: raise it")

    @cached_property
    def source(self) -> Path:
        """The pictures to learn from: DATA/train, or a long tail of it.  Errors: UserError."""
        whole = self.data / "train"
        return long_tail(whole, self.out / "train", self.config.tail) if self.config.tail else whole

    # the steps

    def preparation(self, name: str) -> list[Step]:
        contender, steps = CONTENDERS[name], []
        folder, network = self.out / "data" / contender.data, self.out / "vq" / contender.data
        values = {"source": self.source, "folder": folder, "network": network} | asdict(self.config)
        shape = f"--size {contender.side or self.config.size}"
        if contender.vq:
            learn = f"-m data.vq {{source}} {{network}} {contender.vq} {shape} --views {{views}}"
            learn = words(f"{learn} --steps {{vq_steps}} --batch {{vq_batch}} --width {{vq_width}}", **values)
            steps, shape = [Step(network / "report.json", learn, 1e10 * self.config.vq_steps)], "--network {network}"
        prepare = (
            f"-m data.prepare {{source}} {{folder}} {contender.prepare} {shape} --views {{views}} --workers {{cores}}"
        )
        steps.append(Step(folder / "report.json", words(prepare, cores=self.work.cores, **values), 1e13))
        longest = self.longest(contender.data)
        return [*steps, Step(longest, lambda: write_json(longest, {"tokens": self.tokens_of_longest(folder)}), 1e11)]

    def longest(self, data: str) -> Path:
        """How many tokens the longest document takes, of those to learn from and those to complete."""
        return self.out / "longest" / f"{data}.json"

    def tokens_of_longest(self, data: Path) -> int:
        tokenizer, shards = load_tokenizer(data), read_json(data / "report.json")["shards"].values()
        pictures = usable(find_items(self.test("whole")), tokenizer.codec)
        _, lengths = tokenizer.encode([tokenizer.codec.encode(picture) for picture in pictures])
        return max(int(lengths.max()), *(shard["longest"] for shard in shards))

    def plan(self, name: str, setting: str) -> Plan:
        """As many FLOPs, or as many pictures, as the reference takes."""
        reference, plan = replace(self.plan_a_step(REFERENCE), steps=self.config.steps), self.plan_a_step(name)
        ratio = reference.flops / plan.flops if setting == "flops" else reference.pictures / plan.pictures
        return replace(plan, steps=max(1, round(ratio)))

    def plan_a_step(self, name: str) -> Plan:
        """Rows hold the longest document, and a step about as many tokens for all.  What looking up embeddings takes is
        not counted."""
        contender = CONTENDERS[name]
        data = self.out / "data" / contender.data
        shards = [shard for key, shard in read_json(data / "report.json")["shards"].items() if key.startswith("train")]
        context = max(LEAST_ROW, -(-read_json(self.longest(contender.data))["tokens"] // ROW) * ROW)
        batch, tokenizer = max(1, round(self.config.tokens / context)), load_tokenizer(data)
        config, _ = parse_training(["--config", self.config.config, *contender.train.split(), *self.extra])
        micro = max(number for number in range(1, min(batch, config.micro) + 1) if batch % number == 0)
        sizes = tokenizer.grammar.sizes if config.syntax else ()
        config = replace(config, vocab=tokenizer.vocab, positions=sizes, context=context)
        length = sum(shard["tokens"] for shard in shards) / sum(shard["documents"] for shard in shards)
        cache = 2 * 4 * config.layers * config.kv_heads * (config.dim // config.heads) * context
        at_once = max(1, min(self.config.at_once, CACHE // cache))
        return Plan(data, context, batch, micro, 1, length, flops_of(config, computing_parameters(config)), at_once)

    def check_documents(self) -> None:
        """Errors: UserError, where a picture is too small for some codecs, which then learn from fewer than others."""
        counts = {}
        for name in {CONTENDERS[name].data for name in [REFERENCE, *self.codecs]}:
            shards = read_json(self.out / "data" / name / "report.json")["shards"].values()
            counts[name] = sum(shard["documents"] for shard in shards)
        if len({*counts.values()}) > 1:
            listed = ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items()))
            advice = f"leave out of {self.data}/train what is smaller than --size {self.config.size}"
            raise UserError(f"the codecs can use different numbers of pictures ({listed}): {advice}")

    def steps(self, name: str, setting: str) -> list[Step]:
        """All that is done for one trained model, in order."""
        plan, run, samples = self.plan(name, setting), self.run_of(name, setting), self.samples_of(name, setting)
        flags, values = [*CONTENDERS[name].train.split(), *self.extra], asdict(plan) | {"run": run}
        train = "--data {data} --out {run} --context {context} --batch {batch} --micro {micro} --steps {steps}"
        command = ["train.py", "--config", self.config.config, *flags]
        command += words(train, **values)  # of two --micro the later counts
        steps = [training(run, plan.steps, command, plan.flops)]
        write, pictures = plan.cost / 3 * plan.length, self.config.count  # FLOPs of a picture
        suffix, side = load_tokenizer(plan.data).codec.suffix, CONTENDERS[name].side or self.config.size

        def sample(to: Path, last: Path, count: int, how: str, **more: object) -> Step:
            command = words(f"sample.py {{run}} --batch {plan.at_once} --to {{to}} {how}", run=run, to=to, **more)
            return Step(last, command, write * count)

        to, free = samples / "free", f"--free --count {FREE_COUNT}"
        steps.append(sample(to, to / f"{FREE_COUNT - 1:05d}{suffix}", FREE_COUNT, free))
        for to, how in self.draws():
            last = samples / to / f"{pictures - 1:05d}{suffix}"
            steps.append(sample(samples / to, last, pictures, f"--count {pictures} {how}"))
            steps += self.look(samples / to, side, self.features(f"{name}-{setting}", to))
        for kind, seed, keep in self.completions():
            to, ratios = samples / f"{kind}-{seed}", " ".join(map(str, keep))
            last, share = to / f"keep_{keep[-1]}" / f"{pictures - 1:05d}{suffix}", sum(1 - ratio for ratio in keep)
            how = f"--prompt {{prompt}} --keep {ratios} --seed {seed}"
            steps.append(sample(to, last, pictures * share, how, prompt=self.test(kind)))
            for ratio in keep:
                features = self.features(f"{name}-{setting}", f"{kind}-{seed}-{ratio}")
                steps += self.look(to / f"keep_{ratio}", side, features)
            steps += self.look(to / "roundtrip", side, self.features(CONTENDERS[name].data, kind))
        return steps

    def draws(self) -> Iterator[tuple[str, str]]:
        """The folders of free samples, and how they are drawn."""
        for seed in range(self.config.seeds):
            yield f"seed-{seed}", f"--seed {seed}"
        for top_p in TOP_P:
            yield f"top-p-{top_p:g}", f"--top-p {top_p:g}"

    @cached_property
    def keep(self) -> list[float]:
        """Those shares of a picture that JPEG can keep, whose rows are the coarsest."""
        rows = load_tokenizer(self.out / "data" / CONTENDERS[REFERENCE].data).codec.parts
        return [each for each in KEEP if (each * rows).is_integer()]

    def completions(self) -> Iterator[tuple[str, int, list[float]]]:
        """Which pictures are completed, with which seed, from how much of them."""
        for seed in range(self.config.seeds):
            yield "whole", seed, self.keep
        if self.config.small:
            yield "small", 0, [HALF]

    def look(self, folder: Path, side: int, features: Path) -> list[Step]:
        """To the statistics of a folder of pictures, enlarged to the size of all others where they are smaller."""
        steps, large = [], folder.with_name(f"{folder.name}-large")
        if side != self.config.size:
            steps, folder = [Step(large, partial(enlarge, folder, large, self.config.size), 1e11)], large
        look = f"fid.py {{folder}} --save {{features}} --dims {DIMS} --weights {{weights}}"
        look = words(look, folder=folder, features=features, weights=self.weights)
        return [*steps, Step(features, look, LOOK * self.config.count)]

    @property
    def equal(self) -> list[str]:
        """What others get as much of as JPEG; for the long tail pictures alone, as in the paper."""
        return ["pictures"] if self.config.tail else [*SETTINGS]

    def settings_of(self, name: str) -> list[str]:
        """JPEG gives the measure of both."""
        return ["flops"] if CONTENDERS[name].data == CONTENDERS[REFERENCE].data else self.equal

    @property
    def models(self) -> list[tuple[str, str]]:
        return [(name, setting) for name in self.codecs for setting in self.settings_of(name)]

    def run_of(self, name: str, setting: str) -> Path:
        return self.out / "runs" / f"{name}-{setting}"

    def samples_of(self, name: str, setting: str) -> Path:
        return self.out / "samples" / f"{name}-{setting}"

    def features(self, *names: str) -> Path:
        """Of the samples of a model; of the round trip of a codec; of the test pictures."""
        return self.out / "features" / f"{'-'.join(names)}.npz"


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
    """Links to some pictures of each class: all of the most frequent, `share` of them of the rarest, and between the
    two as a geometric series; which class is how frequent is drawn.  Errors: UserError."""
    if to.exists():
        return to
    classes = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 3:
        raise UserError(
            f"{source} has {len(classes)} folders, and --tail needs one for each class of pictures, 3 at least"
        )
    order, part = np.random.default_rng(0).permutation(len(classes)), to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for place, number in enumerate(order.tolist()):
        items, folder = [*find_items(classes[number])], part / classes[number].name
        if not items:
            raise UserError(f"{classes[number]} is empty: delete it, or put pictures of the class there")
        folder.mkdir(parents=True)
        wanted = max(1, round(len(items) * share ** (place / (len(classes) - 1))))
        for i in range(wanted):
            path = Path(items[i * len(items) // wanted].path)
            (folder / f"{i:05d}{path.suffix}").symlink_to(path.resolve())
    part.rename(to)
    return to
