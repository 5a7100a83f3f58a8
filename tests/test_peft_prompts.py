"""Soft prompts, P-tuning and prefixes in peft's files, both ways; and what has no place in them."""

import json
import warnings

import pytest
import torch
from conftest import hugging_face, peft_model
from models import IDS, build, learnt, logits
from test_peft_files import edit, learn_theirs

import minillm
from minillm.checkpoints import peft as files
from minillm.checkpoints import peft_prompts
from minillm.prompts import prefix, ptuning
from minillm.registry import layers

KINDS = ["hf_llama", "hf_gpt2"]
WRAPS = {
    "prompts": lambda m: minillm.prompts.wrap(m, length=4),
    "ptuning": lambda m: ptuning.wrap(m, length=4, hidden=5),
    "prefix": lambda m: prefix.wrap(m, length=4),
    "prefix of a network": lambda m: prefix.wrap(m, length=4, hidden=5),
}
CONFIGS = {
    "prompts": ("PromptTuningConfig", {}),
    "ptuning": ("PromptEncoderConfig", dict(encoder_hidden_size=6)),
    "ptuning with an LSTM": ("PromptEncoderConfig", dict(
        encoder_hidden_size=6, encoder_reparameterization_type="LSTM", encoder_num_layers=1,
        encoder_dropout=0.0)),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix of a network": ("PrefixTuningConfig", dict(encoder_hidden_size=6,
                                                       prefix_projection=True)),
}


def theirs_of(kind, directory):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(action="ignore"):
        return peft.PeftModel.from_pretrained(build(kind), directory).eval()


def ours_at(model):
    """The model's logits at the text, behind the placeholders."""
    return logits(model)[:, -IDS.shape[1]:]


@pytest.mark.parity
@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("kind", KINDS)
def test_written_here_and_read_by_peft(kind, name, tmp_path):
    model = learnt(WRAPS[name](build(kind)))
    files.save(model, tmp_path / "a")
    theirs = theirs_of(kind, tmp_path / "a")
    y, mask = ours_at(model), torch.ones_like(IDS)
    expected = theirs(input_ids=IDS, attention_mask=mask).logits[:, -IDS.shape[1]:]
    assert torch.allclose(y, expected, atol=1e-5)
    again = files.load(build(kind), tmp_path / "a")
    assert torch.allclose(ours_at(again), y, atol=1e-5)
    with warnings.catch_warnings(action="ignore"):
        theirs.save_pretrained(tmp_path / "b")
    assert torch.allclose(ours_at(files.load(build(kind), tmp_path / "b")), y, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_written_by_peft_and_read_here(kind, name, tmp_path):
    method, options = CONFIGS[name]
    theirs = learn_theirs(peft_model(build(kind), method, task_type="CAUSAL_LM",
                                     num_virtual_tokens=4, **options)).eval()
    with warnings.catch_warnings(action="ignore"):
        theirs.save_pretrained(tmp_path / "a")
    model = files.load(build(kind), tmp_path / "a", name="mine")
    mask = torch.ones_like(IDS)
    expected = theirs(input_ids=IDS, attention_mask=mask).logits[:, -IDS.shape[1]:]
    assert torch.allclose(ours_at(model), expected, atol=1e-5)
    assert not torch.allclose(ours_at(model), logits(build(kind), IDS), atol=0.01)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["prompts", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, name, tmp_path):
    """Those of keys are compared after the rotation, which keeps their lengths."""
    theirs = learn_theirs(peft_model(build(kind), CONFIGS[name][0], task_type="CAUSAL_LM",
                                     num_virtual_tokens=4)).eval()
    with warnings.catch_warnings(action="ignore"):
        theirs.save_pretrained(tmp_path / "a")
    model, weight = files.load(build(kind), tmp_path / "a"), torch.randn(2, 6, 24)
    (ours_at(model) * weight).sum().backward()
    y = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -6:]
    (y * weight).sum().backward()
    with torch.no_grad():
        for layer in layers(model).values():
            for p in layer.patches.parameters():
                p.copy_(p.grad)
    found = [(site, patch) for site in minillm.registry.walk(model) if site.layer
             for patch in site.layer.patches.values()]
    grad, _ = peft_prompts.written(model, found)
    expected = theirs.prompt_encoder["default"].embedding.weight.grad
    assert torch.allclose(grad, expected, atol=1e-4) and expected.abs().max() > 0.01


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_network_of_p_tuning(kind):
    theirs = learn_theirs(peft_model(build(kind), "PromptEncoderConfig", task_type="CAUSAL_LM",
                                     num_virtual_tokens=4, encoder_hidden_size=6)).eval()
    encoder = theirs.prompt_encoder["default"]
    model = ptuning.wrap(build(kind), length=4, hidden=6)
    patch, = (patch for layer in layers(model).values() for patch in layer.patches.values())
    pairs = {"E": encoder.embedding.weight}
    for i, linear in enumerate(encoder.mlp_head[::2], 1):
        pairs |= {f"W{i}": linear.weight, f"b{i}": linear.bias}
    own = dict(patch.named_parameters())
    assert own.keys() == pairs.keys() and len(pairs) == len(list(encoder.parameters()))
    for key, p in pairs.items():
        own[key].data.copy_(p.data)
    y, weight = ours_at(model), torch.randn(2, 6, 24)
    expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -6:]
    assert torch.allclose(patch.vectors(), encoder(torch.arange(4)), atol=1e-6)
    assert torch.allclose(y, expected, atol=1e-5)
    (y * weight).sum().backward(), (expected * weight).sum().backward()
    for key, p in pairs.items():
        assert torch.allclose(own[key].grad, p.grad, atol=1e-4), key
        assert p.grad.abs().max() > 0.01, key


