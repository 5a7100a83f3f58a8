"""PiSSA: the principal part of the weight in A and B, the rest frozen beneath; the base
comes back bit for bit."""

import copy

import pytest
import torch
from conftest import peft_model
from models import build, learnt, logits, two
from torch import nn

import minillm


def state(model):
    return {key: t.clone() for key, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "gpt2", "llama", "hf_gpt2", "hf_llama"])
@pytest.mark.parametrize("options",
                         [dict(r=3), dict(r=2, alpha=5.0, rank_stabilized=True),
                          dict(r=4, iterations=8)])
def test_the_principal_part(kind, options):
    plain = build(kind)
    model = minillm.lora.pissa.wrap(build(kind), **options)
    assert torch.allclose(logits(model), logits(plain), atol=2e-5)
    leaves = dict(plain.named_modules())
    for name, layer in minillm.layers(model).items():
        W, _ = minillm.registry.dense(leaves[name])
        rest, _ = minillm.registry.dense(layer.base)
        patch, r = layer.patches["lora"], options["r"]
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        best = U[:, :r] * S[:r] @ Vt[:r]
        part = patch.scale * patch.B @ patch.A
        if "iterations" in options:  # the randomized one is nearly as good
            assert (W - part).norm() < 1.05 * (W - best).norm(), name
        else:
            assert torch.allclose(part, best, atol=1e-5 * S[0].item()), name
        assert torch.allclose(rest + patch.scale * patch.B @ patch.A, W, atol=1e-5)
        # the root on either side
        assert torch.allclose(patch.A.norm(dim=1), patch.B.norm(dim=0), rtol=1e-3)
        assert not layer.base.weight.requires_grad and patch.A.requires_grad


def test_unwrap_gives_the_base_back_after_everything():
    for verbs in ([], ["merge"], ["merge", "unmerge"], ["merge", "unmerge", "merge"]):
        model, plain = minillm.lora.pissa.wrap(build("gpt2"), r=2), build("gpt2")
        learnt(model)
        y = logits(model)
        for verb in verbs:
            getattr(minillm.lora, verb)(model)
            assert torch.allclose(logits(model), y, atol=1e-4)
        model = copy.deepcopy(model)
        minillm.lora.unwrap(model)
        assert same(state(model), state(plain)), verbs
        assert [p.requires_grad for p in model.parameters()] == [
            p.requires_grad for p in plain.parameters()
        ]


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("filled", [False, True])
def test_an_embedding_with_and_without_a_padding(padding, filled, tmp_path):
    def made():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(24, 8, padding_idx=padding), nn.Linear(8, 4))
        if filled:  # the row of the padding need not be zero
            model[0].weight.data[3] = 1.0
        return model

    model, plain, ids = minillm.lora.pissa.wrap(made(), ["0"], r=2), made(), torch.arange(24)
    W = plain[0].weight
    assert torch.allclose(model(ids), plain(ids), atol=1e-5)
    assert torch.allclose(model[0].dense()[0].T, W, atol=1e-5)
    rest, (U, S, Vt) = model[0].base.weight, torch.linalg.svd(W.T, full_matrices=False)
    part = (U[:, :2] * S[:2] @ Vt[:2]).T  # (24, 8)
    if padding is not None:
        part[padding] = 0
        assert torch.equal(rest[padding], W[padding])
    assert torch.allclose(W - rest, part, atol=1e-5)
    learnt(model)
    y = model(ids)
    minillm.lora.save(model, tmp_path / "a")
    again = minillm.lora.load(made(), tmp_path / "a")
    assert torch.equal(again(ids), y)
    assert torch.allclose(minillm.lora.merge(again)(ids), y, atol=1e-4)
    for one in (model, again):
        assert same(state(minillm.lora.unwrap(one)), state(plain))


def test_unmerge_is_not_the_same_as_unwrap():
    model = minillm.lora.pissa.wrap(two(), r=2)
    with pytest.raises(ValueError, match="no lora is merged in this model"):
        minillm.lora.unmerge(model)
    before, rest = model(torch.ones(1, 6)), model[0].base.weight.clone()
    minillm.lora.unmerge(minillm.lora.merge(model))
    assert torch.equal(model(torch.ones(1, 6)), before) and torch.equal(model[0].base.weight, rest)


def test_cast_and_given_back():
    model = minillm.lora.pissa.wrap(build("llama"), r=2).to(torch.bfloat16)
    assert same(state(minillm.lora.unwrap(model)), state(build("llama").to(torch.bfloat16)))


