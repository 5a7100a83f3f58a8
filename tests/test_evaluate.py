"""The metrics against hand-worked cases and the libraries that define them, and the
report against a count by hand.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face
from models import IDS, build
from torch import nn

import minillm
from minillm import data, measure


class Letters:
    """A tokenizer of single letters, for models with 24 ids."""

    eos = pad = 0
    stops = (0,)

    def encode(self, text):
        return [ord(c) - 96 for c in text]

    def spans(self, text):
        ids = [1 if c == " " else (ord(c) - 96) % 24 for c in text]
        return ids, [(i, i + 1) for i in range(len(text))]

    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_over_windows():
    model, text = build("llama"), "abcdefghijklmnopqrstuvw" * 3
    ids = Letters().encode(text)
    for length, windows, used in ((10, None, 6), (10, 4, 4), (30, None, 2), (100, None, 1)):
        if length > 32:
            with pytest.raises(ValueError, match="beyond"):
                measure.perplexity(model, Letters(), text, length=length, windows=windows)
            continue
        rows = [ids[i : i + length] for i in range(0, len(ids), length)][:used]
        losses = [
            F.cross_entropy(
                model(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction="sum"
            )
            for row in rows
        ]
        score = measure.perplexity(model, Letters(), text, length=length, windows=windows)
        assert score == pytest.approx(
            math.exp(sum(losses) / sum(len(row) - 1 for row in rows)), rel=1e-5
        )
        assert score.n == used and (
            score.low < score < score.high if used >= 5 else score.low is score.high is None
        )


@pytest.mark.parametrize("kind", ["gpt2", "hf_llama", "Linear"])
def test_the_likelihood_is_that_of_the_labels_alone(kind):
    model = build(kind)
    output = model(IDS)
    logp = getattr(output, "logits", output).log_softmax(-1)
    labels = IDS.clone()
    labels[0, :3] = -100
    total, count = measure.nll(model, IDS, labels)
    expected = [
        -sum(logp[b, t - 1, IDS[b, t]] for t in range(1, 6) if labels[b, t] != -100)
        for b in range(2)
    ]
    torch.testing.assert_close(total, torch.stack(expected).detach())
    assert count.tolist() == [3, 5]


def test_prompts_are_measured_on_the_same_tokens():
    model = build("llama")
    before = measure.perplexity(model, Letters(), "abcdefghij" * 4, length=10)
    patch = minillm.prompts.wrap(model, length=2).embed_tokens.patches["prompts"]
    after = measure.perplexity(model, Letters(), "abcdefghij" * 4, length=10)
    assert after != before and model.training is False
    nn.init.constant_(patch.P, float("nan"))
    with pytest.raises(ValueError, match="nan or inf"):
        measure.perplexity(model, Letters(), "abcdefghij" * 4, length=10)
    with pytest.raises(ValueError, match="1 tokens has nothing to predict"):
        measure.perplexity(model, Letters(), "a")


def test_choose_takes_the_likeliest():
    model, tokenizer = build("llama"), Letters()
    choices = ["abc", "de", "f"]
    for prompt, chosen in zip(
        ("hello", "wide"), measure.choose(model, tokenizer, ["hello", "wide"], choices)
    ):
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
    assert measure.perplexity(model, Letters(), text, length=20, windows=1) == pytest.approx(
        expected, rel=1e-5
    )


# --- what was wrong or silent ---------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["hf_gpt2", "hf_llama"])
@pytest.mark.parametrize("left", [True, False])
def test_a_padded_row_of_a_hugging_face_model_is_as_likely_as_alone(kind, left):
    hugging_face()
    model, rows = build(kind), [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3]]
    t = max(map(len, rows))
    fill = [[0] * (t - len(row)) for row in rows]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill)])
    mask = (
        torch.tensor(
            [
                [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
                for row, pad in zip(rows, fill)
            ]
        )
        == 1
    )
    labels = ids.masked_fill(~mask, -100)
    for i, row in enumerate(rows):
        labels[i, mask[i].nonzero()[0]] = -100  # nothing precedes it
    together, count = measure.nll(model, ids, labels, mask)
    alone = torch.cat(
        [measure.nll(model, torch.tensor([row]), torch.tensor([row]))[0] for row in rows]
    )
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
    ids, mask = (
        torch.tensor([[0, 0, 3, 1, 4], [2, 7, 1, 8, 2]]),
        torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]) == 1,
    )
    total, _ = measure.nll(
        model, ids, torch.tensor([[-100, -100, -100, 1, 4], [-100, 7, 1, 8, 2]]), mask
    )
    alone, _ = measure.nll(model, ids[:1, 2:], ids[:1, 2:])
    torch.testing.assert_close(total[:1], alone)
    with pytest.raises(ValueError, match="Order has no mask for packed"):
        measure.nll(model, ids, ids, mask.long() * 2)


def test_perplexity_and_choice_refuse_what_makes_no_sense():
    model, tokenizer, text = build("llama"), Letters(), "abcdefghij" * 4
    for given, message in (
        (dict(windows=-1), "windows=-1: the least is 1"),
        (dict(length=1), "length=1: the least is 2"),
        (dict(batch=0), "batch=0"),
        (dict(windows=0), "windows=0"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.perplexity(model, tokenizer, text, **{"length": 10, **given})
    for prompts, choices, message in (
        ([], ["a"], "prompts: there are none"),
        (["a"], [], "choices: there are none"),
        (["a", ""], ["b"], "prompts: number 2 of 2 is empty"),
        (["a"], ["b", ""], "choices: number 2"),
    ):
        with pytest.raises(ValueError, match=message):
            measure.choose(model, tokenizer, prompts, choices)


def test_an_early_error_leaves_every_module_in_its_own_mode():
    model = build("llama").train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(IndexError):
        measure.nll(model, torch.tensor([[1, 99]]), torch.tensor([[1, 2]]))
    with pytest.raises(TypeError):
        measure.nll(model, IDS, None)
    measure.nll(model, IDS, IDS)
    assert [module.training for module in model.modules()] == modes


def test_every_window_counts_once_and_each_token_alike():
    """A halved loss, a window left out, or a mean of means would give another figure."""
    model, text = build("llama"), "abcdefghijklmnopqrstuvw" * 3 + "wvutsr"
    score = measure.perplexity(model, Letters(), text, length=15, batch=2)
    ids = torch.tensor(Letters().encode(text)[:75]).view(5, 15)
    with torch.no_grad():
        logp = model(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    assert score == pytest.approx(math.exp(-logp.mean().item()), rel=1e-5) and score.n == 5
    np.testing.assert_allclose(score.parts, [[-row.sum().item(), 14] for row in logp], rtol=1e-5)


def test_completions_are_the_loss_that_training_reports():
    model = build("llama")
    examples = [
        data.Example([3, 1, 4, 1, 5, 9], [-100, -100, 4, 1, 5, 9]),
        data.Example([2, 6, 5], [-100, -100, 5]),
    ]
    score = measure.completions(model, examples)
    ids, labels, mask = data.collate(examples)
    assert score == pytest.approx(
        model.loss(ids, labels, mask).exp().item(), rel=1e-5
    ) and score.parts[:, 1].tolist() == [4, 1]
    minillm.prompts.wrap(model, length=2)  # which would predict the first token too
    whole = data.Example([3, 1, 4], [3, 1, 4])
    assert measure.completions(model, [whole]).parts[:, 1].tolist() == [2]
    with pytest.raises(ValueError, match="1 examples have no token to predict"):
        measure.completions(model, [data.Example([1, 2], [1, -100])])


def test_bleu_names_the_tokenizers_that_there_are():
    for tokenize in ("foo", None, 3):
        with pytest.raises(
            ValueError, match=f"tokenize={tokenize!r} is unknown; known: .*'13a'.*'char'"
        ):
            measure.bleu(["a"], ["b"], tokenize=tokenize)
    assert measure.bleu(["a b c d e"], ["a b c d e"], tokenize="char") == pytest.approx(100)


def test_bleu_says_in_one_line_what_a_tokenizer_needs(monkeypatch):
    import sacrebleu.metrics.bleu as library

    def missing(name):
        raise RuntimeError("\nIt needs extra dependencies.\n\n  pip install sacrebleu[ja]\n")

    monkeypatch.setattr(library, "_get_tokenizer", missing)
    with pytest.raises(
        ValueError,
        match=r"tokenize='ja-mecab' lacks something \(It needs extra dependencies. "
        r"pip install sacrebleu\[ja\]\); '13a'",
    ):
        measure.bleu(["a"], ["b"], tokenize="ja-mecab")


def test_the_perplexity_of_a_diverged_model_is_infinity():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    score = measure.perplexity(model, Letters(), "abcdefghij" * 6, length=10)
    assert score == score.high == math.inf
