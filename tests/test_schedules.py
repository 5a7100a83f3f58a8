"""Schedules: beside their formulas, beside transformers', in a plain loop, and resumed."""
# flake8: noqa: F811  (fixtures)

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face
from models import build
from small_model import logged, model, run  # noqa: F401
from test_nothing_lost import FAST
from test_train import examples, losses, quiet

import minillm
from minillm import data
from minillm.train import SCHEDULES, rate, schedules
from minillm.train.schedules import (
    cosine, inverse_sqrt, linear, slanted_triangular, warmup_stable_decay,
)

SIZES = [(1, 0), (1, 1), (7, 0), (20, 5), (20, 20), (100, 10)]  # (steps, warmup)


def rise(s, w):
    return (s + 1) / (w + 1)


PLAIN = {  # each formula after the warm-up, of (s, T, w)
    "constant": lambda s, T, w: 1,
    "linear": lambda s, T, w: (T - s) / (T - w),
    "cosine": lambda s, T, w: math.cos(math.pi / 2 * (s - w) / (T - w)) ** 2,
    "inverse_sqrt": lambda s, T, w: ((w + 1) / (s + 1)) ** 0.5,
}


@pytest.mark.parametrize("steps, warmup", SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_formulas(name, steps, warmup):
    for s in range(steps):
        expected = rise(s, warmup) if s < warmup else PLAIN[name](s, steps, warmup)
        assert rate(s, steps, name, warmup) == pytest.approx(expected), s


@pytest.mark.parametrize("steps, warmup", SIZES)
def test_every_schedule_has_its_peak_after_the_warm_up(steps, warmup):
    for name in SCHEDULES:
        options = dict(decay=0) if name == "warmup_stable_decay" else {}
        share = functools.partial(SCHEDULES[name], **options)
        every = [rate(s, steps, share, warmup) for s in range(steps)]
        assert all(0 < one <= 1 for one in every), name
        rising, falling = every[:warmup], every[warmup:]
        assert rising == sorted(rising) and falling == sorted(falling, reverse=True), name
        assert warmup == steps or falling[0] == 1, name


def test_slanted_triangular_is_the_papers_equation_3():
    T, ratio = 200, 32
    for cut_frac in (0.1, 0.25, 0.5):
        cut = math.floor(T * cut_frac)
        for t in range(T):
            p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
            expected = (1 + p * (ratio - 1)) / ratio
            assert slanted_triangular(t, T, cut) == pytest.approx(expected)
    assert slanted_triangular(0, T, 20, ratio=8) == 1 / 8
    assert slanted_triangular(T, T, 20, ratio=8) == 1 / 8
    assert [slanted_triangular(t, 4, 2, ratio=1) for t in range(4)] == [1, 1, 1, 1]


def test_vaswanis_equation_3():
    """lr ~ min(n^-0.5, n W^-1.5), n = 1, 2, ..., up to a constant factor."""
    W = 40
    by_paper = [min(n**-0.5, n * W**-1.5) for n in range(1, 200)]
    ours = [inverse_sqrt(s, 199, W - 1) for s in range(199)]
    assert ours == pytest.approx([one / max(by_paper) for one in by_paper])


@pytest.mark.parametrize("shape, at_half", [("linear", 0.5), ("cosine", 0.5),
                                            ("1-sqrt", 1 - 0.5**0.5)])
def test_warmup_stable_decay(shape, at_half):
    share = functools.partial(warmup_stable_decay, decay=40, shape=shape)
    every = [share(s, 100, 10) for s in range(100)]
    assert every[9] < 1 and set(every[10:61]) == {1.0} and every[61] < 1
    assert every[80] == pytest.approx(at_half) and share(100, 100, 10) == pytest.approx(0)
    floored = functools.partial(share, floor=0.2)
    assert floored(80, 100, 10) == pytest.approx(0.2 + 0.8 * at_half)
    assert floored(100, 100, 10) == pytest.approx(0.2) and floored(4, 100, 10) == 5 / 11
    assert warmup_stable_decay(80, 100, 10, decay=0.4) == warmup_stable_decay(80, 100, 10, decay=40)
    assert warmup_stable_decay(99, 100, 0, decay=1) == 1 == warmup_stable_decay(9, 10, 9, decay=0)


def test_a_floor():
    for share in (linear, cosine):
        assert share(30, 30, 5, floor=0.1) == pytest.approx(0.1)
        assert share(5, 30, 5, floor=0.1) == 1 and share(1, 30, 5, floor=0.1) == 2 / 6
        for s in range(5, 30):
            assert share(s, 30, 5, floor=0.1) == pytest.approx(0.1 + 0.9 * share(s, 30, 5))


# --- transformers ---------------------------------------------------------------------------------


def theirs(name, optimizer, steps, warmup, **options):
    """transformers' scheduler."""
    hugging_face()
    from transformers import optimization

    calls = dict(
        constant=("get_constant_schedule_with_warmup", {}),
        linear=("get_linear_schedule_with_warmup", dict(num_training_steps=steps)),
        cosine=("get_cosine_schedule_with_warmup", dict(num_training_steps=steps)),
        floored=("get_cosine_with_min_lr_schedule_with_warmup",
                 dict(num_training_steps=steps, min_lr_rate=0.2)),
        inverse_sqrt=("get_inverse_sqrt_schedule", {}),
        warmup_stable_decay=("get_wsd_schedule", dict(num_training_steps=steps)))
    call, given = calls[name]
    return getattr(optimization, call)(optimizer, num_warmup_steps=warmup, **given, **options)


STABLE = [("warmup_stable_decay", dict(decay=decay, shape=shape),
           dict(num_decay_steps=decay, decay_type=shape))
          for decay, shape in ((0, "linear"), (5, "linear"), (8, "cosine"), (13, "1-sqrt"))]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # there is no training
@pytest.mark.parametrize("steps, warmup", [(20, 0), (20, 1), (20, 7), (30, 10)])
@pytest.mark.parametrize("name, ours, options", [
    ("constant", {}, {}), ("linear", {}, {}), ("cosine", {}, {}), ("inverse_sqrt", {}, {}),
    ("floored", dict(floor=0.2), {}), *STABLE])
def test_transformers_has_the_same_one_step_later(name, ours, options, steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = theirs(name, optimizer, steps + 1, warmup + 1, **options)
    share = functools.partial(SCHEDULES["cosine" if name == "floored" else name], **ours)
    assert optimizer.param_groups[0]["lr"] == 0, "their first step"
    for s in range(steps):
        scheduler.step()
        assert rate(s, steps, share, warmup) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12), s


# --- in a training --------------------------------------------------------------------------------


def plain_loop(model, rows, steps, batch_size, lr, shares, factor):
    """AdamW in a loop of plain torch, one rate for each parameter; returns the losses."""
    sets = [dict(params=[p], name=name, weight_decay=0.3 if p.dim() > 1 else 0.0)
            for name, p in model.named_parameters()]
    optimizer, found = torch.optim.AdamW(sets), []
    order = data.batches(rows, batch_size, 0).order()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * shares[step] * factor(group["name"])
        nll, n = 0.0, 0
        for i in order[step * batch_size : (step + 1) * batch_size]:
            ids = torch.tensor(rows[i].ids)
            nll += F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="sum")
            n += len(ids) - 1
        optimizer.zero_grad()
        (nll / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(nll.item() / n)
    return found


IN_A_TRAINING = {
    "constant": ("constant", lambda s: 1),
    "linear": ("linear", lambda s: (8 - s) / 6),
    "cosine": (cosine, lambda s: 0.5 + 0.5 * math.cos(math.pi * (s - 2) / 6)),
    "floored": (functools.partial(cosine, floor=0.5),
                lambda s: 0.75 + 0.25 * math.cos(math.pi * (s - 2) / 6)),
    "inverse_sqrt": ("inverse_sqrt", lambda s: math.sqrt(3 / (s + 1))),
    "stable": (functools.partial(warmup_stable_decay, decay=4), lambda s: min(1, (8 - s) / 4)),
    "slanted": ("slanted_triangular", lambda s: (1 + (8 - s) / 6 * 31) / 32),
    "own": (lambda step, steps, warmup: np.float64(1 / (1 + step)), None),
}


@pytest.mark.parametrize("name", IN_A_TRAINING)
def test_a_training_beside_one_of_plain_torch(name):
    schedule, after = IN_A_TRAINING[name]
    if name == "own":
        shares = [1 / (1 + s) for s in range(8)]
    else:
        first = [1 / 32, 1 / 32 + 31 / 64] if name == "slanted" else [1 / 3, 2 / 3]
        shares = first + [after(s) for s in range(2, 8)]
    one, two, rows = build("llama"), build("llama"), examples(16)
    history = quiet(one, rows, steps=8, batch_size=2, warmup=2, schedule=schedule, lr=0.02,
                    weight_decay=0.3)
    assert [r["rate"] for r in history] == pytest.approx([0.02 * share for share in shares])
    expected = plain_loop(two, rows, 8, 2, 0.02, shares, lambda name: 1)
    assert losses(history) == pytest.approx(expected, rel=1e-5)
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [*SCHEDULES, "partial"])
def test_resume_is_bit_for_bit(name, tmp_path):
    partial = functools.partial(warmup_stable_decay, decay=0.5, shape="1-sqrt", floor=0.1)
    options = dict(steps=8, warmup=3, schedule=partial if name == "partial" else name)
    whole = build("llama")
    expected = losses(quiet(whole, **options))

    def stop(model, step, steps):
        if step == 5 and stop.ask:
            raise KeyboardInterrupt

    stop.ask = True
    resumed = build("llama")
    with pytest.raises(KeyboardInterrupt):
        quiet(resumed, checkpoints=tmp_path, save_every=2, on_step=stop, **options)
    stop.ask, resumed = False, build("llama")
    history = quiet(resumed, checkpoints=tmp_path, save_every=2, on_step=stop, resume=True,
                    **options)
    assert losses(history) == expected and len(expected) == 8
    assert all(p.equal(q) for p, q in zip(whole.parameters(), resumed.parameters()))


