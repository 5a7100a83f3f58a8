"""The texts, the tasks made of them, pieces, packing, the order of batches, the held-out share."""

import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm import data, measure, train
from minillm.data.packing import first_fit
from minillm.model.tokenizer import SentencePiece

at_ease = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePiece.train([data.topics()[:60000]], 600)


def learnt(tokenizer, example):
    """The text of the part that is learnt, the end of the text left out."""
    left_out = (data.NOT_LEARNT, tokenizer.eos)
    return tokenizer.decode([label for label in example.labels if label not in left_out])


def test_the_text_is_there_and_always_the_same():
    assert len(data.topics()) > 300_000 and "The \"for\" statement" in data.topics()
    found = data.docstrings()
    assert len(found) > 5000 and len({d.text for d in found}) == len(found)
    assert any(d.module == "functools" and d.name == "cmp_to_key" for d in found)
    assert not any("site-packages" in d.module or ".test" in d.module for d in found)


def test_the_splits_share_no_module():
    parts = {which: {d.module for d in data.texts(which)} for which in data.SPLITS}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values()))
    sizes = {which: len(data.texts(which)) for which in data.SPLITS}
    assert sizes["train"] > 4 * sizes["test"] > 0 and sizes["validation"] > 100
    assert data.split("functools") == data.split("functools")
    with pytest.raises(ValueError, match="split 'dev' is unknown.*validation"):
        data.texts("dev")


def test_language_learns_every_token(tokenizer):
    part = data.task("language", tokenizer, "test", length=64)
    assert part.metric == "perplexity" and all(2 <= len(e.ids) <= 64 for e in part.examples)
    assert part.text.startswith(tokenizer.decode(part.examples[0].ids)[:40])
    found = [label for e in part.examples for label in e.labels[1:]]
    assert found.count(tokenizer.eos) == len(data.texts("test")) and data.NOT_LEARNT not in found
    start = tokenizer.encode(data.docstrings()[0].text)  # any text's ids, to see the rule by itself
    assert learnt_ids(data.pieces(start, 7)) == start[1:]


def learnt_ids(examples):
    """The labels that the model's loss sees, in order."""
    return [label for e in examples for label in e.labels[1:] if label != data.NOT_LEARNT]


@at_ease
@given(st.integers(0, 200), st.integers(2, 40))
def test_every_token_but_the_first_is_learnt_once_whatever_the_length(n, length):
    ids = list(range(n))
    pieces = data.pieces(ids, length)
    assert learnt_ids(pieces) == ids[1:]
    assert all(2 <= len(e.ids) <= length and len(e.ids) == len(e.labels) for e in pieces)
    assert all(e.labels[0] == data.NOT_LEARNT and e.labels[1:] == e.ids[1:] for e in pieces)


def test_summary_and_package_learn_the_answer_alone(tokenizer):
    for name in ("summary", "package"):
        part = data.task(name, tokenizer, "test", limit=20)
        assert len(part.examples) == len(part.prompts) == len(part.references) == 20
        for example, prompt, reference in zip(part.examples, part.prompts, part.references):
            assert learnt(tokenizer, example).strip() == reference
            assert tokenizer.decode(example.ids[:-1]) == f"{prompt} {reference}"
            assert example.ids[-1] == example.labels[-1] == tokenizer.eos
            if name == "package":
                assert reference in part.choices and reference not in prompt.lower().split()


@pytest.mark.parametrize("name, which, options, message", [
    ("langage", "test", {}, "'langage' is unknown; did you mean 'language'"),
    ("summary", "dev", {}, "split 'dev' is unknown"),
    ("language", "test", dict(length=1), "^length=1: an example has at least 2 tokens"),
    ("language", "test", dict(length=2.5), "^length=2.5: "),
    ("summary", "test", dict(limit=0), "^limit=0: "),
    ("package", "test", dict(limit=-3), "^limit=-3: "),
    ("summary", "test", dict(length=5), "length=5: the task 'summary' has no record"),
])
def test_a_task_that_would_be_empty_is_an_error(tokenizer, name, which, options, message):
    with pytest.raises(ValueError, match=message):
        data.task(name, tokenizer, which, **options)


# --- packing -------------------------------------------------------------------------------------


def documents(example):
    """[(ids, labels)] of the documents of an example, in order."""
    found = {}
    for i, label, document in zip(example.ids, example.labels, example.documents):
        ids, labels = found.setdefault(document, ([], []))
        ids.append(i)
        labels.append(label)
    return list(found.values())


def alone(example):
    return (example.ids, [data.NOT_LEARNT, *example.labels[1:]])


