"""Augmentation: EDA against the paper's steps by hand, tokens, thesaurus files, paraphrases."""

import copy
import random

import pytest
import torch

import minillm
from minillm import augment, data
from minillm.augment.words import apply

WORDS = "the big dog ran to a small house".split()
SYNONYMS = {"big": ["large", "huge"], "small": ["little"], "house": ["home"], "the": ["thee"]}


def synonyms(word):
    return SYNONYMS.get(word, [])


RECORDS = [{"prompt": "The big dog ran to a small house. Where did it run?", "completion": " home"},
           {"prompt": "A small house, with a big door.", "completion": " small"}]


# --- EDA against the paper ------------------------------------------------------------------------


def test_replacement_takes_n_words_that_are_no_stop_words():
    for seed in range(50):
        new, count = augment.replace(WORDS, 2, random.Random(seed), synonyms)
        moved = [(a, b) for a, b in zip(WORDS, new) if a != b]
        assert len(new) == len(WORDS) and len(moved) == count == 2
        assert all(b in SYNONYMS[a] for a, b in moved)
        assert "the" in new  # it has a synonym, but is a stop word
    new, count = augment.replace(WORDS, 9, random.Random(0), synonyms)
    assert count == 3  # all that have one


def test_insertion_adds_n_synonyms_of_its_words():
    places = set()
    for seed in range(200):
        new, count = augment.insert(WORDS, 2, random.Random(seed), synonyms)
        left = list(new)
        for word in WORDS:
            left.remove(word)
        assert count == len(left) == 2 and set(left) <= {"large", "huge", "little", "home"}
        rest = iter(new)
        assert all(word in rest for word in WORDS), "the words keep their order"
        places |= {i for i, word in enumerate(new) if word in left}
    assert places == set(range(len(WORDS) + 2)), "any place, both ends too"
    assert augment.insert(["dog"], 1, random.Random(0), synonyms) == (["dog"], 0)


def test_a_swap_exchanges_two_different_places():
    for seed in range(50):
        new, count = augment.swap(WORDS, 1, random.Random(seed))
        differ = [i for i, (a, b) in enumerate(zip(WORDS, new)) if a != b]
        assert sorted(new) == sorted(WORDS) and len(differ) == 2 and count == 1
    assert augment.swap(["dog"], 1, random.Random(0)) == (["dog"], 0)


def test_deletion_takes_each_word_with_probability_p_and_keeps_one():
    gone = [augment.delete(WORDS, 0.2, random.Random(seed))[1] for seed in range(2000)]
    assert abs(sum(gone) / 2000 / len(WORDS) - 0.2) < 0.015  # 4.7 standard errors
    kept = [augment.delete(WORDS, 1.0, random.Random(seed))[0] for seed in range(100)]
    assert all(words.count(None) == len(WORDS) - 1 for words in kept)
    assert len({next(filter(None, words)) for words in kept}) > 4, "which one is random"
    assert augment.delete(["dog"], 1.0, random.Random(0)) == (["dog"], 0)


@pytest.mark.parametrize("length, alpha, n", [(3, 0.1, 1), (20, 0.1, 2), (29, 0.1, 2),
                                              (40, 0.05, 2), (10, 0.5, 5)])
def test_n_is_alpha_times_the_words_and_at_least_one(length, alpha, n):
    text = " ".join(f"word{i}" for i in range(length))
    _, count = apply(augment.replace, text, alpha, random.Random(0), lambda word: [word + "x"])
    assert count == n


def test_what_is_no_word_stays():
    text = "Big (dog), isn't it?\n\n  Small house!"
    new, _ = apply(augment.replace, text, 1.0, random.Random(0), synonyms)
    assert new in ("Large (dog), isn't it?\n\n  Little home!",
                   "Huge (dog), isn't it?\n\n  Little home!")
    for seed in range(30):
        assert apply(augment.swap, text, 0.1, random.Random(seed), None)[0].count("(") == 1
        new, _ = apply(augment.delete, text, 0.5, random.Random(seed), None)
        assert new == new.strip() and [c for c in new if c in "(),?!\n"] == list("(),?\n\n!")
        new, _ = apply(augment.insert, text, 0.3, random.Random(seed), synonyms)
        assert len(new.split()) == 7 and new.endswith("!")


