"""Norm tuning, its file in peft's form, and the norms that Houlsby's adapters train."""

import copy
import json
import warnings

import pytest
import torch
from conftest import peft_model
from models import IDS, build, logits, two
from test_learning import learning
from torch import nn

import minillm
from minillm.checkpoints import peft as files
from minillm.freeze import norms
from minillm.registry import parameters

PEFTS = {  # the modules that peft's LN_TUNING takes by default
    "hf_llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "hf_gpt2": ["ln_1", "ln_2", "ln_f"],
}
EMBEDDING = {"hf_llama": "model.embed_tokens.weight", "hf_gpt2": "transformer.wte.weight"}


def of_norms(model, kind):
    """The names of the parameters in the modules that peft takes."""
    return {name for name, *_ in parameters(model) if name.split(".")[-2] in PEFTS[kind]}


def trained(model, steps=5, lr=0.05):
    """The losses of some steps of Adam on what learns."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = logits(model)[:, :-1].flatten(0, 1)
        (loss := nn.functional.cross_entropy(output, IDS[:, 1:].flatten())).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- norm tuning ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PEFTS)
def test_all_norms_learn_and_nothing_else(kind, tmp_path):
    model, plain = norms.wrap(build(kind)), build(kind)
    assert learning(model) == of_norms(plain, kind) and len(learning(model)) >= 7
    losses = trained(model)
    assert losses[-1] < losses[0]
    moved = {name for name, *_, p in parameters(model)
             if not torch.equal(p, plain.get_parameter(name))}
    assert moved == of_norms(plain, kind)
    minillm.freeze.save(model, tmp_path / "a")
    assert minillm.registry.store.holds(tmp_path / "a") == ("freeze", "norms")
    again = minillm.freeze.load(plain, tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and learning(again) == learning(model)
    with pytest.raises(minillm.CannotMerge, match="norms cannot be merged"):
        minillm.freeze.merge(model, "norms")
    minillm.freeze.unwrap(model, "norms")
    assert learning(model) == learning(build(kind))


def test_the_page_has_the_count_of_smollm2():
    from test_tables import SMOLLM2

    with torch.device("meta"):
        model = norms.wrap(minillm.Transformer(SMOLLM2))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 35_136 == 61 * 576 and f"{count:,}" in norms.__doc__


def test_norms_of_a_part_and_what_has_none():
    assert learning(norms.wrap(build("llama"), ["layers.1"])) == {
        "layers.1.input_layernorm.weight", "layers.1.post_attention_layernorm.weight"}
    model = norms.wrap(build("llama"), ["norm", "lm_head"])
    assert learning(model) == {"norm.weight", "lm_head.weight"}
    with pytest.raises(ValueError, match=r"'lm_head.weight' and 1 more are claimed by norms already"
                                         r".*unwrap\(model, name='norms'\)"):
        norms.wrap(model)
    with pytest.raises(ValueError, match="this Sequential has no norm that could be trained"):
        norms.wrap(two())
    with pytest.raises(ValueError, match="no norm that could be trained"):
        norms.wrap(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)))
    with pytest.raises(ValueError, match="'nrm' matches no module.*'norm'"):
        norms.wrap(build("llama"), ["nrm"])


def test_beside_lora_bitfit_and_freeze():
    every = of_norms(build("hf_gpt2"), "hf_gpt2")
    for names in (("lora", "norms"), ("norms", "lora")):
        model = build("hf_gpt2")
        for name in names:
            (minillm.lora.wrap if name == "lora" else norms.wrap)(model)
        assert learning(model) == every
        minillm.lora.unwrap(model)
        assert learning(model) == every
    minillm.freeze.bitfit.wrap(model)
    biases = {name for name in learning(build("hf_gpt2")) if name.endswith(".bias")}
    assert learning(model) == every | biases
    minillm.freeze.wrap(minillm.freeze.unwrap(model, "bitfit"), last=1)
    assert learning(model) == {name for name in every if ".h.2." in name or "ln_f" in name}


# --- peft's file ------------------------------------------------------------------------------


@torch.no_grad()
def moved(ps):
    torch.manual_seed(5)
    for p in ps:
        p.add_(torch.randn_like(p) * 0.2)


@pytest.mark.parity
@pytest.mark.parametrize("targets", [None, ["layers.1", "h.1"]])
@pytest.mark.parametrize("kind", PEFTS)
def test_written_here_and_read_by_peft(kind, targets, tmp_path):
    peft = pytest.importorskip("peft")
    model = norms.wrap(build(kind), targets and [targets[kind == "hf_gpt2"]])
    moved(p for p in model.parameters() if p.requires_grad)
    files.save(model, tmp_path / "a")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(build(kind), tmp_path / "a").eval()
    assert not [one for one in map(str, (w.message for w in seen))
                if "missing" in one or "ignored" in one or "unexpected" in one]
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    assert not torch.allclose(logits(model), logits(build(kind)), atol=1e-2)
    again = files.load(build(kind), tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and learning(again) == learning(model)
    config = json.loads((tmp_path / "a" / files.CONFIG).read_text())
    assert config["peft_type"] == "LN_TUNING" and config["modules_to_save"] is None
    if targets is None:
        assert sorted(config["target_modules"]) == sorted(PEFTS[kind])


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, dict(modules_to_save=["q_proj", "c_fc"])])
@pytest.mark.parametrize("kind", PEFTS)
def test_written_by_peft_and_read_here(kind, options, tmp_path):
    theirs = peft_model(build(kind), "LNTuningConfig", **options)  # its default for the family
    mine = {name for name, p in theirs.named_parameters() if p.requires_grad}
    moved(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a")
    model = files.load(build(kind), tmp_path / "a")
    y, other = logits(model), logits(theirs.eval())
    assert torch.allclose(y, other, atol=1e-5) and not torch.allclose(y, logits(build(kind)))
    assert len(mine) == len(learning(model)) and of_norms(model, kind) <= learning(model)
    assert bool(options) == (learning(model) > of_norms(model, kind))
    weight = torch.randn_like(y)
    for p in theirs.parameters():
        p.grad = None
    (y * weight).sum().backward(), (other * weight).sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name in of_norms(model, kind):
        module, _, key = name.rpartition(".")
        theirs_name = f"base_model.model.{module}.ln_tuning_layers.default.{key}"
        assert torch.allclose(model.get_parameter(name).grad, grads[theirs_name], atol=1e-4), name


@pytest.mark.parity
def test_minillms_own_model_has_the_norms_of_hugging_face(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    for family in ("llama", "gpt2"):
        minillm.save(build(family), tmp_path / family)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family)
        model = norms.wrap(build(family))
        moved(p for p in model.parameters() if p.requires_grad)
        files.save(model, tmp_path / f"{family}-a")
        with warnings.catch_warnings(action="ignore"):
            theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / f"{family}-a").eval()
        assert torch.allclose(theirs(input_ids=IDS).logits, model(IDS), atol=1e-5)
        assert torch.equal(files.load(build(family), tmp_path / f"{family}-a")(IDS), model(IDS))


def test_what_a_file_of_peft_cannot_hold(tmp_path):
    model = norms.wrap(build("llama"), ["norm", "lm_head"])
    with pytest.raises(ValueError, match="'lm_head' is no norm, and minillm writes norms alone"):
        files.save(model, tmp_path / "a")
    model = norms.wrap(minillm.lora.wrap(build("llama"), r=2))
    with pytest.raises(ValueError, match="the adapters lora, norms, and a directory holds one"):
        files.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="norms was trained over lora"):
        files.save(model, tmp_path / "a", name="norms")
    minillm.lora.unwrap(model)
    files.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="the model has norms already"):
        files.load(model, tmp_path / "a")
    with pytest.raises(ValueError, match="name='x': .* holds norms, which have no other name"):
        files.load(build("llama"), tmp_path / "a", name="x")
    plain = build("llama")
    with pytest.raises(ValueError, match="norms for 'model.layers.2.input_layernorm', which this "
                                         "model lacks"):
        config = minillm.Config(24, 16, 2, 4, kv_heads=2, ffn=32, positions=32, tied=False)
        files.load(minillm.Transformer(config), tmp_path / "a")
    with pytest.raises(ValueError, match="input_layernorm.weight' is .16,. of torch.float32 in the "
                                         "file, the model has .20,."):
        config = minillm.Config(24, 20, 3, 2, ffn=32, positions=32, tied=False)
        wide = minillm.Transformer(config)
        files.load(copy.deepcopy(wide), tmp_path / "a")
    assert learning(plain) == learning(build("llama"))


# --- the norms of Houlsby's adapters ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_llama", "hf_gpt2"])
def test_they_train_as_the_norms_themselves_would(kind):
    """The paper's training: the adapters, and the model's own norms."""
    torch.manual_seed(0)
    ours = minillm.adapters.wrap(build(kind), size=4, norms=True)
    torch.manual_seed(0)
    theirs = norms.wrap(minillm.adapters.wrap(build(kind), size=4))
    plain = build(kind)
    assert torch.equal(logits(ours), logits(plain))
    assert trained(ours) == pytest.approx(trained(theirs), abs=1e-5)
    changed = 0
    for name, *_, p in parameters(ours):
        assert torch.equal(p, plain.get_parameter(name)), "the model stays as it is"
        site, _, key = name.rpartition(".")
        layer = minillm.layers(ours).get(site)
        if layer is not None and layer.patches["adapters"].norm:
            new = p + layer.patches["adapters"].delta.get_parameter(key)
            own = dict((name, p) for name, *_, p in parameters(theirs))[name]
            assert torch.allclose(new, own, atol=1e-4) and not torch.allclose(new, p, atol=1e-2)
            changed += 1
    assert changed == len(learning(norms.wrap(plain)))
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)


def test_one_adapter_with_its_file_its_switch_and_its_unwrap(tmp_path):
    model, plain = minillm.adapters.wrap(build("llama"), size=2, norms=True, name="sql"), logits(
        build("llama"))
    trained(model)
    learnt = logits(model)
    assert not torch.allclose(learnt, plain, atol=1e-2)
    assert torch.equal(logits(minillm.use(model)), plain)
    assert torch.equal(logits(minillm.use(model, "sql")), learnt)
    minillm.adapters.save(model, tmp_path / "a")
    again = minillm.adapters.load(build("llama"), tmp_path / "a")
    assert torch.equal(logits(again), learnt) and len(minillm.layers(again)) == 13
    minillm.lora.wrap(again, r=2)
    assert torch.equal(logits(minillm.adapters.unwrap(minillm.lora.unwrap(again))), plain)
    for p in model.parameters():  # a value that a subtraction would not give back
        p.requires_grad_(False)
    assert torch.equal(logits(minillm.adapters.unwrap(model)), plain)


def test_two_on_one_norm_add_up_and_rows_have_their_own():
    model = build("gpt2")
    for name in ("a", "b"):
        minillm.adapters.wrap(model, size=2, norms=True, name=name)
        trained(minillm.use(model, name))
    alone = {name: logits(minillm.use(model, name), IDS) for name in ("a", "b")}
    minillm.use(model, "a", "b")
    layer, x = model.norm, torch.randn(2, 3, 16)
    a, b = (layer.patches[name].delta for name in ("a", "b"))
    expected = torch.nn.functional.layer_norm(
        x, (16,), layer.base.weight + a.weight + b.weight, layer.base.bias + a.bias + b.bias,
        layer.base.eps)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    with minillm.rows(model, ["a", "b"]):
        both = logits(model, IDS)
    for i, name in enumerate(("a", "b")):
        assert torch.allclose(both[i], alone[name][i], atol=1e-5)


class Shifted(nn.Module):
    """Gemma's norm: its weight is the distance from 1."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)


