"""Two processes train as one does: the losses, what is saved, and what a checkpoint goes on from."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from models import build
from test_train import examples

import minillm
from minillm import distributed
from minillm.verbs import read

HERE = pathlib.Path(__file__).parent
RUN = """
import sys, torch
from test_distributed import run
run(sys.argv[1], sys.argv[2])
"""


def run(kind, directory):
    """One of the processes: full, LoRA and LoRA on int8, data parallel or sharded; then the same again from a checkpoint."""
    distributed.start()
    torch.set_num_threads(1)
    for name, wraps in CASES.items():
        for again in (False, True):
            model = wrapped(wraps)
            if kind == "sharded":
                distributed.shard(model)
            path = pathlib.Path(directory)
            history = training(model, checkpoints=path / name, save_every=4, resume=again, log=path / f"{name}.{again}.jsonl")
            if again:
                assert len(list((path / name).glob("step-*"))) == 2
            elif distributed.place()[0] == 0:
                max((path / name).glob("step-*")).unlink()  # the next run goes on from the one before
            distributed.wait()
        if "lora" in wraps:
            minillm.lora.save(model, path / f"{name}.safetensors")
    assert history[-1]["step"] == 5


CASES = {"full": (), "lora": ("lora",), "lora on int8": ("quant", "lora")}


def wrapped(wraps):
    torch.manual_seed(0)
    model = build("llama")
    for technique in wraps:
        minillm.techniques()[technique].wrap(model)
    return model


def training(model, **options):
    return minillm.train.train(model, examples(16), steps=6, lr=1e-2, batch_size=4, accumulate=2, warmup=2, weight_decay=0.1,
                               progress=False, **options)


@pytest.mark.parametrize("kind", ["data parallel", "sharded"])
def test_two_processes_train_as_one(tmp_path, kind):
    (tmp_path / "run.py").write_text(RUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(tmp_path / "run.py"), kind, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, wraps in CASES.items():
        model = wrapped(wraps)
        expected = training(model)
        for again in (False, True):
            lines = [json.loads(line) for line in (tmp_path / f"{name}.{again}.jsonl").read_text().splitlines()]
            for key in ("loss", "norm"):
                assert [line[key] for line in lines] == pytest.approx([record[key] for record in expected], rel=1e-4), (name, again, key)
            assert [line["tokens"] for line in lines] == [record["tokens"] for record in expected]
        if "lora" in wraps:
            minillm.lora.save(model, tmp_path / "one.safetensors")
            one, two = read(tmp_path / "one.safetensors")[0], read(tmp_path / f"{name}.safetensors")[0]
            assert one.keys() == two.keys()
            for key, t in one.items():
                torch.testing.assert_close(two[key], t, rtol=1e-3, atol=1e-4)


def test_a_batch_has_a_row_for_each_process(monkeypatch):
    monkeypatch.setattr(distributed, "place", lambda: (1, 3))
    ids = torch.arange(8).view(4, 2)
    assert distributed.rows((ids, ids, None))[0].tolist() == [[2, 3]] and distributed.rows((ids, ids, None))[2] is None
    with pytest.raises(ValueError, match="a batch of 2 rows cannot be shared by 3 processes: choose batch_size"):
        distributed.rows((ids[:2], ids[:2], None))


def test_shard_wants_several_processes():
    with pytest.raises(RuntimeError, match="start the program with torchrun"):
        distributed.shard(build("llama"))
