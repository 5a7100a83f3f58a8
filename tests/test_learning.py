"""Who learns: claimed, forbidden, or as the user set it, whatever the order of the verbs."""

import copy
import itertools

import pytest
import torch
from models import build, logits, two
from torch import nn

import minillm


def learning(model):
    """The author's names of the model's own parameters that learn."""
    return {name for name, *_, p in minillm.registry.parameters(model) if p.requires_grad}


def of_patches(model):
    return {p.requires_grad for layer in minillm.layers(model).values()
            for p in layer.patches.parameters()}


def biases(model):
    return {name for name, *_ in minillm.registry.parameters(model) if name.endswith(".bias")}


WRAPS = {
    "lora": lambda model: minillm.lora.wrap(model, r=2),
    "bitfit": minillm.freeze.bitfit.wrap,
    "freeze": lambda model: minillm.freeze.wrap(model, last=1),
    "quant": minillm.quant.wrap,
    "prune": minillm.prune.wrap,
}
UNWRAPS = {
    "lora": minillm.lora.unwrap, "quant": minillm.quant.unwrap, "prune": minillm.prune.unwrap,
    "bitfit": lambda model: minillm.freeze.unwrap(model, "bitfit"),
    "freeze": lambda model: minillm.freeze.unwrap(model, "freeze"),
}


@pytest.mark.parametrize("kind", ["gpt2", *(pytest.param(kind, marks=pytest.mark.slow)
                                            for kind in ("Linear", "hf_gpt2"))])
def test_bitfit_under_and_over_others(kind):
    every, all_biases = learning(build(kind)), biases(build(kind))
    top = learning(minillm.freeze.wrap(build(kind), last=1))
    for n in (1, 2, 3):
        for names in itertools.permutations(WRAPS, n):
            model = build(kind)
            for name in names:
                WRAPS[name](model)
            expected = every - (set() if "quant" not in names
                                else every - learning(minillm.quant.wrap(build(kind))))
            if "bitfit" in names:
                expected = expected & all_biases
            elif "lora" in names:
                expected = set()
            if "freeze" in names:
                expected = expected & top
            assert learning(model) == expected, names
            assert "lora" not in names or of_patches(model) == {True}
            for name in names:  # in whatever order
                UNWRAPS[name](model)
            assert learning(model) == every, names


def test_bitfit_trains_biases_and_its_file_holds_them(tmp_path):
    model, plain = minillm.freeze.bitfit.wrap(build("gpt2")), build("gpt2")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits(model).square().mean().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters()
             if not torch.equal(p, plain.get_parameter(name))}
    assert moved == biases(plain)
    with pytest.raises(minillm.CannotMerge,
                       match="bitfit cannot be merged: what it trained is the model itself"):
        minillm.freeze.merge(model, "bitfit")
    minillm.freeze.save(model, tmp_path / "b")
    again = minillm.freeze.load(plain, tmp_path / "b")
    assert torch.equal(logits(again), logits(model)) and learning(again) == biases(again)
    with pytest.raises(ValueError, match="claimed by bitfit already"):
        minillm.freeze.bitfit.wrap(again)
    with pytest.raises(ValueError, match="the model has bitfit already"):
        minillm.freeze.load(again, tmp_path / "b")
    minillm.freeze.wrap(model, last=1)
    with pytest.raises(
        ValueError,
        match=r"the model has 'freeze', 'bitfit', and a file holds one: save\(model, path, "
              r"name='freeze'\)",
    ):
        minillm.freeze.save(model, tmp_path / "c")


def test_bitfit_of_a_model_without_biases():
    with pytest.raises(ValueError, match="this Transformer has no bias that bitfit could train"):
        minillm.freeze.bitfit.wrap(build("llama"))
    model = minillm.freeze.bitfit.wrap(build("llama"), "norm")
    assert learning(model) == {"norm.weight"}


