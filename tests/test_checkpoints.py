"""Runs that are interrupted go on to the last bit, and only where they belong."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from conftest import hugging_face
from models import build
from test_train import examples, losses, quiet
from torch import nn

import minillm
from minillm.train import identity
from minillm import files
from minillm.train import Interrupted, newest, saved


def names(directory):
    return [path.name for path in saved(directory)]


def same(model, other):
    theirs = other.state_dict()
    return all(t.equal(theirs[name]) for name, t in model.state_dict().items())


def lora(**options):
    return minillm.lora.wrap(build("llama"), **{**dict(r=2, dropout=0.3), **options})


def ctrl_c_at(model, forward, number=signal.SIGINT):
    """Send this process the signal in the so-many-th forward pass of the model, in mid-step."""
    calls = iter(range(1, 999))

    def send(module, args, output):
        if next(calls) == forward:
            signal.raise_signal(number)

    return model.norm.register_forward_hook(send)


# --- going on ---------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """It has buffers that change, a parameter that never gets a gradient, and dropout."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(24, 8), nn.BatchNorm1d(8), nn.Linear(8, 24)
        self.dropout, self.unused = nn.Dropout(0.3), nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, ids, attention_mask=None):
        x = self.norm(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(x))


def batch_norm():
    torch.manual_seed(1)
    return BatchNorm()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("make", [lora, batch_norm])
def test_a_signal_saves_the_last_whole_step_and_the_run_goes_on_bit_for_bit(make, number, tmp_path):
    held = examples(4, seed=2)
    options = dict(steps=9, warmup=2, weight_decay=0.1, held_out=held, every=2, accumulate=2)
    expected = make()
    whole = quiet(expected, log=tmp_path / "whole.jsonl", **options)
    model = make()
    hook = ctrl_c_at(model, 9, number)  # in the fourth or fifth step
    options |= dict(checkpoints=tmp_path / "runs", save_every=100, log=tmp_path / "log.jsonl")
    before = signal.getsignal(number)
    message = "interrupted after step 4 of 9; saved .*resume=True"
    with pytest.raises(Interrupted, match=message) as caught:
        quiet(model, **options)
    hook.remove()
    assert signal.getsignal(number) is before and isinstance(caught.value, KeyboardInterrupt)
    found = caught.value
    assert (found.path, found.step, found.steps) == (newest(tmp_path / "runs"), 4, 9)
    assert found.signal == number and names(tmp_path / "runs") == ["step-00000004.safetensors"]
    torch.manual_seed(999)
    model = make()
    rest = quiet(model, resume=True, **options)
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in h] for h in (rest, whole)]
    assert timeless[0] == timeless[1] and same(model, expected)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == rest
    model = make()
    assert quiet(model, resume=True, **options) == rest and same(model, expected), "it was finished"


def test_a_second_signal_acts_at_once(tmp_path, caplog):
    model = build("llama")
    hooks = [ctrl_c_at(model, 3), ctrl_c_at(model, 3)]
    with pytest.raises(KeyboardInterrupt) as caught:
        quiet(model, checkpoints=tmp_path, save_every=1)
    assert not isinstance(caught.value, Interrupted)
    assert names(tmp_path)[-1] == "step-00000002.safetensors"
    assert "a second signal ends it at once" in caplog.text
    for hook in hooks:
        hook.remove()
    rest = quiet(build("llama"), checkpoints=tmp_path, save_every=1, resume=True)
    assert losses(rest) == losses(quiet(build("llama")))