sizes_and_room = st.integers(2, 30).flatmap(
    lambda room: st.tuples(st.lists(st.integers(1, room), max_size=60), st.just(room)))


@at_ease
@given(sizes_and_room)
def test_packing_finds_the_rows_of_first_fit_decreasing(drawn):
    sizes, room = drawn
    rows, naive = [], []
    for size in sorted(sizes, reverse=True):  # the quadratic way
        place = next((k for k, used in enumerate(rows) if used + size <= room), len(rows))
        rows[place:] = [size] if place == len(rows) else [rows[place] + size, *rows[place + 1 :]]
        naive.append(place)
    assert list(first_fit(sorted(sizes, reverse=True), room)) == naive
    examples = [data.Example([k] * size, list(range(size)), cut=k) for k, size in enumerate(sizes)]
    packed = data.pack(examples, room)
    assert [len(e.ids) for e in packed] == rows
    found = sorted(d for e in packed for d in documents(e))
    assert found == sorted(alone(e) for e in examples)
    assert sum(e.cut for e in packed) == sum(e.cut for e in examples)
    assert all(e.documents == sorted(e.documents) and e.documents[0] == 1 for e in packed)


@at_ease
@given(sizes_and_room)
def test_packed_examples_keep_their_documents_when_they_are_packed_again(drawn):
    sizes, room = drawn
    examples = [data.Example([k] * size, list(range(size))) for k, size in enumerate(sizes)]
    again = data.pack(data.pack(examples, room), 2 * room)
    assert sorted(d for e in again for d in documents(e)) == sorted(alone(e) for e in examples)


def test_many_examples_are_packed_without_looking_at_every_row():
    """The quadratic way would look at 100 million rows."""
    draw = random.Random(0)
    sizes = [draw.randint(1, 32) for _ in range(30_000)]
    examples = [data.Example([0] * n, [0] * n) for n in sizes]
    packed = data.pack(examples, 64)
    assert sum(len(e.ids) for e in packed) == sum(sizes)
    assert len(packed) == -(-sum(sizes) // 64)  # no number of rows is smaller


@pytest.mark.parametrize("example, length, message", [
    (data.Example([1, 2, 3], [1, 2, 3]), 2, "example 0 has 3 ids, more than a row's length=2"),
    (data.Example([1, 2], [1, 2]), 1, "^length=1: "),
    (data.Example([], []), 8, "example 0 has no ids"),
    (data.Example([1, 2], [1]), 8, "needs as many labels"),
    (data.Example([1, 2], [1, 2], [1]), 8, "as many document numbers"),
    (data.Example([1, 2], [1, 2], [0, 1]), 8, "document numbers from 1"),
])
def test_what_cannot_be_packed_is_an_error(example, length, message):
    with pytest.raises(ValueError, match=message):
        data.pack([example], length)


# --- batches -------------------------------------------------------------------------------------


def test_batches_are_padded_masked_and_follow_the_seed():
    rows = [list(range(1, n + 1)) for n in (2, 5, 3, 4, 2)]
    examples = [data.Example(row, list(row)) for row in rows]
    batches = data.Batches(examples, 2, seed=3, pad=9)
    epoch = [next(batches) for _ in range(3)]
    sizes = [len(row) - int((row == 9).sum()) for ids, _, _ in epoch for row in ids]
    assert sorted(sizes) == [2, 2, 3, 4, 5]
    for ids, labels, mask in epoch:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        assert ids[~mask].eq(9).all() and labels[~mask].eq(-100).all()
        assert labels[mask].equal(ids[mask])
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
    ([], 2, "no examples"),
    ([data.Example([1, 2], [-100, -100])], 2, "example 0 has nothing to learn"),
    ([data.Example([1, 2], [1])], 2, "2 ids and 1 labels"),
    ([data.Example([1, 2], [1, 2])], 0, "batch_size=0"),
    ([data.Example([1, 2], [1, 2])], 1.5, "batch_size=1.5"),
])
def test_batches_refuse_what_teaches_nothing(examples, size, message):
    with pytest.raises(ValueError, match=message):
        data.Batches(examples, size)


