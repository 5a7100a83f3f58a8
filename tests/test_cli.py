"""The command line, end to end on a model small enough to train in a second."""
# flake8: noqa: F811  (fixtures)

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from models import TOKENS
from small_model import logged, model, run  # noqa: F401

import minillm
from minillm import cli, data
from minillm.model.tokenizer import SentencePiece

TRAIN = ("train", "--data", "a.txt", "--length", 64, "--option", "r=4", "--rate", 0.01)


def test_train_then_eval_then_generate_with_what_was_learnt(run, model, tmp_path):
    said = run(*TRAIN, "--steps", 30, "--log", "log.jsonl", "--picture", "loss.png", "--out",
               "lora.safetensors")
    assert "saved lora.safetensors" in said and "over the first 3 of 30 steps" in said
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 30
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    scores = [float(run("eval", *adapter, "--text", "a.txt", "--length", 64).split()[1])
              for adapter in ([], ["--adapter", "lora.safetensors"])]
    assert scores[1] < 0.95 * scores[0]
    assert "n=3" in run("eval", "--text", "a.txt", "--length", 64, "--windows", 3)
    streamed = run("generate", "--adapter", "lora.safetensors", "The for", "--max-new-tokens", 8)
    m, tokenizer = minillm.load(model)
    minillm.lora.load(m, "lora.safetensors")
    whole = tokenizer.decode(m.generate([tokenizer.encode("The for")], 8)[0].tolist())
    assert streamed.rstrip("\n") == whole[len("The for"):].rstrip("\n")
    shown = run("show", "--adapter", "lora.safetensors", "--cost")
    assert "lora(r=4" in shown and "optimizer" in shown


@pytest.mark.parametrize("technique", ["full", *TOKENS, *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(minillm.registry.METHODS.keys() - minillm.techniques().keys()))])
def test_what_each_technique_learns_is_saved(technique, run, model):
    """train, then eval of the file in another load: the loss is that of the trained model."""
    more = {"sparse": ["--option", "anyway=true"], "freeze": ["--option", "last=1"],
            "nf4": ["--option", "group=32"], "fp4": ["--option", "group=32"],
            "loftq": ["--option", "into=quant"], "bitfit": ["--option", "targets=.*norm"]}
    more = more.get(technique, [])
    rate = {"bitfit": 0.2, "norms": 0.2, "vera": 0.2, "ia3": 0.6}.get(technique, 0.02)
    out = "out" if technique == "full" else "out.safetensors"
    run("train", "--data", "a.txt", "--length", 64, "--technique", technique, *more, "--steps", 20,
        "--rate", rate, "--out", out)
    tuned = ["--model", "out"] if technique == "full" else ["--adapter", "out.safetensors"]
    before, after = (float(run("eval", *which, "--text", "a.txt", "--length", 64).split()[1])
                     for which in ([], tuned))
    assert after < 0.99 * before


def test_an_adapter_goes_on_learning(run):
    run(*TRAIN, "--steps", 10, "--out", "one.safetensors")
    first = minillm.registry.store.read("one.safetensors")[0]
    more = ["train", "--data", "a.txt", "--length", 64, "--adapter", "one.safetensors", "--steps",
            3, "--rate", 0.01]
    assert "keeps its own settings" in run(*more, "--option", "r=2", "--out", "two.safetensors",
                                         code=1)
    run(*more, "--out", "two.safetensors")
    second, told = minillm.registry.store.read("two.safetensors")
    assert (second.keys() == first.keys()
            and json.loads(told["sites"])["layers.0.self_attn.q_proj"]["r"] == 4)
    moved = [(second[key] - t).abs().max().item() for key, t in first.items()]
    assert 0 < max(moved) < 0.2, "on from where it was, not anew"


def test_two_files_of_one_name_are_refused(run):
    for name in ("one", "two"):
        run(*TRAIN, "--steps", 1, "--out", f"{name}.safetensors")
    said = run("eval", "--adapter", "one.safetensors", "--adapter", "two.safetensors", "--text",
               "a.txt", code=1)
    assert (
        "one.safetensors and two.safetensors both hold 'lora', and a model can have each name once"
        in said
    )
    assert "minillm train --option name=NAME gives an adapter another name" in said


