"""LoRA's fused step against the plain one, and where each of them runs."""

import contextlib

import pytest
import torch
from conftest import hugging_face
from models import IDS, build, learnt, logits
from torch import nn

import minillm
from minillm.lora import fused


@contextlib.contextmanager
def plainly(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(fused, "suits", lambda *_: False)
        yield


@pytest.fixture
def steps(monkeypatch):
    """The calls of the fused step."""
    calls, step = [], fused.step
    monkeypatch.setattr(fused, "step", lambda *args: calls.append(1) or step(*args))
    return calls


def leaf(kind="Linear", dtype=torch.float64, **options):
    if kind == "Linear":
        inner = nn.Linear(7, 5)
    else:
        hugging_face()
        from transformers.pytorch_utils import Conv1D

        inner = Conv1D(5, 7)
    model = nn.Sequential(inner).to(dtype)
    return learnt(minillm.lora.wrap(model, r=3, alpha=5, **options))


def gradients(model, x):
    y = model(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    found = [p for p in (*model.parameters(), x) if p.requires_grad]
    return [y, *torch.autograd.grad((y * weight).sum(), found)]


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7)])
def test_values_and_gradients_are_the_plain_ones(kind, shape, steps, monkeypatch):
    model, x = leaf(kind), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours = gradients(model, x)
    assert len(steps) == 1
    with plainly(monkeypatch):
        theirs = gradients(model, x)
    assert len(steps) == 1 and len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_input_whose_memory_is_not_in_order(steps, monkeypatch):
    model = leaf()
    x = torch.randn(7, 3, 2, dtype=torch.float64).requires_grad_()
    ours = gradients(nn.Sequential(Turned(), model), x)
    with plainly(monkeypatch):
        theirs = gradients(nn.Sequential(Turned(), model), x)
    assert len(steps) == 1
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Turned(nn.Module):
    def forward(self, x):
        return x.permute(2, 1, 0)


def test_the_gradients_against_differences():
    """To the second order: the backward pass is differentiable too."""
    torch.manual_seed(3)
    layer, x = leaf()[0], torch.randn(2, 2, 7, dtype=torch.float64, requires_grad=True)
    patch, W, b = layer.patches["lora"], layer.base.weight.detach(), layer.base.bias.detach()

    def run(x, A, B):
        return fused.step(x, W, b, A, B, 0.7)

    inputs = x, patch.A.detach().requires_grad_(), patch.B.detach().requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "hf_gpt2", "hf_llama"])
def test_a_model_computes_and_learns_as_with_the_plain_step(kind, steps, monkeypatch):
    def run():
        model = learnt(minillm.lora.wrap(build(kind), r=2))
        y = logits(model)
        y.square().mean().backward()
        return y, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    y, ours = run()
    assert len(steps) >= 12
    with plainly(monkeypatch):
        z, theirs = run()
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_is_about_as_near_to_the_exact_values(monkeypatch):
    """How a product rounds depends on the processor; the fused one may add before it rounds."""
    exact = leaf()
    x = torch.randn(64, 7, dtype=torch.float64).bfloat16()
    rounded = leaf().bfloat16()
    rounded.load_state_dict(exact.state_dict())
    exact.load_state_dict(rounded.state_dict())
    ours = rounded(x)
    with plainly(monkeypatch):
        theirs = rounded(x)
    y = exact(x.double())
    assert (ours - y).norm() <= 1.5 * (theirs - y).norm() < 0.03 * y.norm()


def test_it_keeps_x_and_Ax_and_no_output():
    model, x = leaf(), torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    kept, own = [], {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert [t.shape for t in kept if t.untyped_storage().data_ptr() not in own] == [(11, 3)]


def change(model, how):
    """Put the model into a state in which the plain step has to run; returns (it, its input)."""
    x, layer = torch.randn(2, 7, requires_grad=True), model[0]
    if how == "a format":
        minillm.quant.wrap(model)
    elif how == "a second LoRA":
        minillm.lora.wrap(model, name="b", r=2)
    elif how == "a weight that learns":
        layer.base.weight.requires_grad_()
    elif how == "a bias that learns":
        layer.base.bias.requires_grad_()
    elif how == "a hook":
        layer.base.register_forward_hook(lambda module, args, y: y + 1)
    elif how == "a subclass":
        x = x.as_subclass(Named)
    return model, x


class Named(torch.Tensor):
    pass


@pytest.mark.parametrize("how", ["a format", "a second LoRA", "a weight that learns",
                                 "a bias that learns", "a hook", "a subclass"])
def test_where_the_plain_step_runs(how, steps):
    model, x = change(leaf(dtype=torch.float32), how)
    y = model(x)
    assert len(steps) == (how == "a second LoRA")  # the first is alone above the leaf
    y.sum().backward()
    if how == "a weight that learns":
        assert model[0].base.weight.grad is not None
    if how == "a bias that learns":
        assert model[0].base.bias.grad is not None


def test_dropout_eval_mode_and_no_gradient(steps):
    model, x = leaf(dtype=torch.float32, dropout=0.5), torch.randn(2, 7)
    model.train()(x)
    assert not steps
    model.eval()(x)
    assert len(steps) == 1
    with torch.no_grad():
        model(x)
    assert len(steps) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of torch's own jvp
def test_autocast_rows_and_transforms(steps):
    model, x = leaf(dtype=torch.float32), torch.randn(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    with minillm.rows(model, ["lora", None]):
        y = model(x)
    assert torch.equal(y[1], minillm.use(model)(x)[1])
    minillm.use(model, "lora")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert each["0.patches.lora.A"].shape == (2, 3, 7)
    _, slope = torch.func.jvp(lambda x: model(x), (x,), (torch.ones_like(x),))
    assert slope.shape == (2, 5) and not steps


def test_activations_that_are_computed_again_give_the_same_gradients(steps):
    grads = []
    for recompute in (False, True):
        llama = learnt(minillm.lora.wrap(build("llama"), r=2))
        llama.recompute = recompute
        llama.loss(IDS, IDS).backward()
        grads.append([p.grad for p in llama.parameters() if p.requires_grad])
    assert steps and all(torch.equal(a, b) for a, b in zip(*grads))
