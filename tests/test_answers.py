"""The metrics of answers against hand-worked cases and the libraries that define them."""

import pytest
import torch
from models import build
from test_evaluate import Letters
from torch import nn

import minillm
from minillm import measure


def test_rouge_knows_other_scripts_and_is_the_library_s_on_english():
    from rouge_score.tokenizers import DefaultTokenizer

    english = "It's the 1st value_error, e.g. in sys.path (see RFC-2822); state-of-the-art!\n\tOK"
    assert measure.words(english) == DefaultTokenizer().tokenize(english)
    assert measure.words("Привет, мир! Ça va? 東京へ行く v2 हिन्दी") == [
        "привет",
        "мир",
        "ça",
        "va",
        *"東京へ行く",
        "v2",
        "हिन्दी",
    ]
    for text in ("кошка сидит на окне", "東京へ行く", "η γάτα"):
        assert measure.rouge([text], [text]) == 1
    assert measure.rouge(["кошка спит"], ["кошка сидит"], "rouge1") == 0.5


def test_token_f1_is_that_of_squad_by_hand():
    assert measure.token_f1(["The cat, a black one"], ["cat black"]) == pytest.approx(
        2 * 2 / (3 + 2)
    )
    assert measure.token_f1(["", "x", "the"], ["", "y", "a"]) == pytest.approx(2 / 3)
    assert measure.token_f1(["東京都"], ["東京"]) == pytest.approx(2 * 2 / 5)


class Speaker(nn.Module):
    """A model that continues each prompt with fixed letters."""

    class config:
        positions = 32

    def __init__(self, lines):
        super().__init__()
        self.lines, self.sizes = lines, []

    def generate(self, rows, new, stop=(), pad=None):
        self.sizes.append(len(rows))
        made = [Letters().encode(self.lines.pop(0))[:new] for _ in rows]
        t = max(map(len, rows))
        return torch.tensor(
            [[0] * t + row + [0] * (max(map(len, made)) - len(row)) for row in made]
        )


class Lines(Letters):
    def decode(self, ids):
        return super().decode(ids).replace("z", "\n")


def test_answers_are_generated_and_scored_beside_their_references():
    model = Speaker(["abczde", "x", "abc"])
    found = measure.answers(
        model, Lines(), ["q", "qq", "r"], ["abc", "y", "abc"], batch=2, max_new_tokens=8
    )
    assert model.sizes == [2, 1] and found.texts == ["abc\nde", "x", "abc"]
    assert found.scores["exact match"] == pytest.approx(1 / 3) and found.scores[
        "F1 (tokens)"
    ] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert {"BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"} < set(found.scores)
    assert found.rows(2) == [
        dict(prompt="q", reference="abc", answer="abc de"),
        dict(prompt="qq", reference="y", answer="x"),
    ]
    assert "exact match    0.3333  no interval" in found.summary()
    line = measure.generate_text(
        Speaker(["abczde"]), Lines(), ["q"], max_new_tokens=8, first_line=True
    )
    assert line == ["abc"]
    for prompts, message in (
        ([""], "prompt 1 of 1 has 0 tokens"),
        (["a", "b" * 30], "prompt 2 of 2 has 30 tokens: it may have 1 to 28"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.generate_text(Speaker([]), Lines(), prompts, max_new_tokens=4)


def test_answers_that_repeat_are_classes_too():
    found = measure.measures(["a", "b", "b", "a "], ["a", "b", "a", "a"])
    assert found["exact match"] == 0.75 and found["F1 (macro)"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_accuracy_and_f1_by_hand():
    references, predictions = list("aaabbc"), list("aabbca")
    # a: TP 2, predicted 3, true 3; b: TP 1, predicted 2, true 2; c: TP 0, predicted 1, true 1
    assert measure.accuracy(predictions, references) == 3 / 6
    assert measure.f1(predictions, references, "macro") == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert measure.f1(predictions, references, "micro") == pytest.approx(2 * 3 / (6 + 6))
    assert measure.f1(["d", "a"], ["a", "a"]) == pytest.approx((2 / 3 + 0) / 2)


def test_bleu_and_rouge_are_those_of_their_libraries():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses = [
        "the cat sat on the mat",
        "a dog runs in the park today",
        "hello",
        "it returns the number of items in the list",
    ]
    references = [
        "the cat is on the mat",
        "a dog ran in the park",
        "hello there world",
        "it returns the number of items of a list",
    ]
    score = measure.bleu(hypotheses, references)
    assert score == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score)
    assert score.n == 4 and score.low is None, "too few for an interval"
    more = measure.bleu(hypotheses * 2, references * 2)
    assert more.low < more < more.high
    for kind in ("rouge1", "rougeL"):
        each = [
            RougeScorer([kind]).score(r, h)[kind].fmeasure for h, r in zip(hypotheses, references)
        ]
        assert measure.rouge(hypotheses, references, kind) == pytest.approx(sum(each) / 4)


def test_bleu_of_sentences_shorter_than_four_words_counts_their_n_grams_right():
    import sacrebleu

    hypotheses, references = ["hi", "to be or not to be", "yes it is"], [
        "hi there",
        "to be or not",
        "yes it was",
    ]
    assert measure.bleu(hypotheses, references) == pytest.approx(
        sacrebleu.corpus_bleu(hypotheses, [references]).score
    )


@pytest.mark.parametrize("metric", [measure.accuracy, measure.f1, measure.bleu, measure.rouge])
def test_lists_that_do_not_pair_are_errors(metric):
    for predictions, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(
            ValueError, match=f"{len(predictions)} predictions and {len(references)} references"
        ):
            metric(predictions, references)


def test_one_text_is_no_list():
    for metric in (measure.accuracy, measure.f1, measure.token_f1, measure.bleu, measure.rouge,
                   measure.measures):
        for given in (("hello there", ["hello"]), (["hello"], "hello there"), (["hello"], None)):
            with pytest.raises(TypeError, match="('hello there'|None) is not a list: give a"):
                metric(*given)
    for given in (("one prompt", ["a"]), (["one prompt"], "ab")):
        with pytest.raises(TypeError, match="is not a list"):
            measure.choose(None, None, *given)
    with pytest.raises(TypeError, match="is not a list"):
        measure.generate_text(build("llama"), None, "one prompt", 4)


def test_rouge_names_the_kinds_that_there_are():
    assert measure.rouge(["a b"], ["a b"], "rouge9") == 0
    assert measure.rouge(["a b"], ["a b"], "rougeLsum") == 1
    for kind in ("rouge", "rouge0", "rouge10", "ROUGE-L"):
        with pytest.raises(ValueError, match=f"kind='{kind}' is unknown; known: 'rouge1', .*L'"):
            measure.rouge(["a b"], ["a b"], kind)


def test_there_is_room_for_a_prompt_or_an_error():
    assert measure.room(build("llama"), 12) == 20
    assert measure.room(minillm.prompts.wrap(build("llama"), length=3), 12) == 17
    for model, new, message in (
        (build("llama"), 32, "=32 leaves no room for a prompt: the model has 32 positions"),
        (minillm.prompts.wrap(build("gpt2"), length=20), 12, "of which a soft prompt takes 20"),
        (build("llama"), 0, "max_new_tokens=0: the least is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.room(model, new)