def test_adapters_with_names(run):
    """One more on top of the first, evaluated and exported together; which one learns on is
    asked where two could."""
    model = ["--data", "a.txt", "--length", 64, "--steps", 3, "--rate", 0.01]
    run("train", *model, "--option", "r=2", "--option", "name=sql", "--out", "sql.safetensors")
    run("train", *model, "--adapter", "sql.safetensors", "--option", "name=chat", "--option", "r=2",
        "--out", "chat.safetensors")
    both = ["--adapter", "sql.safetensors", "--adapter", "chat.safetensors"]
    run("eval", *both, "--text", "a.txt", "--length", 64)
    assert "made over sql" in run("eval", "--adapter", "chat.safetensors", "--text", "a.txt",
                                  "--length", 64, code=1)
    said = run("train", *model, *both, "--out", "more.safetensors", code=1)
    assert "--adapter loads 'sql', 'chat' of lora: --option name=sql" in said
    before = minillm.registry.store.read("chat.safetensors")[0]
    run("train", *model, *both, "--option", "name=chat", "--out", "more.safetensors")
    after, fields = minillm.registry.store.read("more.safetensors")
    assert fields["name"] == "chat" and after.keys() == before.keys()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    run("export", *both, "--out", "merged")
    assert "wrote merged" in run("export", *both, "--out", "merged")


def test_an_adapter_of_another_model_is_refused_by_name(run, tmp_path):
    run(*TRAIN, "--steps", 1, "--out", "one.safetensors")
    torch.manual_seed(9)
    config = minillm.Config(500, 32, 3, 4, kv_heads=2, ffn=64, positions=512)
    tokenizer = SentencePiece.train([data.topics()[:40000]], 500)
    minillm.save(minillm.Transformer(config), tmp_path / "other", tokenizer=tokenizer)
    said = run("eval", "--model", "other", "--adapter", "one.safetensors", "--text", "a.txt",
               code=1)
    assert ("one.safetensors belongs to another model" in said and "'other'" in said
            and "--any-base" in said)
    run("eval", "--model", "other", "--adapter", "one.safetensors", "--any-base", "--text", "a.txt",
        "--length", 64)


def test_held_out_data_stops_the_training_and_the_best_is_saved(run):
    said = run(*TRAIN, "--eval-share", 0.3, "--every", 2, "--patience", 2, "--steps", 400, "--rate",
               0.3, "--out", "a.safetensors",
               "--log", "log.jsonl")
    steps = logged("log.jsonl")
    assert (len(steps) < 400 and "best held-out loss" in said
            and steps[-1]["best"]["step"] < steps[-1]["step"])
    assert said.splitlines()[-2:] == [
        f"stopped by --patience 2 after {len(steps)} steps",
        f"saved a.safetensors, as the model was after step {steps[-1]['best']['step'] + 1}"]
    said = run(*TRAIN, "--eval-share", 0.3, "--every", 2, "--patience", 2, "--steps", 4, "--out",
               "b.safetensors")
    assert ("stopped" not in said
            and said.endswith("saved b.safetensors, as the model was after step 4\n"))


def test_the_preview_trains_nothing_without_out(run, tmp_path):
    before = sorted(os.listdir(tmp_path))
    shown = run("train", "--data", "chats.jsonl", "--preview", 2)
    assert ("example 2" in shown and "example 3" not in shown and "[[It is 0." in shown
            and "20 examples" in shown)
    assert sorted(os.listdir(tmp_path)) == before
    assert "saved" in run(*TRAIN, "--preview", 1, "--steps", 1, "--out", "x.safetensors")