# --- records ------------------------------------------------------------------------------------


def test_eda_gives_the_originals_first_keeps_answers_and_counts():
    before = copy.deepcopy(RECORDS)
    more = augment.eda(RECORDS, SYNONYMS, copies=4, alpha=0.3, seed=1)
    assert more[:2] == RECORDS == before
    assert {r["completion"] for r in more[2:]} <= {" home", " small"}
    assert all(r["prompt"] not in [b["prompt"] for b in before] for r in more[2:])
    report = more.report
    assert (report.before, report.after) == (2, len(more))
    assert sum(report.made.values()) + sum(report.unchanged.values()) == 8
    assert set(report.made) | set(report.unchanged) == {"replace", "insert", "swap", "delete"}
    assert "2 samples -> " in str(report) and "swap: 2 copies" in str(report)


def test_the_seed_decides_alone():
    def run(records=RECORDS, seed=3):
        return augment.eda(records, SYNONYMS, copies=8, alpha=0.3, seed=seed)

    torch.manual_seed(0), random.seed(0)
    one = run()
    torch.manual_seed(5), random.seed(5)
    assert run() == one and run(seed=4) != one
    alone = run(RECORDS[1:])[1:]
    assert [r for r in one[2:] if r["completion"] == " small"] == alone, "not of the other records"


def test_the_fields_that_change():
    only = dict(operations=(augment.swap,), copies=1)
    chat = {"messages": [{"role": "user", "content": "one two three"},
                         {"role": "assistant", "content": "four five six"}]}
    new = augment.eda([chat], **only)[1]["messages"]
    assert new[0] != chat["messages"][0] and new[1] == chat["messages"][1]
    alpaca = {"instruction": "one two", "input": "three four", "output": "five six"}
    assert augment.eda([alpaca], **only)[1] == dict(alpaca, instruction="two one",
                                                    input="four three")
    asked = augment.eda([alpaca], fields="output", **only)[1]
    assert asked == dict(alpaca, output="six five")
    same = augment.eda([{"text": "word"}], **only)
    assert len(same) == 1 and same.report.unchanged["swap"] == 1


@pytest.mark.parametrize("given, error, match", [
    (dict(copies=0), ValueError, "copies=0"), (dict(alpha=0), ValueError, "alpha=0"),
    (dict(thesaurus=None), ValueError, "replace and insert need synonyms"),
    (dict(fields=["promt"]), ValueError, "'promt'; there are: 'prompt'"),
    (dict(operations=("swap",)), ValueError, "give one or more of augment.replace"),
    (dict(thesaurus={}), ValueError, "is empty"),
    (dict(thesaurus={"big": []}), ValueError, "'big' has"),
    (dict(records=["text"]), TypeError, "number 0 is a str"),
    (dict(records=[{"label": "a"}]), ValueError, "record 0: the fields are 'label'"),
])
def test_wrong_calls(given, error, match):
    with pytest.raises(error, match=match):
        augment.eda(**(dict(records=RECORDS, thesaurus=SYNONYMS) | given))


@pytest.mark.parametrize("text, match", [
    ("big, large\nsmall\n", "line 2: 'small' is a word without a synonym"),
    ("big, large\n\nsmall,, little", "line 3: .*empty entry, number 2"),
    ("big, large,\n", "line 1: .*empty entry, number 3"),
    ("big, large\n# x\nBig, huge", "line 3: 'big' is in line 1 already"),
    ("# nothing\n", "has no word"), ("", "is empty"),
])
def test_a_bad_thesaurus_names_its_line(tmp_path, text, match):
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(ValueError, match=match):
        augment.eda(RECORDS, tmp_path / "words.txt")


def test_a_good_thesaurus(tmp_path):
    (tmp_path / "words.txt").write_text("# mine\nBig, large , huge\n\nsmall,little\n")
    assert augment.read(tmp_path / "words.txt") == {"big": ["large", "huge"], "small": ["little"]}


