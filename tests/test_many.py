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
    "b": dict(examples=examples(7, seed=1), epochs=2.5, lr=3e-3, batch_size=2, accumulate=3,
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


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_float64_nothing_but_the_rounding_differs(kind):
    check(wrapped(kind, dtype=torch.float64), RUNS, 1e-12)


@pytest.mark.parametrize("kind", ["hf_llama", "hf_gpt2", "Conv1D"])
def test_on_models_of_others(kind):
    rows = [data.Example(e.ids[:5], e.labels[:5]) for e in examples(30) if len(e.ids) >= 5]
    runs = {"a": RUNS["a"] | dict(steps=6), "b": RUNS["b"] | dict(seed=1)}
    if kind == "Conv1D":  # it takes no mask, so nothing is padded
        runs = {name: run | dict(examples=rows) for name, run in runs.items()}
    check(wrapped(kind, "ab"), runs, 1e-5)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_over_a_base_in_a_format(form):
    model = wrapped()
    minillm.quant.wrap(model) if form == "int8" else minillm.quant.nf4.wrap(model, group=16)
    check(model, RUNS, 1e-5)


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "up_proj"]])
def test_on_the_head_and_on_the_embedding(targets):
    model = build("llama")
    for name in "ab":
        minillm.lora.wrap(model, targets if name == "a" else None, name=name, r=2)
    check(model, {"a": RUNS["a"], "b": RUNS["b"]}, 1e-5)


def test_with_recompute_and_over_a_mask():
    model = minillm.prune.wrap(build("llama"), sparsity=0.5)
    for name in "ab":
        minillm.lora.wrap(model, name=name, **WRAPS[name])
    model.recompute = True
    check(model, {"a": RUNS["a"], "b": RUNS["b"]}, 1e-5)


def test_loras_in_half_precision_step_float32_copies():
    model = wrapped(names="ab").bfloat16()
    runs = {"a": dict(examples=examples(), steps=12, lr=1e-4, batch_size=4),
            "b": dict(examples=examples(seed=1), steps=9, lr=2e-4, batch_size=2, accumulate=2)}
    expected, _ = alone(model, runs)
    many(model, runs, progress=False)
    for name in runs:
        for key, p in of(model, name).items():
            assert (p.float() - expected[name][key].float()).abs().max() <= 2e-3, key
            assert key.endswith("A") or p.abs().max() > 2e-4, "a step of 1e-4 would be lost"


def test_the_base_runs_once_over_all_rows_and_a_run_that_is_over_leaves():
    model, seen = wrapped(names="ab"), []
    model.layers[0].mlp.up_proj.base.register_forward_hook(
        lambda module, args, y: seen.append(tuple(args[0].shape[:2])))
    rows = [data.Example(list(range(5)), list(range(5)))] * 8
    many(model, {"a": dict(steps=3, batch_size=2), "b": dict(steps=2, batch_size=4, accumulate=2)},
         examples=rows, lr=1e-3, progress=False)
    assert seen == [(6, 5), (4, 5), (6, 5), (4, 5), (2, 5)]


def test_each_lora_computes_its_own_rows_alone():
    model = learnt(wrapped())
    batch, expected = IDS.repeat(2, 1)[:3], []
    for row, name in zip(batch, "cab"):
        expected.append(logits(minillm.use(model, name), row[None])[0])
    minillm.use(model, "a")
    with together(model, ["a", "b", "c"]) as cut:
        cut(c=1, a=1, b=1)
        y = logits(model, batch)
        y[:2].sum().backward()
        cut(b=2)
        minillm_b = logits(model, batch[1:])
        with pytest.raises(ValueError, match=r"the LoRAs 'b' have \[2\] rows, .* of 3 rows"):
            logits(model, batch)
    assert torch.allclose(y, torch.stack(expected), atol=1e-5)
    assert torch.allclose(minillm_b[1], expected[2], atol=1e-5)
    got = {name for name in "abc" for layer in minillm.layers(model).values()
           if name in layer.patches for p in layer.patches[name].parameters()
           if p.grad is not None and p.grad.any()}
    assert got == {"a", "c"}


def test_afterwards_the_model_is_as_before():
    model = wrapped()
    minillm.use(model, "b").eval()
    before = {name: type(module) for name, module in model.named_modules()}
    y = logits(minillm.use(model, "b"))
    state = torch.random.get_rng_state()
    many(model, {"a": RUNS["a"]}, progress=False)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), y), "b takes part again, and has not changed"
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="stop"), together(model, ["a"]):
        raise RuntimeError("stop")
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model), y)


def test_a_file_names_no_other_run(tmp_path):
    model = wrapped()
    many(model, RUNS, progress=False)
    for name in RUNS:
        minillm.lora.save(model, tmp_path / name, name=name)
        other = minillm.lora.load(build("llama"), tmp_path / name)
        assert torch.equal(logits(other), logits(minillm.use(model, name)))


def test_what_they_were_trained_over_is_in_the_file(tmp_path):
    model = wrapped(names="ab")
    train(model, examples(), steps=1, lr=1e-2, progress=False)  # b over a
    many(model, {"a": RUNS["a"], "b": RUNS["b"]}, progress=False)
    minillm.lora.save(model, tmp_path / "b", name="b")
    with pytest.raises(ValueError, match="made over a"):
        minillm.lora.load(build("llama"), tmp_path / "b")


