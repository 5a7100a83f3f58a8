"""LoRAs combined into one: by the papers' steps written out, and beside peft."""

import pytest
import torch
from conftest import peft_model
from models import IDS, build, logits
from test_names import named
from torch import nn

import minillm
from minillm.lora.combine import dare, ties
from minillm.lora.combine import wrap as combine
from minillm.registry import layers


def deltas(model, *names):
    """{site: [the change of each name]}"""
    return {where: [layer.patches[name].product(layer.patches[name].A, layer.patches[name].B)
                    for name in names if name in layer.patches]
            for where, layer in layers(model).items()}


def change(model, name="both"):
    return {where: parts[0] for where, parts in deltas(model, name).items() if parts}


@pytest.mark.parametrize("kind", ["llama", "hf_gpt2"])
def test_the_sum_is_exact_and_the_combined_ones_are_idle(kind):
    model = named("sql", "chat", kind=kind, alpha=3.0)
    before = deltas(model, "sql", "chat")
    assert combine(model, {"sql": 0.7, "chat": -0.4}, name="both") is model
    for where, D in change(model).items():
        a, b = before[where]
        torch.testing.assert_close(D, 0.7 * a - 0.4 * b, rtol=1e-4, atol=1e-5)
        layer = layers(model)[where]
        assert len(layer.patches["both"].A) == 4
        assert [patch.name for patch in layer.stack()] == ["both"]
    y = logits(model, IDS)
    twin = named("sql", "chat", kind=kind, alpha=3.0)
    for layer in layers(twin).values():
        with torch.no_grad():
            layer.patches["sql"].B.mul_(0.7), layer.patches["chat"].B.mul_(-0.4)
    torch.testing.assert_close(y, logits(twin, IDS), rtol=1e-4, atol=1e-4)
    minillm.lora.unwrap(model, "both")
    minillm.use(model, "sql", "chat")
    torch.testing.assert_close(logits(model, IDS),
                               logits(named("sql", "chat", kind=kind, alpha=3.0), IDS))


def test_another_rank_is_the_best_of_that_rank():
    model = named("sql", "chat")
    before = deltas(model, "sql", "chat")
    combine(model, {"sql": 1.0, "chat": 1.0}, name="both", r=3)
    for where, D in change(model).items():
        U, S, Vt = torch.linalg.svd(sum(before[where]))
        torch.testing.assert_close(D, (U[:, :3] * S[:3]) @ Vt[:3], rtol=1e-3, atol=1e-4)
    combine(model, {"sql": 1.0, "chat": 1.0}, name="wide", r=12)  # k_proj is (8, 16)
    for where, D in change(model, "wide").items():
        patch = layers(model)[where].patches["wide"]
        assert len(patch.A) == min(12, *D.shape) and patch.scale == 1
        torch.testing.assert_close(D, sum(before[where]), rtol=1e-4, atol=1e-5)


def test_ties_step_by_step():
    a = torch.tensor([[4.0, -3.0, 0.1, 2.0], [0.2, 1.0, -5.0, 0.3]])
    b = torch.tensor([[1.0, 6.0, 0.2, -0.1], [4.0, -0.3, -2.0, 0.1]])
    # trim to a half, by magnitude: 4 of a are 4, -3, 2, -5; 4 of b are 1, 6, 4, -2
    # elect: + + . + / + . - .       merge: the mean of the numbers with that sign
    expected = torch.tensor([[2.5, 6.0, 0, 2.0], [4.0, 0, -3.5, 0]])
    assert torch.equal(ties([a, b], [1.0, 1.0], 0.5), expected)
    # weights scale the numbers after the election, as in peft
    expected = torch.tensor([[6.5, 6.0, 0, 6.0], [4.0, 0, -8.5, 0]])
    assert torch.equal(ties([a, b], [3.0, 1.0], 0.5), expected)
    assert torch.equal(ties([a], [1.0], 1.0), a) and (ties([a], [1.0], 0.01) != 0).sum() == 1


def test_dare_drops_and_keeps_the_mean():
    torch.manual_seed(0)
    a, b = torch.full((400, 500), 2.0), torch.full((400, 500), -1.0)
    D = dare([a, b], [1.0, 3.0], 0.25)
    assert D.unique().tolist() == [-12.0, -4.0, 0.0, 8.0]  # both, b alone counts -12, a alone 8
    assert abs(D.mean() - (2.0 - 3.0)) < 0.05
    assert abs((D == 0).float().mean() - 0.75**2) < 0.01


@pytest.mark.parametrize("way", ["ties", "dare"])
def test_the_ways_by_name(way):
    model = named("sql", "chat")
    before, function = deltas(model, "sql", "chat"), dict(ties=ties, dare=dare)[way]
    torch.manual_seed(7)
    combine(model, {"sql": 1.0, "chat": 0.5}, name="both", way=way, r=16)
    torch.manual_seed(7)
    for where, D in change(model).items():
        expected = function(before[where], [1.0, 0.5], 0.2)
        torch.testing.assert_close(D, expected, rtol=1e-3, atol=1e-4)


