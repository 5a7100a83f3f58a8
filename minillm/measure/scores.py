"""Metrics of answers against references: accuracy, F1, BLEU, ROUGE, each a Score with its
interval.
"""

import re
import reprlib
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable

import numpy as np

from minillm import options
from minillm.measure.intervals import Metric, difference, exp, expm1, score

# Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana and Chinese.
NO_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


def words(text):
    """The words of a text in any script, in lower case: letters, digits and the marks
    on them. All other characters separate words.

    In scripts without spaces every character is a word. On ASCII text these are the
    tokens of rouge-score, which drops all other characters: its ROUGE of a Russian or
    Chinese text is 0.
    """
    letters = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text.lower())
    return NO_SPACES.sub(r" \g<0> ", letters).split()


class Words:
    """`words` as a tokenizer object for rouge-score."""

    @staticmethod
    def tokenize(text):
        return words(text)


# --- what the rows of examples become -------------------------------------------------------------


def log_perplexity(parts):
    """parts (n, 2): the summed -log p of an example's tokens, and their number."""
    return parts[:, 0].sum() / parts[:, 1].sum()


def counts(parts):
    """parts (n, 2), the predicted and the true class of each -> (true positives,
    predicted, true), each (classes,).
    """
    predicted, true = parts.astype(int).T
    classes = int(parts.max()) + 1
    return tuple(
        np.bincount(x, minlength=classes) for x in (true[predicted == true], predicted, true)
    )


def macro_f1(parts):
    tp, predicted, true = counts(parts)
    occurs = predicted + true > 0
    return (2 * tp[occurs] / (predicted + true)[occurs]).mean()


def micro_f1(parts):
    tp, predicted, true = counts(parts)
    return 2 * tp.sum() / (predicted.sum() + true.sum())


def corpus_bleu(parts):
    """parts (n, 2 + 2 * 4): the lengths of answer and reference, then matches and
    totals of n-grams of 1 to 4 words.
    """
    from sacrebleu.metrics import BLEU

    sums, n = parts.sum(0).astype(int).tolist(), 4
    return BLEU.compute_bleu(
        correct=sums[2 : 2 + n],
        total=sums[2 + n :],
        sys_len=sums[0],
        ref_len=sums[1],
        smooth_method="exp",
        max_ngram_order=n,
    ).score


def calibration_gap(parts):
    """parts (n, bins, 3): the number of predictions, the sums of their confidence and of right."""
    number, confidence, right = parts.sum(0).T  # each (bins,)
    return abs(right - confidence).sum() / number.sum()


METRICS = {
    "perplexity": Metric(log_perplexity, shown=exp, changed=expm1, least=1, better=-1),
    "accuracy": Metric(share=True, least=0, most=1),
    "exact match": Metric(share=True, least=0, most=1),
    "F1 (macro)": Metric(macro_f1, least=0, most=1),
    "F1 (micro)": Metric(micro_f1, least=0, most=1),
    "F1 (tokens)": Metric(least=0, most=1),
    "BLEU": Metric(corpus_bleu, least=0, most=100),
    "calibration error": Metric(calibration_gap, summed=True, least=0, most=1, better=-1),
}


def metric(name):
    """The Metric of a Score's name; a mean between 0 and 1 (ROUGE of every kind) if the
    name is not in METRICS.
    """
    return METRICS.get(name, Metric(least=0, most=1))


def change(before, after):
    """The paired change from `before` to `after`, a Score; see `intervals.difference`.

    Each is a Score or a list of Scores, one for each seed; a single `before` serves all
    seeds. ValueError if they differ in their metric or number of examples.
    """
    after = [after] if isinstance(after, float) else list(after)
    before = [before] * len(after) if isinstance(before, float) else list(before)
    if (
        not after
        or len(before) != len(after)
        or len({(one.name, one.n) for one in before + after}) != 1
    ):
        raise ValueError(
            f"{before} and {after} cannot be paired: their metric, n and number of seeds must agree"
        )
    return difference(before, after, metric(before[0].name))