def test_the_file_belongs_to_the_original_model(tmp_path):
    model = learnt(minillm.lora.pissa.wrap(build("llama"), r=2))
    minillm.lora.save(model, tmp_path / "a")
    base = build("llama")
    again = minillm.lora.load(base, tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and same(state(again), state(model))
    assert same(state(minillm.lora.unwrap(again)), state(build("llama")))
    other = build("llama")
    with torch.no_grad():
        other.layers[0].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(ValueError, match="belongs to another model"):
        minillm.lora.load(other, tmp_path / "a")
    with pytest.raises(ValueError, match="the model has lora already"):
        minillm.lora.load(model, tmp_path / "a")


def test_quantized_afterwards_it_loses_less(tmp_path):
    """QPiSSA: the residual has no large singular values, and its integers are finer."""
    torch.manual_seed(0)
    U, V = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(64, 64))[0]
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    model[0].weight.data = U * torch.logspace(1, -2, 64) @ V
    W = model[0].weight.detach().clone()
    plain = minillm.quant.wrap(copy.deepcopy(model), bits=4)
    minillm.quant.wrap(minillm.lora.pissa.wrap(model, r=8), bits=4)
    errors = [(one[0].dense()[0] - W).norm() if isinstance(one[0], minillm.Layer)
              else (one[0].dense() - W).norm()
              for one in (model, plain)]
    assert errors[0] < 0.5 * errors[1]
    minillm.lora.save(model, tmp_path / "l"), minillm.quant.save(model, tmp_path / "q")
    base = torch.nn.Sequential(torch.nn.Linear(64, 64))
    base.load_state_dict({"0.weight": W, "0.bias": model[0].bias})
    again = minillm.quant.load(minillm.lora.load(copy.deepcopy(base), tmp_path / "l"),
                               tmp_path / "q")
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
    with pytest.raises(
        ValueError, match="'0' is stored as quant, and lora takes a part out of the dense weight"
    ):
        minillm.lora.load(minillm.quant.load(base, tmp_path / "q", any_base=True), tmp_path / "l",
                          any_base=True)
    with pytest.raises(
        ValueError,
        match=r"lora took a part out of '0' before quant stored it: "
              r"minillm.quant.unwrap\(model\) first",
    ):
        minillm.lora.unwrap(model)
    assert torch.equal(minillm.lora.unwrap(minillm.quant.unwrap(model))[0].weight, W)


def test_an_adapter_merged_into_the_integers_after_it_hides_the_weight(tmp_path):
    model = minillm.quant.wrap(minillm.lora.pissa.wrap(two(), ["0"], r=2), ["0"])
    minillm.lora.save(model, tmp_path / "a")
    learnt(minillm.lora.wrap(model, ["0"], name="more", r=2))
    minillm.lora.merge(model, "more")
    with pytest.raises(ValueError, match="another adapter was merged into '0' after lora took its"):
        minillm.lora.save(model, tmp_path / "b", name="lora")
    minillm.lora.unwrap(minillm.lora.unmerge(model), "more")
    minillm.lora.save(model, tmp_path / "b")


def test_what_it_does_not_take():
    with pytest.raises(
        ValueError, match="lora takes a part out of the weight of '0', and prune lies around it"
    ):
        minillm.lora.pissa.wrap(minillm.prune.wrap(two()), r=2)
    with pytest.raises(ValueError, match="embed_tokens shares that weight"):
        minillm.lora.pissa.wrap(build("hf_llama"), ["lm_head"], r=2)
    with pytest.raises(ValueError, match="iterations=0 is not a whole number"):
        minillm.lora.pissa.wrap(two(), r=2, iterations=0)


@pytest.mark.parity
def test_peft():
    """The same start: A, B and what is left of the base."""
    plain = build("hf_llama")
    theirs = peft_model(plain, r=4, lora_alpha=8, init_lora_weights="pissa",
                        target_modules=["q_proj", "down_proj"])
    ours = minillm.lora.pissa.wrap(plain, ["q_proj", "down_proj"], r=4, alpha=8.0)
    seen = 0
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            layer, seen = minillm.layers(ours)[name], seen + 1
            patch = layer.patches["lora"]
            assert torch.allclose(patch.A, module.lora_A["default"].weight, atol=1e-5)
            assert torch.allclose(patch.B, module.lora_B["default"].weight, atol=1e-5)
            assert torch.allclose(layer.base.weight, module.base_layer.weight, atol=1e-5)
    assert seen == 6
