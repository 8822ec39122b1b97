"""What train.py promises: the order of the data, exact resumption, and that nothing is lost or silently wrong."""

import json
import shutil
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import train as module
from codec import load_tokenizer
from data.stream import Stream
from plumbing import plan, processes
from plumbing.command import UserError
from plumbing.files import digest
from plumbing.muon import Muon, orthogonal
from tests.conftest import ROOT, RUN, command, config, fresh, losses, torchrun, validation
from train import CONFIGS, Config, build_model, build_optimizers, evaluate, parse, rows_of_step, train

# --- data -----------------------------------------------------------------------------------------------------------


def test_each_row_comes_once_an_epoch_in_an_order_of_its_own():
    order = np.concatenate([rows_of_step(step, 7, 50, seed=3) for step in range(50)])
    epochs = order.reshape(7, 50)
    assert all(np.array_equal(np.sort(epoch), np.arange(50)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(order, np.concatenate([rows_of_step(step, 7, 50, seed=4) for step in range(50)]))
    large = rows_of_step(3, 120, 50, seed=3)  # a batch larger than the data
    assert np.array_equal(large, np.concatenate([rows_of_step(step, 1, 50, seed=3) for step in range(360, 480)]))


def test_rows_lie_end_to_end(prepared):
    stream = Stream(prepared, "train", syntax=13)
    rows = stream.row_starts(256)
    assert np.array_equal(np.diff(rows), np.full(len(rows) - 1, 256))
    assert rows[-1] + 257 <= stream.bounds[-1] < rows[-1] + 257 + 256


def test_reading_crosses_shards_and_the_end(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    whole = Stream(prepared, "train", syntax=13)
    tokens, report = whole.read(0, int(whole.bounds[-1])), json.loads((prepared / "report.json").read_text())
    cut = int(whole.documents[5])
    for i, part in enumerate((tokens[:cut], tokens[cut:])):
        np.save(tmp_path / "data" / f"train-0000{i}.npy", part)
        lengths = np.diff(whole.documents)[[slice(5), slice(5, None)][i]]
        np.save(tmp_path / "data" / f"train-0000{i}.lengths.npy", lengths)
        sha = digest(*(tmp_path / "data" / f"train-0000{i}{suffix}.npy" for suffix in ("", ".lengths")))
        report["shards"][f"train-0000{i}"] = {**report["shards"]["train-00000"], "sha256": sha}
    (tmp_path / "data" / "report.json").write_text(json.dumps(report))
    stream = Stream(tmp_path / "data", "train", syntax=0)
    assert np.array_equal(stream.read(cut - 9, 30), tokens[cut - 9 : cut + 21])
    assert np.array_equal(stream.read(len(tokens) - 5, 20), np.concatenate([tokens[-5:], tokens[:15]]))


def test_evaluation_is_the_sum_over_documents_alone(prepared, tmp_path):
    """Batches and padding change nothing: bits an image are those of each document in a pass of its own."""
    stream, settings = (
        Stream(prepared, "val", syntax=0),
        replace(config(prepared, tmp_path), vocab=300),
    )
    model = fresh(settings)
    bits = 0.0
    for begin, end in zip(stream.documents, stream.documents[1:], strict=False):
        tokens = torch.from_numpy(stream.read(begin, end - begin).astype(np.int64))[None]
        with torch.no_grad():
            logits = torch.cat([model(part) for part in tokens[:, :-1].split(256, 1)], 1)
        bits += module.cross_entropy(logits, tokens[:, 1:], "sum").item() / np.log(2)
    result = evaluate(model, stream, load_tokenizer(prepared).grammar, settings, torch.device("cpu"))
    assert result["bits_per_file"] == pytest.approx(bits / 6, rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(bits / stream.symbols, rel=1e-6)


def test_legal_bits_are_of_a_softmax_over_legal_tokens(prepared, tmp_path):
    tokens = load_tokenizer(prepared)
    stream, settings = Stream(prepared, "val", syntax=0), replace(config(prepared, tmp_path), vocab=300)
    model = fresh(settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # all tokens are equally likely: a file costs the logarithms of the numbers of legal tokens
    documents = [
        stream.read(begin, end - begin).astype(np.int64)
        for begin, end in zip(stream.documents, stream.documents[1:], strict=False)
    ]
    walks = [tokens.grammar.walk([document]).states for document in documents]
    legal = [(~tokens.grammar.mask(states[0, :-1], 1 << 20)).sum(-1) for states in walks]
    result = evaluate(model, stream, load_tokenizer(prepared).grammar, settings, torch.device("cpu"))
    assert result["legal_bits_per_file"] == pytest.approx(np.log2(np.concatenate(legal)).sum() / 6, rel=1e-5)
    count = sum(len(document) - 1 for document in documents)
    assert result["bits_per_file"] == pytest.approx(np.log2(300) * count / 6, rel=1e-5)


def test_positions_in_the_data_are_those_of_the_grammar(prepared):
    """Any piece of the stream, whole documents and parts: what data.prepare wrote is what reading the tokens gives."""
    stream, grammar = Stream(prepared, "train", syntax=13), load_tokenizer(prepared).grammar
    whole = []
    for begin, end in zip(stream.documents, stream.documents[1:], strict=False):
        whole.append(grammar.positions(grammar.walk([stream.read(begin, end - begin)]).states)[0])
    whole, rng = np.concatenate(whole), np.random.default_rng(0)
    assert stream.syntax[0].dtype == np.uint16 and (whole < np.array(grammar.sizes)).all()
    starts = rng.integers(0, len(whole) - 1, 50)
    pieces = [(int(a), int(rng.integers(a + 1, min(a + 600, len(whole)) + 1))) for a in starts]
    pieces += [(0, len(whole)), (int(stream.documents[3]), int(stream.documents[4]))]
    for start, end in pieces:
        assert np.array_equal(stream.read_syntax(start, end - start), whole[start:end])
    with pytest.raises(UserError, match="another version .13 syntax positions a token, and not 5.: prepare it anew"):
        Stream(prepared, "train", syntax=5)


# --- the loop -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_explains_it(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.json",
        "codec.json",
        "log.jsonl",
        "loss.png",
        "started.jsonl",
        "step_00000008",
        "step_00000012",
    } <= names
    assert sorted(path.name for path in (finished / "grids").iterdir()) == ["000004.png", "000008.png", "000012.png"]
    assert "step_00000004" not in names  # the newest two are kept
    assert losses(finished)[12] < losses(finished)[1]


def test_accumulation_changes_nothing(prepared, finished, tmp_path):
    train(config(prepared, tmp_path / "run", "--micro", "4", "--steps", "4"))
    for step, loss in losses(tmp_path / "run").items():
        if step < 4:  # another length is another schedule after warm-up
            assert loss == pytest.approx(losses(finished)[step], rel=1e-5)


def test_two_processes_give_the_losses_of_one(prepared, finished, tmp_path):
    arguments = ("train.py", "--data", prepared, "--out", tmp_path / "run", *RUN, "--micro", 1, "--sync-each-pass")
    result = command(*torchrun(2, *arguments))
    assert result.returncode == 0, result.stderr
    for step, loss in losses(finished).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, abs=1e-5)
    assert validation(tmp_path / "run") == pytest.approx(validation(finished), rel=1e-5)
    shutil.rmtree(tmp_path / "run" / "step_00000012")
    train(config(prepared, tmp_path / "run"))  # and one process continues what two began
    assert losses(tmp_path / "run")[12] == pytest.approx(losses(finished)[12], abs=1e-5)


def test_z_loss_adds_the_square_of_the_denominators_logarithm(prepared, tmp_path):
    settings = replace(config(prepared, tmp_path), vocab=300)
    stream, cpu = Stream(prepared, "train", syntax=0), torch.device("cpu")
    rows, grads = stream.row_starts(256)[:4], []
    for z_loss in (0.0, 0.3):
        model = fresh(replace(settings, z_loss=z_loss))
        module.backward(model, stream, rows, 2, replace(settings, z_loss=z_loss), cpu)
        grads.append(model.lm_head.weight.grad)
    model = fresh(settings)
    x, where, _ = module.batch_of(stream, rows, 256, cpu)
    (0.3 * model(x, where).logsumexp(-1).square().mean()).backward()
    torch.testing.assert_close(grads[1] - grads[0], model.lm_head.weight.grad, rtol=1e-3, atol=1e-6)


def test_recomputed_blocks_are_compiled_too(prepared, tmp_path, monkeypatch):
    """All blocks share one graph: torch passes over what it cannot compile without a word."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_(block, backend="aot_eager"))
    settings = replace(config(prepared, tmp_path, "--compile", "--recompute"), vocab=300)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = fresh(settings)
    model(torch.zeros(2, 256, dtype=torch.long)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_that_a_kill_prevented_is_made_up_for(prepared, finished, tmp_path, processes):
    """A checkpoint is written while its step is evaluated: a kill may leave the one without the other.  Then the first
    thing that sharded weights are gathered for is no training."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step_00000012")
    lines = (finished / "log.jsonl").read_text().splitlines()
    until = next(number for number, line in enumerate(lines) if '"step": 8, "val_' in line)
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(lines[:until]) + "\n")
    arguments = ("train.py", "--data", prepared, "--out", tmp_path / "run", *RUN, "--micro", 1)
    result = command(*torchrun(processes, *arguments))
    assert result.returncode == 0, result.stderr
    assert validation(tmp_path / "run") == pytest.approx(validation(finished), rel=1e-5)


def test_recomputing_changes_nothing(prepared, finished, tmp_path):
    train(config(prepared, tmp_path / "run", "--recompute"))
    assert losses(tmp_path / "run") == losses(finished)


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_another_run_in_the_folder_is_refused_with_a_difference(prepared, finished, photos, tmp_path):
    with pytest.raises(UserError, match="dim: 32, now 64"):
        train(config(prepared, finished, "--dim", "64"))
    result = command("-m", "data.prepare", photos, tmp_path / "other", "--size", 32, "--quality", 50, "--vocab", 300)
    assert result.returncode == 0, result.stderr
    with pytest.raises(UserError, match="'quality': 25.*now.*'quality': 50"):
        train(config(tmp_path / "other", finished))


def test_too_little_data_is_refused(prepared, tmp_path):
    with pytest.raises(UserError, match="not one row of --context 100000"):
        train(config(prepared, tmp_path / "run", "--context", "100000"))
    with pytest.raises(UserError, match="holds no codec.json"):
        train(config(tmp_path, tmp_path / "run"))


# --- plans ----------------------------------------------------------------------------------------------------------


def test_every_preset_has_a_plan():
    for name in CONFIGS:
        text = plan.plan(parse(["--config", name])[0])
        assert 6 <= len(text.splitlines()) <= 9 and "nan" not in text
    text = plan.plan(CONFIGS["7b"])
    assert "6,478,893,056 parameters; 58.2 GFLOP a token" in text


@pytest.mark.parametrize("shape", [(128, 4, 4, 344), (128, 4, 1, 512), (256, 8, 8, 256)])
def test_planned_activations_are_those_that_autograd_keeps(shape):
    """What a forward pass saves for the backward pass, counted in bytes, is within a tenth of the plan's."""
    dim, heads, kv_heads, hidden = shape
    settings = Config(vocab=32, dim=dim, heads=heads, kv_heads=kv_heads, hidden=hidden, layers=5, context=256, micro=2)
    model, kept = fresh(settings), {}
    weights = {weight.data_ptr() for weight in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in weights and tensor.dtype.is_floating_point:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module.cross_entropy(model(torch.zeros(2, 256, dtype=torch.long)), torch.zeros(2, 256, dtype=torch.long))
    assert loss > 0
    assert plan.activations(settings, 4) == pytest.approx(sum(kept.values()), rel=0.1)


class Held(TorchDispatchMode):
    """The most bytes that all tensors have held at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again for the parts
        result = function(*arguments, **(options or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, torch.Tensor)]
        self.alive |= {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        self.most = max(self.most, sum(storage.nbytes() for storage in self.alive.values()))
        return result


class FusedNorm(torch.autograd.Function):
    """What RMSNorm keeps on a GPU; on a CPU it is made of parts that keep more."""

    @staticmethod
    def forward(context, x, shape, weight, eps):
        context.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(context, gradient):
        x, weight, _ = context.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


@pytest.mark.parametrize(
    "name, gpus, passes, change",
    [
        ("base", 1, 2, {}),
        ("1b", 8, 1, {}),
        ("7b", 8, 2, {}),
        ("7b", 64, 2, {"sync_each_pass": True}),
        ("70b", 64, 2, {}),
    ],
)
def test_planned_memory_is_what_a_step_takes(name, gpus, passes, change, monkeypatch):
    """Forward and backward, at full width and context, four blocks deep, in tensors that have a size but no numbers,
    never hold more than planned; nor much less, but for the block and the gradients that are on their way while a GPU
    computes, for a CPU overlaps nothing."""
    settings = replace(CONFIGS[name], layers=4, compile=False, batch=passes * gpus * CONFIGS[name].micro, **change)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = dist.init_device_mesh("cpu", (gpus,))
        monkeypatch.setattr(processes, "init_device_mesh", lambda *_: mesh)
        monkeypatch.setattr(processes, "precision", lambda _: torch.bfloat16)
        monkeypatch.setattr(torch.nn.functional, "rms_norm", FusedNorm.apply)
        model_module.rotary_table.cache_clear()  # of tensors that are real, or of another case
        with FakeTensorMode():
            x = torch.zeros(settings.micro, settings.context, dtype=torch.long)
            monkeypatch.setattr(module, "batch_of", lambda *_: (x, x[..., None], x))
            model, rows = module.build_model(settings, torch.device("cpu")), np.zeros(passes * settings.micro)
            with Held() as held:
                module.backward(model, None, rows, settings.micro, settings, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        model_module.rotary_table.cache_clear()
    parts, (_, block) = plan.memory_plan(settings, gpus), plan.count(settings)
    planned = parts["in all"] - parts["moments"]  # there is no optimizer here
    assert held.most < planned
    assert held.most == pytest.approx(planned - 8 * block, rel=0.15)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--laers", "3"], "did you mean --layers?"),
        (["--layers", "three"], "invalid int value: 'three'"),
        (["--config", "huge"], "invalid choice: 'huge'"),
        (["--heads", "7"], "each must divide the one before"),
        (["--batch", "0"], "choose a number above 0"),
        (["--batch", "8", "--micro", "3"], "does not divide into"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, prepared, tmp_path):
    with pytest.raises(UserError, match=message):
        train(parse(["--data", str(prepared), "--out", str(tmp_path / "run"), *arguments])[0])


def test_every_field_is_read_and_explained():
    """A field that nothing reads is a flag that does nothing."""
    source = "".join((ROOT / name).read_text() for name in ("train.py", "model.py", "plumbing/checkpoint.py"))
    text = command("train.py", "--help").stdout
    for field in fields(Config):
        assert f"config.{field.name}" in source, field.name
        assert field.name in ("vocab", "positions") or f"--{field.name.replace('_', '-')}" in text


def test_presets_have_the_papers_and_llamas_sizes():
    from model import Llama

    sizes = {}
    for name, preset in CONFIGS.items():
        with torch.device("meta"):
            sizes[name] = sum(weight.numel() for weight in Llama(preset).parameters())
    assert sizes["7b"] == 6_478_893_056
    assert 9e7 < sizes["base"] < 1.1e8 and 9e8 < sizes["1b"] < 1.1e9
    assert 1.2e10 < sizes["13b"] < 1.35e10 and 6.5e10 < sizes["70b"] < 7e10


def test_each_weight_is_trained_by_one_optimizer():
    """Embeddings faster than the rest and without decay; gains without decay; and all by the schedule."""
    for settings in (replace(CONFIGS["tiny"], positions=(3, 5)), replace(CONFIGS["tiny"], muon=False, embed_lr=1.0)):
        model = build_model(settings, torch.device("cpu"))
        names, found = {weight: name for name, weight in model.named_parameters()}, {}
        for optimizer in build_optimizers(model, settings):
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    assert names[weight] not in found
                    found[names[weight]] = type(optimizer), group["scale"], group["weight_decay"]
        assert found.keys() == {*names.values()}
        for name, (kind, scale, decay) in found.items():
            matrix = name.endswith("proj.weight")
            assert kind is (Muon if settings.muon and matrix else torch.optim.AdamW)
            assert scale == (settings.embed_lr if name.startswith("embed") else 1)
            assert decay == (settings.decay if matrix or name.startswith("lm_head") else 0)


def test_muon_takes_the_steps_of_pytorchs():
    """In bf16 theirs, so nearly: tall, wide and square matrices, decay and momentum, and every direction of a size."""
    torch.manual_seed(0)
    begun = [torch.randn(shape) for shape in ((40, 24), (24, 40), (32, 32), (40, 24))]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in begun] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        for pair in zip(ours, theirs, strict=True):
            pair[0].grad = pair[1].grad = torch.randn(pair[0].shape)
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(begun, ours, theirs, strict=True):
        moved = (other - start).norm()
        assert (one - other).norm() < 0.02 * moved
        sizes = torch.linalg.svdvals(orthogonal(torch.randn(1, *start.shape))[0])
        assert sizes.quantile(0.1) > 0.6 and sizes.max() < 1.3  # the smallest of all may take more than five rounds
