"""Errors of the command line speak of its options, and say what is possible."""
# flake8: noqa: F811  (fixtures)

import json
import re
import shutil
import types

import pytest
from small_model import model, run  # noqa: F401
from test_nothing_lost import FAST, learn

import minillm
from minillm import cli, train


@pytest.mark.parametrize("options, message", [
    (["--option", "r=0"], "--option r=0 is not a whole number"),
    (["--option", "r=x"], "--option r='x' is not a whole number"),
    (["--technique", "prompts", "--option", "length=0"], ": --option length=0"),
    (["--steps", 3, "--every", 1, "--eval-share", "0.0001"], "--eval-share 0.0001 of"),
])
def test_an_error_speaks_of_options(options, message, run):
    assert message in run("train", "--data", "a.txt", "--length", 64, *options, "--out",
                          "x.safetensors", code=1)


def test_settings_of_a_checkpoint_are_options_too(run):
    args = ("--out", "a.safetensors", "--checkpoints", "c")
    learn(run, "lora", *args, steps=4)
    said = learn(run, "lora", "--checkpoints", "c", "--out", "b.safetensors", "--resume", steps=8,
                 code=1)
    assert ("--steps 4 then, 8 now" in said and "to train longer or shorter, begin a new training" in said
            and "--adapter FILE" in said)
    said = run("train", *FAST, "--steps", 4, "--rate", 0.01, "--checkpoints", "c", "--out",
               "b.safetensors", "--resume", code=1)
    assert "--rate 0.02 then, 0.01 now" in said and "to train longer" not in said


@pytest.mark.parametrize("technique", ["prune", "wanda"])
def test_a_pattern_has_a_name(technique, run):
    how = ("--technique", technique, "--out", "x.safetensors", "--option")
    said = run("train", *FAST, *how, "pattern=rows", code=1)
    assert "--option pattern='rows' is unknown; known: 'row'" in said
    run("train", *FAST, *how, "pattern=2:4", "--steps", 1)
    told = json.loads(minillm.registry.store.read("x.safetensors")[1]["sites"])
    assert {config["group"] for config in told.values()} == {"2:4"}


def test_a_name_is_a_text(run):
    run("train", *FAST, "--option", "name=5", "--steps", 1, "--out", "x.safetensors")
    assert minillm.registry.store.holds("x.safetensors") == ("lora", "5")
    said = run("train", *FAST, "--option", "name=sql,chat", "--out", "y.safetensors", code=1)
    assert "--option name='sql,chat': a name has letters" in said


def test_a_long_warmup_is_found_before_the_model(run, monkeypatch):
    monkeypatch.setattr(minillm.checkpoints, "load", lambda *_,
                        **__: pytest.fail("a model was loaded"))
    said = run("train", "--warmup", 5, "--steps", 3, "--out", "x.safetensors", code=2)
    assert "--warmup 5 is more than the 3 steps" in said
    assert "--warmup 101 is more than the 100" in run("train", "--warmup", 101, "--out",
                                                      "x.safetensors", code=2)


@pytest.mark.parametrize("command", [
    ["eval", "--data", "no.jsonl"], ["eval", "--text", "no.jsonl"],
    ["train", "--data", "no.jsonl", "--out", "x.safetensors"]])
def test_a_missing_file_is_named_first(command, run):
    assert f"minillm {command[0]}: no.jsonl: no such file" in run(*command, code=1)


def test_a_message_that_is_too_long_names_the_option(run, monkeypatch):
    lines = iter(["hello " * 400, ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    run("chat", "--max-new-tokens", 4)
    assert "tokens and --max-new-tokens 4 are together beyond" in run.error


def test_a_method_that_calibrates_is_called_by_its_name(run):
    run("train", *FAST, "--technique", "freeze", "--option", "last=1", "--steps", 1, "--out",
        "f.safetensors")
    said = run("train", *FAST, "--technique", "gptq", "--adapter", "f.safetensors",
               "--option", "progress=false", "--out", "b.safetensors", code=1)
    assert "--technique gptq: " in said and "parameters would learn" in said


def test_the_list_of_defaults_is_as_python_has_it(run):
    said = run("train", "--option", "foo=1", "--out", "x.safetensors", code=1)
    assert "defaults: targets=None" in said and "alpha=16.0" in said


@pytest.mark.parametrize("command", [["chat"], ["generate", "--chat", "hi"],
                                     ["train", "--data", "chats.jsonl", "--out", "x.safetensors"]])
def test_without_a_chat_template_it_says_what_is_possible(command, run, tmp_path):
    shutil.copytree(run.model, tmp_path / "plain")
    config = tmp_path / "plain" / "tokenizer_config.json"
    told = json.loads(config.read_text())
    del told["chat_template"]
    config.write_text(json.dumps(told))
    said = run(command[0], "--model", "plain", *command[1:], code=1)
    assert ("no chat template" in said and "minillm generate" in said
            and "chat_template.jinja" in said)


@pytest.mark.parametrize("where", ["summary", "picture"])
def test_ctrl_c_after_the_last_write_says_what_is_saved(where, run, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, where, interrupt)
    monkeypatch.setattr(minillm.cli.training.train, where, interrupt)
    args = ["train", "--model", run.model, *FAST, "--steps", 2, "--out", "a.safetensors",
            "--picture", "a.png"]
    assert cli.main([str(arg) for arg in args]) == 130
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "minillm train: interrupted; saved a.safetensors"
    )


def test_a_length_beyond_the_positions_is_repeated(run, tmp_path):
    (tmp_path / "long.txt").write_text("one line and then another. " * 200)
    said = run("eval", "--text", "long.txt", "--length", 9999, code=1)
    assert re.search(r"--length 9999: a sequence of \d+ tokens is beyond this model's \d+ ", said)


@pytest.mark.parametrize("command", [["eval"], ["train", "--out", "x.safetensors"]])
def test_a_larger_length_is_advised_where_it_helps(command, run, tmp_path):
    rows = [dict(prompt="so " * n, completion=" yes") for n in (600, 20)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for length, said in ((32, "a larger --length keeps it"),
                         (512, "and the model has no more than 512 positions")):
        assert said in run(*command, "--data", "qa.jsonl", "--length", length, code=1)
    (tmp_path / "qa.jsonl").write_text(json.dumps(dict(prompt="a", completion=" yes" * 90)))
    printed = run(*command, "--data", "qa.jsonl", "--length", 32,
                  *["--steps", 1] * (command[0] == "train"))
    assert "a larger --length keeps " in printed + run.error
    if command[0] == "train":
        shown = run("train", "--data", "qa.jsonl", "--length", 32, "--preview", 1)
        assert "a larger --length keeps " in shown and "length=" not in shown


@pytest.mark.parametrize("given, task", [(None, "language"), ("package", "package")])
def test_without_data_a_task_is_learnt(given, task, monkeypatch):
    from minillm.cli import training

    asked = []
    monkeypatch.setattr(training.data, "task", lambda name, tokenizer, split, length: (
        asked.append((name, split, length)) or types.SimpleNamespace(examples=[1, 2])))
    args = types.SimpleNamespace(data=None, task=given, length=32, eval_data=None, eval_share=None,
                                 pack=False)
    assert training.read(args, None, None) == ([1, 2], None)
    assert asked == [(task, "train", 32)]
