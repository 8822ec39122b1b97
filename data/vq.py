"""Pictures to the codes of a learned codebook, and back: the baseline that the paper compares JPEG-LM with.

    python -m data.vq photos out/vq                                       # 4x4 pixels a code, 1,024 codes
    python -m data.vq photos out/vq8 --halvings 3 --codes 4096            # 8x8 pixels a code: the paper's factor
    python -m data.vq photos out/vq --test others --weights FILE          # FID of what comes back, too
    python -m data.prepare photos data/vq --codec vq --network out/vq     # then train on the codes

Convolutions shrink a picture of H x W pixels to a grid of vectors, each is replaced by the nearest of some learned
ones, whose number is the symbol, and convolutions draw the picture from them again.  All is trained end to end on
squared error: van den Oord et al. 2017, VQ-VAE (arXiv:1711.00937).  Codes have unit length and few dimensions, as in
Yu et al. 2021, ViT-VQGAN (arXiv:2110.04627, section 3.2), and those that nobody uses are moved, as in Dhariwal et al.
2020, Jukebox (arXiv:2005.00341, section 3.1).  The paper names neither the layers of its VQ nor its training.

The same command continues an interrupted training, with the same numbers.

Letters in shapes: B pictures, H rows, W columns, D numbers of a code, K codes.
"""

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fid
from codec import Codec, Counted
from data.prepare import VIEWS, usable, validates, views_of
from data.prompts import read_prompts
from data.sources import Item, find_items
from data.stream import rows_of_step
from plumbing.command import Flags, UserError, differences, run
from plumbing.draw import grid, save_image
from plumbing.files import digest, read_json, write_json
from plumbing.processes import best_device, precision
from plumbing.run import claim
from plumbing.weights import read_safetensors, write_safetensors

