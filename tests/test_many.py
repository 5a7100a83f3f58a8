"""LoRAs that train at once end where each ends when it is trained alone."""

import copy
import math

import pytest
import torch
from models import IDS, build, learnt, logits
from test_train import examples, losses

import minillm
from minillm import data
from minillm.lora.many import together
from minillm.train import Diverged, many, summary, train

WRAPS = {  # each LoRA with its own rank, scale and targets
    "a": dict(r=2),
    "b": dict(r=3, alpha=4.0, rank_stabilized=True),
    "c": dict(r=1, alpha=2.0, targets=lambda name, module: name.endswith("1") or ".1." in name),
}
RUNS = {  # and each run with its own settings
    "a": dict(examples=examples(), steps=20, lr=1e-2, batch_size=4, seed=3),
    "b": dict(examples=examples(7, seed=1), epochs=3, lr=3e-3, batch_size=2, accumulate=3,
              schedule="linear", warmup=2, clip=0.1, weight_decay=0.1, betas=(0.8, 0.9)),
    "c": dict(examples=data.pack(examples(20, seed=2), 16), steps=11, lr=2e-2, batch_size=1,
              clip=None, rates={r"B$": 4}, schedule="constant", seed=5),
}


def wrapped(kind="llama", names="abc", dtype=None):
    model = build(kind) if dtype is None else build(kind).to(dtype)
    for i, name in enumerate(names):
        torch.manual_seed(i)
        minillm.lora.wrap(model, name=name, **WRAPS[name])
    return model


def of(model, name):
    """{parameter: value} of one LoRA."""
    return {f"{where}.{key}": p.detach().clone() for where, layer in minillm.layers(model).items()
            if name in layer.patches for key, p in layer.patches[name].named_parameters()}


def alone(model, runs):
    """({name: LoRA}, {name: log}) of each run by itself, on a copy of the model."""
    found, logs = {}, {}
    for name, run in runs.items():
        one = minillm.use(copy.deepcopy(model), name)
        logs[name] = train(one, progress=False, **run)
        found[name] = of(one, name)
    return found, logs


def check(model, runs, tolerance, logs=None):
    expected, alone_logs = alone(model, runs)
    before = {name: of(model, name) for name in runs}
    logs = many(model, runs, progress=False)
    assert logs.keys() == alone_logs.keys()
    for name in runs:
        after = of(model, name)
        assert after.keys() == expected[name].keys() and after
        for key, p in after.items():
            off = (p - expected[name][key]).abs().max().item()
            assert off <= tolerance, f"{name}, {key}: off by {off:.2g}"
        moved = [not torch.allclose(p, before[name][key], atol=100 * tolerance)
                 for key, p in after.items()]
        assert any(moved), "the test would see nothing"
        assert len(logs[name]) == len(alone_logs[name])
        for one, other in zip(logs[name], alone_logs[name]):
            assert one.keys() == other.keys()
            for key in one.keys() - {"seconds"}:
                assert one[key] == pytest.approx(other[key], rel=1e-3, abs=10 * tolerance), key
    return logs


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_ends_where_it_ends_alone(kind):
    model = wrapped(kind)
    base = {name: p.clone() for name, p in build(kind).state_dict().items()}
    logs = check(model, RUNS, 1e-5)
    assert [len(logs[name]) for name in "abc"] == [20, 4, 11]
    minillm.lora.unwrap(model)
    assert all(torch.equal(p, base[name]) for name, p in model.state_dict().items())
