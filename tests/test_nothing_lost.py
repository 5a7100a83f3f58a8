"""What training learns is in its file; no path is two things; no file of the user's is replaced."""
# flake8: noqa: F811  (fixtures)

import itertools
import json
import os
import shutil
import time

import pytest
import torch
from models import TOKENS, build
from small_model import logged, model, run  # noqa: F401
from test_train import examples, losses, quiet

import minillm
from minillm import cli, compare, data, files, train

OPTIONS = {"sparse": ["--option", "anyway=true"], "freeze": ["--option", "last=1"]}
FAST = ["--data", "a.txt", "--length", 64, "--batch-size", 2]


def learn(run, technique, *more, steps=4, **options):
    more = [*OPTIONS.get(technique, ()), *more]
    how = ("--technique", technique, "--steps", steps, "--rate", 0.02)
    return run("train", *FAST, *how, *more, **options)


# --- an adapter that is loaded stays as it is ---------------------------------------------------


@pytest.mark.parametrize("first", ["lora", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("prompts", "quant"))])
def test_what_learns_over_a_loaded_adapter_is_saved(first, run):
    """The two files together have the held-out loss that the training reported."""
    learn(run, first, "--out", "first.safetensors")
    for second in TOKENS:
        if second == first or {first, second} == {"quant", "sparse"}:  # one format a leaf
            continue
        learn(run, second, "--adapter", "first.safetensors", "--eval-data", "a.txt",
              "--log", "log.jsonl", "--out", "second.safetensors")
        found, tokenizer = minillm.load(run.model)
        for name in (first, second):
            path = "first.safetensors" if name == first else "second.safetensors"
            minillm.techniques()[name].load(found, path)
        rows = data.read("a.txt", tokenizer, length=64)
        best = logged("log.jsonl")[-1]["best"]["value"]
        loss = train.held_out_loss(found, rows, 2, tokenizer.pad or 0)
        assert loss == pytest.approx(best, rel=1e-4), second
        assert logged("log.jsonl")[-1]["norm"] > 0, second
        os.unlink("log.jsonl")


@pytest.mark.parametrize("technique", ["quant", "prune"])
def test_what_would_learn_and_be_lost_is_refused(technique, run, tmp_path):
    learn(run, "freeze", "--out", "freeze.safetensors")
    said = learn(run, technique, "--adapter", "freeze.safetensors", "--log", "log.jsonl",
                 "--out", "b.safetensors", code=1)
    assert f"--technique {technique}: " in said
    assert "parameters would learn that its file does not hold, first 'layers.2" in said
    assert not (tmp_path / "log.jsonl").exists()


def test_the_seed_decides_what_a_technique_draws(run, tmp_path):
    for technique in ("lora", "adapters", "prompts"):
        for name, seed in (("a", 3), ("b", 3), ("c", 4)):
            torch.manual_seed(time.time_ns() % 1000)
            learn(run, technique, "--seed", seed, "--out", f"{name}.safetensors", steps=2)
        a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
        assert a == b and a != c, technique


# --- files of the user's ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_replaces_its_own_kind_alone(ending, run, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    path = tmp_path / f"mine.{ending}"
    figure.Figure().savefig(path)
    mine = path.read_bytes()
    said = learn(run, "lora", "--picture", path.name, "--out", "a.safetensors", code=1)
    assert f"mine.{ending}' is a file that minillm did not draw" in said and "with --force" in said
    assert path.read_bytes() == mine and not (tmp_path / "a.safetensors").exists()
    history = quiet(build("llama"), steps=2)
    train.picture(history, path, force=True)
    drawn = path.read_bytes()
    train.picture(history[:1], path)
    assert path.read_bytes() not in (drawn, mine)


def test_a_lock_of_the_users_stays(tmp_path):
    for text, stays in (("mine", True), ("", False)):
        (tmp_path / ".lock").write_text(text)
        with compare.Table(tmp_path).held():
            pass
        assert (tmp_path / ".lock").exists() == stays
        (tmp_path / ".lock").write_text(text)
        train.clear(tmp_path)
        assert (tmp_path / ".lock").exists() == stays


def test_a_second_run_leaves_the_directory_of_the_first_alone(run, tmp_path):
    with files.lock(tmp_path / "a.safetensors.interrupted"):
        assert "another run is writing" in learn(run, "lora", "--out", "a.safetensors", code=1)
        assert (tmp_path / "a.safetensors.interrupted" / ".lock").exists()
    learn(run, "lora", "--out", "a.safetensors")
    assert not (tmp_path / "a.safetensors.interrupted").exists()


