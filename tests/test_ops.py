"""What the forward keeps for the backward, and that making it again gives the same gradients."""

import pytest
import torch
import torch.nn.functional as F
from models import IDS, build, learnt, logits, two
from torch import nn

import minillm
from minillm import ops
from minillm.measure.report import saved_bytes

STACKS = [("quant",), ("sparse",), ("prune",), ("quant", "lora"), ("sparse", "lora"),
          ("quant", "prune"), ("sparse", "prune"),
          ("lora", "prune"), ("prune", "lora"), ("quant", "adapters"), ("quant", "lora", "prune")]
OPTIONS = {"lora": dict(r=2), "sparse": dict(anyway=True), "adapters": dict(size=2)}
ids = "-".join


def stack(model, names):
    for name in names:
        minillm.techniques()[name].wrap(model, **OPTIONS.get(name, {}))
    return learnt(model, std=0.1)


def gradients(model, run=None):
    """(output, {name: gradient}) of a loss that is not linear in the output."""
    model.zero_grad()
    y = (run or logits)(model)
    y.float().square().mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= tolerance * grad.norm(), name


# --- the functions themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 6), (2, 3, 6)])
def test_what_is_made_again_computes_what_autograd_does(shape):
    x, W, mask = (
        torch.randn(shape, requires_grad=True),
        torch.randn(5, 6, requires_grad=True),
        torch.rand(5, 6) < 0.5,
    )
    ours, theirs = ops.masked_linear(x, W, mask), F.linear(x, W * mask)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((y * g).sum(), (x, W)) for y in (ours, theirs))):
        torch.testing.assert_close(a, b)
    ours, theirs = ops.remade_linear(x, W.detach), F.linear(x, W.detach())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad((y * g).sum(), x)[0] for y in (ours, theirs)))


def test_the_second_derivative_is_right():
    x, W = torch.randn(3, 6, dtype=torch.double,
                       requires_grad=True), torch.randn(5, 6, dtype=torch.double,
                                                        requires_grad=True)
    mask = torch.rand(5, 6) < 0.5
    torch.autograd.gradgradcheck(lambda x, W: ops.masked_linear(x, W, mask).tanh(), (x, W))
    torch.autograd.gradgradcheck(lambda x: ops.remade_linear(x, W.detach).tanh(), x)
    torch.autograd.gradgradcheck(
        lambda x, W: ops.remade(lambda x: ops.linear(x, W * mask), x).tanh(), (x, W))


def test_only_what_is_needed_is_computed():
    W = torch.randn(5, 6, requires_grad=True)
    ops.masked_linear(torch.randn(3, 6), W, torch.ones(5, 6, dtype=torch.bool)).sum().backward()
    made = []
    x = torch.randn(3, 6, requires_grad=True)
    with torch.no_grad():
        assert not ops.remade_linear(x, lambda: made.append(1) or W).requires_grad
    ops.remade_linear(x, lambda: made.append(1) or W.detach()).sum().backward()
    assert W.grad is not None and len(made) == 3


# --- what is kept -------------------------------------------------------------------------------


def wide():
    torch.manual_seed(0)
    return minillm.Transformer(minillm.Config(24, 64, 2, 4, kv_heads=2, ffn=128, positions=64,
                                              tied=False))


def test_training_keeps_no_dense_weight_of_what_is_stored_or_masked():
    def kept(*names):
        return saved_bytes(stack(wide(), names), IDS)

    assert kept("quant", "lora") <= kept("lora")
    assert kept("sparse", "lora") <= kept("lora")
    assert kept("prune") <= kept()
    assert kept("quant") == kept("quant", "prune") < kept()
    assert kept("sparse", "prune") <= kept("sparse")
    matrix = 4 * 64 * 64  # of floats; the model has 14 of this size or larger
    assert kept("lora", "prune") < kept("lora") + matrix
    assert kept("quant", "lora", "prune") < kept("lora") + matrix


def test_half_precision_keeps_no_more():
    def kept(dtype, *names):
        return saved_bytes(stack(wide(), names).to(dtype), IDS)

    for dtype in (torch.float16, torch.bfloat16):
        # a row of scales in floats
        assert kept(dtype, "quant", "lora") <= kept(dtype, "lora") + 2 * 2 * 128 * 4


# --- in every way of running --------------------------------------------------------------------


@pytest.mark.parametrize("names", STACKS, ids=ids)
def test_gradients_are_those_of_the_dense_weights(names):
    """The same patches over plain leaves that hold the dense weights."""
    model, plain = stack(build("llama"), names), build("llama")
    formats = [name for name in names if name in ("quant", "sparse")]
    stack(plain, names)
    for name in formats:
        minillm.techniques()[name].unwrap(plain)
    y, ours = gradients(model)
    z, theirs = gradients(plain)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    same_gradients(ours, {name: grad for name, grad in theirs.items() if name in ours}, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", STACKS, ids=ids)
def test_autocast_computes_the_same_within_its_precision(names, dtype):
    model = stack(build("llama"), names)
    y, right = gradients(model)

    def autocast(model):
        with torch.autocast("cpu", dtype=dtype):
            return logits(model)

    z, ours = gradients(model, autocast)
    assert (z - y).norm() < 0.03 * y.norm() and z.dtype == dtype
    same_gradients(ours, right, 0.2 if dtype == torch.bfloat16 else 0.05)
    with torch.no_grad():
        assert (autocast(model) - y).norm() < 0.03 * y.norm()
    with torch.autocast("cpu", dtype=dtype):  # torch advises against it: the backward inside
        logits(model).float().square().mean().backward()


def compiled_at_once(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("names", [
    pytest.param(names,
                 marks=[] if names in (("quant", "lora"), ("sparse", "prune"))
                 else pytest.mark.slow, id=ids(names))
    for names in STACKS])
def test_compiled_training_is_eager_training(names):
    model = stack(build("Linear"), names)
    y, right = gradients(model)
    compiled = compiled_at_once(model)
    z, ours = gradients(model, lambda model: compiled(IDS))
    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    same_gradients(ours, right, 1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS[:1, :1]), model(IDS[:1, :1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["quant", "prune"])
def test_compiled_training_keeps_no_dense_weight(name):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 64, bias=False))
    minillm.techniques()[name].wrap(model, ["1"])
    compiled, kept = compiled_at_once(model), []
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    x = torch.randn(8, 16)
    compiled(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(x)
    assert not [t.shape for t in kept if t.untyped_storage().data_ptr() not in own
                and t.numel() >= 16 * 64]


def test_float16_with_its_gradients():
    model = stack(build("llama"), ("quant", "lora"))
    y, right = gradients(model)
    z, ours = gradients(model.half())
    assert z.dtype == torch.float16 and (z - y).norm() < 0.01 * y.norm()
    same_gradients(ours, {name: grad.half() for name, grad in right.items()}, 0.05)


def test_recomputing_activations_agrees():
    for names in STACKS[:6]:
        model = stack(wide(), names)
        gradient = []
        for recompute in (False, True):
            model.recompute = recompute
            model.train().zero_grad()
            model.loss(IDS, IDS).backward()
            gradient.append({name: p.grad.clone() for name, p in model.named_parameters()
                             if p.grad is not None})
        same_gradients(*gradient, 1e-5)


def test_a_leaf_of_a_sequential_in_float64():
    model = minillm.quant.wrap(two().double())
    x = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(model, x)
    assert isinstance(model[1], nn.GELU)
