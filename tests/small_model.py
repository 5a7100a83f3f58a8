"""A model small enough to train in a second, and `run`, which runs a command on it: fixtures."""

import json
import pathlib

import pytest
import torch

import minillm
from minillm import cli, data
from minillm.model.tokenizer import SentencePiece

CHATML = ("{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
          "{% if add_generation_prompt %}<assistant> {% endif %}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    tokenizer = SentencePiece.train([data.topics()[:40000]], 500)
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = minillm.Config(500, 32, 3, 4, kv_heads=2, ffn=64, positions=512)
    minillm.save(minillm.Transformer(config), path, tokenizer=tokenizer)
    return str(path)


@pytest.fixture
def run(model, capsys, tmp_path, monkeypatch):
    """Run a command on the small model, in an empty directory; returns what it prints.

    code: the exit code that is expected; of a command that fails, the one line of its error.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(data.topics()[:8000])
    chats = [dict(messages=[dict(role="user", content=f"What is {i}?"),
                            dict(role="assistant", content=f"It is {i % 5}.")]) for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))

    def call(*args, code=0):
        args = [str(arg) for arg in args]
        if args[0] not in ("fetch", "compare") and "--model" not in args:
            args[1:1] = ["--model", model]
        try:
            got = cli.main(args)
        except SystemExit as stopped:  # an argument that is wrong by itself
            got = stopped.code
        captured = capsys.readouterr()
        call.error = captured.err
        assert got == code, captured.err
        if code:
            said = captured.err.strip()
            assert said.count("\n") == 0 and said.startswith(f"minillm {args[0]}: "), said
            return captured.err
        return captured.out

    call.model = model
    return call


def logged(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