@pytest.mark.parity
@pytest.mark.parametrize("name", ["ptuning", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_minillms_own_model_and_the_exported_one_share_files(family, name, tmp_path):
    peft, transformers = pytest.importorskip("peft"), hugging_face()
    minillm.save(build(family), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = learnt(WRAPS[name](build(family)))
    files.save(model, tmp_path / "a")
    other = files.load(theirs, tmp_path / "a")
    assert torch.allclose(ours_at(other), ours_at(model), atol=1e-5)
    minillm.prompts.unwrap(other)
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    y = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -6:]
    assert torch.allclose(y, ours_at(model), atol=1e-5)
    assert torch.allclose(ours_at(files.load(build(family), tmp_path / "a")), y, atol=1e-5)


@pytest.mark.parametrize("scaling", [None, dict(rope_type="linear", factor=4.0), dict(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=32)])
def test_keys_are_rotated_and_turned_back(scaling):
    config = minillm.Config(24, 16, 2, 4, kv_heads=2, ffn=32, positions=64, rope_scaling=scaling)
    model, K = minillm.Transformer(config), torch.randn(5, 8)
    turned = peft_prompts.rotated(model, K, 4)
    assert torch.allclose(peft_prompts.rotated(model, turned, 4, back=True), K, atol=1e-6)
    m = turned[0].norm() / K[0].norm()  # position 0 does not turn
    assert torch.allclose(turned[0], m * K[0])
    assert (m > 1.1) == (scaling is not None and scaling["rope_type"] == "yarn")
    assert not torch.allclose(turned[1:], m * K[1:], atol=1e-2)


def test_the_settings(tmp_path):
    files.save(prefix.wrap(build("hf_llama"), length=4, hidden=5), tmp_path / "a")
    config = json.loads((tmp_path / "a" / files.CONFIG).read_text())
    assert {k: config[k] for k in ("peft_type", "num_virtual_tokens", "token_dim", "num_layers",
                                   "num_attention_heads", "prefix_projection")} == {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "token_dim": 8, "num_layers": 3,
        "num_attention_heads": 2, "prefix_projection": False}
    files.save(ptuning.wrap(build("llama"), length=4, hidden=5), tmp_path / "b")
    config = json.loads((tmp_path / "b" / files.CONFIG).read_text())
    assert (config["peft_type"], config["token_dim"], config["encoder_hidden_size"],
            config["encoder_reparameterization_type"]) == ("P_TUNING", 16, 5, "MLP")
    loaded = files.load(build("llama"), tmp_path / "b")
    assert [patch.kind for patch in loaded.embed_tokens.patches.values()] == ["prompts"]


def qwen3():
    config = minillm.Config(24, 16, 2, 4, kv_heads=2, ffn=32, positions=32, qk_norm=True)
    return minillm.Transformer(config)


def neo():
    transformers = hugging_face()
    return transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(
        vocab_size=24, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=32,
        attention_types=[[["global"], 2]], intermediate_size=32))


def test_what_has_no_place_in_a_file(tmp_path, monkeypatch):
    for model, message in ((qwen3(), "this model normalises its keys"),
                           (neo(), "how GPTNeoForCausalLM rotates is not known")):
        with pytest.raises(ValueError, match=message):
            files.save(prefix.wrap(model, length=2), tmp_path / "a")
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="is not known here"):
        patched.setattr(peft_prompts, "ROTATED", ())
        files.save(prefix.wrap(build("hf_llama"), length=2), tmp_path / "a")
    with pytest.raises(ValueError, match="for all layers, and 'layers.0.self_attn.v_proj'"):
        files.save(prefix.wrap(build("llama"), ["k_proj"], length=2), tmp_path / "a")
    with pytest.raises(ValueError, match="'layers.0.mlp.up_proj' computes no keys or values"):
        files.save(prefix.wrap(build("llama"), ["k_proj", "v_proj", "up_proj"], length=2),
                   tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("change, message", [
    (lambda t: t.update(prompt_embeddings=torch.zeros(4, 46)),
     "has 46 numbers for each token .*are 48 in 3 layers: it was made for another model"),
    (lambda t: t.update(prompt_embeddings=torch.zeros(4)), "should hold prompt_embeddings"),
    (lambda t: t.update(more=torch.zeros(4)), r"nothing else; it holds \['more'\]"),
    (lambda t: t.update(prompt_embeddings=torch.zeros(32, 48)), "length=32: the model has 32 posi"),
    (lambda t: t.update(prompt_embeddings=torch.full((4, 48), torch.nan)), "nan or infinity"),
])
def test_a_file_that_does_not_fit_changes_nothing(change, message, tmp_path):
    files.save(prefix.wrap(build("llama"), length=4), tmp_path / "a")
    edit(tmp_path / "a", (), change)
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        files.load(model, tmp_path / "a")
    assert not layers(model) and all(p.requires_grad for p in model.parameters())