@pytest.mark.parametrize("args, message", [
    (["show", "--model", "nowhere"], "nowhere: no such file"),
    (["eval", "--adapter", "a.txt"], "a.txt is not a whole safetensors file"),
    (["train", "--option", "targets=['q_porj']", "--out", "x.safetensors"],
     "'q_porj' matches no leaf.*'q_proj'"),
    (["train", "--option", "rank_stabilized=maybe", "--out", "x.safetensors"],
     "rank_stabilized='maybe' is neither true nor false"),
    (["train", "--option", "targets=5", "--out", "x.safetensors"],
     "targets=5 is neither a regular expression"),
    (["train", "--out", "a.txt/x.safetensors"], "a.txt is not a directory"),
    (["train", "--option", "foo=1", "--out", "x.safetensors"],
     "lora has no option 'foo'.*alpha=16.0"),
    (["train", "--option", "r=abc", "--out", "x.safetensors"], "r='abc' is not a whole number"),
    (["train", "--option", "r=2.5", "--out", "x.safetensors"], "r='2.5' is not a whole number"),
    (["train", "--data", "nowhere.jsonl", "--out", "x.safetensors"], "nowhere.jsonl"),
    (["train", "--data", "a.md", "--out", "x.safetensors"], "'.md'"),
    (["train", "--out", "a.txt"], "a.txt exists, and no technique of minillm wrote it; --force"),
    (["train", "--out", "."], "is a directory"),
    (["train", "--technique", "full", "--out", "a.txt"], "a.txt"),
    (["train", "--picture", "x.doc", "--out", "x.safetensors"], "'x.doc': a picture ends in"),
    (["train", "--log", "a.txt", "--out", "x.safetensors"], "'a.txt' is a file, but not the log"),
    (["train", "--device", "cuda:99", "--out", "x.safetensors"],
     "--device cuda:99 is not possible here; possible: cpu"),
    (["train", "--device", "toaster", "--out", "x.safetensors"],
     "--device toaster is not possible here; possible: cpu"),
    (["compare", "--techniques", "lroa", "--out", "r"], "'lroa' is not one.*did you mean 'lora'"),
    (["generate", "--top-p", "0.9", "hi"], "--top-p 0.9 has no effect at --temperature 0,"),
    (["generate", "--system", "x", "hi"], "--system.*--chat"),
    (["export", "--out", "."], "current directory"),
    (["export", "--out", "a.txt"], "a.txt"),
    (["show", "--device", "meta"], "--device meta is not possible here"),
    (["train", "--technique", "adapters", "--option", "width=4", "--out", "x.safetensors"],
     "width=4: the output that this adapter changes has the width 32"),
    (["train", "--technique", "sparse", "--out", "x.safetensors"], "--option anyway=true"),
    (["train", "--data", "a.txt", "--eval-share", "0.0001", "--length", "512",
      "--out", "x.safetensors"],
     "^minillm train: --eval-share 0.0001 of .* examples holds out 0"),
    (["export", "--type", "q8_0", "--out", "d"], "q8_0"),
])
def test_errors_are_one_line_and_nothing_is_touched(args, message, run, tmp_path):
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert re.search(message, said := run(*args, code=1)), said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("args, message", [
    (["fly"], "'fly'"),
    (["train", "--stpes", "5"], "'--stpes' is not known; did you mean --steps"),
    (["train", "--rate", "0"], "--rate: '0' is not a number above 0"),
    (["train", "--rate", "-1"], "--rate: '-1' is not a number above 0"),
    (["train", "--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
    (["train", "--steps", "1", "--epochs", "1", "--out", "x.safetensors"],
     "--steps and --epochs: give one of them"),
    (["train", "--length", "1"], "--length: '1'"),
    (["train", "--warmup", "2.5"], "--warmup: '2.5' is not"),
    (["train", "--resume", "--preview"], "--resume needs --out PATH or --checkpoints DIR"),
    (["train", "--keep", "3", "--out", "x.safetensors"], "--keep need --checkpoints"),
    (["train", "--skip-bad", "--out", "x.safetensors"], "--skip-bad needs --data"),
    (["train", "--patience", "2", "--out", "x.safetensors"], "--patience.*need held-out data"),
    (["train", "--option", "r", "--out", "x.safetensors"], "--option 'r' is not KEY=VALUE"),
    (["train", "--technique", "full", "--option", "r=2", "--out", "x.safetensors"],
     "full has no options"),
    (["train"], "--out is missing"),
    (["eval", "--windows", "-1"], "--windows: '-1'"),
    (["generate", "--temperature", "-1", "hi"], "--temperature: '-1'"),
    (["generate", "--top-p", "0", "hi"], "--top-p: '0'"),
    (["generate", "--top-k", "-1", "hi"], "--top-k: '-1'"),
    (["generate", "--min-p", "2", "hi"], "--min-p: '2'"),
    (["eval", "--data", "c.jsonl", "--text", "a.txt"], "--text and --data: give one of them"),
    (["eval", "--text", "a.txt", "--task", "language"], "--text and --task: give one of them"),
    (["eval", "--data", "c.jsonl", "--windows", "2"], "--windows is for running text"),
    (["eval", "--task", "package", "--windows", "2"], "--windows is for running text"),
    (["eval", "--text", "a.txt", "--skip-bad"], "--skip-bad is for records"),
    (["eval", "--data", "a.txt", "--examples", "0"], "--examples is for records"),
    (["eval", "--task", "summary", "--max-new-tokens", "5"], "--max-new-tokens is for records"),
    (["train", "--data", "c.jsonl", "--task", "summary", "--out", "x"],
     "--task and --data: give one of them"),
    (["compare", "--data", "c.jsonl", "--task", "summary"], "--task and --data: give one of them"),
    (["train", "--option", "r=2", "--option", "r=4", "--out", "x.safetensors"],
     "--option r=2 and --option r=4: give one of them"),
    (["train", "--preview", "--log", "x.jsonl"], "--log needs --out PATH"),
    (["train", "--seed", str(2**63), "--out", "x"],
     f"--seed: '{2**63}' is not a whole number from 0 to"),
    (["compare", "--seed", str(2**64)], "--seed: '.*' is not a whole number from 0 to"),
    (["generate", "--seed", "3", "hi"], "--seed 3 has no effect at --temperature 0"),
    (["chat", "--seed", "0"], "--seed 0 has no effect at --temperature 0"),
    (["show", "--any-base"], "--any-base is for --adapter"),
    (["export", "--type", "q4", "--out", "x"], "'q4'"),
])
def test_wrong_arguments_are_one_line_before_any_work(args, message, capsys, monkeypatch):
    monkeypatch.setattr(minillm.checkpoints, "load", lambda *_,
                        **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and re.search(message, said), said


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert re.fullmatch(r"minillm \d[\d.]*, torch \S+, Python \S+\n", capsys.readouterr().out)


def test_eval_of_the_users_own_records(run):
    said = run("eval", "--data", "chats.jsonl", "--max-new-tokens", 4, "--examples", 2)
    for name in ("20 examples", "loss", "perplexity", "exact match", "BLEU", "ROUGE-L", "It is 1."):
        assert name in said
    assert "It is 2." not in said


def test_chat_remembers_what_was_said(run, model, monkeypatch):
    lines = iter(["hello", "and then?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    said = run("chat", "--system", "Be brief.", "--max-new-tokens", 6).splitlines()
    m, tokenizer = minillm.load(model)
    messages, answers = [dict(role="system", content="Be brief.")], []
    for line in ("hello", "and then?"):
        messages.append(dict(role="user", content=line))
        _, ids, _ = tokenizer.chat_spans(messages, generate=True)
        new = m.generate([ids], 6, stop=tokenizer.stops)[0].tolist()[len(ids):]
        answers.append(tokenizer.decode([i for i in new if i not in tokenizer.stops]))
        messages.append(dict(role="assistant", content=answers[-1]))
    assert "\n".join(said) == "\n".join(answers).rstrip("\n")


def test_export_merges_what_can_be_merged_and_refuses_the_rest(run, tmp_path):
    pytest.importorskip("gguf")
    for technique, more in (("lora", ["--option", "r=2"]), ("quant", []),
                            ("freeze", ["--option", "last=1"]), ("prompts", []), ("ia3", []),
                            ("parallel", ["--option", "size=2"])):
        run("train", "--data", "a.txt", "--length", 64, "--technique", technique, *more, "--steps",
            2, "--out", f"{technique}.safetensors")
    for technique in ("lora", "quant", "freeze", "ia3"):
        run("export", "--adapter", f"{technique}.safetensors", "--out", technique)
        continued = [
            run("generate", *which, "The", "--max-new-tokens", 8)
            for which in (["--adapter", f"{technique}.safetensors"], ["--model", technique])
        ]
        assert continued[0] == continued[1], technique
    for technique in ("prompts", "parallel"):
        assert f"{technique}.safetensors holds {technique}, which does not change a weight" in run(
            "export", "--adapter", f"{technique}.safetensors", "--out", "no", code=1)
    assert not (tmp_path / "no").exists()
    run("export", "--out", "m.GGUF")
    assert "m.GGUF exists" in run("export", "--out", "m.GGUF", code=1)
    run("export", "--out", "m.GGUF", "--force")
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    assert "notes.txt" in run("export", "--out", "lora", code=1)
    run("export", "--out", "lora", "--force")
    assert (tmp_path / "lora" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("where", [["--checkpoints", "c"],
                                   pytest.param([], marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_says_how_to_go_on(run, model, tmp_path, where):
    args = ["--data", "a.txt", "--length", "64", "--option", "r=4", "--steps", "60", *where,
            "--log", "log.jsonl",
            "--out", "lora.safetensors"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minillm", "train", "--model", model, *args],
        cwd=tmp_path,
        text=True,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(minillm.__file__))},
    )
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text().count(
        "\n"
    ):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert (process.returncode == 130 and "--resume goes on from there" in said
            and "Traceback" not in said)
    assert not (tmp_path / "lora.safetensors").exists()
    assert "--resume" in run("train", *args, code=1), "a fresh run there is refused"
    run("train", *args, "--resume")
    assert [record["step"] for record in logged(tmp_path / "log.jsonl")] == list(range(60))
    assert not (tmp_path / "lora.safetensors.interrupted").exists()
    run("train", *args[:8], "--out", "whole.safetensors")
    whole, resumed = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "lora"))
    assert whole == resumed
    assert cli.main(["train", "--model", model, *args[:-2], "--rate", "1e9", "--out",
                     "no.safetensors"]) == 1
    assert not list(tmp_path.glob("no.safetensors*")), "a training that fails leaves nothing"


@pytest.mark.slow
def test_compare_writes_the_table(run, model, tmp_path):
    pytest.importorskip("matplotlib")
    sizes = ["--data", "chats.jsonl", "--steps", 2, "--seeds", 1, "--batch-size", 2]
    said = run("compare", "--model", model, "--techniques", "none", "lora", "--out", "r", *sizes)
    told = json.loads((tmp_path / "r" / "table.json").read_text())
    assert ([row["technique"] for row in told["rows"]] == ["none", "lora"]
            and "lora: learning rate" in said)
    assert (tmp_path / "r" / "table.md").read_text().count("|") > 20
    assert (tmp_path / "r" / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command",
                         [("generate", "x"), ("generate", "--chat", "x"), ("chat",),
                          ("eval", "--task", "language"),
                                     ("train", "--data", "a.txt", "--out", "x.safetensors")])
def test_a_model_without_a_tokenizer_is_one_line(run, tmp_path, command):
    minillm.save(minillm.Transformer(minillm.Config(500, 16, 1, 2)), tmp_path / "bare")
    said = run(command[0], "--model", "bare", *command[1:], code=1)
    assert ("bare has no tokenizer (tokenizer.json or tokenizer.model), which" in said
            and command[0] in said)


def test_chat_takes_a_template_that_joins_texts(run, model, tmp_path, monkeypatch):
    """Such a template fails on a message without content: the check before the first line
    has to give one."""
    shutil.copytree(model, tmp_path / "joins")
    (tmp_path / "joins" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}")
    lines = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    run("chat", "--model", "joins", "--max-new-tokens", 2)


def test_every_option_reaches_the_training(run, monkeypatch):
    """train.train gets what each option says."""
    seen, train = {}, minillm.train.train
    monkeypatch.setattr(minillm.train, "train",
                        lambda *args, **told: seen.update(told) or train(*args, **told))
    given = dict(steps=7, rate=0.02, batch_size=3, accumulate=2, schedule="linear", warmup=2,
                 weight_decay=0.3, clip=0.5, seed=4, every=5, patience=6, save_every=3, keep=1,
                 checkpoints="states", log="log.jsonl")
    options = [text for name, value in given.items()
               for text in (f"--{name.replace('_', '-')}", value)]
    run("train", "--data", "a.txt", "--length", 64, "--eval-share", 0.5, "--out", "x.safetensors",
        *options)
    given["lr"] = given.pop("rate")
    assert {name: str(seen[name]) for name in given} == {n: str(v) for n, v in given.items()}
    assert seen["epochs"] is None and seen["resume"] is False and seen["held_out"]
