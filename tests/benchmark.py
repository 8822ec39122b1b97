"""How fast the parts are: one JSON line per measurement.

    python -m tests.benchmark            everything
    python -m tests.benchmark fid        what is named

What is compared runs in turn, A B A B, after one warm-up each, so that other load on the machine meets both alike.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor, library, nn

import fid as fid_py  # the function below has the short name
import sample
import train
from codec import JPEG, Codec, Tokenizer
from data.pairs import learn_pairs
from data.prepare import cores, prepare
from data.shapes import draw, make, move
from h264 import H264
from model import Cache
from plumbing import huggingface, plan, processes


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each function, run in turn after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def hardware() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n") if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **gpu,
    }


def matrix_rate() -> float:
    """Operations/s of a product of large float32 matrices."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / interleaved({"product": lambda: a @ a}, 5)["product"]


def memory_bandwidth() -> float:
    """Bytes/s that are read where memory is just added up."""
    numbers = torch.ones(1 << 26)
    return 4 * len(numbers) / interleaved({"sum": numbers.sum}, 5)["sum"]


def emit(name: str, medians: dict[str, float], unit: str, ratio: float | None = None, **more: object) -> None:
    """Print one measurement; `ratio` is how many times better ours is than what stands beside it."""
    rounded = {key: float(f"{value:.4g}") for key, value in medians.items()}
    ratio = None if ratio is None else round(ratio, 3)
    print(json.dumps({"name": name, "medians": rounded, "ratio": ratio, "unit": unit, **more, "hardware": hardware()}))


# --- FID --------------------------------------------------------------------------------------------------------------

operators = None  # where missing ones are defined; they vanish with it


def complete_torchvision() -> None:
    """Let a torchvision load that was not built for this torch, by defining the two operators that it names while
    loading.  Its pure Python is all that pytorch_fid and transformers need.  ImportError where it is not installed."""
    global operators
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        operators = library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def published_inception(state: dict[str, Tensor], dims: int) -> nn.Module:
    """pytorch_fid's own network, from a full table of weights instead of a download; ImportError where absent."""
    complete_torchvision()
    import pytorch_fid.inception as published

    published.load_state_dict_from_url = lambda *_, **__: state
    return published.InceptionV3([published.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights under pytorch_fid's names, drawn so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(count: int, low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for name, conv in fid_py.Inception(2048).named_modules():
        if isinstance(conv, nn.Conv2d):
            weight = torch.randn(conv.weight.shape, generator=generator)
            state[f"{name}.conv.weight"] = weight * (2 / conv.weight[0].numel()) ** 0.5
            state[f"{name}.bn.weight"] = uniform(conv.out_channels, 0.8, 1.2)
            state[f"{name}.bn.bias"] = uniform(conv.out_channels, -0.1, 0.1)
            state[f"{name}.bn.running_mean"] = uniform(conv.out_channels, -0.1, 0.1)
            state[f"{name}.bn.running_var"] = uniform(conv.out_channels, 0.8, 1.2)
    return state


def network_of(state: dict[str, Tensor], dims: int) -> nn.Module:
    """Our network with these weights, laid out as `fid.extract` lays it out."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "weights.pth")
        return fid_py.load(Path(folder) / "weights.pth", dims).to(memory_format=torch.channels_last)


def fid() -> None:
    """Images/s from files to features at 768 dims, beside pytorch_fid's own; seconds of a distance at 2048 dims."""
    dims, count, state = 768, 50, random_state()
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(
                Path(folder) / f"{i:02d}.jpg"
            )
        images, ours = fid_py.Images(Path(folder)), network_of(state, dims)
        functions = {"ours": lambda: fid_py.extract(images, ours)[0]}
        try:
            network = published_inception(state, dims)
            from pytorch_fid.fid_score import get_activations

            device = "cuda" if torch.cuda.is_available() else "cpu"
            network = network.to(device)
            functions["pytorch_fid"] = lambda: get_activations(images.files, network, 50, dims, device, 0)
        except ImportError:
            pass
        seconds, more = interleaved(functions), {}
        if theirs := functions.get("pytorch_fid"):
            wanted = theirs()
            more["feature_error"] = float(
                f"{np.linalg.norm(functions['ours']() - wanted) / np.linalg.norm(wanted):.2g}"
            )
    ratio = seconds["pytorch_fid"] / seconds["ours"] if "pytorch_fid" in seconds else None
    speeds = {name: count / value for name, value in seconds.items()}
    emit(f"fid features at {dims} dims", speeds, "images/s", ratio, images=count, **more)

    rng = np.random.default_rng(0)
    a, b = (fid_py.Statistics.of(rng.standard_normal((n, 2048))) for n in (5000, 4000))
    seconds = interleaved({"ours": lambda: fid_py.frechet_distance(a, b)}, rounds=3)
    emit("fid distance at 2048 dims", seconds, "s")


# --- training ---------------------------------------------------------------------------------------------------------


class RandomTokens:
    """Stands for a Stream: where the tokens come from is not measured."""

    def read(self, start: int, count: int) -> np.ndarray:
        return np.random.default_rng(start).integers(0, 320, count, np.uint16)

    def read_syntax(self, start: int, count: int) -> np.ndarray:
        return np.zeros((count, 0), np.uint8)


def step_of(config: train.Config, device: torch.device, rows: int) -> tuple[Callable[[], None], nn.Module]:
    """A whole step of training on some rows, as train.loop takes it, and the model."""
    model = train.build_model(config, device)
    for weight in model.parameters():  # on the device, for a billion numbers take one core ten seconds
        nn.init.normal_(weight, std=0.02) if weight.dim() > 1 else nn.init.ones_(weight)
    optimizers, stream = train.build_optimizers(model, config), RandomTokens()

    def step() -> None:
        train.backward(model, stream, np.arange(rows), config.micro, config, device)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step, model


SHAPE = {"vocab": 320, "context": 512, "dim": 192, "layers": 4, "heads": 6, "kv_heads": 6, "hidden": 512}


def transformers_llama(config: train.Config) -> nn.Module:
    """transformers' own model of the same shape; ImportError where it is not installed."""
    complete_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**huggingface.settings(config), attn_implementation="sdpa"))


