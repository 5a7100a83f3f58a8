"""Learning rates by depth and by role, LoRA+: beside peft, and in a plain loop."""

import re

import pytest
import torch
from conftest import peft_model
from models import build, two
from test_schedules import plain_loop
from test_train import examples, losses, quiet

import minillm
from minillm.train import by_role, groups, layerwise, rate, times
from minillm.train.groups import factors


def peaks(model, rates, lr=1.0):
    """{name: peak rate} in AdamW's groups."""
    by_id = {id(p): group["peak"] for group in groups(model, lr, rates=rates)
             for p in group["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def expected(name, depth_of, decay, L=3):
    """The factor of a parameter by ULMFiT's formula: each layer has decay times the one above."""
    where = depth_of(name)  # 0: before the blocks, 1 to L: in them, L + 1: after them
    return decay ** (L + 1 - where)


def depth(name):
    found = re.search(r"\b(?:layers|h)\.(\d)\.", name)
    if found:
        return int(found[1]) + 1
    return 4 if re.match(r"(transformer\.|model\.)?(norm|ln_f|lm_head|head)\b", name) else 0


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "gpt2", "llama", "hf_gpt2", "hf_llama"])
def test_layerwise(kind):
    model = build(kind)
    found = peaks(model, layerwise(model, 0.5))
    assert found == {name: expected(name, depth, 0.5) for name in found}
    assert len(set(found.values())) == 5, "before the blocks, three of them, after them"


@pytest.mark.parametrize("kind", ["llama", "hf_gpt2"])
def test_what_a_technique_adds_has_the_factor_of_its_block(kind):
    model = minillm.adapters.wrap(minillm.lora.wrap(build(kind), r=2))
    found = peaks(model, layerwise(model, 0.5))
    assert any(".base." in name for name in found) and any("lora" in name for name in found)
    assert found == {name: expected(name, depth, 0.5) for name in found}


def test_only_blocks_that_learn_have_an_entry():
    model = minillm.freeze.wrap(build("llama"), last=2)
    assert layerwise(model, 0.5) == {r"^layers\.1\.": 0.25, r"^layers\.2\.": 0.5}
    assert set(peaks(model, layerwise(model, 0.5)).values()) == {0.25, 0.5, 1}
    assert set(layerwise(build("llama"), 1).values()) == {1.0}


def test_ulmfits_decay():
    """eta^(l - 1) = eta^l / 2.6."""
    model = build("llama")
    found = peaks(model, layerwise(model, 1 / 2.6), lr=0.01)
    names = ["embed_tokens.weight", *(f"layers.{i}.mlp.up_proj.weight" for i in range(3)),
             "lm_head.weight"]
    every = [found[name] for name in names]
    assert every[-1] == 0.01
    assert [a / b for a, b in zip(every[1:], every)] == pytest.approx([2.6] * 4)


def test_more_than_nine_blocks():
    config = minillm.Config(24, 8, 12, 2, positions=32)
    model = minillm.Transformer(config)
    found = peaks(model, layerwise(model, 0.9))
    assert found["layers.1.mlp.up_proj.weight"] == pytest.approx(0.9**11)
    assert found["layers.11.mlp.up_proj.weight"] == pytest.approx(0.9)


def test_by_role():
    model = build("llama")
    rates = by_role(model, attention=2, mlp=3, norms=4, embedding=0.5, head=10)
    for name, peak in peaks(model, rates).items():
        kind = dict(self_attn=2, mlp=3, norm=4, embed_tokens=0.5, lm_head=10)
        assert peak == next(f for part, f in kind.items() if part in name), name
    assert by_role(model) == {} and by_role(model, head=0) == {r"^lm_head\.": 0.0}


def test_by_role_in_hugging_faces_models():
    model = build("hf_gpt2")
    assert by_role(model, embedding=0.1) == {r"^transformer\.wte\.": 0.1}
    assert len(by_role(model, norms=2)) == 7 and len(by_role(model, mlp=2)) == 3


def test_roles_go_over_depths_and_a_product_multiplies():
    model = minillm.lora.wrap(build("llama"), r=2)
    rates = layerwise(model, 0.5) | by_role(model, attention=7)
    found = peaks(model, rates)
    assert found["layers.0.self_attn.q_proj.patches.lora.B"] == 7
    assert found["layers.0.mlp.up_proj.patches.lora.B"] == 0.125
    found = peaks(model, times(model, layerwise(model, 0.5), {r"B$": 16}))
    assert found["layers.0.mlp.up_proj.patches.lora.A"] == 0.125
    assert found["layers.0.mlp.up_proj.patches.lora.B"] == 2
    assert found["layers.2.mlp.up_proj.patches.lora.B"] == 8
    assert times(model, {"A$": 2}, {"A$": 0.5}) == {}