CLASHES = [
    ("--technique full --out lg --log lg/log.jsonl",
     "--log lg/log.jsonl lies inside --out lg"),
    ("--out z.safetensors --log ./z.safetensors",
     "--out z.safetensors and --log ./z.safetensors are one path"),
    ("--out z.safetensors --checkpoints z.safetensors",
     "--out z.safetensors and --checkpoints z.safetensors"),
    ("--out z.png --picture z.png",
     "--out z.png and --picture z.png"),
    ("--log z.png --picture z.png --out z.safetensors",
     "--log z.png and --picture z.png"),
    ("--technique full --out fd --checkpoints fd",
     "--out fd and --checkpoints fd"),
    ("--technique full --out fd --checkpoints fd/c",
     "--checkpoints fd/c lies inside --out fd"),
    ("--out z.safetensors --checkpoints z.safetensors/c",
     "lies inside --out z.safetensors"),
    ("--out c/step-00000003.safetensors --checkpoints c",
     "lies inside --checkpoints c"),
    ("--out z.safetensors --log z.safetensors.interrupted",
     "--log z.safetensors.interrupted are one path"),
    ("--log link.jsonl --out real.jsonl",
     "--out real.jsonl and --log link.jsonl"),
    ("--data chats.jsonl --out chats.jsonl --force",
     "--data chats.jsonl would be replaced by --out chats.jsonl"),
    ("--eval-data chats.jsonl --log chats.jsonl --out z.safetensors",
     "--eval-data chats.jsonl would be replaced by --log"),
    ("--adapter a.safetensors --out a.safetensors",
     "--adapter a.safetensors would be replaced by --out"),
    ("--model copy --out copy/model.safetensors --force",
     "--model copy/model.safetensors would be replaced by --out"),
    ("--model copy --technique full --out copy",
     "--model copy would be replaced by --out copy"),
]


@pytest.mark.parametrize("options, message", CLASHES)
def test_no_path_is_two_things(options, message, run, tmp_path, monkeypatch):
    shutil.copytree(run.model, "copy")
    os.symlink("real.jsonl", "link.jsonl")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    monkeypatch.setattr(minillm.checkpoints, "load", lambda *_,
                        **__: pytest.fail("a model was loaded"))
    assert message in run("train", *options.split(), code=2)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_neither_do_export_and_compare_write_over_what_they_read(run, tmp_path):
    shutil.copytree(run.model, "copy")
    said = run("export", "--model", "copy", "--out", "copy", code=2)
    assert "--model copy would be replaced by --out copy" in said
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "table.json").write_text("[]")
    said = run("compare", "--data", "r/table.json", "--out", "r", "--force", code=2)
    assert "--data r/table.json would be replaced by --out r/table.json" in said


def test_checkpoints_have_room_for_the_other_outputs(run):
    learn(run, "lora", "--checkpoints", "c", "--log", "c/log.jsonl", "--out", "c/lora.safetensors")
    assert {"log.jsonl", "lora.safetensors", "step-00000004.safetensors"} < set(os.listdir("c"))


@pytest.mark.parametrize("out", ["adapter.gguf", "x.bin", "x"])
def test_an_adapter_is_a_safetensors_file(out, run):
    said = learn(run, "lora", "--out", out, code=2)
    assert f"--out {out}: a technique is saved as a .safetensors file" in said


