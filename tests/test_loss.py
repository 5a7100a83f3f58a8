"""The fused loss is F.cross_entropy, and so is its gradient, whatever the head is."""

import pytest
import torch
import torch.nn.functional as F
from models import build
from torch import nn

import minillm
from minillm.model.loss import CrossEntropySum, cross_entropy_sum

families = pytest.mark.parametrize("kind", ["gpt2", "llama"])


@families
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_cross_entropy_over_the_labels_and_so_is_its_gradient(kind, tied):
    make = {"gpt2": minillm.Config.gpt2, "llama": minillm.Config}[kind]
    model = minillm.Transformer(make(24, 16, 2, 2, positions=32, tied=tied))
    ids = torch.randint(24, (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.4, -100)
    plain = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = torch.autograd.grad(plain, list(model.parameters()))
    loss = model.loss(ids, labels)
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss * 2, list(model.parameters())), expected):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(ids, labels), plain)
        count = (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(model.loss(ids, labels, reduction="sum"), plain * count)


def heads():
    """{name: a module (n, 6) -> (n, 11)}: what a head may be."""
    torch.manual_seed(3)

    def lora(part):
        model = minillm.lora.wrap(nn.Sequential(part), ["0"], r=2)
        for layer in minillm.layers(model).values():
            nn.init.normal_(layer.patches["lora"].B)
        return model

    frozen = nn.Linear(6, 11).requires_grad_(False)
    half = nn.Linear(6, 11)
    half.bias.requires_grad_(False)
    return {
        "trainable": nn.Linear(6, 11, bias=False),
        "with a bias": nn.Linear(6, 11),
        "frozen": frozen,
        "bias frozen": half,
        "LoRA": lora(nn.Linear(6, 11)),
        "int8": minillm.quant.wrap(nn.Sequential(nn.Linear(6, 11).requires_grad_(False))),
        "LoRA on int8": lora(minillm.quant.wrap(nn.Sequential(nn.Linear(6, 11)))),
        "two layers": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 11)),
    }


@pytest.mark.parametrize("name", list(heads()))
@pytest.mark.parametrize("n", [0, 1, 4, 5, 8, 10])
def test_its_gradient_is_the_numerical_one_in_float64_at_every_edge_of_a_chunk(name, n):
    head = heads()[name].double()
    h, y = torch.randn(n, 6, dtype=torch.float64, requires_grad=True), torch.randint(11, (n,))
    learnt = [p for p in head.parameters() if p.requires_grad]
    plain = F.cross_entropy(head(h), y, reduction="sum")
    ours = cross_entropy_sum(h, y, head, 4)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad(plain, [h, *learnt])
    for a, b in zip(torch.autograd.grad(3 * ours, [h, *learnt]), expected, strict=True):
        torch.testing.assert_close(a, 3 * b)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(h, y, head, 4), plain)
    if n:
        assert torch.autograd.gradcheck(
            lambda h, *p: CrossEntropySum.apply(h, y, head, 4, *p), [h, *learnt]
        )


def test_only_what_learns_gets_a_gradient():
    h, y = torch.randn(5, 6), torch.randint(11, (5,))
    head = heads()["LoRA"]
    cross_entropy_sum(h, y, head, 2).backward()
    assert {name for name, p in head.named_parameters() if p.grad is not None} == {
        "0.patches.lora.A",
        "0.patches.lora.B",
    }
    assert not cross_entropy_sum(h, y, heads()["frozen"], 2).requires_grad


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_in_half_precision_the_sums_are_exact_and_the_gradient_is_rounded_once(dtype, tolerance):
    """300 chunks, summed in 16 bits, would lose most of the head's gradient."""
    n, head = 300, nn.Linear(6, 11).to(dtype)
    h, y = torch.randn(n, 6).to(dtype).requires_grad_(), torch.randint(11, (n,))
    exact = nn.Linear(6, 11).double()
    exact.load_state_dict(head.state_dict())
    wide = h.detach().double().requires_grad_()
    plain = F.cross_entropy(exact(wide), y, reduction="sum")
    expected = torch.autograd.grad(plain, [wide, *exact.parameters()])
    loss = cross_entropy_sum(h, y, head, 1)
    assert loss.dtype == torch.float32 and abs(loss.item() / plain.item() - 1) < tolerance
    for a, b in zip(torch.autograd.grad(loss, [h, *head.parameters()]), expected, strict=True):
        assert a.dtype == dtype and (a - b).abs().max() <= tolerance * b.abs().max()


def test_a_scaled_loss_in_float16_does_not_overflow():
    """torch.amp.GradScaler starts at 65536, which float16 does not hold; the product it does."""
    h, y, head = (
        torch.randn(400, 6).half().requires_grad_(),
        torch.randint(11, (400,)),
        nn.Linear(6, 11).half(),
    )
    (grad,) = torch.autograd.grad(cross_entropy_sum(h * 1e-3, y, head), h)
    (scaled,) = torch.autograd.grad(cross_entropy_sum(h * 1e-3, y, head) * 65536.0, h)
    assert scaled.isfinite().all() and scaled.abs().max() > 1
    torch.testing.assert_close(scaled.float() / 65536, grad.float(), rtol=1e-2, atol=1e-6)


def test_a_second_derivative_is_refused_and_not_wrong():
    model, ids = build("llama"), torch.randint(24, (2, 5))
    for grads in (
        lambda x: torch.autograd.grad(x, model.norm.weight, create_graph=True),
        lambda x: x.backward(create_graph=True),
    ):
        with pytest.raises(
            RuntimeError, match="no second derivative.*torch.nn.functional.cross_entropy"
        ):
            grads(model.loss(ids, ids))


@pytest.mark.parametrize("trainable", [True, False])
def test_under_autocast_it_is_the_loss_of_autocast_logits(trainable):
    model, ids = build("llama"), torch.randint(24, (4, 30))
    model.lm_head.requires_grad_(trainable)
    learnt = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        ours = model.loss(ids, ids)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    for a, b in zip(torch.autograd.grad(ours, learnt), torch.autograd.grad(plain, learnt)):
        assert (a - b).abs().max() < 0.05 * b.abs().max() + 1e-4


IDS = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (torch.full((1, 4), -100), {}, "no label is left"),
        (IDS[:, :3], {}, r"labels \(1, 3\) and ids \(1, 4\) differ in shape"),
        (
            torch.tensor([[0, 3, 24, -100]]),
            {},
            "the labels run from 3 to 24, but the vocabulary has 24 entries; -100 is for",
        ),
        (torch.tensor([[0, 1.5, 2, 3]]), {}, "the labels run from 1.5 to 3.0"),
        (torch.tensor([[0, -1, 2, 3]]), {}, "the labels run from -1 to 3"),
        (IDS, dict(reduction="none"), "reduction='none' is unknown; known: 'mean', 'sum'"),
        (IDS, dict(mask=torch.ones(1, 5) > 0), r"mask \(1, 5\) and ids \(1, 4\) differ in shape"),
    ],
)
def test_what_is_no_loss_is_refused_before_any_work(labels, options, message, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(
        minillm.model.transformer.Block, "forward", lambda *_: pytest.fail("it has started")
    )
    with pytest.raises(ValueError, match=message):
        model.loss(IDS, labels, **options)


def test_the_first_label_has_no_token_before_it_and_may_be_anything():
    model = build("llama")
    torch.testing.assert_close(
        model.loss(IDS, torch.tensor([[99, 1, 2, 3]])),
        model.loss(IDS, torch.tensor([[0, 1, 2, 3]])),
    )
