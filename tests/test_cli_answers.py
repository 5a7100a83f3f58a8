"""What `eval` says of records that do not fit, and what `chat` does with messages that do not."""
# flake8: noqa: F811  (fixtures)

import io
import json
import sys

import pytest
from small_model import model, run  # noqa: F401

import minillm
from minillm import data, measure


def no_loss(*_, **__):
    pytest.fail("a loss was measured")


@pytest.fixture
def records(run, tmp_path):
    """Three records, whose second has a prompt that is longer than the model."""
    prompts = ("What?", "so " * 600, "Why?")
    rows = (json.dumps(dict(prompt=prompt, completion=" yes")) + "\n" for prompt in prompts)
    (tmp_path / "qa.jsonl").write_text("".join(rows))
    return "qa.jsonl"


def test_a_prompt_beyond_the_model_is_skipped_or_one_error(run, records, monkeypatch):
    skip = ("eval", "--data", records, "--skip-bad", "--length", 32, "--max-new-tokens", 4)
    said = run(*skip)
    assert "skipped: 1 bad record" in said and "line 2" in said and "n=2" in said
    assert "not answered" not in said
    said = run(*skip[:-4], "--length", 4096, "--max-new-tokens", 4, code=1)
    assert "512 positions" in said
    monkeypatch.setattr(measure, "completions", no_loss)
    assert "qa.jsonl, line 2" in run("eval", "--data", records, "--length", 32, code=1)


@pytest.mark.parametrize("prompt", ["so " * 200, ""])
@pytest.mark.parametrize("name", ["qa.jsonl", "a: b.jsonl"])
def test_a_prompt_that_has_a_loss_and_no_answer(prompt, name, run, tmp_path):
    rows = [dict(prompt=prompt, completion=" yes") for prompt in ("What?", prompt, "Why?")]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    said = run("eval", "--data", name, "--length", 512, "--max-new-tokens", 300, "--skip-bad")
    assert f"skipped: 1 bad record\n  {name}, line 4: " in said
    assert f"not answered: 1 record\n  {name}, line 2: the prompt has" in said
    assert "1 to 212" in said
    assert "3 examples" in said and "n=2" in said


def test_records_that_cannot_be_answered_have_a_loss(run, tmp_path):
    (tmp_path / "qa.jsonl").write_text(json.dumps(dict(prompt="", completion=" yes")) + "\n")
    said = run("eval", "--data", "qa.jsonl")
    assert "loss" in said and "not answered: 1 record" in said and "BLEU" not in said


def test_more_new_tokens_than_positions_are_refused_before_the_loss(run, monkeypatch):
    monkeypatch.setattr(measure, "completions", no_loss)
    said = run("eval", "--data", "chats.jsonl", "--max-new-tokens", 600, code=1)
    assert "--max-new-tokens 600 leaves no room for a prompt: the model has 512 positions" in said


@pytest.mark.parametrize("bad, message", [
    (b"caf\xe9", "not UTF-8 (the byte 0xe9)"), (b"long " * 400, "512 positions")])
def test_a_message_that_does_not_fit_does_not_end_the_chat(bad, message, run, monkeypatch, capsys):
    def talk(*lines):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines) + b"\n")))
        out = run("chat", "--max-new-tokens", 4)
        return out, run.error

    (with_it, said), (without, nothing) = talk(b"hello", bad, b"and?"), talk(b"hello", b"and?")
    assert with_it == without and nothing == ""
    assert said.startswith("minillm chat: ") and said.count("\n") == 1
    assert message in said and "goes on without this message" in said


def test_a_model_without_a_chat_template_ends_the_chat(run):
    bare, tokenizer = minillm.load(run.model)
    tokenizer.chat_template = None
    minillm.save(bare, "bare", tokenizer=tokenizer)
    assert "has no chat template" in run("chat", "--model", "bare", code=1)


def test_another_technique_is_named_before_its_rate(run):
    more = ("train", "--data", "a.txt", "--length", 64, "--steps", 2, "--checkpoints", "c")
    run(*more, "--out", "a.safetensors")
    said = run(*more, "--technique", "prompts", "--resume", "--out", "b.safetensors", code=1)
    assert "the techniques were lora at" in said and "they are prompts at" in said
    assert "lr=" not in said


def test_bad_records_are_found_before_a_model_is_loaded(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"prompt": 1}\n')
    for command in (("train", "--data", "bad.jsonl", "--out", "a.safetensors"),
                    ("train", "--eval-data", "bad.jsonl", "--out", "a.safetensors"),
                    ("eval", "--data", "bad.jsonl")):
        assert "bad.jsonl, line 2" in run(*command, "--model", "nowhere", code=1)


def test_the_preview_does_not_hide_what_the_held_out_data_lost(run, tmp_path):
    rows = [dict(text="The first of all."), dict(text=""), dict(text="The second of all.")]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--preview", 1, "--skip-bad", "--steps", 1, "--out", "a.safetensors")
    run("train", "--data", "chats.jsonl", "--eval-data", "odd.jsonl", *more)
    assert "odd.jsonl: 2 examples" in run.error and "skipped: 1 bad record" in run.error
    out = run("train", "--data", "odd.jsonl", *more)
    assert "skipped: 1 bad record" in out and "odd.jsonl: " not in run.error


@pytest.mark.parametrize("length", [65, pytest.param(64, marks=pytest.mark.slow)])
def test_eval_measures_windows_of_the_length_it_says(length, run):
    said = run("eval", "--task", "language", "--length", length, "--windows", 3)
    model, tokenizer = minillm.load(run.model)
    text = data.task("language", tokenizer, "test").text
    assert said == f"{measure.perplexity(model, tokenizer, text, length, windows=3)!r}\n"
    assert "n=3" in said


def test_train_says_which_fields_it_does_not_read(run, tmp_path):
    (tmp_path / "b.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 4)
    args = ("train", "--data", "b.csv", "--steps", 1, "--out", "a.safetensors")
    run(*args)
    assert "b.csv: 8 examples" in run.error and "not read: 'label' in 8 records" in run.error
    assert ("not read: 'label' in 8 records" in run(*args, "--preview")
            and "not read" not in run.error)
    (tmp_path / "b.csv").write_text("text\n" + "good film\n" * 4)
    run(*args)
    assert "b.csv" not in run.error