# --- the network ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    size: int = 64  # pixels, both ways
    codes: int = 1024  # entries of the codebook
    halvings: int = 2  # of the resolution: a code for 4x4 pixels; 3: for 8x8
    width: int = 64  # channels at the lowest resolution; half as many at the highest
    blocks: int = 2  # residual blocks at the lowest resolution, in each half of the network
    code_dim: int = 8  # numbers of a code

    def __post_init__(self) -> None:
        bounds = {"size": (8, 1024), "codes": (2, 32_768), "halvings": (1, 5), "width": (32, 1024)}
        for name, (least, most) in (bounds | {"blocks": (1, 64), "code_dim": (1, 256)}).items():
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: choose {least} to {most}")
        if self.size % 2**self.halvings or self.width % 32:
            given = f"--size {self.size} --halvings {self.halvings} --width {self.width}"
            raise UserError(f"{given}: choose the size in steps of {2**self.halvings}, the width in steps of 32")


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(width // 16, width)


class Residual(nn.Sequential):
    """x + conv(conv(x)), which begins as x."""

    def __init__(self, width: int):
        first, second = ((norm(width), nn.SiLU(), conv(width, width)) for _ in range(2))
        super().__init__(*first, *second)
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Codebook(nn.Module):
    """Vectors (B, D, H, W) to the nearest of K directions, and their numbers.

    All lengths are 1, so the nearest has the largest dot product, and no code can drift out of reach.  `use` is a
    running mean of how often each code is chosen, 1 being its fair share; one that falls below `dead` is moved to a
    vector of the batch at hand.  Without that a few codes win early, and the others are never chosen.
    """

    commitment, decay, dead = 0.25, 0.95, 0.1

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(codes, dim))
        self.register_buffer("use", torch.zeros(codes))  # all dead: the first batch fills it

    def numbers(self, z: Tensor) -> Tensor:
        """(B, D, H, W) to (B, H, W), in float32: bf16 has too few digits to tell neighbours apart."""
        with torch.autocast(z.device.type, enabled=False):
            return (unit(z).movedim(1, -1) @ unit(self.weight, 1).T).argmax(-1)

    def vectors(self, numbers: Tensor) -> Tensor:
        """(B, H, W) to (B, D, H, W)."""
        return F.embedding(numbers, unit(self.weight, 1)).movedim(-1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes (B, D, H, W), through which gradients pass as if they were z, and the loss that draws
        vectors and codes to each other; takes note of which codes are used."""
        z = unit(z)
        with torch.no_grad():
            self.revive(z.movedim(1, -1).flatten(0, 2))
            numbers = self.numbers(z)
            share = torch.bincount(numbers.flatten(), minlength=len(self.use)) * (len(self.use) / numbers.numel())
            self.use.lerp_(share, 1 - self.decay)
        q = self.vectors(numbers)
        loss = F.mse_loss(q, z.detach()) + self.commitment * F.mse_loss(z, q.detach())
        return z + (q - z).detach(), loss

    def revive(self, z: Tensor) -> None:
        """Move the dead codes to vectors (n, D), drawn from those at hand."""
        dead = (self.use < self.dead).nonzero()[:, 0]
        self.weight[dead] = z[torch.randint(len(z), (len(dead),)).to(z.device)]
        self.use[dead] = 1


def unit(x: Tensor, dim: int = 1) -> Tensor:
    return F.normalize(x.float(), dim=dim)


class Network(nn.Module):
    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config = config
        widths = [3, config.width // 2, *[config.width] * (config.halvings - 1)]
        down, up = [], []
        for i, (above, width) in enumerate(zip(widths, widths[1:], strict=False)):
            blocks = config.blocks if i == config.halvings - 1 else 1
            down += [nn.Conv2d(above, width, 4, stride=2, padding=1), *(Residual(width) for _ in range(blocks))]
            before = [norm(width), nn.SiLU()] if i == 0 else []
            up = [*(Residual(width) for _ in range(blocks)), *before, conv(width, 4 * above), nn.PixelShuffle(2), *up]
        self.encoder = nn.Sequential(*down, norm(width), nn.SiLU(), nn.Conv2d(width, config.code_dim, 1))
        self.codebook = Codebook(config.codes, config.code_dim)
        self.decoder = nn.Sequential(conv(config.code_dim, width), *up)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) as they come back, and the codebook's loss."""
        q, loss = self.codebook(self.encoder(x))
        return self.decoder(q).float(), loss

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) to codes (B, H / 2^halvings, W / 2^halvings)."""
        return self.codebook.numbers(self.encoder(to_input(pixels)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, H, W), -1 for none, to uint8 (B, H * 2^halvings, W * 2^halvings, 3)."""
        vectors = self.codebook.vectors(codes.clamp(min=0)) * (codes >= 0)[:, None]
        return ((self.decoder(vectors).movedim(1, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_input(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to -1..1 (B, 3, H, W)."""
    return (pixels.float() / 127.5 - 1).movedim(-1, 1)


# --- the codec ------------------------------------------------------------------------------------------------------

FILE = "vq.safetensors"  # the network, in the folder where it was learned and wherever its codes are


@contextmanager
def alone() -> Iterator[None]:
    """One thread and no gradients: the same sums everywhere, and no threads that a worker process would miss."""
    with fid.one_thread_each(), torch.inference_mode():
        yield


@dataclass(frozen=True)
class VQ(Counted):
    """Codes of a learned codebook, from left to right and from top to bottom.

    Pictures are encoded one at a time, in float32 on a CPU, for the nearest code may depend on rounding.
    """

    network: str = ""  # folder that `python -m data.vq` wrote; its weights' sha256 from then on

    name, part = "vq", "rows of codes"

    def __post_init__(self) -> None:
        if self.network:
            loaded, sha256 = load(Path(self.network, FILE))
            object.__setattr__(self, "learned", loaded)
            object.__setattr__(self, "network", sha256[:16])

    def __getattr__(self, name: str) -> object:
        if name == "learned":
            raise UserError("--network is missing: name a folder that `python -m data.vq SOURCE OUT` wrote")
        raise AttributeError(name)

    symbols = property(lambda self: self.learned.config.codes)
    shape = property(lambda self: (self.learned.config.size, self.learned.config.size, 3))
    parts = property(lambda self: self.learned.config.size >> self.learned.config.halvings)
    places = property(lambda self: (self.parts, self.parts))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape == self.shape and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
        with alone():
            codes = self.learned.encode(torch.from_numpy(np.array(pixels))[None])
        return codes.flatten().numpy().astype(self.dtype)

    def decode(self, symbols: np.ndarray) -> np.ndarray:
        """What is missing is no code at all, what is too much is left out."""
        codes = torch.full((self.parts**2,), -1)
        known = torch.from_numpy(np.minimum(symbols[: self.parts**2], self.symbols - 1).astype(np.int64))
        codes[: len(known)] = known
        with alone():
            return self.learned.decode(codes.view(1, self.parts, self.parts))[0].numpy()

    def save(self, folder: Path) -> dict[str, object]:
        save(folder / FILE, self.learned)
        return asdict(self)

    @classmethod
    def load(cls, folder: Path, saved: dict[str, object]) -> Self:
        found = cls(str(folder))
        if found.network != saved["network"]:
            raise ValueError(f"{FILE} is not the network that wrote the codes")
        return found

    @property
    def encoder(self) -> str:
        return f"PyTorch {torch.__version__}"


def save(path: Path, network: Network) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".vq-") as folder:
        about = {"network": json.dumps(asdict(network.config))}
        write_safetensors(Path(folder, FILE), network.state_dict(), about)
        Path(folder, FILE).replace(path)


@lru_cache(4)
def read_network(path: Path, sha256: str) -> Network:
    tensors, about = read_safetensors(path)
    try:
        config = NetworkConfig(**json.loads(about["network"]))
        if not all(type(value) is int for value in asdict(config).values()):
            raise ValueError(config)
        with torch.device("meta"):  # what is no such network is refused before its size is allocated
            network = Network(config)
        network.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} holds no network of this version ({reason}): learn it anew") from None
    return network.eval()


def load(path: Path) -> tuple[Network, str]:
    """The network in a file, and the file's sha256.  Errors: UserError."""
    if not path.exists():
        raise UserError(f"{path.parent} holds no {FILE}: run `python -m data.vq SOURCE {path.parent}` first")
    sha256 = digest(path)
    return read_network(path, sha256), sha256


# --- learning it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Learning(NetworkConfig):
    steps: int = 6000  # optimizer steps
    batch: int = 16  # pictures a step
    lr: float = 1e-3  # peak learning rate
    warmup: int = 100  # steps of linear rise, before the cosine fall to zero
    seed: int = 0  # of the weights, the order of the pictures and the codes that are moved
    views: int = 1  # of each picture: 1, 2 with its mirror image, 8 turned as well
    val: float = 0.05  # share of the pictures that validate: those of data.prepare, if its --val is the same
    every: int = 500  # steps from one evaluation and saved state to the next

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"steps": 1, "batch": 1, "warmup": 0, "seed": 0, "every": 1}
        for name, value in asdict(self).items():
            if name in least and not least[name] <= value < 2**31:
                raise UserError(f"--{name} is {value}: choose {least[name]} or more")
        if not (0 < self.val < 1 and 0 < self.lr < 1) or self.views not in VIEWS:
            given = f"--lr {self.lr} --val {self.val} --views {self.views}"
            raise UserError(f"{given}: choose the first two between 0 and 1, and views of {VIEWS}")


MOST = 100_000  # pictures that it learns on, drawn from all; they are held in memory
FEW = 0.1  # of the codes in use: what is called a collapse


def batch_of(pictures: np.ndarray, step: int, config: Learning) -> Tensor:
    """What step `step` sees, uint8 (B, H, W, 3), a function of the seed and the step alone."""
    chosen = rows_of_step(step, config.batch, len(pictures) * config.views, config.seed).tolist()
    views = [next(islice(views_of(pictures[n % len(pictures)], VIEWS[-1]), n // len(pictures), None)) for n in chosen]
    return torch.from_numpy(np.stack(views))


def learning_rate(step: int, config: Learning) -> float:
    return config.lr * min((step + 1) / max(1, config.warmup), 0.5 + 0.5 * math.cos(math.pi * step / config.steps))


def decibels(error: Tensor) -> float:
    """The mean PSNR of mean squared errors (n,) over -1..1; none counts as more than that of an eighth of a level."""
    return (10 * torch.log10(4 / error.clamp(min=1e-6))).mean().item()


@torch.no_grad()
def evaluate(network: Network, pictures: np.ndarray) -> dict[str, float]:
    """PSNR in dB of pictures as they come back, its mean over all; how many codes they use; and the number of codes,
    were all equally frequent, that would be as hard to guess."""
    device, errors, uses = network.codebook.use.device, [], torch.zeros(network.config.codes)
    for some in torch.from_numpy(pictures).split(50):
        codes, x = network.encode(some.to(device)), to_input(some)
        errors.append((to_input(network.decode(codes).cpu()) - x).square().mean((1, 2, 3)))
        uses += torch.bincount(codes.flatten().cpu(), minlength=len(uses))
    share = uses[uses > 0] / uses.sum()
    perplexity = math.exp(-(share * share.log()).sum().item())
    return {"psnr": decibels(torch.cat(errors)), "used": int((uses > 0).sum()), "perplexity": round(perplexity, 1)}


class State:
    """A training, which can be left and taken up again: OUT/training.safetensors."""

    def __init__(self, out: Path, config: Learning, settings: dict[str, object], device: torch.device):
        torch.manual_seed(config.seed)
        self.path, self.config, self.settings = out / "training.safetensors", config, settings
        self.step, self.seconds = 0, 0.0
        shape = NetworkConfig(**{each.name: getattr(config, each.name) for each in fields(NetworkConfig)})
        self.network = Network(shape).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0)
        if self.path.exists():
            self.read()

    def write(self) -> None:
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, memory in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{name}": tensor for name, tensor in memory.items()}
        note = {"step": self.step, "seconds": self.seconds, "settings": self.settings}
        part = self.path.with_suffix(".part")
        write_safetensors(part, tensors, {"training": json.dumps(note)})
        part.replace(self.path)

    def read(self) -> None:
        """Errors: UserError, also where it is another training."""
        tensors, about = read_safetensors(self.path)
        note = json.loads(about["training"])
        if changed := differences(note["settings"], self.settings):
            other = f"{self.path.parent} holds another training ({changed})"
            raise UserError(f"{other}: choose another folder, or delete it")
        self.step, self.seconds = note["step"], note["seconds"]
        prefix = "network."
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self.network.load_state_dict({name[len(prefix) :]: tensor for name, tensor in kept.items()})
        memory = {}
        for name in tensors.keys() - kept.keys():
            number, key = name.split(".")
            memory.setdefault(int(number), {})[key] = tensors[name].clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": memory, "param_groups": groups})

    def advance(self, pixels: Tensor) -> Tensor:
        """Take a step on pictures (B, H, W, 3), and give the mean squared error of each (B,)."""
        device, config = self.network.codebook.use.device, self.config
        torch.manual_seed((config.seed << 32) + self.step)  # of the codes that are moved
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        x, kind = to_input(pixels.to(device)), precision(device)
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            y, loss = self.network(x)
        errors = (y - x).square().mean((1, 2, 3))
        self.optimizer.zero_grad(set_to_none=True)
        (errors.mean() + loss).backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise UserError(f"the gradient is {norm.item()} at step {self.step}: lower --lr")
        self.optimizer.step()
        self.step += 1
        return errors.detach()


def listing_of(items: list[Item]) -> str:
    return hashlib.sha256("\0".join(item.name for item in items).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PicturesOf(Codec):
    """Just the shape of pictures, for whoever reads them."""

    size: int
    name: ClassVar[str] = "frame"

    shape = property(lambda self: (self.size, self.size, 3))


def pictures_of(items: list[Item], config: Learning) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, H, W, 3) to learn from and to validate with: those that validate in data.prepare, but that files
    that cannot be used are counted too where there are more than it takes.  Errors: UserError."""
    chosen = np.arange(len(items))
    if len(items) > MOST:
        chosen = np.sort(np.random.default_rng(0).permutation(len(items))[:MOST])
    frame, found, numbers = PicturesOf(config.size), [], []
    for number in tqdm(chosen.tolist(), "read", unit=" files", disable=None):
        for picture in usable([items[number]], frame):
            numbers.append(number if len(items) > MOST else len(found))
            found.append(picture)
    held = validates(np.array(numbers, int), config.val)
    if not held.any() or held.all():
        few = f"the source has {len(found)} usable pictures, too few to validate --val {config.val} of them"
        raise UserError(f"{few}: give it more")
    pictures = np.stack(found)
    return pictures[~held], pictures[held]


def learn(source: Path, out: Path, config: Learning) -> None:
    """Write OUT/vq.safetensors, report.json and grid.png from the pictures of SOURCE.  Errors: UserError."""
    out.mkdir(parents=True, exist_ok=True)
    items = [*find_items(source)]
    settings = {**asdict(config), "listing": listing_of(items)}
    if (out / "report.json").exists() and (out / FILE).exists():
        if changed := differences(read_json(out / "report.json").get("settings", {}), settings):
            raise UserError(f"{out} was learned otherwise ({changed}): choose another folder, or delete this one")
        print(f"{out} is learned already")
        return
    learned_from, held = pictures_of(items, config)
    state, errors, started = State(out, config, settings, best_device()), [], time.perf_counter()
    network, before, now = state.network, state.seconds, {}
    parameters = sum(weight.numel() for weight in network.parameters())
    print(f"{parameters:,} parameters; {len(learned_from):,} pictures; step {state.step} of {config.steps}", flush=True)
    with tqdm(None, "learn", config.steps, initial=state.step, unit=" steps", disable=None) as bar:
        while state.step < config.steps:
            errors.append(state.advance(batch_of(learned_from, state.step, config)))
            bar.update()
            if state.step % config.every == 0 or state.step == config.steps:
                state.seconds = before + time.perf_counter() - started
                state.write()
                now, training = evaluate(network, held), decibels(torch.cat(errors))
                errors = []
                left = state.seconds / state.step * (config.steps - state.step)
                bar.write(LINE.format(step=state.step, training=training, codes=config.codes, left=left, **now))
    report = {"settings": settings, "seconds": round(state.seconds, 1), "parameters": parameters}
    report |= now or evaluate(network, held)
    seen = len(held) * (config.size >> config.halvings) ** 2  # codes, at most so many of which can be seen in use
    if report["used"] < FEW * min(config.codes, seen):
        few = f"{report['used']} of {config.codes:,} codes are used: the codebook has collapsed"
        print(f"warning: {few}, or the pictures are too simple for it; lower --lr or --codes, or take more pictures")
    shown = held[:: -(-len(held) // 10)][:10]
    with torch.no_grad():
        back = network.decode(network.encode(torch.from_numpy(shown).to(network.codebook.use.device))).cpu().numpy()
    save_image(out / "grid.png", grid([*shown, *back], len(shown), room=1024))
    save(out / FILE, network.cpu().to(memory_format=torch.contiguous_format))
    write_json(out / "report.json", report)  # last: now it is learned
    state.path.unlink(missing_ok=True)
    used = f"{report['used']:,} of {config.codes:,} codes used"
    print(f"{out}: {report['psnr']:.2f} dB, {used}, {report['seconds']:,.0f} s")


LINE = (
    "step {step}  training {training:.2f} dB  validation {psnr:.2f} dB, {used:,} of {codes:,} codes used, as hard to "
    "guess as {perplexity:,.0f}  {left:,.0f} s left"
)


def distance(codec: VQ, test: Path, weights: Path | None, dims: int = 768) -> dict[str, float | int]:
    """FID between pictures and what comes back of them."""
    network, found = fid.load(fid.weights_file(weights), dims), []
    with tempfile.TemporaryDirectory() as folder:
        read_prompts(test, codec, Path(folder))
        for name in ("originals", "roundtrip"):
            features, _ = fid.extract(fid.Images(Path(folder, name)), network)
            found.append(fid.Statistics.of(features))
    return {f"fid_{dims}": fid.frechet_distance(*found), "pictures": len(features)}


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument("source", type=Path, help="folder of pictures, of such folders, or of .tar files of them")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--test", type=Path, help="other pictures, to measure the FID of what comes back of them")
    parser.add_argument("--weights", type=Path, help="of the FID network (default: downloaded once, see fid.py)")
    parser.add_fields(Learning())
    flags = parser.parse(arguments)
    config = Learning(**{each.name: getattr(flags, each.name) for each in fields(Learning) if each.name in flags})
    for folder in filter(None, (flags.source, flags.test)):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: name a folder of pictures or of .tar files")
    if flags.out.resolve().is_relative_to(flags.source.resolve()):
        raise UserError(f"{flags.out} lies in {flags.source}, whose files it would count as its own: choose another")
    with claim(flags.out, wait=True):
        learn(flags.source, flags.out, config)
        if flags.test:
            found = distance(VQ(str(flags.out)), flags.test, flags.weights)
            write_json(flags.out / "report.json", read_json(flags.out / "report.json") | {"test": found})
            print(f"{flags.out}: " + ", ".join(f"{name} {value:.5g}" for name, value in found.items()))


if __name__ == "__main__":
    run(main)