def test_a_signal_that_the_program_handles_is_its_own(tmp_path):
    came, before = [], signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        model = build("llama")
        ctrl_c_at(model, 2, signal.SIGTERM)
        assert len(quiet(model, checkpoints=tmp_path)) == 6 and came == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_goes_on_from_the_best_before_the_interruption(tmp_path):
    """The best step is not the one of the checkpoint: its parameters are in the file too."""
    def run(values, **options):
        model = build("llama")
        values = iter(values)
        history = quiet(model, steps=6, evaluate=lambda model: next(values), every=1,
                        checkpoints=tmp_path, save_every=1, keep=1, **options)
        return model, history

    with pytest.raises(StopIteration):
        run([3.0, 1.0, 2.0])
    model, history = run([2.0, 2.0, 2.0], resume=True)
    assert history[-1]["best"] == dict(step=1, value=1.0)
    assert names(tmp_path) == ["step-00000006.safetensors"]
    other, held = build("llama"), iter([2.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    quiet(other, steps=6, evaluate=lambda model: next(held), every=1)
    assert same(model, other)


def test_early_stopping_leaves_a_checkpoint(tmp_path):
    def run(**options):
        values, model = iter([1.0, 2.0, 3.0, 0.0]), build("llama")
        history = quiet(model, steps=20, evaluate=lambda model: next(values), every=1, patience=2,
                        checkpoints=tmp_path, save_every=20, **options)
        return history, model

    history, model = run()
    assert names(tmp_path) == ["step-00000003.safetensors"] and len(history) == 3
    again, other = run(resume=True)
    assert again == history and same(model, other)


def test_saving_is_by_default_each_tenth_of_the_steps(tmp_path):
    quiet(build("llama"), steps=25, checkpoints=tmp_path, keep=99)
    steps = [int(name[5:13]) for name in names(tmp_path)]
    assert steps == [*range(2, 25, 2), 25]


def test_only_the_last_are_kept_and_only_checkpoints_are_removed(tmp_path):
    mine = ["step-best.safetensors", "step-1.safetensors", ".step-notes", "notes",
            ".step-00000009.safetensors.abcdefgh", ".step-00000009.safetensors.mine/paper.txt",
            ".step-9.safetensors.abcdefgh/paper.txt", ".step-00000009.safetensors.abcd_efg/paper"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    path = tmp_path / "step-00000002.safetensors"
    with pytest.raises(ZeroDivisionError), files.atomic(path) as new:
        shutil.copytree(new.parent, half := tmp_path / (new.parent.name[:-8] + "01234567"))
        (half / new.name).write_text("half")  # what a killed process leaves
        raise ZeroDivisionError
    quiet(build("llama"), checkpoints=tmp_path, save_every=1, keep=3)
    assert names(tmp_path) == [f"step-0000000{i}.safetensors" for i in (4, 5, 6)]
    assert not half.exists() and all((tmp_path / name).read_text() == "mine" for name in mine)


# --- what does not belong together ------------------------------------------------------------


def test_a_fresh_run_does_not_take_the_directory_of_another(tmp_path):
    quiet(build("llama"), checkpoints=tmp_path, save_every=3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = (r"holds those of an earlier training \(2, the newest step-00000006.safetensors\): "
               "resume=True continues it; for a new training choose another directory")
    with pytest.raises(FileExistsError, match=message):
        quiet(build("llama"), checkpoints=tmp_path, steps=2, log=tmp_path / "log")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("changed, message", [
    (dict(steps=12), "steps=6 then, 12 now"),
    (dict(lr=0.02), "lr=0.01 then, 0.02 now"),
    (dict(betas=(0.9, 0.95)), r"betas=\[0.9, 0.999\] then, \[0.9, 0.95\] now"),
    (dict(rates={"A$": 2}), r"rates=None then, {'A\$': 2.0} now"),
    (dict(weight_decay=0.1), "weight_decay=0.0 then, 0.1 now"),
    (dict(clip=None), "clip=1.0 then, None now"),
    (dict(warmup=3, schedule="linear"), "schedule='cosine' then, 'linear' now, warmup=0 then, 3"),
    (dict(seed=1), "seed=0 then, 1 now"),
    (dict(held_out=examples(2)), r"every=None then, 1 now, held_out=None then, '2 examples \("),
    (dict(rows=examples(12, seed=5)), r"data='12 examples \(\w{8}\)' then, '12 examples \(\w{8}"),
    (dict(rows=examples(11)), r"data='12 examples \(\w{8}\)' then, '11 examples \(\w{8}\)' now"),
])
def test_other_settings_and_data_are_named(changed, message, tmp_path):
    quiet(lora(), checkpoints=tmp_path)
    with pytest.raises(ValueError, match=f"step-00000006.* written with other settings: {message}"):
        quiet(lora(), checkpoints=tmp_path, resume=True, **changed)


def other_base():
    model = build("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    return minillm.lora.wrap(model, r=2, dropout=0.3)


def rotated():
    model = lora()
    model.config.rope_base = 500.0
    return model


def masked(sparsity=0.5):
    return minillm.prune.wrap(lora(dropout=0.0), sparsity=sparsity)


def on_int8(scale=1):
    model = build("llama")
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight *= scale
    return minillm.lora.wrap(minillm.quant.wrap(model), r=2)


def other_mask():
    model = masked()
    patch = next(p for layer in minillm.layers(model).values() for p in layer.patches.values()
                 if p.family == "prune")
    patch.mask.logical_not_()
    return model


@pytest.mark.parametrize("then, now, message", [
    (lora, other_base, r"made for 'Transformer' \(fingerprint \w{8}\), this model is 'T"),
    (lora, lambda: lora().bfloat16(), r"dtypes=\['float32'\] then, \['bfloat16'\] now"),
    (lora, rotated, "the model has rope_base=10000.0 then, 500.0 now"),
    (lora, lambda: lora(alpha=4.0), r"lora at .*q_proj' has alpha=16.0 then, 4.0 now \(21 of 21"),
    (lora, lambda: lora(dropout=0.1), "lora at .*q_proj' has dropout=0.3 then, 0.1 now"),
    (lora, masked, "were lora at 21 sites then, they are lora at 21 sites, prune at 21 sites now"),
    (masked, lambda: masked(0.25), "prune at .* has sparsity=0.5 then, 0.25 now"),
    (masked, other_mask, r"prune at .*q_proj' has tensors=\w{8} then, \w{8} now \(1 of"),
    (on_int8, lambda: on_int8(2), r"quant at '.*0.mlp.up_proj' has tensors=\w{8} then, \w{8} now"),
    (lora, lambda: build("Linear"), "the model has model='Transformer' then, 'Plain' now"),
])
def test_another_model_is_named(then, now, message, tmp_path):
    quiet(then(), checkpoints=tmp_path, steps=2)
    assert len(quiet(then(), checkpoints=tmp_path, steps=2, resume=True)) == 2
    message = f"step-00000002.* belongs to another training: .*{message}"
    with pytest.raises(ValueError, match=message):
        quiet(now(), checkpoints=tmp_path, steps=2, resume=True)


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_llama"])
def test_models_of_others_are_held_out_saved_and_resumed(name, tmp_path):
    options = dict(held_out=examples(3), checkpoints=tmp_path, save_every=3)
    history = quiet(minillm.lora.wrap(build(name), r=2), **options)
    newest(tmp_path).unlink()
    rest = quiet(minillm.lora.wrap(build(name), r=2), resume=True, **options)
    assert losses(rest) == losses(history) and rest[-1]["best"] == history[-1]["best"]


def test_what_learns_has_to_be_what_learnt(tmp_path):
    quiet(minillm.freeze.wrap(build("llama"), last=1), checkpoints=tmp_path, steps=2)
    for other in (build("llama"), minillm.freeze.wrap(build("llama"), last=2)):
        with pytest.raises(ValueError, match="does not fit what learns.*wrapped for it"):
            quiet(other, checkpoints=tmp_path, steps=2, resume=True)


def test_a_newest_file_that_is_no_checkpoint_is_named(tmp_path):
    quiet(build("llama"), checkpoints=tmp_path, save_every=3)
    bad = tmp_path / "step-00000009.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    renamed = (tmp_path / "step-00000006.safetensors").read_bytes()
    for content, message in ((b"half", "is not a whole safetensors file.*move it away"),
                             ((tmp_path / "foreign").read_bytes(), "is not a checkpoint"),
                             (renamed, "its log is not complete, or not of this step")):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=f"step-00000009.safetensors.*{message}"):
            quiet(build("llama"), checkpoints=tmp_path, save_every=3, resume=True)
        assert len(names(tmp_path)) == 3
    bad.unlink()
    assert len(quiet(build("llama"), checkpoints=tmp_path, save_every=3, resume=True)) == 6


def test_resuming_an_empty_directory_begins(tmp_path):
    history = quiet(build("llama"), checkpoints=tmp_path / "new", resume=True)
    assert losses(history) == losses(quiet(build("llama")))


# --- what may happen to a process -------------------------------------------------------------


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
    history = quiet(build("llama"), checkpoints=tmp_path, save_every=2)
    assert names(tmp_path) == ["step-00000002.safetensors", "step-00000006.safetensors"]
    assert not list(tmp_path.glob(".step-*")) and losses(history) == losses(quiet(build("llama")))
    (tmp_path / "step-00000006.safetensors").unlink()
    assert len(quiet(build("llama"), checkpoints=tmp_path, save_every=2, resume=True)) == 6


RUN = """
import sys, torch

from models import build
from test_train import examples
import minillm
from minillm.train import identity
torch.set_num_threads(1)
model = minillm.lora.wrap(build("llama"), r=2, dropout=0.2)
minillm.train.train(model, examples(), steps=400, lr=1e-2, batch_size=4, warmup=5, progress=False,
                    checkpoints=sys.argv[1], save_every=1, resume=True,
                    log=sys.argv[1] + "/log.jsonl")
"""


def start(directory):
    here = pathlib.Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(directory)], env=environment)


@pytest.mark.slow
def test_a_process_killed_at_any_moment_goes_on_bit_for_bit(tmp_path):
    """kill -9 ten times, some in mid-save; the losses are those of a run that was left alone."""
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
            minillm.registry.store.read(path)
    assert halves, "no kill met a save"
    assert start(killed).wait() == 0 and not list(killed.glob(".step-*"))
    logs = [[json.loads(line)["loss"] for line in (d / "log.jsonl").read_text().splitlines()]
            for d in (whole, killed)]
    assert logs[0] == logs[1] and len(logs[0]) == 400


@pytest.mark.parametrize(
    "then, now, message",
    [
        (
            (nn.ReLU(), nn.Dropout(0.1)),
            (nn.Tanh(), nn.Dropout(0.5)),
            r"the module '1' was ReLU\(\) then, it is Tanh\(\) now",
        ),
        (
            (nn.ReLU(), nn.Dropout(0.1)),
            (nn.ReLU(), nn.Dropout(0.5)),
            r"the module '2' was Dropout\(p=0.1, .*\) then, it is Dropout\(p=0.5, .*\) now",
        ),
        (
            (nn.ReLU(),),
            (nn.ReLU(), nn.Identity()),
            r"the module '2' was Linear\(.*\) then, it is Identity\(\) now",
        ),
    ],
)
def test_a_training_goes_on_with_the_same_modules(then, now, message, tmp_path):
    def model(middle):
        torch.manual_seed(1)
        return nn.Sequential(nn.Embedding(24, 8), *middle, nn.Linear(8, 24))

    quiet(model(then), steps=2, batch_size=1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=message):
        quiet(model(now), steps=2, batch_size=1, checkpoints=tmp_path, resume=True)
    quiet(model(then), steps=2, batch_size=1, checkpoints=tmp_path, resume=True)


def test_what_differs_between_processes_is_not_compared():
    class Shown(nn.Module):
        def extra_repr(self):
            return f"f={self.f}, device={self.device}, size=3"

    model = nn.Sequential(Shown())
    model[0].f, model[0].device = object(), "cuda:0"
    then = identity.of(model)
    model[0].f, model[0].device = object(), "cpu"
    model[0].__class__ = type("FSDPShown", (Shown,), {})
    assert identity.differs(model, then) is None
    del then["modules"]  # of an earlier minillm
    assert identity.differs(model, then) is None


@pytest.mark.parity
def test_a_model_of_from_pretrained_goes_on_bit_for_bit(tmp_path):
    """Its configuration holds what JSON has no word for, such as a torch.dtype."""
    transformers = hugging_face()
    build("hf_llama").save_pretrained(tmp_path / "model")

    def load(**changed):
        found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", **changed)
        assert isinstance(found.config.dtype, torch.dtype)
        return found

    expected, model = load(), load()
    whole = quiet(expected)
    options = dict(checkpoints=tmp_path / "runs", save_every=100)
    hook = ctrl_c_at(model.model, 3)
    with pytest.raises(Interrupted):
        quiet(model, **options)
    hook.remove()
    with pytest.raises(ValueError, match="has rms_norm_eps=1e-06 then, 0.001 now"):
        quiet(load(rms_norm_eps=1e-3), resume=True, **options)
    model = load()
    assert losses(quiet(model, resume=True, **options)) == losses(whole) and same(model, expected)


def test_what_a_checkpoint_cannot_say_is_found_before_the_first_step(tmp_path):
    model = lora()
    next(iter(minillm.layers(model).values())).patches["lora"].config = lambda: dict(r=object())
    model.forward = model.loss = None  # it is never called
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        quiet(model, checkpoints=tmp_path)


class Shared(nn.Module):
    """Two layers register one tensor, a third a view of it, a fourth a row made by `expand`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.layers = (
            nn.Embedding(24, 8),
            nn.ModuleList(nn.Linear(8, 8) for _ in "1234"),
        )
        self.head, count = nn.Linear(8, 24), torch.zeros(4, 2)
        for layer, t in zip(self.layers, (count, count, count[1:], torch.zeros(1).expand(8))):
            layer.register_buffer("count", t)
        # one memory, two parameters
        self.layers[1].weight = nn.Parameter(self.layers[0].weight.data)

    def forward(self, ids, attention_mask=None):
        x = self.table(ids)
        if self.training:
            self.layers[0].count += 1
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def test_what_shares_memory_is_saved_and_put_back(tmp_path):
    model = Shared()
    ctrl_c_at_first = model.table.register_forward_hook(
        lambda *_: signal.raise_signal(signal.SIGINT) if model.layers[0].count[0, 0] == 2 else None)
    values = iter([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    options = dict(checkpoints=tmp_path, evaluate=lambda model: next(values), every=1)
    with pytest.raises(Interrupted, match="after step 3"):
        quiet(model, **options)
    ctrl_c_at_first.remove()
    model = Shared()
    history = quiet(model, resume=True, **options)
    other, values = Shared(), iter([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert losses(history) == losses(quiet(other, evaluate=options["evaluate"], every=1))
    assert same(model, other) and model.layers[1].count[0, 0] == model.layers[2].count[0, 0] == 1
    assert model.layers[3].count.tolist() == [0.0] * 8
