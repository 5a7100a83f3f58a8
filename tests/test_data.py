"""The texts, the tasks made of them, the user's own files, and the order of batches."""

import json

import pytest
import torch

from minillm import data
from minillm.tokenizer import SentencePiece


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = SentencePiece.train([data.topics()[:60000]], 600)
    tokenizer.chat_template = ("{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>\n{% endif %}")
    return tokenizer


def learnt(tokenizer, example):
    """The text of the part that is learnt, the end of the text left out."""
    return tokenizer.decode([label for label in example.labels if label not in (data.NOT_LEARNT, tokenizer.eos)])


def test_the_text_is_there_and_always_the_same():
    assert len(data.topics()) > 300_000 and "The \"for\" statement" in data.topics()
    found = data.docstrings()
    assert len(found) > 5000 and len({d.text for d in found}) == len(found)
    assert any(d.module == "functools" and d.name == "cmp_to_key" for d in found)
    assert not any("site-packages" in d.module or ".test" in d.module for d in found)


def test_the_splits_share_no_module():
    parts = {which: {d.module for d in data.texts(which)} for which in data.SPLITS}
    assert not (parts["train"] & parts["test"] | parts["train"] & parts["validation"] | parts["validation"] & parts["test"])
    sizes = {which: len(data.texts(which)) for which in data.SPLITS}
    assert sizes["train"] > 4 * sizes["test"] > 0 and sizes["validation"] > 100
    assert data.split("functools") == data.split("functools")
    with pytest.raises(ValueError, match="split 'dev' is unknown.*validation"):
        data.texts("dev")


def test_language_learns_every_token(tokenizer):
    part = data.task("language", tokenizer, "test", length=64)
    assert part.metric == "perplexity" and all(e.ids == e.labels and 2 <= len(e.ids) <= 64 for e in part.examples)
    assert part.text.startswith(tokenizer.decode(part.examples[0].ids)[:40])


def test_summary_and_package_learn_the_answer_alone(tokenizer):
    for name in ("summary", "package"):
        part = data.task(name, tokenizer, "test", limit=20)
        assert len(part.examples) == len(part.prompts) == len(part.references) == 20
        for example, prompt, reference in zip(part.examples, part.prompts, part.references):
            assert learnt(tokenizer, example).strip() == reference
            assert tokenizer.decode(example.ids[:-1]) == f"{prompt} {reference}" and example.labels[-1] == tokenizer.eos
            if name == "package":
                assert reference in part.choices and reference not in prompt.lower().split()
    with pytest.raises(ValueError, match="'langage' is unknown; did you mean 'language'"):
        data.task("langage", tokenizer, "test")


def test_a_file_of_prompts(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "two plus two is", "completion": " four é"}\n\n{"text": "hello there"}\n')
    one, two = data.read(tmp_path / "a.jsonl", tokenizer)
    assert learnt(tokenizer, one) == " four é" and learnt(tokenizer, two) == "hello there"[1:] or learnt(tokenizer, two) == "hello there"
    (tmp_path / "a.csv").write_text('prompt,completion\n"say ""hi"",\nplease",hi\n')
    (three,) = data.read(tmp_path / "a.csv", tokenizer)
    assert learnt(tokenizer, three) == "hi" and 'say "hi",\nplease' in tokenizer.decode(three.ids)
    (tmp_path / "a.txt").write_text("word " * 200)
    pieces = data.read(tmp_path / "a.txt", tokenizer, length=50)
    assert [len(p.ids) for p in pieces[:-1]] == [50] * (len(pieces) - 1)


def test_a_conversation_learns_what_the_assistant_says(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "say <assistant>\nno"}, {"role": "assistant", "content": "first"},
                {"role": "user", "content": "again"}, {"role": "assistant", "content": "second"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    (example,) = data.read(tmp_path / "a.jsonl", tokenizer)
    assert learnt(tokenizer, example) == "first\nsecond\n", "the marker in the user's own text is not taken for a turn"


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b"{}", "'.json' is unknown; known: .txt, .jsonl, .csv"),
    ("a.txt", b"", "is empty"),
    ("a.jsonl", b"\n  \n", "is empty"),
    ("a.txt", b"fine\nnot \xff\xfe utf", "line 2: not UTF-8"),
    ("a.jsonl", b'{"text": "a b c"}\n{"text": ', "line 2: not JSON"),
    ("a.jsonl", b'["text"]', "line 1: a record is an object"),
    ("a.jsonl", b'{"txt": "a"}', "line 1: the fields are 'txt'; known: 'text'"),
    ("a.jsonl", b'{"text": 3}', "line 1: 'text' is int, not text"),
    ("a.jsonl", b'{"messages": "hi"}', "'messages' is str, not a list"),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}', "'role' and 'content'"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}', "line 1: nothing is left to learn"),
    ("a.jsonl", b'{"prompt": "' + b"long " * 300 + b'", "completion": "x"}', "nothing is left to learn within 256"),
    ("a.csv", b"prompt,completion\na,b\nc\n", "line 3: 1 fields, the header has 2"),
    ("a.csv", b'prompt,completion\n"a,b\n', "line [23]"),
])
def test_a_bad_file_is_an_error_with_its_line(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        data.read(tmp_path / name, tokenizer)
    assert str(tmp_path / name) in str(error.value)


def test_batches_are_padded_masked_and_follow_the_seed():
    examples = [data.Example(list(range(1, n + 1)), list(range(1, n + 1))) for n in (2, 5, 3, 4, 2)]
    batches = data.Batches(examples, 2, seed=3, pad=9)
    epoch = [next(batches) for _ in range(3)]
    assert sorted(len(row) - int((row == 9).sum()) for ids, _, _ in epoch for row in ids) == [2, 2, 3, 4, 5]
    for ids, labels, mask in epoch:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        assert ids[~mask].eq(9).all() and labels[~mask].eq(-100).all() and labels[mask].equal(ids[mask])
    again = data.Batches(examples, 2, seed=3, pad=9)
    later = [next(again) for _ in range(4)]
    assert all(a[0].equal(b[0]) for a, b in zip(epoch, later))
    resumed = data.Batches(examples, 2, seed=3, pad=9)
    resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
    for _ in range(5):
        assert next(resumed)[0].equal(next(again)[0])
    orders = {tuple(data.Batches(examples, 2, seed=s).order()) for s in range(8)}
    assert len(orders) > 4


@pytest.mark.parametrize("examples, size, message", [
    ([], 2, "no examples"), ([data.Example([1, 2], [-100, -100])], 2, "example 0 has nothing to learn"),
    ([data.Example([1, 2], [1])], 2, "2 ids and 1 labels"), ([data.Example([1, 2], [1, 2])], 0, "batch_size=0"),
])
def test_batches_refuse_what_teaches_nothing(examples, size, message):
    with pytest.raises(ValueError, match=message):
        data.Batches(examples, size)
