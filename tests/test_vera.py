"""VeRA: the paper's formula, peft's layer, and one pair of matrices in memory and in files."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from conftest import peft_model
from models import IDS, build, logits
from torch import nn

import minillm
from minillm import data
from minillm.lora import vera
from minillm.measure.memory import total_bytes
from minillm.registry import layers


def learn(model):
    """Values as after training."""
    torch.manual_seed(5)
    for layer in layers(model).values():
        for patch in layer.patches.values():
            nn.init.normal_(patch.b, std=0.3), nn.init.normal_(patch.d, std=0.3)
    return model


def patches(model, name="vera"):
    return [layer.patches[name] for layer in layers(model).values()]


def test_the_formula_of_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7, bias=False))
    learn(vera.wrap(model, r=4))
    for layer, patch in zip(model, patches(model)):
        W, b, (out, into) = layer.base.weight, layer.base.bias, layer.base.weight.shape
        A, B = patch.common.A[:, :into], patch.common.B[:out]
        x = torch.randn(3, into, requires_grad=True)
        expected = x @ W.T + x @ (torch.diag(patch.b) @ B @ torch.diag(patch.d) @ A).T
        expected = expected if b is None else expected + b
        torch.testing.assert_close(layer(x), expected)
        weight = torch.randn(3, out)
        for ours, theirs in zip(*(torch.autograd.grad((y * weight).sum(), [x, patch.d, patch.b])
                                  for y in (layer(x), expected))):
            torch.testing.assert_close(ours, theirs)


def test_at_birth():
    torch.manual_seed(0)
    model = vera.wrap(nn.Sequential(nn.Linear(600, 500), nn.Linear(500, 800)), r=400, d_initial=0.3)
    first, second = patches(model)
    assert first.common is second.common and not list(first.common.parameters())
    A, B = first.common.A, first.common.B
    assert A.shape == (400, 600) and B.shape == (800, 400)
    for matrix, into in ((A, 600), (B, 400)):  # U(-c, c): the variance is c^2 / 3
        c = (6 / into) ** 0.5
        assert matrix.abs().max() <= c and abs(matrix.var() / (c**2 / 3) - 1) < 0.02
    assert all((patch.d == 0.3).all() and (patch.b == 0).all() for patch in (first, second))
    assert first.config() == dict(r=400, dropout=0.0)


def test_dropout_is_of_the_branch_in_training():
    torch.manual_seed(0)
    model = learn(vera.wrap(nn.Sequential(nn.Linear(6, 5)), r=4, dropout=0.5))
    (patch,), base, x = patches(model), model[0].base, torch.randn(50, 6)
    torch.manual_seed(1)
    y = model.train()(x)
    torch.manual_seed(1)
    d = nn.functional.dropout(x, 0.5)
    A, B = patch.common.A, patch.common.B
    torch.testing.assert_close(y, base(x) + patch.b * ((patch.d * (d @ A.T)) @ B.T))
    assert torch.equal(model.eval()(x), model(x)) and not torch.allclose(model(x), y)


@pytest.mark.parametrize("kind", ["llama", "hf_gpt2"])
def test_the_pair_is_one_in_copies_moves_and_files(kind, tmp_path):
    model = learn(vera.wrap(build(kind), r=5))
    y = logits(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                  copy.deepcopy(model).double().float()):
        assert len({id(patch.common) for patch in patches(other)}) == 1
        assert patches(other)[0].common is not patches(model)[0].common
        assert torch.equal(logits(other, IDS), y)
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert patches(moved)[0].common.A.dtype == torch.bfloat16
    assert len({patch.common.A.data_ptr() for patch in patches(moved)}) == 1
    minillm.lora.save(model, tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    common = patches(model)[0].common
    assert {key for key in tensors if "common" in key} == {"common:A", "common:B"}
    assert torch.equal(tensors["common:A"], common.A)
    other = minillm.lora.load(build(kind), tmp_path / "a.safetensors")
    assert len({id(patch.common) for patch in patches(other)}) == 1
    assert torch.equal(logits(other, IDS), y)
    minillm.lora.load(other, tmp_path / "a.safetensors", name="again")
    assert patches(other, "again")[0].common is not patches(other)[0].common
    minillm.use(other, "again")
    assert torch.equal(logits(other, IDS), y)
    minillm.lora.merge(minillm.use(other, "vera"), "vera")
    assert torch.allclose(logits(other, IDS), y, atol=1e-5)


def test_memory_counts_the_pair_once():
    model = build("llama")
    before = total_bytes(model)
    vera.wrap(model, r=5)
    common = patches(model)[0].common
    own = sum(p.numel() for patch in patches(model) for p in patch.parameters())
    assert total_bytes(model) - before == 4 * (own + common.A.numel() + common.B.numel())
    assert "vera(r=5)" in str(minillm.show(model))


def broken(path, change):
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("common:B"), r"share \['A', 'B'\], the file has \['A'\]"),
    (lambda t: t.update({"common:C": t["common:A"].clone()}), "the file has .*'C'"),
    (lambda t: t.update({"common:A": t["common:A"][:, :3].clone()}), "are no pair of the rank 5"),
    (lambda t: t.update({"common:A": t["common:A"][0].clone()}), "layers.0.self_attn"),
    (lambda t: t["common:B"].fill_(torch.nan), "share holds nan"),
    (lambda t: t.update({"common:B": t["common:B"].long()}), "the patches of vera share"),
])
def test_a_broken_pair_is_an_error(change, message, tmp_path):
    minillm.lora.save(learn(vera.wrap(build("llama"), r=5)), tmp_path / "a.safetensors")
    broken(tmp_path / "a.safetensors", change)
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        minillm.lora.load(model, tmp_path / "a.safetensors")
    assert not layers(model)


def test_a_file_of_another_kind_shares_nothing(tmp_path):
    minillm.lora.save(minillm.lora.wrap(build("llama"), r=2), tmp_path / "a.safetensors")
    broken(tmp_path / "a.safetensors", lambda t: t.update({"common:A": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"the patches of lora share \[\], the file has \['A'\]"):
        minillm.lora.load(build("llama"), tmp_path / "a.safetensors")


@pytest.mark.parametrize("options, message", [
    (dict(r=0), "r=0 is not a whole number"), (dict(r=2.5), "r=2.5"),
    (dict(d_initial=0), "d_initial=0 is not a number other than 0"),
    (dict(d_initial=float("nan")), "d_initial=nan"), (dict(dropout=1), "dropout=1"),
    (dict(targets=["q_prj"]), "'q_prj' matches no leaf"),
    (dict(targets=["embed_tokens"]), "'embed_tokens' matches no leaf"),
])
def test_wrong_options(options, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        vera.wrap(model, **options)
    assert not layers(model)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["hf_llama", "hf_gpt2"])
def test_it_is_pefts(kind):
    targets = ["q_proj", "down_proj"] if kind == "hf_llama" else ["c_attn", "c_fc"]
    model = learn(vera.wrap(build(kind), targets, r=5))
    theirs = peft_model(build(kind), "VeraConfig", r=5, target_modules=targets,
                        fan_in_fan_out=kind == "hf_gpt2")
    common, inner = patches(model)[0].common, theirs.base_model
    with torch.no_grad():
        for ours, other in ((common.A, inner.vera_A), (common.B, inner.vera_B)):
            assert ours.shape == other["default"].shape
            other["default"].copy_(ours)
        for name, layer in layers(model).items():
            module = inner.model.get_submodule(name)
            module.vera_lambda_d["default"].copy_(layer.patches["vera"].d)
            module.vera_lambda_b["default"].copy_(layer.patches["vera"].b)
    y, other = logits(model, IDS), logits(theirs, IDS)
    torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward(), (other * weight).sum().backward()
    for name, layer in layers(model).items():
        module, patch = inner.model.get_submodule(name), layer.patches["vera"]
        for ours, p in ((patch.d, module.vera_lambda_d), (patch.b, module.vera_lambda_b)):
            torch.testing.assert_close(ours.grad, p["default"].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opened", [False, True])
def test_a_training_goes_on_with_the_same_pair(opened, tmp_path):
    """The pair is not in the checkpoint: it does not learn, also where there is an `on_step`."""
    def go(seed, steps, **options):
        model = build("llama")
        torch.manual_seed(seed)
        vera.wrap(model, r=5)
        if opened:
            options["on_step"] = lambda model, step, steps: None
        examples = [data.Example(row.tolist(), row.tolist()) for row in torch.cat([IDS] * 4)]
        minillm.train.train(model, examples, steps=4, lr=0.1, checkpoints=tmp_path / "run",
                            save_every=steps, progress=False, **options)
        return logits(model, IDS)

    whole = go(0, 2)
    for path in (tmp_path / "run").glob("*4.safetensors"):
        path.unlink()
    (path,) = (tmp_path / "run").glob("*.safetensors")
    assert not [key for key in safetensors.torch.load_file(path) if "common" in key]
    with pytest.raises(ValueError, match="vera at 'layers.0.self_attn.q_proj' has shares='"):
        go(1, 2, resume=True)
    assert torch.equal(go(0, 2, resume=True), whole)