def training() -> None:
    """Tokens/s of a step at dim 192, 4 layers, 6 heads, context 512, batch 16, beside transformers', and its share
    of the rate of a large matrix product."""
    config, cpu = train.Config(**SHAPE), torch.device("cpu")
    functions = {"ours": config, "ours in one pass": replace(config, micro=16)}
    if shutil.which("c++") or shutil.which("g++"):
        functions["ours compiled"] = replace(config, compile=True)
    functions = {name: step_of(settings, cpu, 16)[0] for name, settings in functions.items()}
    try:
        theirs = transformers_llama(config)
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        x = torch.randint(0, 320, (16, 512))

        def step() -> None:
            theirs(x, labels=x).loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        functions["transformers"] = step
    except ImportError:
        pass
    speeds = {name: 16 * 512 / seconds for name, seconds in interleaved(functions, rounds=7).items()}
    ratio = speeds["ours"] / speeds["transformers"] if "transformers" in speeds else None
    parameters, _ = plan.count(config)
    reached = speeds["ours"] * plan.flops_of(config, parameters) / matrix_rate()
    emit("training step, 1.9M parameters", speeds, "tokens/s", ratio, reached=round(reached, 3))


# --- at scale ---------------------------------------------------------------------------------------------------------


def sharding() -> None:
    """Tokens/s of `--config small` on the CPU: one process of two threads, two of one thread that share the batch, and
    two that know nothing of each other, each with half the batch: what is left between the last two is sharding."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        make(Path(folder) / "shapes")
        outs = itertools.count()

        def run(launchers: list[list[str]], batch: int, threads: int) -> float:
            begun = {}
            for launcher in launchers:
                out = Path(folder) / f"out{next(outs)}"
                shape = f"--data {folder}/shapes --out {out} --batch {batch} --steps 100 --samples 1".split()
                command = [sys.executable, *launcher, "train.py", *shape, "--every", "100", "--log-every", "100"]
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                begun[out] = subprocess.Popen(command, env=environment, **quiet)
            speed = 0
            for out, process in begun.items():
                assert process.wait() == 0
                speed += json.loads((out / "log.jsonl").read_text().splitlines()[0])["tokens_per_second"]
            return speed

        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        runs = {"one process": ([[]], 2, 2), "two, sharded": ([torchrun], 2, 1), "two, apart": ([[], []], 1, 1)}
        speeds = {name: [] for name in runs}
        for _ in range(3):
            for name, arguments in runs.items():
                speeds[name].append(run(*arguments))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    overhead = medians["two, apart"] / medians["two, sharded"] - 1
    emit("small on the CPU", medians, "tokens/s", overhead=round(overhead, 3))


def saving() -> None:
    """Seconds that a checkpoint of the base model holds training up, and until it is there."""
    config = replace(train.CONFIGS["base"], vocab=320)
    model = train.build_model(config, torch.device("cpu"))
    model.init_weights()
    optimizers, seconds = train.build_optimizers(model, config), {"held up": [], "there": []}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    for optimizer in optimizers:
        optimizer.step()
    tokens = Tokenizer(JPEG(size=64))
    with tempfile.TemporaryDirectory(dir=".") as folder, train.Saver(Path(folder)) as saver:
        for step in range(5):
            begun = time.perf_counter()
            saver.save(model, optimizers, step, config, tokens)
            seconds["held up"].append(time.perf_counter() - begun)
            saver.wait()
            seconds["there"].append(time.perf_counter() - begun)
        size = sum(path.stat().st_size for path in Path(folder).glob("step_*4/*")) / 1e9
    emit("saving base", {name: statistics.median(values) for name, values in seconds.items()}, "s", gb=round(size, 2))


MATRICES = ("gemm", "cutlass", "nvjet", "cublas", "_mm")  # in the names of kernels
ATTENTION = ("flash", "fmha", "attention", "cudnn")


def scale() -> None:
    """On a GPU: tokens/s, share of the peak, memory beside --plan, and where the time goes, of base, as it is and with
    --compile, and of 1b and 7b, which have that (of half the blocks where all do not fit)."""
    if not torch.cuda.is_available():
        print("scale: there is no GPU here", file=sys.stderr)
        return
    device = processes.join()
    room = torch.cuda.get_device_properties(device).total_memory
    for name, compiled, passes in (("base", False, 4), ("base", True, 4), ("7b", True, 2), ("1b", True, 2)):
        preset = train.CONFIGS[name]
        config = replace(preset, batch=preset.micro * passes, syntax=False, compile=compiled)
        if plan.memory_plan(config, 1)["in all"] > room:
            config = replace(config, layers=config.layers // 2)
        planned = plan.memory_plan(config, 1)["in all"]
        shape = {"layers": config.layers, "rows": config.batch, "micro": config.micro, "compile": config.compile}
        if planned > room:
            print(f"{name}: needs {planned / 1e9:.0f} GB of {room / 1e9:.0f}", file=sys.stderr)
            continue
        emit(f"step of {name}", **shape, **at_scale(config, device), planned_gb=round(planned / 1e9, 1))
        torch._dynamo.reset()
        gc.collect()  # FSDP's modules refer to each other
        torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


def at_scale(config: train.Config, device: torch.device) -> dict[str, object]:
    """What `scale` prints of one config: random tokens, plain Llama."""
    step, _ = step_of(config, device, config.batch)
    torch.cuda.reset_peak_memory_stats()

    def timed() -> None:
        step()
        torch.cuda.synchronize()

    seconds = interleaved({"step": timed}, rounds=3)["step"]
    parameters, _ = plan.count(config)
    speed = config.batch * config.context / seconds
    full, peak = plan.flops_of(config, parameters), plan.peak_flops(device)
    causal = full - 6 * config.layers * config.dim * config.context
    shares = {"MFU": speed * full / peak, "MFU, causal": speed * causal / peak} if peak else {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        timed()
    times, names = dict.fromkeys(["matrix products", "attention", "triton", "the rest"], 0.0), []
    for event in profile.key_averages():
        if not (spent := event.self_device_time_total) or event.is_user_annotation:
            continue
        name = event.key.lower()
        kinds = {"triton": ("triton",), "attention": ATTENTION, "matrix products": MATRICES, "the rest": ("",)}
        times[next(kind for kind, parts in kinds.items() if any(part in name for part in parts))] += spent
        names.append((spent, event.count, event.key))
    for spent, count, name in sorted(names, reverse=True)[:25]:
        print(f"{spent / 1e3:10.2f} ms {count:6} times  {name[:110]}", file=sys.stderr)
    total = sum(times.values()) or 1.0  # a profiler without its rights sees no kernels
    return {
        "medians": {"tokens/s": speed, **shares},
        "unit": "tokens/s, share of the peak",
        "memory_gb": round(plan.memory(device), 1),
        "profile": {name: round(spent / total, 3) for name, spent in times.items()},
        "kernels_of_step": round(total / 1e6 / seconds, 3),  # of its time; the rest waits for Python
    }


def writing() -> None:
    """On a GPU: tokens/s of sampling with the base preset, grammar and syntax positions included, by 1 file at once, 64
    and 400, beside the same steps without a recording."""
    if not torch.cuda.is_available():
        print("writing: there is no GPU here", file=sys.stderr)
        return
    device, pictures = torch.device("cuda"), [draw(i) for i in range(100)]
    codec = JPEG(restart=0)
    tokenizer = learn_pairs(codec, [codec.encode(picture) for picture in pictures], 258)
    config = replace(train.CONFIGS["base"], vocab=tokenizer.vocab, positions=tokenizer.grammar.sizes)
    model = train.build_model(config, torch.device("cpu")).eval()
    model.init_weights()
    model.to(device, torch.bfloat16)
    lengths = []  # an untrained model goes on as long as it may

    def write(batch: int) -> None:
        start, seeds = [np.array([tokenizer.start])] * batch, [(0, i) for i in range(batch)]
        rows = sample.generate(model, tokenizer, start, seeds, sample.Sampling(length=513))
        lengths.append(statistics.mean(map(len, rows)) - 1)

    def eagerly(batch: int) -> None:
        can, sample.can_record = sample.can_record, lambda *_: False
        write(batch)
        sample.can_record = can

    for batch in (1, 64, 400):
        lengths.clear()
        functions = {"ours": partial(write, batch), "without a recording": partial(eagerly, batch)}
        seconds = interleaved(functions, 2)
        speeds = {name: batch * statistics.median(lengths) / value for name, value in seconds.items()}
        emit(f"sampling base, {batch} at once", speeds, "tokens/s", ms_a_step=round(1e3 * batch / speeds["ours"], 3))


# --- preparation ------------------------------------------------------------------------------------------------------


def bare_loop(paths: list[Path]) -> int:
    """What the encoding itself costs: open, convert, resize, save."""
    written = 0
    for path in paths:
        out = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS).save(
                out, "JPEG", quality=25, subsampling="4:2:0", streamtype=2, restart_marker_blocks=1
            )
        written += len(out.getvalue())
    return written


def preparation() -> None:
    """Files/s of data.prepare, with syntax positions and without, beside a bare Pillow loop on as many processes, and
    memory at few files and at many."""
    count = 16_384
    with tempfile.TemporaryDirectory() as folder:
        pictures, outs = Path(folder) / "pictures", itertools.count()
        pictures.mkdir()
        for i in range(count):
            picture = np.asarray(Image.fromarray(draw(i % 512)).resize((96, 96)))
            Image.fromarray(picture).save(pictures / f"{i:05d}.jpg", quality=95)
        paths = sorted(pictures.iterdir())

        def bare() -> None:
            with ProcessPoolExecutor(cores()) as pool:
                list(pool.map(bare_loop, [paths[i : i + 64] for i in range(0, count, 64)]))

        def ours(syntax: bool = False) -> None:
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                prepare(pictures, Path(folder) / f"out{next(outs)}", JPEG(), 320, 0.05, cores(), syntax)

        functions = {"ours": ours, "ours with syntax positions": lambda: ours(True), "bare": bare}
        speeds = {name: count / seconds for name, seconds in interleaved(functions, 3).items()}
        emit("preparation, 96 to 64 px", speeds, "files/s", speeds["ours"] / speeds["bare"])

        peaks = {}
        for part in (count // 8, count):
            few = Path(folder) / f"few{part}"
            few.mkdir()
            for path in paths[:part]:
                (few / path.name).hardlink_to(path)
            script = (
                f"from data.prepare import *; from codec import JPEG; import resource\n"
                f"prepare(Path({str(few)!r}), Path({str(few) + 'out'!r}), JPEG(), 320, 0.05, 2)\n"
                f"import sys; usage = [resource.getrusage(who).ru_maxrss for who in (-1, 0)]\n"
                f"print(max(usage), file=sys.stderr)"
            )
            result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
            peaks[f"{part} files"] = int(result.stderr.split()[-1]) / 1024
        emit("preparation, largest process", peaks, "MiB")


# --- sampling ---------------------------------------------------------------------------------------------------------


def sampling() -> None:
    """What mask, states and positions cost beside a step of the small model, 64 files at once: pictures with a restart
    marker an MCU and a row, and clips."""
    pictures, moving = [draw(i) for i in range(100)], [move(i) for i in range(100)]
    for codec, drawn in ((JPEG(), pictures), (JPEG(restart=4), pictures), (H264(64, 64, fps=10), moving)):
        functions, steps = sampling_of(codec, drawn)
        seconds = {name: value / steps * 1e3 for name, value in interleaved(functions, 5).items()}
        overhead = seconds["grammar"] / seconds["model"]
        emit(f"sampling, a token of 64 files, {codec}", seconds, "ms", overhead=round(overhead, 4))


def sampling_of(codec: Codec, drawn: list[np.ndarray]) -> tuple[dict[str, Callable[[], None]], int]:
    """What the grammar does while files are drawn, what the model and the dice do, and the tokens of a file."""
    symbols = [codec.encode(pixels) for pixels in drawn]
    tokenizer = learn_pairs(codec, symbols, codec.vocab)
    config = replace(train.CONFIGS["small"], vocab=tokenizer.vocab, positions=tokenizer.grammar.sizes)
    model, steps = train.build_model(config, torch.device("cpu")).eval(), 300
    model.init_weights()
    rows = torch.full((64, steps), tokenizer.end)
    for row, file in zip(rows, symbols, strict=False):
        tokens = tokenizer.encode([file])[0][:steps]
        row[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    grammar, room = tokenizer.grammar.to("cpu"), config.context
    logits, told = torch.randn(64, tokenizer.vocab), torch.zeros(64, 1, len(grammar.sizes), dtype=torch.long)

    def alone() -> None:
        states = grammar.begin(64)
        for at in range(1, steps):
            logits.masked_fill(grammar.mask(states, room - at), -torch.inf)
            states, _ = grammar.accept(states, rows[:, at], room - at)
            grammar.positions(states)

    @torch.no_grad()
    def rest() -> None:
        cache, uniform = Cache(model.config, 64, steps), torch.rand(64)
        for at in range(1, steps):
            sample.choose(model(rows[:, at - 1 : at], told, cache)[:, -1], uniform, sample.Sampling())

    return {"grammar": alone, "model": rest}, steps - 1


def generation() -> None:
    """Tokens/s of whole files at dim 192, 4 layers, 6 heads, 256 tokens of 320, with grammar and syntax positions,
    beside transformers' `generate` without; and what weights, keys and values, read once a token, leave room for."""
    drawn = [JPEG().encode(draw(i)) for i in range(100)]
    tokenizer, cpu = learn_pairs(JPEG(), drawn, 320), torch.device("cpu")
    config = train.Config(**SHAPE, positions=tokenizer.grammar.sizes)
    model, seeds, bandwidth = train.build_model(config, cpu).eval(), itertools.count(), memory_bandwidth()
    model.init_weights()
    weights, drawing, lengths = sum(weight.numel() for weight in model.parameters()), sample.Sampling(length=257), []

    def ours(batch: int) -> None:
        start, number = [np.array([tokenizer.start])] * batch, next(seeds)
        rows = sample.generate(model, tokenizer, start, [(number, i) for i in range(batch)], drawing)
        lengths.append(sum(map(len, rows)) / batch - 1)

    functions = {"ours": ours}
    try:
        llama = transformers_llama(config).eval()
        how = {"do_sample": True, "top_k": 0, "max_new_tokens": 256, "min_new_tokens": 256, "pad_token_id": 0}

        def theirs(batch: int) -> None:
            first = torch.zeros(batch, 1, dtype=torch.long)
            llama.generate(first, attention_mask=torch.ones_like(first), **how)

        functions["transformers"] = theirs
    except ImportError:
        pass
    for batch, rounds in ((64, 5), (1, 15)):
        lengths.clear()
        seconds = interleaved({name: partial(function, batch) for name, function in functions.items()}, rounds)
        counts = {"ours": statistics.median(lengths), "transformers": 256}
        speeds = {name: batch * counts[name] / value for name, value in seconds.items()}
        cached = 2 * config.layers * config.dim * batch * 128  # keys and values, of half a file on average
        speeds["at the memory's speed"] = batch * bandwidth / (4 * (weights + cached))
        ratio = speeds["ours"] / speeds["transformers"] if "transformers" in speeds else None
        reached = round(speeds["ours"] / speeds["at the memory's speed"], 3)
        emit(f"sampling, {batch} files at once", speeds, "tokens/s", ratio, reached=reached)