def test_another_schedule_or_option_is_another_training(tmp_path):
    options = dict(steps=2, checkpoints=tmp_path)
    first = functools.partial(cosine, floor=0.1)
    quiet(build("llama"), schedule=first, **options)
    quiet(build("llama"), schedule=functools.partial(cosine, floor=0.1), resume=True, **options)
    for other, shown in ((functools.partial(cosine, floor=0.2), "floor=0.2"), ("cosine", "cosine"),
                         (functools.partial(linear, floor=0.1), "schedules.linear, floor=0.1")):
        with pytest.raises(ValueError, match=r"other settings: schedule='partial\(minillm.train."
                                             rf"schedules.cosine, floor=0.1\)' then, .*{shown}"):
            quiet(build("llama"), schedule=other, resume=True, **options)


def test_a_schedule_and_its_name_are_one(tmp_path):
    options = dict(steps=2, checkpoints=tmp_path, resume=True)
    quiet(build("llama"), schedule=linear, **options)
    quiet(build("llama"), schedule="linear", **options)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, message", [
    ("cosin", "schedule='cosin' is unknown; known: constant, linear, cosine, inverse_sqrt, "
              "warmup_stable_decay, slanted_triangular"),
    (3, r"schedule=3 is neither a function schedule\(step, steps, warmup\) nor one of constant"),
    (lambda step: 1.0, r"is not a function schedule\(step, steps, warmup\): .* takes 1 positional"),
    (lambda step, steps, warmup: -1.0, "schedule=test_schedules.<lambda> gives -1.0 at step 0: the "
                                       "share of the rate is a finite number from 0"),
    (lambda step, steps, warmup: math.nan, "gives nan at step 0"),
    (lambda step, steps, warmup: 1 if step < 5 else math.inf, "gives inf at step 5"),
    (lambda step, steps, warmup: None, "gives None at step 0"),
    (functools.partial(warmup_stable_decay, decay=5),
     "decay=5: a decay of 5 steps after a warm-up of 2 is longer than the training of 6 steps"),
    (functools.partial(warmup_stable_decay, decay=0.9),
     "decay=0.9: a decay of 5 steps after a warm-up of 2 is longer than the training of 6"),
    (functools.partial(warmup_stable_decay, decay=1.5), "decay=1.5 is not a whole number of steps"),
    (functools.partial(warmup_stable_decay, decay=-1), "decay=-1 is not a whole number of steps"),
    (functools.partial(warmup_stable_decay, shape="square"),
     "shape='square' is unknown; known: 'linear', 'cosine', '1-sqrt'"),
    (functools.partial(cosine, floor=1.5), "floor=1.5 is not a share of the rate, from 0 to 1"),
    (functools.partial(slanted_triangular, ratio=0.5), "ratio=0.5 is not a number from 1"),
    (functools.partial(cosine, flor=0.5), "is not a function schedule.*unexpected keyword"),
])
def test_schedules_that_make_no_sense(schedule, message):
    model = build("llama")
    model.forward = model.loss = None  # it is never called
    with pytest.raises(ValueError, match=message):
        quiet(model, steps=6, warmup=2, schedule=schedule)