def test_a_run_that_diverges_ends_and_the_others_go_on():
    model = wrapped(names="ab")
    runs = {"a": RUNS["a"] | dict(lr=1e30, clip=None), "b": RUNS["b"]}
    expected, _ = alone(model, {"b": RUNS["b"]})
    with pytest.raises(Diverged, match=r"run 'a', step \d: the loss is .*nan.*lower learning rate "
                                       r"than 1e\+30 may help \(complete: 'b'\)") as error:
        many(model, runs, progress=False)
    for key, p in of(model, "b").items():
        assert torch.allclose(p, expected["b"][key], atol=1e-5)
    found = error.value
    assert list(found.runs) == ["a"] and 0 < len(found.logs["a"]) < 20
    assert len(found.logs["b"]) == 4 and isinstance(found, ValueError)


def test_the_log_is_that_of_train():
    logs = many(wrapped(names="ab"), [("a", dict(steps=3)), ("b", dict(lr=1e-3))],
                examples=examples(), lr=1e-2, steps=5, progress=False)
    assert [len(logs[name]) for name in "ab"] == [3, 5]
    assert logs["a"][0]["rate"] == 1e-2 and logs["b"][0]["rate"] == 1e-3, "its own counts more"
    assert summary(logs["a"]).steps == 3 and math.isfinite(losses(logs["b"])[-1])


def test_dropout_is_that_of_each_row():
    model = build("llama")
    for name in "ab":
        minillm.lora.wrap(model, name=name, r=2, dropout=0.5)
    logs = [many(copy.deepcopy(model), dict(a={}, b={}), examples=examples(), lr=1e-2, steps=4,
                 seed=seed, progress=False) for seed in (1, 1, 2)]
    assert losses(logs[0]["b"]) == losses(logs[1]["b"]) != losses(logs[2]["b"])


GOOD = dict(examples=examples(), lr=1e-2, steps=1)


@pytest.mark.parametrize("runs, message", [
    ({}, "runs is empty"),
    ({"d": GOOD}, "no adapter is called 'd'; there are: 'a', 'b', 'c'"),
    ([("a", GOOD), ("b", GOOD), ("a", GOOD)], "two runs are called 'a'"),
    ({"a": GOOD, "b": GOOD | dict(held_out=[])},
     "run 'b': held_out= is not possible for runs at once; a run has examples, steps"),
    ({"a": GOOD | dict(pad=3)}, "run 'a': pad= is not possible"),
    ({"a": GOOD | dict(patience=None)}, "run 'a': patience= is not possible"),
    ({"a": GOOD | dict(lrr=3)}, "run 'a': lrr= is unknown; a run has .* lr,"),
    ({"a": dict(lr=1, steps=1)}, "run 'a' has no examples="),
    ({"a": dict(examples=[], steps=1)}, "run 'a' has no lr="),
    ({"a": GOOD | dict(lr=0)}, "run 'a': lr=0 is not a number above 0"),
    ({"a": GOOD | dict(warmup=2)}, "run 'a': warmup=2 is not"),
    ({"a": GOOD | dict(rates={"C$": 2})}, "run 'a': rates: 'C.' matches no parameter"),
    ({"a": GOOD | dict(examples=[data.Example([3] * 40, [3] * 40)])}, "run 'a': example 0 has 40"),
    ({"a": 3}, "run 'a': 3 is not a dict of settings"),
    (3, "runs=3 is neither a dict"),
])
def test_what_is_refused(runs, message):
    model = wrapped()
    before = {name: of(model, name) for name in "abc"}
    with pytest.raises(ValueError, match=message):
        many(model, runs, progress=False)
    assert all(torch.equal(p, before[name][key]) for name in "abc"
               for key, p in of(model, name).items())


def test_models_that_are_refused():
    def refused(model, message, names="a"):
        with pytest.raises(ValueError, match=message):
            many(model, {name: GOOD for name in names}, progress=False)

    model = wrapped(names="ab")
    minillm.lora.dora.wrap(model, name="d")
    refused(model, "'d' is a dora, and only LoRAs compute at once", "ad")
    refused(minillm.lora.pissa.wrap(wrapped(names="a"), name="p"), "'p' took a part", "ap")
    refused(minillm.prune.wrap(wrapped(names="a")), "prune is around 'a' at 'layers.0.*one folded")
    model = wrapped(names="a")
    model.norm.weight.requires_grad_(True)
    refused(model, "'norm.weight' of the model's own learns, and all runs would share it")
    refused(minillm.freeze.bitfit.wrap(wrapped("gpt2", names="a")),
            "and .* more of the model's own learns")
    model = wrapped(names="a")
    model.extra = torch.nn.BatchNorm1d(3).requires_grad_(False)
    refused(model, "'extra' is a BatchNorm1d, which computes over all rows")
    model = wrapped(names="ab")
    with minillm.rows(model, ["a", "b"]):
        refused(model, "each row has its own adapter here")
    for layer in minillm.layers(model).values():
        for p in layer.patches["a"].parameters():
            p.requires_grad_(False)
    refused(model, "run 'a': nothing in this LoRA learns", "ba")
