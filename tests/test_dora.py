"""DoRA: the paper's formula, and peft's layer: outputs, gradients, files."""

import pytest
import torch
from conftest import peft_model
from models import build, learnt, logits, two
from torch import nn

import minillm


def one(bias=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias, dtype=dtype))
    minillm.lora.dora.wrap(model, ["0"], r=3, **options)
    patch = model[0].patches["dora"]
    with torch.no_grad():
        patch.B.normal_(std=0.3), patch.m.mul_(torch.rand(5) + 0.5)
    return model, patch, model[0].base


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, dict(alpha=3.0), dict(rank_stabilized=True)])
def test_the_formula_of_the_paper(bias, options):
    model, patch, base = one(bias, **options)
    s = options.get("alpha", 16.0) / (3**0.5 if options.get("rank_stabilized") else 3)
    x = torch.randn(4, 6, requires_grad=True)
    V = base.weight + s * patch.B @ patch.A
    W = patch.m[:, None] * V / V.detach().norm(dim=1, keepdim=True)
    expected = x @ W.T + (base.bias if bias else 0)
    y, weight = model(x), torch.randn(4, 5)
    assert torch.allclose(y, expected, atol=1e-5)
    learn = [x, patch.A, patch.B, patch.m]
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), learn) for out in (y, expected))):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(model[0].dense()[0].norm(dim=1), patch.m, atol=1e-6)


def test_the_norm_needs_no_matrix_and_is_that_of_the_matrix():
    _, patch, base = one()
    W = base.weight.detach()
    assert torch.allclose(patch.norm(W), (W + patch.scale * patch.B @ patch.A).norm(dim=1),
                          atol=1e-6)
    with torch.no_grad():  # V is nothing but rounding in one row: no root of a number below 0
        patch.A.zero_(), patch.B.zero_()
        patch.A[0], patch.B[2, 0] = W[2], -1 / patch.scale
    assert patch.norm(W).isfinite().all() and patch.norm(W)[2] < 1e-2


def test_at_birth_m_is_the_length_of_each_row_as_the_patches_beneath_leave_it():
    model = minillm.prune.wrap(two(), sparsity=0.5)
    W, _ = model[0].dense()
    minillm.lora.dora.wrap(model, r=2)
    assert torch.allclose(model[0].patches["dora"].m, W.norm(dim=1))
    assert model[0].patches["dora"].config() == dict(r=2, alpha=16.0, rank_stabilized=False,
                                                     dropout=0.0)


def test_dropout_is_of_the_branch_alone():
    model, patch, base = one(dropout=0.5)
    x = torch.randn(2000, 6)
    torch.manual_seed(3)
    y = model.train()(x)
    torch.manual_seed(3)
    d = nn.functional.dropout(x, 0.5)
    scale = patch.m / patch.norm(base.weight)
    expected = scale * (x @ base.weight.T + patch.scale * d @ patch.A.T @ patch.B.T) + base.bias
    assert torch.allclose(y, expected, atol=1e-4) and not torch.allclose(y, model.eval()(x))


def test_over_lora_and_merged():
    """It is no sum: what lies beneath is part of its direction, and is merged first."""
    model = learnt(minillm.lora.dora.wrap(minillm.lora.wrap(two(), r=2), r=2))
    with pytest.raises(ValueError,
                       match="dora cannot be merged into '0' while lora lies beneath it"):
        minillm.lora.merge(model, "dora")
    x = torch.randn(3, 6)
    expected = model(x)
    minillm.lora.merge(model)
    assert torch.allclose(model(x), expected, atol=1e-4) and type(model[0]) is nn.Linear
    minillm.lora.unmerge(model)
    assert list(model[0].patches) == ["lora", "dora"] and torch.equal(model(x), expected)


