"""A sequence of wrap, merge, unmerge and unwrap that takes all away leaves the model as it was."""

import itertools
import random

import pytest
from models import build
from torch import nn

import minillm
from minillm.registry import CannotMerge, Format, METHODS, attached, walk
from minillm.registry.past import past

OPTIONS = {
    "freeze": dict(last=1),
    "lora": dict(r=2),
    "adapters": dict(size=2),
    "prompts": dict(length=2),
    "sparse": dict(anyway=True),
    "bitfit": dict(targets=lambda name, module: "norm" in name),
}
VERBS = ("wrap", "wrap", "merge", "unmerge", "unwrap", "forget")  # to forget: merge(keep=False)


def learns(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def step(model, name, verb):
    """Whether the model allows the verb now."""
    method = METHODS[name]
    verbs = minillm.techniques()[method.family]
    given = (
        OPTIONS.get(name, {}) if verb == "wrap" else dict(keep=False) if verb == "forget" else {}
    )
    try:
        if verb == "wrap":
            method.wrap(model, **given)
        else:
            getattr(verbs, "merge" if verb == "forget" else verb)(model, method.kind, **given)
    except (ValueError, CannotMerge):
        return False
    for layer in minillm.layers(model).values():
        for p in layer.patches.parameters():
            nn.init.normal_(p, std=0.1)
    return True


def left(model):
    """The names of what is attached, merged or frozen."""
    names = set(attached(model).split(", ")) - {"nothing"}
    for site in walk(model):
        base = site.module
        while record := past(base):
            names.add(record.patch.name)
            base = record.base
    return names


def unwrap_all(model):
    """Take away what is there, as often as it takes; returns the model."""
    for _ in range(10):
        for name in sorted(left(model)):
            step(model, name, "unwrap")
        if not left(model):
            return model
    raise AssertionError(f"what cannot be unwrapped: {left(model)}")


@pytest.mark.parametrize(
    "calls, last",
    [
        ("prune.wrap prune.merge lora.wrap prune.unmerge lora.unwrap prune.unwrap", None),
        ("prune.wrap prune.merge lora.wrap prune.unwrap lora.unwrap", None),
        ("prune.wrap prune.merge freeze.wrap prune.unmerge freeze.unwrap prune.unwrap", None),
        (
            "lora.wrap lora.merge quant.wrap freeze.wrap quant.unwrap lora.unwrap freeze.unwrap",
            "quant",
        ),
        ("sparse.wrap prune.wrap prune.merge sparse.unwrap prune.unwrap", None),
        (
            "freeze.wrap sparse.wrap prune.wrap prune.merge "
            "sparse.unwrap freeze.unwrap prune.unwrap",
            None,
        ),
        (
            "sparse.wrap prune.wrap prune.merge freeze.wrap prune.unmerge freeze.unwrap "
            "sparse.unwrap prune.unwrap",
            None,
        ),
    ],
)
def test_what_a_merge_stopped_learns_again(calls, last):
    model, plain = build("llama"), build("llama")
    model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    first = learns(model)
    for call in calls.split():
        assert step(model, *call.split(".")), call
    assert not left(model) and learns(model) == first
    if last != "quant":
        assert all(t.equal(plain.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow)
                                         for n in range(1, 12))])
def test_any_sequence_leaves_the_model_as_it_was(number):
    """Two or three techniques; the verbs in any order, those that the model allows."""
    draw, names = random.Random(number), [name for name, method in METHODS.items()
                                          if method.kind == name]
    sets = list(itertools.combinations(names, 2)) + list(itertools.combinations(names, 3))
    for chosen in sets[number::12]:
        model, calls = build("llama"), []
        model.norm.weight.requires_grad_(False)
        model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        first, bits = learns(model), {key: t.clone() for key, t in model.state_dict().items()}
        for _ in range(16):
            name, verb = draw.choice(chosen), draw.choice(VERBS)
            if step(model, name, verb):
                calls.append(f"{name}.{verb}")
        what = f"{' '.join(calls)}, then unwrapped"
        unwrap_all(model)
        assert learns(model) == first, what
        assert not any(isinstance(m, (Format, minillm.Layer)) for m in model.modules()), what
        lossy = ("quant.wrap", "fp8.wrap")
        if not any(call in lossy or call.endswith("forget") for call in calls):
            assert all(t.equal(bits[key]) for key, t in model.state_dict().items()), what


def test_what_was_set_after_a_merge_is_kept_by_unmerge():
    model = minillm.prune.merge(minillm.prune.wrap(build("llama")))
    model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model = minillm.prune.unmerge(model)
    assert not model.layers[0].mlp.up_proj.base.weight.requires_grad
    minillm.prune.unwrap(model)
    assert not model.layers[0].mlp.up_proj.weight.requires_grad and model.norm.weight.requires_grad
