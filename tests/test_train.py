"""The loop: schedules and groups by their formulas, accumulation that equals a larger batch, and runs that survive a kill."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from models import build

import minillm
from minillm import data, files
from minillm.train import groups, rate, saved, train


def examples(n=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(24, (int(torch.randint(3, 9, (1,), generator=draw)),), generator=draw).tolist() for _ in range(n)]
    return [data.Example(row, [-100, *row[1:]]) for row in rows]


def losses(history):
    return [record["loss"] for record in history]


def quiet(model, rows=None, **options):
    return train(model, rows or examples(), **{**dict(steps=6, lr=1e-2, batch_size=4, progress=False), **options})


def test_schedules():
    assert [rate(s, 10, "constant", 2) for s in (0, 1, 2, 9)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1, 1]
    assert [rate(s, 10, "linear", 2) for s in (2, 6, 10)] == [1, 0.5, 0]
    assert [rate(s, 10, "cosine", 0) for s in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert rate(4, 12, "cosine", 0) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    with pytest.raises(ValueError, match="schedule='cosin' is unknown; known: constant, linear, cosine"):
        rate(0, 1, "cosin")


def test_groups():
    model = build("llama")
    found = groups(model, 1.0, 0.1, {r"layers\.0\.": 0.5, "embed_tokens": 0.1})
    by_id = {id(p): g for g in found for p in g["params"]}
    named = dict(model.named_parameters())
    assert by_id[id(named["layers.0.mlp.up_proj.weight"])]["lr"] == 0.5 and by_id[id(named["layers.1.mlp.up_proj.weight"])]["lr"] == 1
    assert by_id[id(named["embed_tokens.weight"])]["lr"] == 0.1
    assert by_id[id(named["norm.weight"])]["weight_decay"] == 0 and by_id[id(named["lm_head.weight"])]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match="'layer_9' matches no parameter that learns"):
        groups(model, 1.0, rates={"layer_9": 2})
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in this model learns"):
        groups(model, 1.0)


def test_training_learns_what_it_may_and_nothing_else():
    for name in minillm.techniques():
        model = minillm.techniques()[name].wrap(build("llama"), **{"sparse": dict(anyway=True), "freeze": dict(last=1)}.get(name, {}))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses_of_epochs = torch.tensor(losses(quiet(model, steps=30))).view(-1, 6).mean(1)
        assert losses_of_epochs[-1] < losses_of_epochs[0], name
        for n, p in model.named_parameters():
            assert p.equal(before[n]) != p.requires_grad, f"{name}: {n}"


def test_accumulated_micro_batches_are_one_batch():
    """Also where they learn different numbers of tokens: a mean of means would fail here."""
    one, two = build("llama"), build("llama")
    rows = examples(16)
    a = quiet(one, rows, batch_size=8, accumulate=1, steps=2, clip=None)
    b = quiet(two, rows, batch_size=2, accumulate=4, steps=2, clip=None)
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_log_has_a_line_a_step(tmp_path):
    history = quiet(build("llama"), log=tmp_path / "log.jsonl", evaluate=lambda model: 2.0, every=3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == history and [r["step"] for r in lines] == list(range(6))
    assert [r.get("evaluation") for r in lines] == [None, None, 2.0, None, None, 2.0]


def test_early_stopping():
    values = iter([5.0, 4.0, 4.5, 4.2, 1.0])
    assert len(quiet(build("llama"), steps=9, evaluate=lambda model: next(values), every=1, patience=2)) == 4


def test_a_loss_that_is_no_number_stops_at_once(tmp_path):
    model = build("llama")
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 0: the loss is nan.*lower learning rate than 0.01"):
        quiet(model)


def test_resuming_goes_on_bit_for_bit(tmp_path):
    options = dict(steps=9, dropout=0.3)

    def run(**more):
        model = minillm.lora.wrap(build("llama"), r=2, dropout=options["dropout"])
        return quiet(model, steps=9, warmup=2, weight_decay=0.1, **more), model

    whole, expected = run()
    calls = iter(range(99))

    def interrupt(model):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run(checkpoints=tmp_path, save_every=2, evaluate=interrupt, every=1)
    assert [p.name for p in saved(tmp_path)] == ["step-00000002.safetensors", "step-00000004.safetensors"]
    torch.manual_seed(999)
    rest, model = run(checkpoints=tmp_path, save_every=2, resume=True)
    assert losses(rest) == losses(whole)
    assert all(p.equal(q) for p, q in zip(model.parameters(), expected.parameters()))
    assert len(saved(tmp_path)) == 2, "the last two are kept"
    with pytest.raises(ValueError, match="other settings: steps=9 then, 12 now"):
        quiet(minillm.lora.wrap(build("llama"), r=2), steps=12, checkpoints=tmp_path, resume=True, warmup=2, weight_decay=0.1)
    with pytest.raises(ValueError, match="does not fit what learns.*wrapped then"):
        quiet(minillm.lora.wrap(build("llama"), r=3), steps=9, checkpoints=tmp_path, resume=True, warmup=2, weight_decay=0.1)


def test_two_runs_cannot_share_a_directory(tmp_path):
    with files.lock(tmp_path):
        with pytest.raises(RuntimeError, match="another run is writing to"):
            quiet(build("llama"), checkpoints=tmp_path)
    quiet(build("llama"), checkpoints=tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write, calls = safetensors.torch.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            write(*args, **kwargs)
            pathlib.Path(args[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        quiet(build("llama"), checkpoints=tmp_path, save_every=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-00000002.safetensors"]
    assert len(quiet(build("llama"), checkpoints=tmp_path, save_every=2, resume=True)) == 6


RUN = """
import sys, torch
from models import build
from test_train import examples
import minillm
torch.set_num_threads(1)
model = minillm.lora.wrap(build("llama"), r=2, dropout=0.2)
minillm.train.train(model, examples(), steps=400, lr=1e-2, batch_size=4, warmup=5, progress=False, checkpoints=sys.argv[1], save_every=1,
                    resume=True, log=sys.argv[1] + "/log.jsonl")
"""


def start(directory):
    here = pathlib.Path(__file__).parent
    return subprocess.Popen([sys.executable, "-c", RUN, str(directory)], env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}"})


@pytest.mark.slow
def test_a_process_killed_at_any_moment_goes_on_bit_for_bit(tmp_path):
    """kill -9 ten times, in the middle of a save among them; what is there can be read, and the losses are those of a run left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    assert start(whole).wait() == 0
    draw, halves = torch.Generator().manual_seed(1), 0
    for kill in range(10):
        before = [path.name for path in saved(killed)]
        process = start(killed)
        while [path.name for path in saved(killed)] == before:  # it has started, and gone on
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        time.sleep(float(torch.rand((), generator=draw)) * 0.03)
        while kill % 2 and not list(killed.glob(".step-*")):
            assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        halves += bool(list(killed.glob(".step-*")))
        for path in saved(killed):
            minillm.verbs.read(path)
    assert halves, "no kill met a save"
    assert start(killed).wait() == 0 and not list(killed.glob(".step-*"))
    logs = [[json.loads(line)["loss"] for line in (d / "log.jsonl").read_text().splitlines()] for d in (whole, killed)]
    assert logs[0] == logs[1] and len(logs[0]) == 400
