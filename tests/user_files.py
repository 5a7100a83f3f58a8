"""Fixtures: files as a user writes them, and tokenizers to read them with."""

import json

import pytest

from minillm import data
from minillm.model.tokenizer import SentencePiece

CHAT = ("{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}")
USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "first"}
AGAIN = {"role": "user", "content": "again"}
LONG = "long " * 300
ALPACA = [{"instruction": "Add.", "input": "2 and 2", "output": "4"},
          {"instruction": "Say hi.", "input": "", "output": "hi"},
          {"instruction": "Say hi.", "output": "hi"},
          {"instruction": "Say hi.", "input": None, "system": "Be kind.", "output": "hi"}]


@pytest.fixture(scope="module")
def bare():
    return SentencePiece.train([data.topics()[:60000]], 600)


@pytest.fixture(scope="module")
def tokenizer(bare):
    return SentencePiece(bare.proto, CHAT)


@pytest.fixture
def write(tmp_path):
    """write(name, what): a file of bytes, text, a list of records (.jsonl), or JSON (.json)."""

    def write(name, what):
        path = tmp_path / name
        if isinstance(what, str):
            what = what.encode()
        if not isinstance(what, bytes):
            rows = [what] if name.endswith(".json") else what
            what = "\n".join(json.dumps(row) for row in rows).encode()
        path.write_bytes(what)
        return path

    return write


def learnt(tokenizer, example):
    """The text of the part that is learnt, the end of the text left out."""
    left_out = (data.NOT_LEARNT, tokenizer.eos)
    return tokenizer.decode([label for label in example.labels if label not in left_out])


def said(tokenizer, example):
    return tokenizer.decode(example.ids)
