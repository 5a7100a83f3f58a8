"""save_all and load_all: everything that is attached, in one directory, into a fresh process."""

import json
import pathlib
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import law
from models import IDS, build, learnt, logits
from test_laws import EXAMPLES, drawn

import minillm
from minillm.registry import attached

FRESH = """
import pickle, sys
import torch
from models import build, logits
import minillm
for kind, directory, expected, learns in pickle.load(open(sys.argv[1], "rb")):
    model = minillm.load_all(build(kind), directory)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-6), directory
    assert [n for n, p in model.named_parameters() if p.requires_grad] == learns, directory
"""


@pytest.mark.parametrize("numbers", [range(4), pytest.param(range(4, 30), marks=pytest.mark.slow)],
                         ids=["some", "more"])
def test_stacks_are_trained_saved_in_one_directory_and_loaded_in_a_fresh_process(numbers, tmp_path):
    jobs = []
    for number in numbers:
        _, kind, names, model = drawn(number)
        if any(p.requires_grad for p in model.parameters()):
            try:
                minillm.train.train(model, EXAMPLES, steps=3, lr=1e-2, progress=False)
            except ValueError as error:  # a mask over a dropout has no gradient
                assert "has a dropout that no folded weight has" in str(error), names
        minillm.save_all(model, tmp_path / str(number))
        learns = [name for name, p in model.named_parameters() if p.requires_grad]
        jobs.append((kind, str(tmp_path / str(number)), logits(model).detach(), learns))
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    here = pathlib.Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "jobs")],
                          capture_output=True, text=True,
                          env={**__import__("os").environ, "PYTHONPATH": f"{here}:{here.parent}"})
    assert not done.returncode, done.stderr[-3000:]
    for _ in jobs:
        law("6 one directory", True, "")


def stacked():
    """An ordinary stack: int8, two LoRAs, an adapter, a soft prompt, and a frozen embedding."""
    model = minillm.quant.wrap(build("llama"))
    minillm.freeze.wrap(model, targets=["embed_tokens"])
    minillm.lora.wrap(model, name="sql", r=2)
    minillm.adapters.wrap(model, size=3)
    minillm.lora.wrap(model, name="chat", r=3)
    minillm.prompts.wrap(model, length=2)
    return learnt(model)


def test_the_directory_lists_what_was_wrapped_in_order(tmp_path):
    model = minillm.use(stacked(), "sql", "prompts")
    minillm.save_all(model, tmp_path / "d")
    told = json.loads((tmp_path / "d" / "techniques.json").read_text())
    assert [one["name"] for one in told["techniques"]] == [
        "freeze", "sql", "adapters", "chat", "prompts", "quant"]
    assert told["active"] == ["prompts", "sql"]
    again = minillm.load_all(build("llama"), tmp_path / "d")
    assert torch.equal(logits(again), logits(model))
    for name in ("chat", "adapters", "sql"):  # each is there, and can be switched on
        ours, theirs = logits(minillm.use(model, name), IDS), logits(minillm.use(again, name), IDS)
        assert torch.equal(ours, theirs)


