"""The command line, end to end on a model small enough to train in a second."""

import json

import pytest
import torch

import minillm
from minillm import cli, compare, data
from minillm.tokenizer import SentencePiece


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    tokenizer = SentencePiece.train([data.topics()[:40000]], 500)
    torch.manual_seed(0)
    minillm.save(minillm.Transformer(minillm.Config(500, 32, 3, 4, kv_heads=2, ffn=64, positions=512)), path, tokenizer=tokenizer)
    return str(path)


def test_train_then_eval_then_generate_with_what_was_learnt(model, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(data.topics()[:8000])
    out = str(tmp_path / "lora.safetensors")
    args = ["train", "--model", model, "--data", str(text), "--option", "r=4", "--steps", "30", "--length", "64", "--rate", "0.01"]
    kept = ["--checkpoints", str(tmp_path / "c"), "--save-every", "10", "--log", str(tmp_path / "log.jsonl")]
    assert cli.main([*args, *kept, "--out", out]) == 0
    assert "saved" in capsys.readouterr().out and len((tmp_path / "log.jsonl").read_text().splitlines()) == 30
    scores = []
    for adapter in ([], ["--adapter", out]):
        assert cli.main(["eval", "--model", model, *adapter, "--text", str(text), "--length", "64"]) == 0
        scores.append(float(capsys.readouterr().out.split()[1]))
    assert scores[1] < 0.95 * scores[0]
    assert cli.main(["generate", "--model", model, "--adapter", out, "The for", "--max-new-tokens", "8"]) == 0
    streamed = capsys.readouterr().out
    m, tokenizer = minillm.load(model)
    minillm.lora.load(m, out)
    assert streamed.rstrip("\n") == tokenizer.decode(m.generate([tokenizer.encode("The for")], 8)[0].tolist())[len("The for"):].rstrip("\n")
    assert cli.main(["show", "--model", model, "--adapter", out, "--cost"]) == 0
    shown = capsys.readouterr().out
    assert "lora(r=4" in shown and "optimizer" in shown


def test_errors_are_one_line_and_a_code(model, tmp_path, capsys):
    for args, message in [
        (["show", "--model", "nowhere"], "nowhere: no such file"),
        (["eval", "--model", model, "--adapter", model + "/model.safetensors"], "is not a file that a technique"),
        (["train", "--model", model, "--option", "targets=['q_porj']", "--out", "x"], "'q_porj' matches no leaf.*'q_proj'"),
        (["compare", "--model", model, "--techniques", "lroa", "--out", str(tmp_path)], "'lroa' is not one"),
        (["generate", "--model", model, "--chat", "hi"], "no chat template"),
    ]:
        assert cli.main(args) == 1
        captured = capsys.readouterr().err
        assert captured.count("\n") == 1 and captured.startswith(f"minillm {args[0]}: ")
        assert __import__("re").search(message, captured), captured
    with pytest.raises(SystemExit):
        cli.main(["fly"])


def test_compare_writes_the_table(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sizes = ["--steps", "4", "--sweep-steps", "2", "--batch-size", "2", "--windows", "2"]
    assert cli.main(["compare", "--model", model, "--techniques", "none", "lora", "--out", str(tmp_path / "r"), *sizes]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "r" / "table.json").read_text())
    assert [row["technique"] for row in rows] == ["none", "lora"]
    none, lora = rows
    assert none["before"] == none["after"] == lora["before"] and lora["after"]["value"] != lora["before"]["value"]
    assert lora["trainable"] > 0 and lora["rate"] and len(lora["sweep"]) >= 3 and lora["peak_bytes"] > 0
    assert lora["int8_bytes"] < lora["bytes"] and "lora: learning rate" in printed
    assert (tmp_path / "r" / "table.md").read_text().count("|") > 20
    assert (tmp_path / "r" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_moves_on_while_its_edge_is_best(monkeypatch):
    """The loss falls with the rate up to 1, so the search has to leave its first three rates."""
    best_at = 1.0
    monkeypatch.setattr(compare, "fit", lambda name, model, part, tokenizer, settings, lr, steps: lr)
    monkeypatch.setattr(compare, "techniques", lambda: {})
    lr, tried = compare.sweep("lora", None, None, None, dict(sweep_steps=1), lambda lr: abs(torch.tensor(lr / best_at).log()))
    assert len(tried) == 6 and lr == pytest.approx(0.2), "0.002 times the square root of 10, four times over"


@pytest.mark.parametrize("task", ["summary", "package"])
def test_the_other_tasks_are_scored(model, task):
    m, tokenizer = minillm.load(model)
    part = data.task(task, tokenizer, "test", limit=4, length=200)
    score = compare.score(m, tokenizer, part, 64, 2)
    assert 0 <= score <= 1 and score.n == 4
