"""Compacter: the paper's sums of Kronecker products, written out; and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from models import IDS, build, learnt, logits, two
from torch import nn

import minillm
from minillm.adapters import compacter
from minillm.registry import CannotMerge


def kron(A, B):
    """The block matrix of A[p, j] B, entry by entry."""
    rows = [torch.cat([A[p, j] * B for j in range(A.shape[1])], dim=1) for p in range(A.shape[0])]
    return torch.cat(rows, dim=0)


def whole(A, s, t):
    """sum_i A_i (x) s_i t_i^T"""
    return sum(kron(A[i], s[i][:, None] @ t[i][None, :]) for i in range(len(A)))


@pytest.mark.parametrize("m, d, n", [(4, 8, 2), (8, 8, 4), (3, 6, 3), (5, 7, 1), (12, 4, 4)])
def test_without_the_matrix_as_with_it(m, d, n):
    A, s, t = torch.randn(n, n, n), torch.randn(n, m // n), torch.randn(n, d // n)
    tensors = [x.requires_grad_() for x in (A, s, t, torch.randn(2, 3, d))]
    *_, x = tensors
    y, W = compacter.kronecker(x, A, s, t), whole(A, s, t)
    assert W.shape == (m, d) and y.shape == (2, 3, m) and torch.allclose(y, x @ W.T, atol=1e-4)
    assert torch.equal(kron(A[0], A[-1]), torch.kron(A[0], A[-1]))
    weight = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), tensors) for out in (y, x @ W.T))):
        assert torch.allclose(a, b, atol=1e-3)
    assert torch.allclose(compacter.kronecker(x[0, 0], A, s, t), y[0, 0], atol=1e-5)  # one vector


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_adapter_of_the_paper(n):
    """h + W_up gelu(W_down h + b_down) + b_up with whole matrices, and all gradients."""
    model = learnt(compacter.wrap(build("llama"), "mlp", size=8, n=n), 0.5)
    layer = model.layers[1].mlp
    patch, x = layer.patches["compacter"], torch.randn(2, 5, 16)
    h = layer.base(x)
    W_down = whole(patch.A, patch.s_down, patch.t_down)
    W_up = whole(patch.A, patch.s_up, patch.t_up)
    assert W_down.shape == (8, 16) and W_up.shape == (16, 8)
    expected = h + F.gelu(h @ W_down.T + patch.b_down) @ W_up.T + patch.b_up
    y, weight = layer(x), torch.randn(2, 5, 16)
    assert torch.allclose(y, expected, atol=1e-4)
    learn = list(patch.parameters())
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), learn) for out in (y, expected))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_parameters_are_as_many_as_the_page_says():
    size, width, n = 32, 576, 4
    config = minillm.Config(64, width, 1, 9, kv_heads=3, ffn=64)
    model = compacter.wrap(minillm.Transformer(config))
    for layer in minillm.layers(model).values():
        patch = layer.patches["compacter"]
        assert sum(p.numel() for p in patch.parameters()) == n**3 + 3 * (size + width) == 1888
        assert patch.config() == dict(size=size, n=n, width=width)
    names = [layer for layer in minillm.layers(model)]
    assert names == ["layers.0.self_attn", "layers.0.mlp"]
    plain = minillm.adapters.wrap(minillm.Transformer(config)).layers[0].mlp.patches["adapters"]
    assert sum(p.numel() for p in plain.parameters()) == 37_472


def test_at_birth_the_matrices_are_as_large_as_an_ordinary_adapters():
    """W_down has the variance 1/d, W_up is zero but its t is not: one step moves s_up."""
    found = []
    for _ in range(60):
        model = compacter.wrap(nn.Sequential(nn.Linear(64, 64)), ["0"], size=16, n=4)
        found.append(model[0].patches["compacter"])
        assert not any(getattr(found[-1], key).any() for key in ("s_up", "b_down", "b_up"))
    W_down = torch.stack([whole(p.A, p.s_down, p.t_down) for p in found])
    assert 0.8 < 64 * W_down.var() < 1.25
    stds = [torch.stack([getattr(p, key) for p in found]).std().item()
            for key in ("A", "s_down", "t_down", "t_up")]
    assert torch.allclose(torch.tensor(stds), torch.tensor([0.5, 1, 1 / 8, 1 / 4]), rtol=0.1)


def test_each_adapter_has_its_own_A():
    model = compacter.wrap(build("llama"), size=4, n=2)
    own = [layer.patches["compacter"].A for layer in minillm.layers(model).values()]
    assert len(own) == 6 and len({id(A) for A in own}) == 6
    assert not torch.equal(own[0], own[1])


def test_after_a_leaf_over_a_format_and_in_half_precision():
    model = minillm.quant.wrap(nn.Sequential(nn.Linear(6, 8)), ["0"])
    learnt(compacter.wrap(model, ["0"], size=4, n=2))
    patch, x = model[0].patches["compacter"], torch.randn(3, 6)
    h = model[0].base(x)
    assert torch.allclose(model(x), patch.adapt(h), atol=1e-6)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), patch.adapt(h).float(),
                                                           atol=0.2)


def test_after_a_mixture_of_experts_the_width_is_that_of_the_norms():
    from test_roles import made

    model = compacter.wrap(made("hf_mixtral"), size=4, n=2)
    assert {layer.patches["compacter"].width for layer in minillm.layers(model).values()} == {16}
    assert len(minillm.layers(model)) == 6 and logits(model).isfinite().all()


@pytest.mark.parametrize("call, message", [
    (lambda: compacter.wrap(build("llama"), size=6, n=4),
     "n=4 at 'layers.0.self_attn': size=6 is no multiple of n"),
    (lambda: compacter.wrap(build("llama"), size=6, n=3),
     "n=3 at 'layers.0.self_attn': width=16 is no multiple of n"),
    (lambda: compacter.wrap(build("llama"), n=0), "n=0 is not a whole number from 1 to 64"),
    (lambda: compacter.wrap(build("llama"), n=65), "n=65 is not a whole number from 1 to 64"),
    (lambda: compacter.wrap(build("llama"), n=2.0), "n=2.0 is not a whole number"),
    (lambda: compacter.wrap(build("llama"), size=0), "size=0 is not a whole number of at least 1"),
    (lambda: compacter.wrap(build("llama"), width="16"), "width='16' is not"),
    (lambda: compacter.wrap(two()), "no sublayer to wrap by default"),
    (lambda: logits(compacter.wrap(build("llama"), width=8)),
     r"width=8: the output that this adapter changes has the width 16; wrap\(model, width=16\)"),
])
def test_a_wrong_call_says_what_is_possible(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_it_cannot_be_merged_and_unwrap_gives_the_model_back():
    model = build("gpt2")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    learnt(compacter.wrap(model, size=4))
    with pytest.raises(CannotMerge, match="compacter cannot be merged"):
        minillm.adapters.merge(model)
    minillm.adapters.unwrap(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_it_learns_and_its_file_brings_it_back(tmp_path):
    model = compacter.wrap(build("llama"), size=8, n=2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.03)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        output = logits(model)[:, :-1].flatten(0, 1)
        (loss := F.cross_entropy(output, IDS[:, 1:].flatten())).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    minillm.adapters.save(model, tmp_path / "a")
    again = minillm.adapters.load(build("llama"), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