# --- clips ------------------------------------------------------------------------------------------------------------


def reading() -> None:
    """Microseconds a byte: what `check` takes for clips, and what the grammar takes for those and their positions."""
    codec = H264(64, 64, fps=10)
    clips = [codec.encode(move(i)) for i in range(100)]
    size, grammar = sum(map(len, clips)), Tokenizer(codec).grammar
    documents = [np.concatenate([[256], symbols, [257]]) for symbols in clips]

    def walk() -> None:
        grammar.piece.cache_clear()
        grammar.walk(documents)

    functions = {"check": lambda: [*map(codec.check, clips)], "walk": walk}
    seconds = interleaved(functions, 5)
    emit("reading H.264", {name: value / size * 1e6 for name, value in seconds.items()}, "us a byte")


def bare_clips(paths: list[Path], codec: H264) -> int:
    """What decoding and encoding by themselves cost: of frames 1 / fps apart, scaled by swscale."""
    written = 0
    for path in paths:
        with av.open(str(path)) as video:
            stream, frames, due = video.streams.video[0], [], 0.0
            for frame in video.decode(stream):
                while frame.time >= due - 1e-3:
                    small = frame.reformat(codec.width, codec.height, "rgb24", interpolation="AREA").to_ndarray()
                    frames, due = [*frames, small], due + 1 / codec.fps
                    if len(frames) == codec.frames:
                        written += len(codec.encode(np.stack(frames)))
                        frames = []
    return written


