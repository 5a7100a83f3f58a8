"""A file that would change what another technique relies on, or has trained, is an
error in every order."""

import itertools

import pytest
import torch
from models import build, learnt, logits

import minillm
from minillm.registry import parameters


def trained(model, amount=0.05):
    """Move what learns of the model's own, as training would."""
    with torch.no_grad():
        for p in {id(p): p for *_, p in parameters(model)}.values():
            if p.requires_grad:
                p.add_(amount)
    return model


MAKE = {
    "freeze": lambda model: trained(minillm.freeze.wrap(model, last=1)),
    "quant": lambda model: trained(minillm.quant.wrap(model)),
    "prune": lambda model: trained(minillm.prune.wrap(model)),
    "lora": lambda model: learnt(minillm.lora.wrap(model, r=2)),
}


@pytest.fixture
def files(tmp_path):
    """A file of each technique, each made on the plain model."""
    for name, make in MAKE.items():
        minillm.techniques()[name].save(make(build("llama")), tmp_path / name)
    for name in ("quant", "prune"):  # wrapped, and nothing trained
        minillm.techniques()[name].save(minillm.techniques()[name].wrap(build("llama")),
                                        tmp_path / f"{name}0")
    return tmp_path


def load(model, path):
    return minillm.techniques()[path.name.rstrip("0")].load(model, path)


@pytest.mark.parametrize("one, two", [*itertools.permutations(MAKE, 2)])
def test_two_files_of_the_plain_model(one, two, files):
    """What each of them trained of the model cannot be had at once."""
    model = load(build("llama"), files / one)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="belongs to another model|was made without|made over"):
        load(model, files / two)
    after = model.state_dict()
    assert (before.keys() == after.keys()
            and all(torch.equal(before[key], after[key]) for key in after))


@pytest.mark.parametrize("name", ["quant0", "prune0"])
def test_a_file_of_untrained_weights_after_freeze(name, files):
    model = load(build("llama"), files / "freeze")
    expected = logits(model)
    with pytest.raises(ValueError,
                       match=f"{name} was made without freeze.*would change .*any_base=True"):
        load(model, files / name)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["freeze", "prune"])
def test_a_technique_that_was_unwrapped_guards_its_values_no_more(name, files):
    model = load(build("llama"), files / name)
    minillm.techniques()[name].unwrap(model)
    load(model, files / "quant0")
    assert torch.equal(logits(model), logits(minillm.quant.wrap(build("llama"))))


def test_what_commutes_is_loaded_in_both_orders(files):
    for order in (["lora", "quant0"], ["quant0", "lora"]):
        model = build("llama")
        for name in order:
            load(model, files / name)
        assert set(minillm.registry.attached(model).split(", ")) == {"lora", "quant"}


def test_one_after_the_other_is_no_contradiction(tmp_path):
    """Made one on top of the other, the later file may hold other values of what the
    earlier one trained."""
    model = MAKE["quant"](build("llama"))
    minillm.quant.save(model, tmp_path / "q")
    trained(minillm.prune.wrap(model))
    minillm.prune.save(model, tmp_path / "p")
    again = minillm.prune.load(minillm.quant.load(build("llama"), tmp_path / "q"), tmp_path / "p")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("before, after",
                         [(dict(bits=4), dict(bits=3)), (dict(bits=8), dict(bits=7)),
                          (dict(bits=3), dict(bits=4)),
                          (dict(bits=4, zero_point=True), dict(bits=3, zero_point=True)),
                          ({}, dict(bits=2, group=8))])
def test_a_format_of_other_options_takes_the_place(before, after, tmp_path):
    model = minillm.quant.wrap(build("llama"), **after)
    minillm.quant.save(model, tmp_path / "q")
    other = minillm.lora.wrap(minillm.quant.wrap(build("llama"), **before), r=2)
    with pytest.raises(ValueError, match="the model has quant already"):
        minillm.quant.load(other, tmp_path / "q")
    minillm.quant.load(other, tmp_path / "q", replace=True, any_base=True)
    forms = [site.module for site in minillm.registry.walk(other)
             if isinstance(site.module, minillm.quant.Integer)]
    expected = [site.module for site in minillm.registry.walk(model)
                if isinstance(site.module, minillm.quant.Integer)]
    assert torch.equal(logits(other), logits(model))
    assert [form.config() for form in forms] == [form.config() for form in expected]
    minillm.quant.unwrap(other), minillm.lora.unwrap(other)
    assert isinstance(other.layers[0].mlp.up_proj, torch.nn.Linear)


def test_a_file_of_another_model_does_not_ask_for_itself(tmp_path):
    """The hint names what was attached beside the file's own technique, or nothing."""
    torch.manual_seed(0)
    model = minillm.lora.wrap(build("llama"), r=2)
    minillm.lora.save(model, tmp_path / "alone")
    minillm.quant.wrap(model, bits=2)
    minillm.lora.save(model, tmp_path / "beside")
    other = build("llama")
    other.layers[0].mlp.up_proj.weight.data += 9
    with pytest.raises(ValueError, match="belongs to another model") as error:
        minillm.lora.load(other, tmp_path / "alone")
    assert "made beside" not in str(error.value)
    with pytest.raises(ValueError, match="made beside quant: load the file of quant first"):
        minillm.lora.load(other, tmp_path / "beside")
    both = minillm.quant.qat.wrap(minillm.quant.wrap(build("llama"), bits=2))  # of one family
    minillm.quant.save(both, tmp_path / "qat", "qat")
    with pytest.raises(ValueError, match="made beside quant: load the file of quant first"):
        minillm.quant.load(other, tmp_path / "qat")
