"""Hugging Face folders: transformers loads what is written; what it and sentencepiece write is read."""

import json
import pickle

import numpy as np
import pytest
import torch

from codec import JPEG
from data.shapes import draw
from plumbing import huggingface
from plumbing.checkpoint import checkpoints, newest, read_run
from plumbing.command import UserError
from plumbing.weights import read_safetensors, write_safetensors
from tests.conftest import command, config
from train import train

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def plain(prepared, tmp_path_factory):
    """A run of a plain Llama, without syntax positions."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train(config(prepared, out, "--no-syntax", "--steps", "4"))
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of the form of the published JPEG-LM: 32 heads, vocab 320, float16, context 65,536, sentencepiece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("published")
    codec, text = JPEG(size=256, header=True), folder / "text"
    rng = np.random.default_rng(0)
    lines = ["".join(chr(huggingface.BYTE + b) for b in codec.encode(draw(i, 256)).tolist()) for i in range(20)]
    lines += ["".join(chr(huggingface.BYTE + b) for b in rng.permutation(256).tolist()) for _ in range(4)]
    text.write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=320, minloglevel=2,
        max_sentence_length=10**6, character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, split_by_unicode_script=False, split_by_number=False, split_by_whitespace=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=320, hidden_size=256, intermediate_size=352, num_hidden_layers=2, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=65_536, rms_norm_eps=1e-5, initializer_range=0.2,
        )
    )  # fmt: skip
    model.half().save_pretrained(folder, max_shard_size="500KB")
    return folder


def test_transformers_loads_what_is_written_to_the_same_logits(plain, tmp_path):
    result = command("train.py", "--out", plain, "--export", tmp_path / "hf")
    assert result.returncode == 0, result.stderr
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ours, tokens, _ = read_run(plain, torch.device("cpu"))
    x = torch.randint(0, tokens.vocab, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-5)
    back, known, _ = read_run(tmp_path / "hf", torch.device("cpu"))
    assert known == tokens
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True))


def test_a_published_folder_gives_the_logits_of_transformers(published):
    assert len(list(published.glob("*.safetensors"))) > 2
    theirs = transformers.LlamaForCausalLM.from_pretrained(published, torch_dtype=torch.float32).eval()
    ours, tokens, _ = read_run(published, torch.device("cpu"))
    assert (ours.config.heads, ours.config.context, tokens.codec) == (32, 65_536, JPEG(size=256, header=True))
    _, order = huggingface.read_tokenizer(published / "tokenizer.model", tokens.codec)
    assert len(set(order)) == len(order) == tokens.vocab == 319  # all but the unknown
    x = torch.randint(0, tokens.vocab, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(torch.tensor(order)[x]).logits[..., order]
        torch.testing.assert_close(ours(x), wanted, rtol=1e-4, atol=1e-4)


def test_pairs_are_those_of_sentencepiece(published):
    """The same tokens for the files of drawings as sentencepiece gives, start and end included."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(published / "tokenizer.model"))
    codec = JPEG(size=256, header=True)
    tokens, order = huggingface.read_tokenizer(published / "tokenizer.model", codec)
    for i in range(30):
        symbols = codec.encode(draw(100 + i, 256))
        theirs = processor.encode(
            "".join(chr(huggingface.BYTE + byte) for byte in symbols.tolist()), add_bos=True, add_eos=True
        )
        ours = tokens.encode([symbols])[0]
        assert [order[token] for token in ours] == theirs
        assert np.array_equal(tokens.decode(ours), symbols)


def test_bin_weights_and_tied_heads_are_read(tmp_path, plain):
    ours, tokens, _ = read_run(plain, torch.device("cpu"))
    huggingface.write(tmp_path, ours, tokens)
    state = read_safetensors(tmp_path / "model.safetensors")[0]
    (tmp_path / "model.safetensors").unlink()
    state.pop("lm_head.weight")
    theirs = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**theirs, "tie_word_embeddings": True}))
    half = len(state) // 2
    for i, names in enumerate((list(state)[:half], list(state)[half:])):
        torch.save({name: state[name] for name in names}, tmp_path / f"pytorch_model-0000{i}.bin")
    back, _, _ = read_run(tmp_path, torch.device("cpu"))
    assert torch.equal(back.lm_head.weight, back.embed_tokens.weight)
    assert torch.equal(back.embed_tokens.weight, ours.embed_tokens.weight)