def test_a_step_or_a_warm_up_beyond_the_training():
    with pytest.raises(ValueError, match="warmup=11 is longer than the training of 10 steps"):
        rate(0, 10, "cosine", 11)
    for step in (-1, 11):
        with pytest.raises(ValueError, match=f"step={step} is not a step of a schedule of 10"):
            rate(step, 10, "cosine")
    assert rate(10, 10, "linear") == 0


# --- the command line -----------------------------------------------------------------------------


def test_options_on_the_command_line():
    made = schedules.with_options("warmup_stable_decay", dict(decay="20", shape="1-sqrt"))
    assert made.func is warmup_stable_decay and made.keywords == dict(decay=20, shape="1-sqrt")
    assert schedules.with_options("linear", {}) == "linear"


def test_a_schedule_reaches_the_training(run):
    run("train", *FAST, "--steps", 5, "--rate", 0.01, "--warmup", 0, "--schedule",
        "warmup_stable_decay", "--schedule-option", "decay=4", "--schedule-option", "floor=0.5",
        "--log", "log.jsonl", "--out", "x.safetensors")
    assert [r["rate"] for r in logged("log.jsonl")] == pytest.approx(
        [0.01, 0.01, 0.00875, 0.0075, 0.00625])


@pytest.mark.parametrize("options, message, code", [
    (["--schedule", "cosin"], "argument --schedule: invalid choice: 'cosin'", 2),
    (["--schedule-option", "floor"], "--schedule-option 'floor' is not KEY=VALUE, such as", 2),
    (["--schedule-option", "floor=0", "--schedule-option", "floor=1"], "give one of them", 2),
    (["--schedule-option", "floor=x"], "--schedule-option floor='x' is not a number", 1),
    (["--schedule-option", "floor=2"], "--schedule-option floor=2.0 is not a share of the", 1),
    (["--schedule-option", "decay=2"], "cosine has no option 'decay'; its options and their "
                                       "defaults: floor=0.0", 1),
    (["--schedule", "constant", "--schedule-option", "floor=0"], "defaults: none", 1),
    (["--schedule", "warmup_stable_decay", "--schedule-option", "decay=9", "--steps", 9,
      "--warmup", 2], "--schedule-option decay=9: a decay of 9 steps after a warm-up of 2", 1),
])
def test_errors_on_the_command_line(options, message, code, run, monkeypatch):
    monkeypatch.setattr(minillm.checkpoints, "load", lambda *_,
                        **__: pytest.fail("a model was loaded"))
    assert message in run("train", *options, "--out", "x.safetensors", code=code)


def test_a_changed_option_is_refused_in_options(run):
    args = ("train", *FAST, "--steps", 2, "--checkpoints", "c", "--out")
    run(*args, "a.safetensors", "--schedule-option", "floor=0.1")
    said = run(*args, "b.safetensors", "--schedule-option", "floor=0.2", "--resume", code=1)
    assert "--schedule 'partial(minillm.train.schedules.cosine, floor=0.1)' then, " in said
    run(*args, "b.safetensors", "--schedule-option", "floor=0.1", "--resume")