class ShiftedRMSNorm(Shifted):
    pass


def test_a_norm_of_any_form():
    model, x = nn.Sequential(nn.Linear(4, 4), ShiftedRMSNorm(4)), torch.randn(3, 4)
    minillm.adapters.wrap(model, ["0"], size=2, norms=True)
    delta = model[1].patches["adapters"].delta.weight
    moved([delta])
    h = model[0](x)
    n = h / h.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(model(x), n * (1 + model[1].base.weight + delta), atol=1e-5)


def test_over_a_half_precision_model_the_change_is_float32():
    model = minillm.adapters.wrap(build("llama").bfloat16(), size=2, norms=True)
    delta = model.norm.patches["adapters"].delta.weight
    assert delta.dtype == torch.float32 and logits(model).dtype == torch.bfloat16
    trained(model)
    assert delta.grad is not None and delta.any()


@pytest.mark.parametrize("call, message", [
    (lambda: minillm.adapters.wrap(two(), ["0"], norms=True),
     "norms=True: this Sequential has no norm with parameters"),
    (lambda: minillm.adapters.wrap(build("llama"), ["mlp", "norm"], norms=True),
     "norms=True trains 'norm', which targets= names too"),
    (lambda: minillm.adapters.wrap(build("llama"), norms=1), "norms=1 is neither True nor False"),
    (lambda: minillm.adapters.wrap(minillm.adapters.wrap(build("llama")), norms=True),
     "'layers.0.self_attn' is already wrapped with adapters"),
])
def test_a_wrong_call_says_what_is_possible(call, message):
    with pytest.raises(ValueError, match=message):
        call()