def test_leaves_that_one_of_them_lacks_and_files(tmp_path):
    model = minillm.lora.wrap(build("llama"), ["q_proj"], name="a", r=2)
    minillm.lora.wrap(model, ["q_proj", "embed_tokens"], name="b", r=3)
    minillm.adapters.wrap(model, ["mlp"], name="wide", size=2)
    for layer in layers(model).values():
        for patch in layer.patches.values():
            for p in patch.parameters():
                nn.init.normal_(p, std=0.2)
    before = deltas(model, "a", "b")
    combine(model, {"a": 2.0, "b": 1.0}, name="both")
    assert layers(model)["layers.0.mlp"].patches["wide"].active, "it was not combined"
    assert {w: len(layer.patches["both"].A) for w, layer in layers(model).items()
            if "both" in layer.patches} == {"embed_tokens": 3, **{
                f"layers.{i}.self_attn.q_proj": 5 for i in range(3)}}
    torch.testing.assert_close(change(model)["embed_tokens"], before["embed_tokens"][0])
    minillm.adapters.unwrap(model)
    minillm.lora.save(model, tmp_path / "both.safetensors", name="both")
    alone = minillm.lora.load(build("llama"), tmp_path / "both.safetensors")
    assert torch.equal(logits(alone, IDS), logits(model, IDS)), "it needs none of them"


@pytest.mark.parametrize("options, message", [
    (dict(weights={"sq": 1.0}), "no LoRA is called 'sq'; there are: chat, sql"),
    (dict(weights={"wide": 1.0}), "no LoRA is called 'wide'"),
    (dict(weights={"start": 1.0}), "no LoRA is called 'start'.*PiSSA, are merged first"),
    (dict(weights={}), "weights={} is no dict"), (dict(weights=["sql"]), "is no dict"),
    (dict(weights={"sql": float("nan")}), "the weight of 'sql'=nan"),
    (dict(weights={"sql": "1"}), "the weight of 'sql'='1'"),
    (dict(name="chat"), "already wrapped with chat"), (dict(name="wide"), "the name of a dora"),
    (dict(way="tis"), "way='tis' is unknown; known: 'linear', 'ties', 'dare'"),
    (dict(density=0.5), "density=0.5 has no effect on way='linear'"),
    (dict(way="ties", density=0), "density=0"), (dict(way="ties", density=1.5), "density=1.5"),
    (dict(r=0), "r=0 is not a whole number"), (dict(r=2.5), "r=2.5"),
])
def test_wrong_options_change_nothing(options, message):
    model = named("sql", "chat", targets=["q_proj"])
    minillm.lora.dora.wrap(model, ["k_proj"], name="wide", r=2)
    minillm.lora.pissa.wrap(model, ["v_proj"], name="start", r=2)
    y = logits(model, IDS)
    with pytest.raises(ValueError, match=message):
        combine(model, **dict(dict(weights={"sql": 1.0}, name="both"), **options))
    assert torch.equal(logits(model, IDS), y)
    assert not any("both" in layer.patches for layer in layers(model).values())
    with minillm.rows(model, ["sql"] * len(IDS)), pytest.raises(ValueError, match="minillm.rows"):
        combine(model, {"sql": 1.0}, name="both")
    assert not any("both" in layer.patches for layer in layers(model).values())


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["hf_llama", "hf_gpt2"])
@pytest.mark.parametrize("way, theirs", [("linear", "svd"), ("ties", "ties_svd")])
def test_it_is_pefts(kind, way, theirs):
    targets = ["q_proj", "down_proj"] if kind == "hf_llama" else ["c_attn", "c_fc"]
    model = named("sql", "chat", kind=kind, targets=targets)
    other = peft_model(build(kind), r=2, lora_alpha=16, target_modules=targets,
                       fan_in_fan_out=kind == "hf_gpt2")
    config = other.peft_config["default"]
    for name in ("sql", "chat"):
        other.add_adapter(name, config)
        with torch.no_grad():
            for where, layer in layers(model).items():
                module = other.base_model.model.get_submodule(where)
                module.lora_A[name].weight.copy_(layer.patches[name].A)
                module.lora_B[name].weight.copy_(layer.patches[name].B)
    weights = {"sql": 0.8, "chat": 0.5}
    density = dict(density=0.3) if way == "ties" else {}
    combine(model, weights, name="both", way=way, r=4, **density)
    other.add_weighted_adapter([*weights], [*weights.values()], "both", combination_type=theirs,
                               svd_rank=4, **density)
    other.set_adapter("both")
    assert torch.allclose(logits(model, IDS), logits(other.eval(), IDS), atol=1e-5)