def test_a_directory_is_replaced_and_what_others_put_there_stays(tmp_path):
    model = stacked()
    minillm.save_all(model, tmp_path / "d")
    minillm.lora.unwrap(model, "chat")
    minillm.save_all(model, tmp_path / "d")
    assert not list((tmp_path / "d").glob("*chat*"))
    assert torch.equal(logits(minillm.load_all(build("llama"), tmp_path / "d")), logits(model))
    (tmp_path / "d" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        minillm.save_all(model, tmp_path / "d")
    minillm.save_all(model, tmp_path / "d", force=True)
    assert (tmp_path / "d" / "notes.txt").read_text() == "mine"


def test_what_cannot_be_saved_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match="nothing is attached.*minillm.save"):
        minillm.save_all(build("llama"), tmp_path / "d")
    model = minillm.lora.merge(stacked(), "sql", tolerance=10)
    with pytest.raises(ValueError, match="sql is merged into .*minillm.lora.unmerge"):
        minillm.save_all(model, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_model_that_it_does_not_fit_is_an_error_and_stays_as_it_was(tmp_path):
    minillm.save_all(stacked(), tmp_path / "d")
    with pytest.raises(ValueError, match="this one has lora.*the plain model"):
        minillm.load_all(minillm.lora.wrap(build("llama")), tmp_path / "d")
    other = build("llama")
    with torch.no_grad():
        other.embed_tokens.weight.add_(1)  # the files hold all else: `freeze` leaves it to learn
    with pytest.raises(ValueError, match="belongs to another model.*embed_tokens"):
        minillm.load_all(other, tmp_path / "d")
    assert attached(other) == "nothing"
    minillm.load_all(other, tmp_path / "d", any_base=True)
    with pytest.raises(FileNotFoundError, match="techniques.json"):
        minillm.load_all(build("llama"), tmp_path)


@pytest.mark.parametrize("broken", ["cut", "gone", "another", "list"])
def test_a_broken_file_is_found_before_the_model_changes(broken, tmp_path):
    model = stacked()
    minillm.save_all(model, tmp_path / "d")
    last = tmp_path / "d" / "5-prompts.safetensors"
    if broken == "cut":
        last.write_bytes(last.read_bytes()[:-8])
    elif broken == "gone":
        last.unlink()
    elif broken == "another":
        tensors = {key: t[:1] for key, t in safetensors.torch.load_file(last).items()}
        with safetensors.safe_open(last, "pt") as file:
            safetensors.torch.save_file(tensors, last, file.metadata())
    else:
        (tmp_path / "d" / "techniques.json").write_text('{"base": {}, "active": [], "techniques": '
                                                        '[{"file": "../x", "technique": "lora", '
                                                        '"name": "x"}]}')
    base = build("llama")
    before = {key: t.clone() for key, t in base.state_dict().items()}
    with pytest.raises((ValueError, OSError), match="list" if broken == "list" else "5-prompts"):
        minillm.load_all(base, tmp_path / "d")
    assert attached(base) == "nothing"
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()


def test_a_checkpoint_and_the_techniques_on_it_never_replace_each_other(tmp_path):
    model = minillm.lora.wrap(build("llama"), r=2)
    minillm.save(build("llama"), tmp_path / "base")
    with pytest.raises(FileExistsError, match="config.json"):
        minillm.save_all(model, tmp_path / "base")
    minillm.save_all(model, tmp_path / "tuned")
    with pytest.raises(FileExistsError, match="1-lora.safetensors"):
        minillm.save(build("llama"), tmp_path / "tuned")


@pytest.mark.parametrize("inside", [False, True])
def test_load_finds_the_base_by_its_source(inside, tmp_path):
    minillm.save(build("llama"), tmp_path / "base")
    model, _ = minillm.load(tmp_path / "base")
    learnt(minillm.lora.wrap(minillm.quant.wrap(model), r=2))
    directory = tmp_path / ("base" if inside else "tuned")  # beside the base's own files, by force
    minillm.save_all(model, directory, force=inside)
    again, _ = minillm.load(directory)
    assert torch.equal(logits(again), logits(model)) and again.source == str(tmp_path / "base")
    minillm.lora.unwrap(again)
    minillm.save_all(again, directory, force=inside)  # and again, from what was loaded
    assert attached(minillm.load(directory)[0]) == "quant"


@pytest.mark.parametrize("kind", ["hf_gpt2", "llama"])
def test_a_base_without_a_source_has_to_be_given(kind, tmp_path):
    minillm.save_all(minillm.lora.wrap(build(kind), r=2), tmp_path / "d")
    with pytest.raises(ValueError, match=r"does not name its base.*load_all\(model"):
        minillm.load(tmp_path / "d")


def test_several_processes_are_an_error_and_no_deadlock(tmp_path, monkeypatch):
    monkeypatch.setattr(minillm.distributed, "place", lambda: (0, 2))
    with pytest.raises(ValueError, match="save_all needs one process"):
        minillm.save_all(stacked(), tmp_path / "d")
    assert not (tmp_path / "d").exists()
