"""Two processes train as one does: the losses, the files, and what a checkpoint goes on from."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from models import build
from test_train import examples

import minillm
from minillm import distributed
from minillm.train import Interrupted
from minillm.registry.store import read

HERE = pathlib.Path(__file__).parent
RUN = """
import sys, torch
from test_distributed import run
run(*sys.argv[1:])
"""


def run(kind, directory, *cases):
    """One of the processes: full, LoRA and LoRA on int8; then the same again from a checkpoint."""
    distributed.start()
    torch.set_num_threads(1)
    for name, wraps in ((name, CASES[name]) for name in cases):
        for again in (False, True):
            model = wrapped(wraps, name)
            if kind == "sharded":
                minillm.train.shard(model)
            path = pathlib.Path(directory)
            history = training(model, checkpoints=path / name, save_every=4, resume=again,
                               log=path / f"{name}.{again}.jsonl", **measure(name))
            if again:
                assert len(list((path / name).glob("step-*"))) == 2
            elif distributed.place()[0] == 0:
                max((path / name).glob("step-*")).unlink()  # the next goes on from the one before
            distributed.wait()
        if kind == "sharded" and "lora" in wraps:
            refused(model, path / f"{name}.refused")
        whole = {key: distributed.whole(p.detach()) for key, p in model.named_parameters()}
        if distributed.place()[0] == 0:
            safetensors.torch.save_file(whole, path / f"{name}.whole")
        if "lora" in wraps:
            minillm.lora.save(model, path / f"{name}.safetensors")
    assert history[-1]["step"] == 5
    interrupted(kind, path / "interrupted")


def refused(model, path):
    """What would give a sharded model parameters that FSDP does not know."""
    minillm.lora.save(model, path)
    for change in (minillm.lora.merge, minillm.lora.unmerge, minillm.prune.wrap,
                   minillm.quant.wrap, minillm.lora.dora.wrap, minillm.prompts.wrap,
                   lambda model: minillm.lora.load(model, path, "more")):
        with pytest.raises(ValueError, match="spread over the processes"):
            change(model)


def interrupted(kind, directory):
    """A signal to the second process ends both, with one checkpoint."""
    model = wrapped(("lora",))
    if kind == "sharded":
        minillm.train.shard(model)
    passes = iter(range(9))

    def send(module, args, output):
        if distributed.place()[0] == 1 and next(passes) == 2:  # in the second step
            signal.raise_signal(signal.SIGINT)

    model.norm.register_forward_hook(send)
    with pytest.raises(Interrupted, match="interrupted after step 2 of 6"):
        training(model, checkpoints=directory, save_every=6)
    distributed.wait()
    assert [path.name for path in directory.glob("step-*")] == ["step-00000002.safetensors"]


CASES = {"full": (), "bfloat16": ("bfloat16",), "lora": ("lora",),
         "lora on int8": ("quant", "lora"), "hf_gpt2": ("lora",)}


def wrapped(wraps, name="llama"):
    torch.manual_seed(0)
    model = build(name if name == "hf_gpt2" else "llama")
    for technique in wraps:
        if technique == "bfloat16":
            model.bfloat16()
        else:
            minillm.techniques()[technique].wrap(model)
    return model


def training(model, **options):
    usual = dict(steps=6, lr=1e-2, batch_size=4, accumulate=2, warmup=2, weight_decay=0.1)
    return minillm.train.train(model, examples(16), progress=False, **{**usual, **options})


def measure(name):
    """Held-out examples; or a measure by which the first is the best, before the checkpoint."""
    if name == "lora":
        return dict(held_out=examples(3, seed=9), every=2)
    values = iter([1.0, 2.0, 3.0])
    return dict(evaluate=lambda model: next(values), every=2)


@pytest.mark.parametrize("kind, cases", [
    ("data parallel", ("full", "lora")), ("sharded", ("lora on int8", "hf_gpt2")),
    *(pytest.param(kind, (*CASES,), marks=pytest.mark.slow)
      for kind in ("data parallel", "sharded"))])
def test_two_processes_train_as_one(tmp_path, kind, cases):
    (tmp_path / "run.py").write_text(RUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(tmp_path / "run.py"), kind, str(tmp_path), *cases]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, wraps in ((name, CASES[name]) for name in cases):
        model = wrapped(wraps, name)
        expected = training(model, **measure(name))
        rough = 300 if "bfloat16" in wraps else 1  # the processes' gradients are rounded too
        for again in (False, True):
            log = (tmp_path / f"{name}.{again}.jsonl").read_text()
            lines = [json.loads(line) for line in log.splitlines()]
            for key in ("loss", "norm", "tokens", "learnt", "held_out"):
                found, wanted = ([r[key] for r in h if key in r] for h in (lines, expected))
                assert found == pytest.approx(wanted, rel=rough * 1e-4), (name, again, key)
            assert lines[-1]["best"]["step"] == expected[-1]["best"]["step"]
        whole = safetensors.torch.load_file(tmp_path / f"{name}.whole")
        for key, p in model.named_parameters():
            torch.testing.assert_close(whole[key], p.detach(), rtol=rough * 1e-3, atol=rough * 1e-4)
        if "lora" in wraps:
            minillm.lora.save(model, tmp_path / "one.safetensors")
            one, two = (read(tmp_path / f"{n}.safetensors")[0] for n in ("one", name))
            assert one.keys() == two.keys()
            for key, t in one.items():
                torch.testing.assert_close(two[key], t, rtol=1e-3, atol=1e-4)


def test_a_batch_has_a_row_for_each_process(monkeypatch):
    monkeypatch.setattr(distributed, "place", lambda: (1, 3))
    ids = torch.arange(8).view(4, 2)
    found = distributed.rows((ids, ids, None))
    assert found[0].tolist() == [[2, 3]] and found[2] is None
    message = "a batch of 2 rows cannot be shared by 3 processes: choose batch_size"
    with pytest.raises(ValueError, match=message):
        distributed.rows((ids[:2], ids[:2], None))
    with pytest.raises(ValueError, match=message):  # before any work: the last of an epoch is small
        training(None, batch_size=7)


def test_shard_wants_several_processes():
    with pytest.raises(RuntimeError, match="start the program with torchrun"):
        minillm.train.shard(build("llama"))


def test_each_process_talks_through_its_own_gpu(monkeypatch):
    """Without a GPU: what would be said to torch."""
    said = []
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", said.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a,
                        **k: said.append((a, k)))
    monkeypatch.setattr(distributed.atexit, "register", said.append)
    device = torch.device("cuda", 1)
    assert distributed.start() == device
    assert said == [device, (("nccl",), dict(device_id=device)),
                    torch.distributed.destroy_process_group]
