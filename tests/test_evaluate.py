"""The metrics against hand-worked cases and the libraries that define them, and the report against a count by hand."""

import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face
from models import IDS, build
from torch import nn

import minillm
from minillm import evaluate, report
from minillm.evaluate import Score


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
        assert score.n == used and score.low <= score <= score.high


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
    assert score.low <= score <= score.high and score.n == 4
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


def test_the_interval_covers_and_narrows():
    wide, narrow = (evaluate.accuracy([1] * n + [0] * n, [1] * 2 * n) for n in (10, 1000))
    assert wide == narrow == 0.5 and 0.25 < wide.low < narrow.low < 0.5 < narrow.high < wide.high < 0.75
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 2000), rel=0.1)


def test_a_score_is_a_float_that_knows_more():
    score = Score(2.5, "perplexity", 8, 2.0, 3.0)
    again = pickle.loads(pickle.dumps(score))
    assert (again, again.n, again.low, again.high) == (2.5, 8, 2.0, 3.0) and json.dumps(score) == "2.5"
    assert repr(score) == "perplexity 2.5 [2, 3] (n=8)" and score.record()["value"] == 2.5


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


def test_the_report_counts_by_hand():
    model = minillm.lora.wrap(minillm.quant.wrap(build("llama")), r=2)
    told = report.report(model, batch=2, length=16)
    linears = 3 * (16 * 16 * 2 + 8 * 16 * 2 + 3 * 16 * 32)
    rows = 3 * (16 + 8 + 8 + 16 + 32 + 32 + 16)
    lora = 3 * 2 * (2 * 32 + 2 * 24 + 3 * 48)
    rest = 24 * 16 * 2 + 7 * 16
    assert told.trainable == lora and told.parameters == lora + rest
    assert told.bytes_by_format == {"quant": linears + 4 * rows, "float32": 4 * (lora + rest)}
    assert (told.gradients, told.optimizer) == (4 * lora, 8 * lora)
    assert told.activations > 2 * 16 * 16 * 4 and told.seconds_per_token > 0
    assert json.loads(told.json())["weights"] == told.weights == sum(told.bytes_by_format.values())
    assert f"{lora:,}" in told.table()
    fewer = report.report(minillm.freeze.wrap(build("llama"), last=1), batch=2, length=16)
    assert fewer.activations < report.report(build("llama"), batch=2, length=16).activations
    assert report.total_bytes(build("gpt2")) == 4 * sum(p.numel() for p in build("gpt2").parameters()), "a tied matrix counts once"


def test_the_report_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.report(build("llama")).picture(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_lines_up_and_is_markdown():
    text = report.table([dict(name="a", count=1234567), dict(name="longer", share=0.123456)])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].startswith("|---") and "1,234,567" in lines[2] and "0.1235" in lines[3]


@pytest.mark.parity
def test_perplexity_of_a_hugging_face_model_is_its_own_loss():
    hugging_face()
    model, text = build("hf_llama"), "abcdefghijklmnopqrstuvw" * 2
    ids = torch.tensor([Letters().encode(text)[:20]])
    expected = model(ids, labels=ids).loss.exp().item()
    assert evaluate.perplexity(model, Letters(), text, length=20, windows=1) == pytest.approx(expected, rel=1e-5)


def test_a_process_counts_its_own_peak_and_not_its_parents():
    import concurrent.futures
    import multiprocessing

    big = torch.ones(1 << 28, dtype=torch.uint8)  # 256 MiB here, none of it there
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        theirs = pool.submit(report.peak_memory).result()
    assert 0 < theirs < report.peak_memory() - big.numel() // 2