def test_the_names_are_those_of_a_training():
    """Also of a compiled model, whose parameters have other names."""
    model = build("llama")
    compiled = torch.compile(model, backend="eager")
    assert layerwise(compiled, 0.5) == layerwise(model, 0.5)
    assert by_role(compiled, head=2) == by_role(model, head=2)
    assert times(compiled, {"norm": 2}) == times(model, {"norm": 2})


@pytest.mark.parametrize("call, message", [
    (lambda m: layerwise(m, 0), "decay=0 is not a number above 0, and at most 1"),
    (lambda m: layerwise(m, 1.1), "decay=1.1 is not a number above 0, and at most 1"),
    (lambda m: layerwise(two()), "Sequential has no list of blocks"),
    (lambda m: by_role(m, head=-1), "head=-1 is not a factor from 0"),
    (lambda m: by_role(m, head=float("inf")), "head=inf is not a factor from 0"),
    (lambda m: by_role(build("Linear"), attention=2),
     "attention=2: this Plain has no part that is known as its attention: name its parameters"),
    (lambda m: by_role(minillm.lora.wrap(build("llama")), head=2), "nothing in the head learns"),
    (lambda m: by_role(build("gpt2"), head=2), "head=2: the head shares its matrix with the "
                                               "embedding, .* give embedding= instead"),
    (lambda m: by_role(build("hf_llama"), head=2), "the head shares its matrix"),
    (lambda m: times(m, {"layer_9": 2}), "'layer_9' matches no parameter that learns"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(build("llama"))


# --- LoRA+ ----------------------------------------------------------------------------------------


@pytest.mark.parity
def test_lora_plus_beside_peft():
    """The same matrices at the same rates as in peft's optimizer."""
    pytest.importorskip("peft", reason="needs the extra 'parity'")
    from peft.optimizers import create_loraplus_optimizer

    base = build("hf_llama")
    theirs = peft_model(base, r=2, target_modules=["q_proj", "down_proj"])
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {re.sub(r"^base_model\.model\.", "", name): by_id[id(p)]
                for name, p in theirs.named_parameters() if p.requires_grad}
    model = minillm.lora.wrap(base, ["q_proj", "down_proj"], r=2)
    found = {name.replace(".patches.lora.A", ".lora_A.default.weight").replace(
        ".patches.lora.B", ".lora_B.default.weight"): peak
        for name, peak in peaks(model, {r"B$": 16}, lr=1e-3).items()}
    assert found == pytest.approx(expected) and set(found.values()) == {1e-3, 1.6e-2}


def test_lora_plus_is_for_matrices_called_b_alone():
    """Of LoRA's family; nothing of the model's own ends so."""
    model = minillm.lora.dora.wrap(build("llama"), r=2)
    assert {name.rsplit(".", 1)[-1] for name, factor in factors(model, {r"B$": 16}).items()
            if factor == 16} == {"B"}


# --- in a training --------------------------------------------------------------------------------


def test_a_training_beside_one_of_plain_torch():
    one, two, rows = build("llama"), build("llama"), examples(16)
    rates = layerwise(one, 0.5) | by_role(one, head=3)
    history = quiet(one, rows, steps=8, batch_size=2, lr=0.02, weight_decay=0.3, rates=rates)
    shares = [rate(s, 8) for s in range(8)]
    found = plain_loop(two, rows, 8, 2, 0.02, shares,
                       lambda name: 3 if "lm_head" in name else expected(name, depth, 0.5))
    assert losses(history) == pytest.approx(found, rel=1e-5)
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


def test_resume_knows_the_factors(tmp_path):
    def rates(decay):
        return layerwise(build("llama"), decay)

    options = dict(steps=4, checkpoints=tmp_path, save_every=2)
    whole, resumed = build("llama"), build("llama")
    quiet(whole, rates=rates(0.5), **options)
    (tmp_path / "step-00000004.safetensors").unlink()
    quiet(resumed, rates=rates(0.5), resume=True, **options)
    assert all(p.equal(q) for p, q in zip(whole.parameters(), resumed.parameters()))
    with pytest.raises(ValueError, match=r"other settings: rates=\{.*0.125.* then, \{.*0.7"):
        quiet(build("llama"), rates=rates(0.7), resume=True, **options)