def test_a_full_disk_ends_the_log_and_not_the_training(tmp_path, caplog):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path, whole = tmp_path / "log.jsonl", losses(quiet(build("llama"), steps=20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        history = quiet(build("llama"), steps=20, log=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert losses(history) == whole and path.stat().st_size == 1000
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and str(path) in said[0] and "goes on without it" in said[0]


# --- examples that the model cannot read --------------------------------------------------------


def row(n, i=3):
    return data.Example([i] * n, [i] * n)


@pytest.mark.parametrize("name", ["llama", "gpt2", "hf_gpt2", "hf_llama"])
def test_examples_that_do_not_fit_stop_the_training_before_it_starts(name, tmp_path):
    log, endless = tmp_path / "log.jsonl", name == "hf_llama"  # of rotary positions
    for bad, message in ((row(9, 24), "the id 24, and the model's vocabulary has the ids 0 to 23"),
                         (row(9, -1), "the id -1"),
                         (row(33), "33 tokens, and the model has 32 positions")):
        if len(bad.ids) == 33 and endless:
            continue
        with pytest.raises(ValueError, match=f"^example 8 has {message}"):
            quiet(build(name), [*examples(8), bad], log=log)
        with pytest.raises(ValueError, match="held-out example 1 has "):
            quiet(build(name), held_out=[row(5), bad], log=log)
    message = "30 tokens and a prompt of 3, and .* 32 positions: at most 29"
    with pytest.raises(ValueError, match=message):
        quiet(minillm.prompts.wrap(build("llama"), length=3), [row(30)], log=log)
    with pytest.raises(ValueError, match="32 positions, and the text needs one, so length is at"):
        minillm.prompts.wrap(build("gpt2"), length=40)
    with pytest.raises(ValueError, match="give prompts the examples unpacked"):
        packed = data.pack([row(5)] * 4, 20)
        quiet(minillm.prompts.wrap(build("gpt2"), length=4), packed, log=log)
    assert not log.exists()
    assert len(quiet(build(name), [row(32)], steps=1)) == 1
    if name == "llama":
        packed = data.pack([row(30)] * 4, 64)  # each document has room
        assert len(quiet(build(name), packed, steps=1)) == 1


def test_lengths_beyond_the_model_are_one_line(run, tmp_path):
    prompts = ("--technique", "prompts")
    for options, message in (
            (("--length", 1024), "example 0 has 1024 tokens, and the model has 512 positions"),
            ((*prompts, "--length", 500), "500 tokens and a prompt of 20, and the model has 512"),
            ((*prompts, "--option", "length=2000"), "512 positions, and the text needs one")):
        said = run("train", "--data", "a.txt", *options, "--log", "log.jsonl",
                   "--out", "b.safetensors", code=1)
        assert message in said
    assert not (tmp_path / "log.jsonl").exists()


# --- a write that fails after the last step ------------------------------------------------------


def last_line(run, capsys, code, *args):
    """The error of a training that began, beneath its bar."""
    args = ["train", "--model", run.model, *FAST, "--steps", 4, *args]
    assert cli.main([str(arg) for arg in args]) == code
    return capsys.readouterr().err.splitlines()[-1]


def failing(monkeypatch, technique, before):
    """Let `before(path)` run when the technique's file is written for the first time."""
    save, calls = minillm.techniques()[technique].save, []

    def first(model, path, name, **options):
        calls.append(path)
        if len(calls) == 1:
            before(path)
        save(model, path, name, **options)

    monkeypatch.setattr(minillm.techniques()[technique], "save", first)


def interrupt(path):
    raise KeyboardInterrupt


@pytest.mark.parametrize("what, code", [("a file", 1), ("Ctrl-C", 130)])
@pytest.mark.parametrize("where", [[], ["--checkpoints", "c"]])
def test_a_failing_write_costs_no_training(what, code, where, run, tmp_path, capsys, monkeypatch):
    def appear(path):
        (tmp_path / path).write_text("mine")

    values = itertools.cycle([2.0, 1.0, 3.0, 3.0])  # another step than the last is the best
    monkeypatch.setattr(train.loop, "held_out_loss", lambda *_: next(values))
    more = ["--eval-data", "a.txt", "--every", 1, "--rate", 0.1]
    learn(run, "lora", *more, "--out", "whole.safetensors")
    failing(monkeypatch, "lora", appear if what == "a file" else interrupt)
    more += [*where, "--log", "log.jsonl", "--out", "a.safetensors"]
    said = last_line(run, capsys, code, *more)
    path = f"{'c' if where else 'a.safetensors.interrupted'}/step-00000004.safetensors"
    assert path in said and "--resume goes on from there" in said and os.path.exists(path)
    assert what == "Ctrl-C" or "a.safetensors exists, and no technique" in said
    (tmp_path / "a.safetensors").unlink(missing_ok=True)
    if not where:
        said = learn(run, "lora", "--out", "a.safetensors", code=1)
        assert "a.safetensors.interrupted holds an interrupted training with this --out: " in said
    learn(run, "lora", *more, "--resume")
    a, b = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "a"))
    assert a == b and not os.path.exists("a.safetensors.interrupted")


def test_a_training_that_the_disk_has_no_room_for_is_called_lost(run, capsys, monkeypatch):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    failing(monkeypatch, "lora",
            lambda path: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1])))
    try:
        said = last_line(run, capsys, 1, "--out", "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "a.safetensors: file too large; the training is lost: " in said
    assert "step-00000004" in said
    assert "--resume" not in said and not os.path.exists("a.safetensors.interrupted")


def test_resume_with_nothing_to_resume_is_an_error(run, tmp_path):
    said = learn(run, "lora", "--out", "a.safetensors", "--resume", code=1)
    assert said == "minillm train: --resume: there is no checkpoint in a.safetensors.interrupted\n"
    learn(run, "lora", "--out", "b.safetensors", "--checkpoints", "a.safetensors.interrupted")
    said = learn(run, "lora", "--out", "a.safetensors", "--checkpoints", "typo", "--resume", code=1)
    assert "no checkpoint in typo; --resume without --checkpoints goes on from a.safe" in said
    assert "a.safetensors.interrupted/step-00000004.safetensors" in said
    assert not {"typo", "a.safetensors"} & set(os.listdir())
