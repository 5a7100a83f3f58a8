"""Training in half precision: AdamW steps float32 copies, and the model has them rounded."""

import pytest
import torch
from models import build
from test_checkpoints import ctrl_c_at, same
from test_train import examples, losses, quiet

from minillm import data
from minillm.registry.store import read
from minillm.train import Interrupted, held_out_loss, loss_sum, newest


def half(dtype):
    """The same start in every dtype: its weights are of bfloat16."""
    return build("llama").bfloat16().to(dtype)


def fall(dtype):
    """(how far 40 steps at 1e-5 lower the loss, the share of the weights that moved)."""
    model = half(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    quiet(model, steps=40, lr=1e-5, schedule="constant")
    moved = sum((p != q).sum().item() for p, q in zip(before, model.parameters()))
    first, last = (held_out_loss(m.float(), examples()) for m in (half(dtype), model))
    return first - last, moved / sum(p.numel() for p in before)


@pytest.mark.parametrize("dtype, share, near", [(torch.bfloat16, 0.4, 0.3),
                                                (torch.float16, 0.9, 0.02)])
def test_a_small_rate_learns_as_in_float32(dtype, share, near):
    expected, _ = fall(torch.float32)
    found, moved = fall(dtype)
    assert expected > 0.005 and found == pytest.approx(expected, rel=near) and moved > share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loop_beside_one_with_float32_copies_written_out(dtype):
    """Equal bit for bit, with micro-batches, whose gradients add up in float32, and clipping."""
    rows, model, plain = examples(16), half(dtype), half(dtype)
    history = quiet(model, rows, steps=5, accumulate=2, clip=0.5, schedule="constant", seed=3)
    copies = [p.detach().float() for p in plain.parameters()]
    optimizer = torch.optim.AdamW(copies, lr=1e-2, weight_decay=0.0)
    batches = data.batches(rows, 4, 3)
    for record in history:
        micro = [next(batches), next(batches)]
        count = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in micro)
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        for batch in micro:
            plain.zero_grad()
            (loss_sum(plain, *batch) / count).backward()
            for p, copy in zip(plain.parameters(), copies):
                copy.grad += p.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(copies, 0.5)
        optimizer.step()
        for p, copy in zip(plain.parameters(), copies):
            p.data = copy.to(dtype)
        assert record["norm"] == norm.item() > 0.5
    assert same(model, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_on_bit_for_bit(dtype, tmp_path):
    """Also where the best step is not the last: the model ends as after that one."""
    def options(values=(4.0, 2.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0)):
        values = iter(values)
        return dict(steps=8, lr=1e-4, evaluate=lambda model: next(values), every=1)

    expected, model = half(dtype), half(dtype)
    whole = quiet(expected, **options())
    hook = ctrl_c_at(model, 5)
    with pytest.raises(Interrupted):
        quiet(model, checkpoints=tmp_path, save_every=100, **options())
    hook.remove()
    tensors = read(newest(tmp_path))[0]
    for name, p in model.named_parameters():
        copy = tensors[f"optimizer.master.{name}"]
        assert copy.dtype == torch.float32 and copy.to(dtype).equal(tensors[f"model.{name}"])
    model, rest = half(dtype), options([3.0] * 3)
    rest = quiet(model, checkpoints=tmp_path, save_every=100, resume=True, **rest)
    assert losses(rest) == losses(whole) and rest[-1]["best"]["step"] == 2 and same(model, expected)


def test_float32_has_no_copies(tmp_path):
    quiet(build("llama"), checkpoints=tmp_path, steps=1)
    assert not [name for name in read(newest(tmp_path))[0] if "master" in name]


# --- what on_step changes -----------------------------------------------------------------------


TOUCHED = ["norm.weight", "layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight",
           "layers.0.self_attn.q_proj.weight"]


def gradients(model, step, steps):
    """Some by a new tensor, some in place, some of a part alone; none depends on a rounding."""
    norm, up, down, q = map(model.get_parameter, TOUCHED)
    norm.grad = torch.ones_like(norm)
    up.grad.copy_(torch.arange(up.numel()).view_as(up) % 7 - 3)
    down.grad.data.fill_(-2)
    q.grad.zero_()
    q.grad[:, 0] = 1


@torch.no_grad()
def weights(model, step, steps):
    norm, up, down, q = map(model.get_parameter, TOUCHED)
    norm.mul_(0.5)
    up[0] = 0.25
    down.data.neg_()
    q.copy_(q.flip(0))
    gradients(model, step, steps)


@pytest.mark.parametrize("on_step", [gradients, weights])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_step_changes_in_half_precision_what_it_does_in_float32(on_step, dtype):
    found = {}
    for key, kind, change in (("half", dtype, on_step), ("whole", torch.float32, on_step),
                              ("plain", torch.float32, None)):
        model = half(kind)
        quiet(model, steps=2, lr=0.05, clip=None, on_step=change)
        found[key] = {name: p.float() for name, p in model.named_parameters()}
    for name in TOUCHED:
        torch.testing.assert_close(found["half"][name], found["whole"][name], rtol=0.01, atol=2e-3)
        assert not torch.allclose(found["plain"][name], found["whole"][name], atol=0.05)


def test_a_gradient_of_on_steps_own():
    """Where the loss gives none: the parameter does not take part in it."""
    model = half(torch.bfloat16)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))

    def born(model, step, steps):
        model.unused.grad = torch.tensor([1.0, 0.0, -1.0], dtype=torch.bfloat16)

    quiet(model, steps=1, lr=0.25, on_step=born)
    assert model.unused.tolist() == [0.75, 1.0, 1.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_on_step_that_does_nothing_rounds_nothing(dtype):
    plain, model = half(dtype), half(dtype)
    options = dict(steps=6, lr=1e-4, clip=None)
    expected = losses(quiet(plain, **options))
    assert losses(quiet(model, on_step=lambda *_: None, **options)) == expected
    assert same(model, plain)


def test_what_on_step_leaves_alone_stays_exact():
    """A rounding of what it does not change, at each step, would be another training."""
    def look(model, step, steps):
        model.norm.weight.grad[0] = 0

    def other(model, step, steps):
        model.norm.weight.grad = model.norm.weight.grad.clone()
        model.norm.weight.grad[0] = 0

    found = []
    for on_step in (look, other):
        model = half(torch.bfloat16)
        found.append((losses(quiet(model, steps=6, lr=1e-4, clip=None, on_step=on_step)), model))
    plain = half(torch.bfloat16)
    quiet(plain, steps=6, lr=1e-4, clip=None)
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])
    once = [half(torch.bfloat16), half(torch.bfloat16)]
    quiet(once[0], steps=1, clip=None)
    quiet(once[1], steps=1, clip=None, on_step=look)
    for (name, p), q in zip(once[0].named_parameters(), once[1].parameters()):
        assert p[1:].equal(q[1:]) if name == "norm.weight" else p.equal(q), name