class Words:
    """A tokenizer of one word a token."""

    eos, stops, chat_template = 0, (0,), None
    texts = ["<end>", " cat", " dog", " car", " A", "s", " bus"]
    vocab_size = len(texts)

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)

    def encode(self, text, special=True):
        return [1 + len(text) % 6]


def test_nearest_rows_by_hand():
    model = minillm.Transformer(minillm.Config(7, 8, 1, 2))
    W = torch.zeros(7, 8)
    W[1, :3], W[2, 0], W[3, 2] = torch.tensor([1.0, 0.1, 0.1]), 10.0, 1.0
    W[6, 2:4] = 500.0  # long: a large product with " cat", but a small cosine
    W[4] = W[5] = W[1]  # no words: a capital, no space
    model.embed_tokens.weight.data.copy_(W)
    nearest = augment.Nearest(model, Words(), k=2)
    assert nearest("cat") == ["dog"] and nearest("car") == ["bus"]
    assert nearest("A") == nearest("nothing") == []
    assert augment.Nearest(model, Words(), k=3, least=-1)("cat")[0] == "dog"


def test_a_paraphrase_keeps_the_answer_and_depends_on_its_record_alone():
    torch.manual_seed(0)
    model = minillm.Transformer(minillm.Config(7, 8, 1, 2))
    given = dict(model=model, tokenizer=Words(), copies=2, max_new_tokens=5)
    one = augment.paraphrase(RECORDS, **given)
    torch.manual_seed(9)
    assert augment.paraphrase(RECORDS, **given) == one
    alone = augment.paraphrase(RECORDS[1:], **given)[1:]
    assert [r for r in one[2:] if r["completion"] == " small"] == alone
    assert len(one) > 2 and one.report.made["paraphrase"] == len(one) - 2
    with pytest.raises(TypeError, match="no minillm generate"):
        augment.paraphrase(RECORDS, torch.nn.Linear(2, 2), Words())


# --- tokens -------------------------------------------------------------------------------------

EXAMPLE = data.Example(list(range(1, 41)), [-100] * 30 + list(range(31, 41)))


def test_dropped_tokens_are_not_learnt_ones():
    more = augment.drop([EXAMPLE], 0.5, copies=20)
    assert more[0] is EXAMPLE
    for new in more[1:]:
        assert new.ids[0] == 1 and new.ids[-10:] == new.labels[-10:] == EXAMPLE.ids[30:]
        assert len(new.ids) == len(new.labels) < 40 and new.ids == sorted(new.ids)
    lost = sum(40 - len(new.ids) for new in more[1:])
    assert lost == more.report.units["drop"] and 0.4 < lost / 20 / 29 < 0.6
    whole = data.Example([1, 2, 3], [-100, 2, 3])
    assert len(augment.drop([whole], 0.9)) == 1, "all is learnt: nothing may go"


def test_masked_tokens_keep_their_labels():
    more = augment.mask([EXAMPLE], 99, 0.5, copies=20)
    for new in more[1:]:
        assert new.labels == EXAMPLE.labels and new.ids[0] == 1
        assert all(a in (b, 99) for a, b in zip(new.ids, EXAMPLE.ids))
    hit = sum(new.ids.count(99) for new in more[1:])
    assert hit == more.report.units["mask"] and 0.4 < hit / 20 / 39 < 0.6
    assert augment.mask([EXAMPLE], 99, 0.5, seed=1)[1] != more[1]
    assert augment.mask([data.Example([7, 8], [-100, 8]), EXAMPLE], 99, 0.5)[-1] == more[1]


def test_the_first_token_of_each_packed_document_stays():
    packed = data.pack([data.Example([1, 2, 3, 4], [-100, -100, -100, 4]),
                        data.Example([5, 6, 7], [-100, -100, 7])], 8)
    for change in (augment.drop(packed, 0.9), augment.mask(packed, 99, 0.9)):
        new = change[1]
        assert new.ids[0] == 1 and new.ids[new.documents.index(2)] == 5
        assert len(new.ids) == len(new.labels) == len(new.documents)