def with_an_empty_row(how):
    """DoRA over a leaf whose row 0 is zero, in the weight or by a mask; inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    if how == "zeros":
        model[2].weight.data[0] = 0
    else:
        minillm.prune.wrap(model, ["2"])
        model[2].patches["prune"].mask[0] = False
    return model, torch.randn(8, 6)


@pytest.mark.parametrize("how", ["zeros", "mask"])
def test_a_row_of_zeros_stays_one_and_can_learn(how):
    model, x = with_an_empty_row(how)
    before = model(x)
    patch = minillm.lora.dora.wrap(model, ["2"], r=2)[2].patches["dora"]
    assert torch.allclose(model(x), before, atol=1e-6) and patch.m[0] == 0
    assert torch.equal(model[2].dense()[0][0], torch.zeros(5))
    optimizer, losses = torch.optim.Adam([patch.A, patch.B, patch.m], 0.02), []
    wanted = before.detach().clone()
    wanted[:, 0] += 2 * torch.tanh(x @ torch.ones(6))
    for _ in range(200):
        optimizer.zero_grad()
        (loss := (model(x) - wanted).square().mean()).backward()
        assert all(p.grad.isfinite().all() for p in (patch.A, patch.B, patch.m))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and patch.m[0].abs() > 0.1
    W, _ = model[2].dense()
    assert torch.allclose(W.norm(dim=1), patch.m.abs(), atol=1e-5)
    folded = nn.functional.linear(model[:2](x), *model[2].dense())
    assert torch.allclose(model(x), folded, atol=1e-5)


def test_a_row_without_a_direction_is_zero_whatever_its_length():
    model, patch, base = one()
    with torch.no_grad():
        base.weight[0], patch.B[0] = 0, 0
    assert patch.m[0] > 0
    x = torch.randn(3, 6)
    y = model(x)
    assert torch.equal(y[:, 0], base.bias[0].expand(3)) and y.isfinite().all()
    assert torch.equal(model[0].dense()[0][0], torch.zeros(6))
    for grad in torch.autograd.grad(y.sum() + model[0].dense()[0].sum(), [patch.A, patch.B,
                                                                          patch.m]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_of_zeros_in_half_precision_and_compiled(dtype):
    model, x = with_an_empty_row("zeros")
    model, x = minillm.lora.dora.wrap(model, r=2).to(dtype), x.to(dtype)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert y.isfinite().all() and torch.allclose(y, model(x), atol=1e-2)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_embeddings_are_not_taken():
    with pytest.raises(ValueError,
                       match="'embed_tokens' is a Embedding, no leaf that can be wrapped"):
        minillm.lora.dora.wrap(build("llama"), ["embed_tokens"])


@pytest.mark.parity
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_peft(rank_stabilized):
    """Outputs within 1e-5, and the gradients of A, B and m."""
    plain = build("hf_llama")
    theirs = peft_model(plain, r=4, lora_alpha=8, use_dora=True, use_rslora=rank_stabilized,
                        target_modules=["q_proj", "down_proj"])
    ours = minillm.lora.dora.wrap(plain, ["q_proj", "down_proj"], r=4, alpha=8.0,
                                  rank_stabilized=rank_stabilized)
    found = {}
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_magnitude_vector"):
            with torch.no_grad():
                module.lora_B["default"].weight.normal_(std=0.2)
                module.lora_magnitude_vector["default"].weight.mul_(1.3)
            patch = minillm.layers(ours)[name].patches["dora"]
            pairs = [(patch.A, module.lora_A["default"].weight),
                     (patch.B, module.lora_B["default"].weight),
                     (patch.m, module.lora_magnitude_vector["default"].weight)]
            with torch.no_grad():
                for p, q in pairs:
                    p.copy_(q)
            found[name] = pairs
    assert len(found) == 6
    a, b = logits(ours), logits(theirs)
    assert torch.allclose(a, b, atol=1e-5)
    weight = torch.randn_like(a)
    for out in (a, b):
        (out * weight).sum().backward()
    for pairs in found.values():
        for p, q in pairs:
            assert torch.allclose(p.grad, q.grad, atol=1e-5 * max(1.0, q.grad.abs().max().item()))
    merged = theirs.merge_and_unload()
    assert torch.allclose(logits(minillm.lora.merge(ours)), logits(merged), atol=1e-5)