def test_what_the_user_sets_after_a_wrap_is_kept():
    model = minillm.lora.wrap(build("llama"), r=2)
    model.norm.weight.requires_grad_(True)
    for verb in (minillm.prune.wrap, minillm.quant.wrap, minillm.quant.unwrap,
                 minillm.prune.unwrap):
        verb(model)
        assert learning(model) == {"norm.weight"}, verb
    minillm.lora.merge(model)
    assert learning(model) == learning(build("llama"))
    minillm.lora.unmerge(model)
    minillm.lora.unwrap(model)
    model.norm.weight.requires_grad_(False)
    minillm.lora.unwrap(minillm.lora.wrap(model, r=2))
    assert learning(model) == learning(build("llama")) - {"norm.weight"}
    minillm.freeze.bitfit.wrap(model, "norm")  # a technique names that very parameter
    assert learning(model) == {"norm.weight"}
    minillm.freeze.unwrap(model)
    assert learning(model) == learning(build("llama")) - {"norm.weight"}


def test_a_later_freeze_of_what_the_user_let_learn():
    model = minillm.lora.wrap(build("llama"), r=2)
    model.norm.weight.requires_grad_(True)
    minillm.freeze.wrap(model, "norm")
    assert learning(model) == set()
    model.norm.weight.requires_grad_(True)
    minillm.prune.wrap(model)
    assert learning(model) == {"norm.weight"}


def test_tied_and_shared():
    model = minillm.lora.wrap(build("hf_llama"), ["lm_head"], r=2)
    assert learning(model) == set()
    minillm.untie(model)
    minillm.lora.merge(model)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= learning(model)
    model = minillm.freeze.wrap(minillm.lora.wrap(build("hf_llama"), r=2), "lm_head")
    minillm.lora.unwrap(model)
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    assert learning(model) == learning(build("hf_llama")) - tied
    minillm.untie(model)
    minillm.prune.wrap(model)
    assert learning(model) == learning(build("hf_llama")) - {"lm_head.weight"}
    one = nn.Linear(4, 4)
    model = nn.Sequential(one, nn.ReLU(), one)
    minillm.lora.unwrap(minillm.lora.wrap(model, ["0"], r=2))
    assert one.weight.requires_grad and model[0] is model[2] is one


def test_freeze_then_a_format_and_back():
    model = minillm.quant.wrap(minillm.freeze.wrap(build("llama"), last=1))
    expected = learning(minillm.freeze.wrap(build("llama"), last=1))
    assert learning(minillm.quant.unwrap(model)) == expected
    model = minillm.freeze.wrap(minillm.quant.wrap(build("llama")), last=1)
    assert learning(minillm.quant.unwrap(model)) == expected
    assert learning(minillm.freeze.unwrap(model)) == learning(build("llama"))


def test_a_copy_and_a_fixed_adapter():
    model = copy.deepcopy(minillm.lora.wrap(build("llama"), r=2))
    assert (learning(model) == set()
            and learning(minillm.lora.unwrap(copy.deepcopy(model))) == learning(build("llama")))
    for patch in minillm.registry.learning.patches(model):
        patch.fixed = True
    minillm.prune.wrap(model)
    assert learning(model) == learning(build("llama"))


def test_what_learned_beside_a_mask_after_a_copy(tmp_path):
    """Versions count the changes of one tensor: the copy's is another, which may have any
    values."""
    for steps in (1, 2, 3):
        model = minillm.prune.wrap(two())
        model = copy.deepcopy(model)
        for _ in range(steps):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            model(torch.randn(3, 6)).square().mean().backward()
            optimizer.step()
        minillm.lora.wrap(model, r=2)
        assert set(minillm.registry.store.learned_of("prune", model)) == {
            "0.weight",
            "0.bias",
            "2.weight",
            "2.bias",
        }


def test_what_the_user_set_beside_one_technique_does_not_bind_a_later_one():
    model = minillm.lora.wrap(build("llama"), r=2)
    model.norm.weight.requires_grad_(True)
    minillm.lora.unwrap(model)
    assert learning(model) == learning(build("llama"))
    assert learning(minillm.lora.wrap(model, r=2)) == set()


def test_what_learned_beside_a_mask_that_is_gone_is_not_in_the_next_ones_file():
    model = minillm.prune.wrap(two())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    minillm.prune.wrap(minillm.prune.unwrap(model))
    minillm.lora.wrap(model, r=2)
    assert not minillm.registry.store.learned_of("prune", model)


def test_no_module_is_added_and_nothing_is_in_the_state():
    model = build("llama")
    names = [name for name, _ in model.named_modules()], list(model.state_dict())
    minillm.freeze.wrap(model, last=1)
    assert names == ([name for name, _ in model.named_modules()], list(model.state_dict()))
