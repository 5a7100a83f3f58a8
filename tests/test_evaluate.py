"""The metrics against hand-worked cases and the libraries that define them, and the report against a count by hand."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face
from models import IDS, build
from torch import nn

import minillm
from minillm import data, evaluate
from minillm.evaluate import Score, intervals


class Letters:
    """A tokenizer of single letters, for models with 24 ids."""

    eos = pad = 0

    def encode(self, text):
        return [ord(c) - 96 for c in text]

    def spans(self, text):
        return [1 if c == " " else (ord(c) - 96) % 24 for c in text], [(i, i + 1) for i in range(len(text))]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_over_windows():
    model, text = build("llama"), "abcdefghijklmnopqrstuvw" * 3
    ids = Letters().encode(text)
    for length, windows, used in ((10, None, 6), (10, 4, 4), (30, None, 2), (100, None, 1)):
        if length > 32:
            with pytest.raises(ValueError, match="beyond"):
                evaluate.perplexity(model, Letters(), text, length=length, windows=windows)
            continue
        rows = [ids[i : i + length] for i in range(0, len(ids), length)][:used]
        losses = [F.cross_entropy(model(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction="sum") for row in rows]
        score = evaluate.perplexity(model, Letters(), text, length=length, windows=windows)
        assert score == pytest.approx(math.exp(sum(losses) / sum(len(row) - 1 for row in rows)), rel=1e-5)
        assert score.n == used and (score.low < score < score.high if used >= 5 else score.low is score.high is None)


@pytest.mark.parametrize("kind", ["gpt2", "hf_llama", "Linear"])
def test_the_likelihood_is_that_of_the_labels_alone(kind):
    model = build(kind)
    output = model(IDS)
    logp = getattr(output, "logits", output).log_softmax(-1)
    labels = IDS.clone()
    labels[0, :3] = -100
    total, count = evaluate.nll(model, IDS, labels)
    expected = [-sum(logp[b, t - 1, IDS[b, t]] for t in range(1, 6) if labels[b, t] != -100) for b in range(2)]
    torch.testing.assert_close(total, torch.stack(expected).detach())
    assert count.tolist() == [3, 5]


def test_prompts_are_measured_on_the_same_tokens():
    model = build("llama")
    before = evaluate.perplexity(model, Letters(), "abcdefghij" * 4, length=10)
    patch = minillm.prompts.wrap(model, length=2).embed_tokens.patches["prompts"]
    after = evaluate.perplexity(model, Letters(), "abcdefghij" * 4, length=10)
    assert after != before and model.training is False
    nn.init.constant_(patch.P, float("nan"))
    with pytest.raises(ValueError, match="nan or inf"):
        evaluate.perplexity(model, Letters(), "abcdefghij" * 4, length=10)
    with pytest.raises(ValueError, match="1 tokens has nothing to predict"):
        evaluate.perplexity(model, Letters(), "a")


def test_accuracy_and_f1_by_hand():
    references, predictions = list("aaabbc"), list("aabbca")
    # a: TP 2, predicted 3, true 3; b: TP 1, predicted 2, true 2; c: TP 0, predicted 1, true 1
    assert evaluate.accuracy(predictions, references) == 3 / 6
    assert evaluate.f1(predictions, references, "macro") == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert evaluate.f1(predictions, references, "micro") == pytest.approx(2 * 3 / (6 + 6))
    assert evaluate.f1(["d", "a"], ["a", "a"]) == pytest.approx((2 / 3 + 0) / 2)


def test_bleu_and_rouge_are_those_of_their_libraries():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses = ["the cat sat on the mat", "a dog runs in the park today", "hello", "it returns the number of items in the list"]
    references = ["the cat is on the mat", "a dog ran in the park", "hello there world", "it returns the number of items of a list"]
    score = evaluate.bleu(hypotheses, references)
    assert score == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score)
    assert score.n == 4 and score.low is None, "too few for an interval"
    more = evaluate.bleu(hypotheses * 2, references * 2)
    assert more.low < more < more.high
    for kind in ("rouge1", "rougeL"):
        each = [RougeScorer([kind]).score(r, h)[kind].fmeasure for h, r in zip(hypotheses, references)]
        assert evaluate.rouge(hypotheses, references, kind) == pytest.approx(sum(each) / 4)


def test_bleu_of_sentences_shorter_than_four_words_counts_their_n_grams_right():
    import sacrebleu

    hypotheses, references = ["hi", "to be or not to be", "yes it is"], ["hi there", "to be or not", "yes it was"]
    assert evaluate.bleu(hypotheses, references) == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score)


@pytest.mark.parametrize("metric", [evaluate.accuracy, evaluate.f1, evaluate.bleu, evaluate.rouge])
def test_lists_that_do_not_pair_are_errors(metric):
    for predictions, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(ValueError, match=f"{len(predictions)} predictions and {len(references)} references"):
            metric(predictions, references)


def test_the_interval_of_a_share_narrows():
    wide, narrow = (evaluate.accuracy([1] * n + [0] * n, [1] * 2 * n) for n in (10, 1000))
    assert wide == narrow == 0.5 and 0.25 < wide.low < narrow.low < 0.5 < narrow.high < wide.high < 0.75
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 2000), rel=0.01)


def test_intervals_of_eight_examples_cover_what_they_say():
    draw, z = np.random.default_rng(1), 1000
    covered = []
    for _ in range(z):  # windows of 255 tokens, whose mean -log p varies as that of docstrings does
        losses = 4.5 + 0.5 * draw.standard_normal(8)
        score = intervals.score("perplexity", [(255 * loss, 255) for loss in losses], evaluate.metric("perplexity"))
        covered.append(score.low <= math.exp(4.5) <= score.high)
    assert 0.93 <= np.mean(covered) <= 0.97, "a percentile bootstrap covers 0.85"
    covered = []
    for p in draw.random(z):
        score = evaluate.accuracy(draw.random(8) < p, [True] * 8)
        covered.append(score.low <= p <= score.high)
    assert np.mean(covered) >= 0.93


def test_the_interval_of_a_mean_is_student_s():
    rows = [0.1, 0.4, 0.2, 0.9, 0.3, 0.5, 0.55]
    score = intervals.score("any", rows, evaluate.metric("any"))
    half = 2.44691 * np.std(rows, ddof=1) / 7**0.5  # t of 6 degrees of freedom, from a table
    assert (score.low, score.high) == (pytest.approx(np.mean(rows) - half, abs=1e-4), pytest.approx(np.mean(rows) + half, abs=1e-4))
    for freedom, t in ((1, 12.7062), (2, 4.30265), (7, 2.36462), (30, 2.04227), (1000, 1.96234)):
        assert intervals.t_quantile(freedom) == pytest.approx(t, rel=1e-4)
    assert intervals.score("any", [0.3] * 9, evaluate.metric("any")).low is None, "all alike: nothing says how they vary"


def losses(draw, windows, seed=0.0, noise=0.02):
    rows = [(100 * (loss + seed + noise * draw.standard_normal()), 100) for loss in windows]
    return intervals.score("perplexity", rows, evaluate.metric("perplexity"))


def test_a_paired_change_knows_more_than_two_intervals():
    draw = np.random.default_rng(0)
    windows = 4 + draw.standard_normal(12)
    before, after = losses(draw, windows), [losses(draw, windows - 0.1) for _ in range(3)]
    change = evaluate.change(before, after)
    assert before.low < after[0] < before.high, "apart, the two cannot be told from each other"
    assert change == pytest.approx(math.exp(-0.1) - 1, abs=0.02) and change.low < change < change.high < 0
    first = math.log(evaluate.change(before, after[:1]) + 1)
    assert first == pytest.approx(math.log(after[0] / before))
    assert "change of perplexity" in repr(change) and change.n == 12
    with pytest.raises(ValueError, match="scores pair where"):
        evaluate.change(before, losses(draw, windows[:5]))


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_the_interval_of_a_change_covers_windows_and_seeds(spread):
    draw, covered = np.random.default_rng(2), []
    for _ in range(200):
        windows = 4 + draw.standard_normal(8)
        gain = -0.1 + 0.05 * draw.standard_normal(8)  # what training gives differs from window to window
        before = losses(draw, windows, noise=0.0)
        change = evaluate.change(before, [losses(draw, windows + gain, spread * draw.standard_normal()) for _ in range(3)])
        covered.append(change.low <= math.expm1(-0.1) <= change.high)
    assert np.mean(covered) >= 0.93


def test_models_that_agree_on_every_answer_may_still_differ():
    right, wrong = evaluate.accuracy([1] * 8, [1] * 8), evaluate.accuracy([0] * 2 + [1] * 6, [1] * 8)
    same = evaluate.change(right, right)
    assert same == 0 and same.low < -0.1 and same.high > 0.1
    assert evaluate.change(right, wrong) == -0.25
    one = evaluate.f1([1] * 8, [1] * 8)
    assert evaluate.change(one, one).low is None


def test_a_score_is_a_float_that_knows_more():
    score = Score(2.5, "perplexity", 8, 2.0, 3.0)
    again = pickle.loads(pickle.dumps(score))
    assert (again, again.n, again.low, again.high) == (2.5, 8, 2.0, 3.0) and json.dumps(score) == "2.5"
    assert repr(score) == "perplexity 2.5 [2, 3] (n=8)" and score.record()["value"] == 2.5
    assert repr(Score(123456.7, "perplexity", 3)) == "perplexity 123,457 (n=3, no interval)"


def test_choose_takes_the_likeliest():
    model, tokenizer = build("llama"), Letters()
    choices = ["abc", "de", "f"]
    for prompt, chosen in zip(("hello", "wide"), evaluate.choose(model, tokenizer, ["hello", "wide"], choices)):
        means = {}
        for choice in choices:
            ids, _ = tokenizer.spans(f"{prompt} {choice}")
            logp = model(torch.tensor([ids]))[0].log_softmax(-1)
            answer = range(len(prompt), len(ids))
            means[choice] = sum(logp[t - 1, ids[t]] for t in answer).item() / len(answer)
        assert chosen == max(means, key=means.get)


@pytest.mark.parity
def test_perplexity_of_a_hugging_face_model_is_its_own_loss():
    hugging_face()
    model, text = build("hf_llama"), "abcdefghijklmnopqrstuvw" * 2
    ids = torch.tensor([Letters().encode(text)[:20]])
    expected = model(ids, labels=ids).loss.exp().item()
    assert evaluate.perplexity(model, Letters(), text, length=20, windows=1) == pytest.approx(expected, rel=1e-5)


# --- what was wrong or silent -----------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["hf_gpt2", "hf_llama"])
@pytest.mark.parametrize("left", [True, False])
def test_a_padded_row_of_a_hugging_face_model_is_as_likely_as_alone(kind, left):
    hugging_face()
    model, rows = build(kind), [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3]]
    t = max(map(len, rows))
    fill = [[0] * (t - len(row)) for row in rows]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill)])
    mask = torch.tensor([[0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad) for row, pad in zip(rows, fill)]) == 1
    labels = ids.masked_fill(~mask, -100)
    for i, row in enumerate(rows):
        labels[i, mask[i].nonzero()[0]] = -100  # nothing precedes it
    together, count = evaluate.nll(model, ids, labels, mask)
    alone = torch.cat([evaluate.nll(model, torch.tensor([row]), torch.tensor([row]))[0] for row in rows])
    torch.testing.assert_close(together, alone)
    assert count.tolist() == [7, 2, 4]


def test_a_model_without_a_mask_sees_padded_rows_one_by_one():
    class Order(nn.Module):  # a model in which padding is felt: each token adds to all later ones
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(24, 24)

        def forward(self, ids):
            return self.embed(ids).cumsum(1)

    model = Order()
    ids, mask = torch.tensor([[0, 0, 3, 1, 4], [2, 7, 1, 8, 2]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]) == 1
    total, _ = evaluate.nll(model, ids, torch.tensor([[-100, -100, -100, 1, 4], [-100, 7, 1, 8, 2]]), mask)
    alone, _ = evaluate.nll(model, ids[:1, 2:], ids[:1, 2:])
    torch.testing.assert_close(total[:1], alone)
    with pytest.raises(ValueError, match="Order has no mask for packed"):
        evaluate.nll(model, ids, ids, mask.long() * 2)


def test_perplexity_and_choice_refuse_what_makes_no_sense():
    model, tokenizer, text = build("llama"), Letters(), "abcdefghij" * 4
    for given, message in ((dict(windows=-1), "windows=-1: the least is 1"), (dict(length=1), "length=1: the least is 2"),
                           (dict(batch=0), "batch=0"), (dict(windows=0), "windows=0")):
        with pytest.raises(ValueError, match=message):
            evaluate.perplexity(model, tokenizer, text, **{"length": 10, **given})
    for prompts, choices, message in (([], ["a"], "prompts: there are none"), (["a"], [], "choices: there are none"),
                                      (["a", ""], ["b"], "prompts: number 2 of 2 is empty"), (["a"], ["b", ""], "choices: number 2")):
        with pytest.raises(ValueError, match=message):
            evaluate.choose(model, tokenizer, prompts, choices)


def test_an_early_error_leaves_every_module_in_its_own_mode():
    model = build("llama").train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(IndexError):
        evaluate.nll(model, torch.tensor([[1, 99]]), torch.tensor([[1, 2]]))
    with pytest.raises(TypeError):
        evaluate.nll(model, IDS, None)
    evaluate.nll(model, IDS, IDS)
    assert [module.training for module in model.modules()] == modes


def test_every_window_counts_once_and_each_token_alike():
    """A halved loss, a window left out, or a mean of means would give another figure."""
    model, text = build("llama"), "abcdefghijklmnopqrstuvw" * 3 + "wvutsr"
    score = evaluate.perplexity(model, Letters(), text, length=15, batch=2)
    ids = torch.tensor(Letters().encode(text)[:75]).view(5, 15)
    with torch.no_grad():
        logp = model(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    assert score == pytest.approx(math.exp(-logp.mean().item()), rel=1e-5) and score.n == 5
    np.testing.assert_allclose(score.parts, [[-row.sum().item(), 14] for row in logp], rtol=1e-5)


def test_completions_are_the_loss_that_training_reports():
    model = build("llama")
    examples = [data.Example([3, 1, 4, 1, 5, 9], [-100, -100, 4, 1, 5, 9]), data.Example([2, 6, 5], [-100, -100, 5])]
    score = evaluate.completions(model, examples)
    ids, labels, mask = data.collate(examples)
    assert score == pytest.approx(model.loss(ids, labels, mask).exp().item(), rel=1e-5) and score.parts[:, 1].tolist() == [4, 1]
    with pytest.raises(ValueError, match="1 examples have no token to predict"):
        evaluate.completions(model, [data.Example([1, 2], [1, -100])])


def test_rouge_knows_other_scripts_and_is_the_library_s_on_english():
    from rouge_score.tokenizers import DefaultTokenizer

    english = "It's the 1st value_error, e.g. in sys.path (see RFC-2822); state-of-the-art!\n\tOK"
    assert evaluate.words(english) == DefaultTokenizer().tokenize(english)
    assert evaluate.words("Привет, мир! Ça va? 東京へ行く v2 हिन्दी") == ["привет", "мир", "ça", "va", *"東京へ行く", "v2", "हिन्दी"]
    for text in ("кошка сидит на окне", "東京へ行く", "η γάτα"):
        assert evaluate.rouge([text], [text]) == 1
    assert evaluate.rouge(["кошка спит"], ["кошка сидит"], "rouge1") == 0.5


def test_token_f1_is_that_of_squad_by_hand():
    assert evaluate.token_f1(["The cat, a black one"], ["cat black"]) == pytest.approx(2 * 2 / (3 + 2))
    assert evaluate.token_f1(["", "x", "the"], ["", "y", "a"]) == pytest.approx(2 / 3)
    assert evaluate.token_f1(["東京都"], ["東京"]) == pytest.approx(2 * 2 / 5)


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
        return torch.tensor([[0] * t + row + [0] * (max(map(len, made)) - len(row)) for row in made])


class Lines(Letters):
    def decode(self, ids):
        return super().decode(ids).replace("z", "\n")


def test_answers_are_generated_and_scored_beside_their_references():
    model = Speaker(["abczde", "x", "abc"])
    found = evaluate.answers(model, Lines(), ["q", "qq", "r"], ["abc", "y", "abc"], batch=2, max_new_tokens=8)
    assert model.sizes == [2, 1] and found.texts == ["abc\nde", "x", "abc"]
    assert found.scores["exact match"] == pytest.approx(1 / 3) and found.scores["F1 (tokens)"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert {"BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"} < set(found.scores)
    assert found.rows(2) == [dict(prompt="q", reference="abc", answer="abc de"), dict(prompt="qq", reference="y", answer="x")]
    assert "exact match    0.3333  no interval" in found.summary()
    line = evaluate.generate_text(Speaker(["abczde"]), Lines(), ["q"], max_new_tokens=8, first_line=True)
    assert line == ["abc"]
    for prompts, message in (([""], "prompt 1 of 1 has 0 tokens"), (["a", "b" * 30], "prompt 2 of 2 has 30 tokens: it takes 1 to 28")):
        with pytest.raises(ValueError, match=message):
            evaluate.generate_text(Speaker([]), Lines(), prompts, max_new_tokens=4)


def test_answers_that_repeat_are_classes_too():
    found = evaluate.measures(["a", "b", "b", "a "], ["a", "b", "a", "a"])
    assert found["exact match"] == 0.75 and found["F1 (macro)"] == pytest.approx((0.8 + 2 / 3) / 2)
