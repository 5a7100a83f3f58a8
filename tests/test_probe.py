"""`merge(probe=...)`: the model computes the same afterwards, or nothing is merged."""

import copy
import types

import pytest
import torch
from models import IDS, build, learnt, logits
from test_names import named
from torch import nn

import minillm
from minillm.registry import layers
from minillm.registry.probe import ALLOWED, ROUNDED, allowed_of, check, outputs


def tree(model):
    """What a refused merge must leave as it is."""
    return ({name: (list(layer.patches), id(layer.base)) for name, layer in layers(model).items()},
            {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
            [id(module) for module in model.modules()], list(model.state_dict()))


@pytest.mark.parametrize("kind", ["llama", "hf_gpt2", "Linear"])
@pytest.mark.parametrize("keep", [True, False])
def test_an_honest_merge(kind, keep):
    model, plain = named("sql", kind=kind), named("sql", kind=kind)
    y = logits(model, IDS)
    assert minillm.lora.merge(model, probe=IDS, keep=keep) is model
    minillm.lora.merge(plain, keep=keep)
    assert torch.equal(logits(model, IDS), logits(plain, IDS)) and not layers(model)
    assert torch.allclose(logits(model, IDS), y, atol=1e-4)
    if keep:
        assert torch.equal(logits(minillm.lora.unmerge(model), IDS), y)


class Odd(nn.Module):
    """It reads a weight before the call: a merge changes what it computes."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        stored = self.one.base if hasattr(self.one, "base") else self.one
        return self.two(self.one(x) + x @ stored.weight.T)


def test_a_merge_that_changes_the_model_is_undone():
    model, x = learnt(minillm.lora.wrap(Odd(), r=2, name="a")), torch.randn(3, 6)
    learnt(minillm.lora.wrap(model, ["two"], r=2, name="b"))
    seen = []
    model.one.register_forward_hook(lambda *_: seen.append(1))
    model.one.base.bias.requires_grad_(True)  # the user's choice
    model.train(), model.two.eval()
    before, y = tree(model), model(x)
    message = (r"merging lora changes what the model computes: its outputs for the probe differ by "
               r"[\d.]+ of their size, more than allowed=1e-05.*'(one|two)'.*Nothing is merged")
    with pytest.raises(ValueError, match=message):
        minillm.lora.merge(model, probe=x)
    assert tree(model) == before and torch.equal(model(x), y)
    assert model.training and not model.two.training and model.one.training
    count = len(seen)
    model(x)
    assert len(seen) == count + 1, "the hook is where it was"
    minillm.lora.merge(model, "b", probe=x)
    minillm.lora.merge(model, "a", probe=x, allowed=10.0)
    assert not layers(model)


def test_the_bounds():
    model = named("sql")
    assert allowed_of(model) == ALLOWED[torch.float32]
    assert allowed_of(copy.deepcopy(model).bfloat16()) == ALLOWED[torch.bfloat16]
    assert allowed_of(copy.deepcopy(model).double()) == ALLOWED[torch.float64]
    minillm.lora.merge(copy.deepcopy(model).double(), probe=IDS)
    small = learnt(minillm.lora.wrap(build("llama"), r=2), std=0.02)
    minillm.lora.merge(small.bfloat16(), probe=IDS)
    small = learnt(minillm.lora.wrap(build("llama"), r=2), std=0.1)
    quantized = minillm.quant.wrap(small)
    assert allowed_of(quantized) == ROUNDED
    minillm.lora.merge(quantized, probe=IDS)
    coarse = minillm.quant.wrap(copy.deepcopy(model), bits=2)
    before = tree(coarse)
    with pytest.raises(ValueError, match="for the probe differ by .* allowed=0.1"):
        minillm.lora.merge(coarse, probe=IDS, tolerance=100)
    assert tree(coarse) == before


def test_the_bound_of_float16():
    """one = I and a LoRA of c I: the outputs are (2 + c) two(x) before, and (2 + 2c) after."""
    x = torch.randn(3, 6).half()
    for c, fits in ((0.004, True), (0.04, False)):  # off by about c / 2
        model = minillm.lora.wrap(Odd().half(), ["one"], r=6, alpha=6.0)
        patch = model.one.patches["lora"]
        with torch.no_grad():
            model.one.base.weight.copy_(torch.eye(6)), patch.A.copy_(torch.eye(6))
            patch.B.copy_(c * torch.eye(6))
            model.one.base.bias.zero_(), model.two.bias.zero_()
        if fits:
            assert not layers(minillm.lora.merge(model, probe=x))
            continue
        with pytest.raises(ValueError, match="differ by 0.0.* of their size.* allowed=0.005"):
            minillm.lora.merge(model, probe=x)


def test_the_largest_rounding_errors_are_named_largest_first():
    plan = [(types.SimpleNamespace(name=name), None, None, rounding)
            for name, rounding in (("a", 0.2), ("b", 0.4), ("c", 0.1), ("d", 0.3))]
    with pytest.raises(ValueError, match="change: 'b' 0.4, 'd' 0.3, 'a' 0.2. Nothing is merged"):
        check(torch.ones(2), 2 * torch.ones(2), 0.1, "lora", plan)


def test_wrong_probes_change_nothing():
    model = named("sql")
    before = tree(model)
    for keywords, error, message in [
        (dict(allowed=0.1), ValueError, "allowed=0.1 has no effect without probe="),
        (dict(allowed=-1, probe=IDS), ValueError, "allowed=-1 is not a number above 0"),
        (dict(probe=IDS + 100), IndexError, "the vocabulary has 24 entries"),
    ]:
        with pytest.raises(error, match=message):
            minillm.lora.merge(model, **keywords)
        assert tree(model) == before
    silent = nn.Sequential(nn.Linear(4, 4))
    silent.forward = lambda x: "text"
    with pytest.raises(TypeError, match="forward returned str, which cannot be compared"):
        minillm.lora.merge(minillm.lora.wrap(silent, ["0"], r=2), probe=torch.ones(1, 4))
    zero = minillm.lora.wrap(nn.Sequential(nn.Linear(4, 4, bias=False)), r=2)
    minillm.lora.merge(zero, probe=torch.zeros(1, 4))  # 0 before and after


def test_a_probe_that_fails_after_the_merge_undoes_it():
    model = named("sql")
    before, calls = tree(model), []

    def fails(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        minillm.lora.merge(model, probe=IDS)
    handle.remove()
    assert tree(model) == before
    assert outputs(model, IDS).dtype == torch.float64