def videos() -> None:
    """Clips/s of data.prepare beside a bare PyAV loop on as many processes; memory at few clips and at many."""
    codec = H264(64, 48, fps=10)
    with tempfile.TemporaryDirectory() as folder:
        made, outs = Path(folder) / "made", itertools.count()
        made.mkdir()
        rng = np.random.default_rng(0)
        for i in range(40):  # ten seconds of 320x240 each, 25 frames a second, a little noise as cameras have it
            with av.open(str(made / f"{i:02d}.mp4"), "w") as file:
                stream = file.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
                stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
                large = np.kron(move(i, frames=25), np.ones((1, 4, 5, 1)))[:, :240]
                for at in range(250):
                    picture = (large[at % 25] + rng.normal(0, 4, (240, 320, 3))).clip(0, 255).astype(np.uint8)
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
                file.mux(stream.encode(None))
        paths, clips = sorted(made.iterdir()), 40 * 6

        def bare() -> None:
            with ProcessPoolExecutor(cores()) as pool:
                list(pool.map(bare_clips, [paths[i : i + 1] for i in range(40)], [codec] * 40))

        def ours() -> None:
            with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
                prepare(made, Path(folder) / f"out{next(outs)}", codec, None, 0.05, cores())

        speeds = {name: clips / seconds for name, seconds in interleaved({"ours": ours, "bare": bare}, 3).items()}
        emit("preparation of videos, 320x240 to 64x48", speeds, "clips/s", speeds["ours"] / speeds["bare"])
        peaks = {}
        for stride in (2.0, 0.1):
            script = (
                "from data.prepare import *; from h264 import H264; import resource, sys\n"
                f"out, codec = Path({folder!r}) / 'peak{stride}', H264(64, 48, fps=10, stride={stride})\n"
                f"prepare(Path({str(made)!r}), out, codec, None, 0.05, 2)\n"
                "print(max(resource.getrusage(who).ru_maxrss for who in (-1, 0)), file=sys.stderr)"
            )
            result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
            peaks[f"a clip every {stride} s"] = int(result.stderr.split()[-1]) / 1024
        emit("preparation of videos, largest process", peaks, "MiB")


# --- the whole of the small config ------------------------------------------------------------------------------------


def small() -> None:
    """Minutes and memory from drawing the pictures to the last grid."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make(Path(folder) / "shapes")
        arguments = ["train.py", "--data", f"{folder}/shapes", "--out", f"{folder}/out"]
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        minutes = (time.perf_counter() - start) / 60
    emit("small, drawn to grid", {"minutes": minutes}, "min")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    emit("small, largest process", {"memory": peak}, "GiB")


TIMINGS = [training, sharding, saving, scale, preparation, fid, sampling, generation, writing, reading, videos, small]
BENCHMARKS = {function.__name__: function for function in TIMINGS}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {unknown[0]}: choose of {', '.join(BENCHMARKS)}")
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()