def test_training_begins_with_given_weights(plain, prepared, tmp_path):
    ours, tokens, _ = read_run(plain, torch.device("cpu"))
    huggingface.write(tmp_path / "hf", ours, tokens)
    settings = ["--no-syntax", "--steps", "4", "--lr", "1e-9", "--init", str(tmp_path / "hf")]
    train(config(prepared, tmp_path / "run", *settings))
    begun, _, _ = read_run(tmp_path / "run", torch.device("cpu"))
    for a, b in zip(ours.parameters(), begun.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    with pytest.raises(UserError, match="another shape: give --dim 32 --layers 2 --heads 2"):
        train(config(prepared, tmp_path / "other", *settings, "--dim", "64"))


def test_published_folders_write_files_and_continue_to_train(published, prepared, tmp_path):
    model, tokens = huggingface.read(published, torch.device("cpu"))
    assert newest(checkpoints(published)) is None and tokens.codec.mcus == 256
    sizes = {"dim": 256, "layers": 2, "heads": 32, "kv-heads": 32, "hidden": 352, "steps": 2, "every": 2}
    shape = ["--no-syntax", "--embed-lr=1", *(f"--{name}={value}" for name, value in sizes.items())]
    train(config(prepared, tmp_path / "run", *shape, "--init", str(published)))
    begun, known, _ = read_run(tmp_path / "run", torch.device("cpu"))
    theirs = {piece.tobytes(): row for row, piece in enumerate(tokens.expansions)}
    for row, piece in enumerate(known.expansions):
        if piece.tobytes() in theirs:
            there = model.embed_tokens.weight[theirs[piece.tobytes()]]
            assert (begun.embed_tokens.weight[row] - there).abs().max() < 0.01


def test_what_is_no_plain_llama_is_refused(plain, finished, tmp_path):
    with pytest.raises(UserError, match="no syntax positions"):
        huggingface.write(tmp_path / "told", *read_run(finished, torch.device("cpu"))[:2])
    model, tokens, _ = read_run(plain, torch.device("cpu"))
    huggingface.write(tmp_path, model, tokens)
    theirs = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "mistral"}, "is of a mistral"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"rope_scaling": "linear"}, "for rotary positions"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta is 'x'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only a Llama with 'silu' there is read"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 8}, "head_dim 8: only a Llama with hidden_size / num_attention_heads, 16, there"),
        ({"tie_word_embeddings": True}, "holds an lm_head.weight of its own"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
        ({"num_hidden_layers": 3}, "does not hold the weights of its config.json"),
        ({"num_hidden_layers": 10**6}, "does not hold the weights of its config.json"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_attention_heads": 3}, "each must divide"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**theirs, **change}))
        with pytest.raises(UserError, match=message):
            huggingface.read(tmp_path, torch.device("cpu"))
    for text in ("", "[]", "{", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json"):
            huggingface.read(tmp_path, torch.device("cpu"))
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    (tmp_path / "codec.json").unlink()
    with pytest.raises(UserError, match="neither codec.json nor tokenizer.model"):
        huggingface.read(tmp_path, torch.device("cpu"))


def test_what_transformers_computes_otherwise_is_refused(plain, tmp_path):
    """A field may be left out of our list only if transformers gives the same logits with and without it."""
    model, tokens, _ = read_run(plain, torch.device("cpu"))
    huggingface.write(tmp_path, model, tokens)
    x = torch.randint(0, tokens.vocab, (1, 100), generator=torch.Generator().manual_seed(0))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = theirs(x).logits
        for change, value in (("hidden_act", "gelu"), ("rope_theta", 100.0), ("rms_norm_eps", 0.1)):
            settings = theirs.config.to_dict() | {change: value}
            if change == "rope_theta":
                settings["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
            (tmp_path / "config.json").write_text(json.dumps(settings))
            other = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()(x).logits
            assert (other - wanted).abs().max() > 1e-4
            if change == "hidden_act":
                with pytest.raises(UserError, match="hidden_act"):
                    read_run(tmp_path, torch.device("cpu"))
            else:
                ours = read_run(tmp_path, torch.device("cpu"))[0](x)
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, None])
def test_an_untied_folder_without_a_head_is_refused(plain, tmp_path, tied):
    model, tokens, _ = read_run(plain, torch.device("cpu"))
    huggingface.write(tmp_path, model, tokens)
    state = read_safetensors(tmp_path / "model.safetensors")[0]
    kept = {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}
    write_safetensors(tmp_path / "model.safetensors", kept)
    theirs = json.loads((tmp_path / "config.json").read_text())
    theirs["tie_word_embeddings"] = tied
    (tmp_path / "config.json").write_text(json.dumps({k: value for k, value in theirs.items() if value is not None}))
    with pytest.raises(UserError, match="holds no lm_head.weight"):
        huggingface.read(tmp_path, torch.device("cpu"))


def test_odd_weights_are_refused(plain, tmp_path):
    model, tokens, _ = read_run(plain, torch.device("cpu"))
    huggingface.write(tmp_path, model, tokens)
    path = tmp_path / "model.safetensors"
    data, state = path.read_bytes(), {name: tensor.clone() for name, tensor in read_safetensors(path)[0].items()}
    end = 8 + int.from_bytes(data[:8], "little")

    def lie(begin: int, to: int) -> bytes:
        header = json.loads(data[8:end])
        header["model.norm.weight"]["data_offsets"] = [begin, to]
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    for odd in (data[: len(data) // 2], b"", data[:4], data[:8] + b"[]", lie(-128, 0), lie(0, 128), lie(0, 1 << 40)):
        path.write_bytes(odd)
        with pytest.raises(UserError, match="is no whole safetensors file"):
            huggingface.read(tmp_path, torch.device("cpu"))
    write_safetensors(path, {**state, "model.norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(UserError, match="only weights of floating point"):
        huggingface.read(tmp_path, torch.device("cpu"))
    write_safetensors(path, state)
    write_safetensors(tmp_path / "other.safetensors", {"model.norm.weight": torch.ones(32)})
    with pytest.raises(UserError, match="holds model.norm.weight twice"):
        huggingface.read(tmp_path, torch.device("cpu"))
    path.unlink()
    (tmp_path / "other.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    for odd in (b"", path.read_bytes()[:-100], b"#" * 100, pickle.dumps([1, 2]), pickle.dumps({"a": 1})):
        path.write_bytes(odd)
        with pytest.raises(UserError, match="cannot be read|other things than tensors"):
            huggingface.read(tmp_path, torch.device("cpu"))


def test_a_tokenizer_that_was_cut_is_refused(published, tmp_path):
    """Wherever that was, but for what follows the description of its training."""
    data = (published / "tokenizer.model").read_bytes()
    whole = huggingface.read_pieces(published / "tokenizer.model")
    path, passed = tmp_path / "tokenizer.model", []
    for length in [*range(0, len(data), 7), *range(len(data) - 200, len(data))]:
        path.write_bytes(data[:length])
        try:
            assert huggingface.read_pieces(path) == whole
            passed.append(length)
        except UserError as error:
            assert "is no whole sentencepiece model" in str(error)
    assert len(passed) < 5
    for odd in (b"#" * 100, b"\xff" * 10**6, b"\x08\x01", b"\x0a\x02\x08\x01\x12\x00"):
        path.write_bytes(odd)
        with pytest.raises(UserError, match="is no whole sentencepiece model"):
            huggingface.read_pieces(path)