@pytest.mark.parametrize("examples, message", [
    (data.Task("perplexity", [data.Example([1, 2], [1, 2])]), "is Task, not .*give its .examples"),
    (["a text"], "number 0 is 'a text', not an Example; data.read.* data.pieces"),
    ([[1, 2]], "number 0 is list, not an Example; data.read"),
    ("a.jsonl", "is 'a.jsonl', not a list of Examples; data.read"),
    ((x for x in []), r"is generator, not a list of Examples; give list\(...\) of it"),
    (data.Example([1, 2], [1, 2]), "is Example, not a list"),
])
def test_what_is_no_list_of_examples_says_what_would_be(examples, message):
    for call in (lambda: data.Batches(examples, 1), lambda: data.held_out(examples, 0.5),
                 lambda: data.pack(examples, 8), lambda: measure.completions(None, examples),
                 lambda: train.train(None, examples, lr=1, steps=1)):
        with pytest.raises(TypeError, match=f"^examples: .*{message}"):
            call()
    good = [data.Example([1, 2], [1, 2])]
    with pytest.raises(TypeError, match=f"^held_out: .*{message}"):
        train.train(None, good, lr=1, steps=1, held_out=examples)


def test_an_epoch_has_every_example_once_and_len_counts_its_batches():
    examples = [data.Example([n, n], [n, n]) for n in range(7)]
    for size, n in ((1, 7), (2, 4), (3, 3), (7, 1), (50, 1)):
        batches = data.Batches(examples, size)
        assert len(batches) == n
        for epoch in range(3):
            ids = torch.cat([next(batches)[0] for _ in range(n)])
            assert sorted(ids[:, 0].tolist()) == list(range(7)) and batches.epoch == epoch + 1


def test_the_order_of_an_epoch_is_what_it_was_in_earlier_versions():
    """A checkpoint's place in the data is worth nothing in another order."""
    batches = data.Batches([data.Example([1, 2], [1, 2])] * 6, 2, seed=3)
    first = batches.order()
    batches.load_state_dict(dict(epoch=1, position=4))
    assert (first, batches.order()) == ([2, 5, 4, 3, 0, 1], [4, 3, 1, 2, 5, 0])
    for epoch, position in ((0, 6), (-1, 0), (0, -2)):
        with pytest.raises(ValueError, match="is not a place in 6 examples"):
            batches.load_state_dict(dict(epoch=epoch, position=position))


def test_a_fingerprint_tells_every_difference():
    def make(ids=(1, 2, 3), labels=(-100, 2, 3), documents=None):
        return data.Example(list(ids), list(labels), documents and list(documents))

    lists = [[make()], [make(), make()], [make(ids=(1, 2, 4))], [make(labels=(-100, -100, 3))],
             [make(documents=(1, 1, 1))], [make(documents=(1, 2, 2))], [make((1, 2), (1, 2))],
             [make((1, 2), (1, 2)), make()], [make(), make((1, 2), (1, 2))], []]
    marks = [data.fingerprint(examples) for examples in lists]
    assert len(set(marks)) == len(marks) and all(len(mark) == 16 for mark in marks)
    assert marks[0] == data.fingerprint((make(),)) and marks[-1] == "e3b0c44298fc1c14"


@pytest.mark.parametrize("seed", range(5))
def test_a_held_out_share_keeps_duplicates_together_and_moves_nobody(seed):
    numbers = random.Random(seed).choices(range(300), k=200)
    examples = [data.Example([n, n + 1], [-100, n + 1]) for n in numbers]
    train, held = data.held_out(examples, 0.3, seed)
    assert sorted(e.ids for e in train + held) == sorted(e.ids for e in examples)
    assert not {tuple(e.ids) for e in train} & {tuple(e.ids) for e in held}
    more, rest = data.held_out(examples[::-1] + [data.Example([9, 9], [-100, 9])], 0.3, seed)
    assert [e for e in rest[::-1] if e.ids != [9, 9]] == held
    assert [e for e in more[::-1] if e.ids != [9, 9]] == train


def test_a_held_out_share_is_about_as_large_as_asked_and_follows_the_seed():
    examples = [data.Example([n, n], [n, n]) for n in range(2000)]
    for share in (0.1, 0.5):
        assert len(data.held_out(examples, share)[1]) == pytest.approx(2000 * share, rel=0.15)
    assert data.held_out(examples, 0.1, 1)[1] != data.held_out(examples, 0.1, 2)[1]
    for few, share, message in ((examples, 0, "share=0: "), (examples, 1.0, "share=1.0: "),
                                (examples[:1], 0.5, "of 1 examples holds out"), ([], 0.5, "of 0"),
                                ([examples[0]] * 9, 0.5, "neither may be 0")):
        with pytest.raises(ValueError, match=message):
            data.held_out(few, share)


def test_a_token_that_reaches_into_a_turn_is_learnt_and_an_empty_one_at_its_start():
    from minillm.data.example import NOT_LEARNT, only

    spans = {(0, 2): False, (1, 3): True, (2, 2): True, (2, 4): True, (3, 6): True, (5, 7): False}
    labels = only(list(range(6)), list(spans), [(2, 5)])
    assert [label != NOT_LEARNT for label in labels] == list(spans.values())