# --- the metrics ----------------------------------------------------------------------------------


def listed(values):
    """The values as a list; TypeError for a single text."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(
            f"{reprlib.repr(values)} is not a list: give a list, also for one text: [...]"
        )
    return list(values)


def paired(predictions, references):
    predictions, references = listed(predictions), listed(references)
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references: "
            "give as many of each, and at least one"
        )
    return predictions, references


def accuracy(predictions, references, name="accuracy"):
    """The share of predictions that equal their reference, a Score."""
    predictions, references = paired(predictions, references)
    return score(name, [p == r for p, r in zip(predictions, references)], metric("accuracy"))


def f1(predictions, references, average="macro"):
    """F1 over the classes that occur in either list, a Score. "macro" is the mean over the
    classes, "micro" is F1 of the counts of all classes together.
    """
    predictions, references = paired(predictions, references)
    if average not in ("macro", "micro"):
        raise ValueError(f"average={average!r} is unknown; known: 'macro', 'micro'")
    classes = {c: i for i, c in enumerate(dict.fromkeys(references + predictions))}
    rows = [(classes[p], classes[r]) for p, r in zip(predictions, references)]
    return score(f"F1 ({average})", rows, metric(f"F1 ({average})"))


def normalized(text):
    """The tokens that SQuAD compares: lower case, without punctuation and without the
    articles a, an, the.
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return NO_SPACES.sub(r" \g<0> ", text).split()


def token_f1(predictions, references):
    """The mean F1 between the tokens of an answer and of its reference, 0 to 1, a Score
    (Rajpurkar et al. 2016, arXiv 1606.05250).

    With c tokens in common, precision is c / tokens of the answer and recall is c / tokens
    of the reference. Two texts without tokens agree: their F1 is 1.
    """
    predictions, references = paired(predictions, references)
    rows = []
    for prediction, reference in zip(predictions, references):
        a, b = normalized(prediction), normalized(reference)
        rows.append(
            2 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b)) if a or b else 1.0
        )
    return score("F1 (tokens)", rows, metric("F1 (tokens)"))


def bleu(hypotheses, references, tokenize="13a"):
    """Corpus BLEU, 0 to 100, a Score, with sacrebleu's defaults (exponential smoothing) and
    one reference for each hypothesis.

    tokenize: a tokenizer of sacrebleu, else ValueError; "13a" splits at spaces and
    punctuation, "zh" is for Chinese, "char" for any script.
    """
    from sacrebleu.metrics import BLEU

    hypotheses, references = paired(hypotheses, references)
    options.one_of("tokenize", tokenize, list(BLEU.TOKENIZERS))
    try:
        each, rows = BLEU(effective_order=True, tokenize=tokenize), []
    except (RuntimeError, ImportError, OSError) as error:  # it needs another package, or a download
        raise ValueError(
            f"tokenize={tokenize!r} lacks something ({' '.join(str(error).split())}); "
            "'13a', 'intl', 'zh', 'char' and 'none' work without it"
        ) from error
    # A row: both lengths, then matches and totals of each order of n-gram.
    for hypothesis, reference in zip(hypotheses, references):
        s = each.sentence_score(hypothesis, [reference])
        rows.append([s.sys_len, s.ref_len, *s.counts, *s.totals])
    return score("BLEU", rows, metric("BLEU"))


def rouge(hypotheses, references, kind="rougeL"):
    """The mean F-measure of ROUGE, 0 to 1, a Score; kind is "rouge1", "rouge2", ... "rouge9",
    "rougeL" or "rougeLsum". The tokens are those of `words`.
    """
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses, references = paired(hypotheses, references)
    options.one_of("kind", kind, [*(f"rouge{n}" for n in range(1, 10)), "rougeL", "rougeLsum"])
    scorer = RougeScorer([kind], tokenizer=Words())
    rows = [
        scorer.score(reference, hypothesis)[kind].fmeasure
        for hypothesis, reference in zip(hypotheses, references)
    ]
    name = kind.replace("rouge", "ROUGE-")
    return score(name, rows, metric(name))
