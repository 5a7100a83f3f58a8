"""How good a model is: perplexity, accuracy, F1, BLEU, ROUGE, each with the number of examples and an interval.

    perplexity   exp(-1/n sum log p(x_i | x_<i))           over windows that do not overlap, as most papers report it
    accuracy     correct / n
    F1           2 TP / (2 TP + FP + FN)                    macro: the mean over the classes; micro: over all counts together
    BLEU         Papineni et al. 2002, by sacrebleu         0 to 100, of the whole corpus
    ROUGE        Lin 2004, by rouge-score                   0 to 1, the mean F-measure

A Score is a float that also carries n and the 95% interval of a bootstrap over its examples (Efron 1979; 1,000 resamples, a
fixed seed): two numbers within each other's interval are not two results.
Not included: overlapping windows (a stride), which give lower perplexities and cost as many times more.
"""

import numpy as np
import torch
import torch.nn.functional as F

from minillm.registry import prepare
from minillm.transformer import left_pad


class Score(float):
    """A figure with its name, the number of examples n, and the ends low and high of its 95% interval."""

    def __new__(cls, value, name="", n=0, low=None, high=None):
        self = super().__new__(cls, value)
        self.name, self.n = name, n
        self.low, self.high = value if low is None else low, value if high is None else high
        return self

    def __getnewargs__(self):
        return float(self), self.name, self.n, self.low, self.high

    def __repr__(self):
        return f"{self.name} {float(self):.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"

    def record(self):
        """A dict for JSON."""
        return dict(name=self.name, value=float(self), n=self.n, low=self.low, high=self.high)


def bootstrap(name, parts, measure):
    """The Score of `measure(rows)`, where rows is an array (n, ...) of what each example contributes."""
    parts = np.asarray(parts, dtype=float)
    n, draw = len(parts), np.random.default_rng(0)
    resampled = [measure(parts[draw.integers(n, size=n)]) for _ in range(1000)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(float(measure(parts)), name, n, float(low), float(high))


# --- perplexity -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def nll(model, ids, labels, mask=None):
    """(-log p of the labels, summed for each row (b,); how many there are (b,)); labels of -100 do not count.

    ids, labels, mask (b, t) on any device; the model may be minillm's, Hugging Face's, or any that maps ids to logits.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids, labels, mask = (None if t is None else t.to(device) for t in prepare(model, ids, labels, mask))
    target, keep = labels[:, 1:], labels[:, 1:] != -100
    try:
        if hasattr(model, "hidden") and hasattr(model, "lm_head"):
            h = model.hidden(ids, mask)[:, :-1][keep]  # (kept, width): the head is applied to 512 rows at a time
            pieces = [F.cross_entropy(model.lm_head(x).float(), y, reduction="none") for x, y in zip(h.split(512), target[keep].split(512))]
            kept = torch.cat(pieces) if pieces else h.new_zeros(0)
        else:
            output = model(ids) if mask is None else model(ids, attention_mask=mask)
            logits = getattr(output, "logits", output)[:, :-1]
            kept = F.cross_entropy(logits[keep].float(), target[keep], reduction="none")
    finally:
        model.train(was_training)
    if not kept.isfinite().all():
        raise ValueError("the model's log-likelihood is nan or inf: its weights or activations are out of range")
    losses = torch.zeros(keep.shape, device=device).masked_scatter(keep, kept)
    return losses.sum(1).cpu(), keep.sum(1).cpu()


def perplexity(model, tokenizer, text, length=512, windows=None, batch=4):
    """The perplexity of text, a Score, over windows of `length` tokens that do not overlap, at most `windows` of them.

    The first token of a window is not predicted, no token is put before it, and a last window that is not full is left out
    unless it is the only one. The interval is over windows.
    """
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens has nothing to predict")
    rows = [ids[i : i + length] for i in range(0, len(ids), length)]
    rows = [row for row in rows if len(row) == length][:windows] or [ids]
    parts = []
    for i in range(0, len(rows), batch):
        x = torch.tensor(rows[i : i + batch])
        labels = x.clone()
        labels[:, 0] = -100  # a soft prompt would predict it, and be measured on more tokens than other methods
        parts += zip(*(t.tolist() for t in nll(model, x, labels)))
    return bootstrap("perplexity", parts, lambda rows: np.exp(rows[:, 0].sum() / rows[:, 1].sum()))


# --- of answers -------------------------------------------------------------------------------------------------------------


def paired(predictions, references):
    predictions, references = list(predictions), list(references)
    if len(predictions) != len(references) or not references:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references: as many of each, and at least one")
    return predictions, references


def accuracy(predictions, references):
    """The share of predictions that equal their reference, a Score."""
    predictions, references = paired(predictions, references)
    return bootstrap("accuracy", [p == r for p, r in zip(predictions, references)], lambda rows: rows.mean())


def f1(predictions, references, average="macro"):
    """F1 over the classes that occur in either list, a Score: "macro" is their plain mean, "micro" counts all together."""
    predictions, references = paired(predictions, references)
    if average not in ("macro", "micro"):
        raise ValueError(f"average={average!r} is unknown; known: 'macro', 'micro'")
    classes = {c: i for i, c in enumerate(dict.fromkeys(references + predictions))}

    def measure(rows):
        predicted, true = rows.astype(int).T
        tp, predicted, true = (np.bincount(x, minlength=len(classes)) for x in (true[predicted == true], predicted, true))
        if average == "micro":
            return 2 * tp.sum() / (predicted.sum() + true.sum())
        occurs = predicted + true > 0
        return (2 * tp[occurs] / (predicted + true)[occurs]).mean()

    return bootstrap(f"F1 ({average})", [(classes[p], classes[r]) for p, r in zip(predictions, references)], measure)


def bleu(hypotheses, references):
    """Corpus BLEU, 0 to 100, a Score: sacrebleu's defaults (13a tokens, exponential smoothing). One reference each."""
    from sacrebleu.metrics import BLEU

    hypotheses, references = paired(hypotheses, references)
    metric = BLEU(effective_order=False)
    rows = []
    for hypothesis, reference in zip(hypotheses, references):  # lengths, then matches and totals of each order of n-gram
        s = BLEU(effective_order=True).sentence_score(hypothesis, [reference])
        rows.append([s.sys_len, s.ref_len, *s.counts, *s.totals])

    def measure(rows):
        sums = rows.sum(0).astype(int).tolist()
        n = metric.max_ngram_order
        return metric.compute_bleu(correct=sums[2 : 2 + n], total=sums[2 + n :], sys_len=sums[0], ref_len=sums[1],
                                   smooth_method=metric.smooth_method, smooth_value=metric.smooth_value,
                                   max_ngram_order=n).score

    return bootstrap("BLEU", rows, measure)


def rouge(hypotheses, references, kind="rougeL"):
    """The mean F-measure of ROUGE, 0 to 1, a Score; kind is "rouge1", "rouge2", ... or "rougeL"."""
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses, references = paired(hypotheses, references)
    scorer = RougeScorer([kind], use_stemmer=False)
    rows = [scorer.score(reference, hypothesis)[kind].fmeasure for hypothesis, reference in zip(hypotheses, references)]
    return bootstrap(kind.replace("rouge", "ROUGE-"), rows, lambda rows: rows.mean())


# --- asking a model ---------------------------------------------------------------------------------------------------------


def choose(model, tokenizer, prompts, choices, batch=8):
    """For each prompt the choice the model finds likeliest after it, by the mean log-likelihood of the choice's tokens.

    The mean and not the sum: choices have different numbers of tokens, and the sum would prefer short ones.
    """
    rows = []
    for prompt in prompts:
        for choice in choices:
            ids, offsets = tokenizer.spans(f"{prompt} {choice}")
            rows.append((ids, [i if end > len(prompt) else -100 for i, (_, end) in zip(ids, offsets)]))
    means = []
    for i in range(0, len(rows), batch):
        ids, mask = left_pad([ids for ids, _ in rows[i : i + batch]])
        labels, _ = left_pad([labels for _, labels in rows[i : i + batch]], -100)
        total, count = nll(model, ids, labels, mask)
        means += (total / count).tolist()
    scores = np.array(means).reshape(len(prompts), len(choices))  # (n * c,) -> (n, c)
    return [choices[i] for i in scores.argmin(1)]


def generate_text(model, tokenizer, prompts, max_new_tokens=32, batch=8):
    """Each prompt's greedy continuation, up to the end of the text or of the line, without the prompt."""
    rows, stop = [tokenizer.encode(prompt) for prompt in prompts], () if tokenizer.eos is None else tokenizer.eos
    texts = []
    for i in range(0, len(rows), batch):
        part = rows[i : i + batch]
        new = model.generate(part, max_new_tokens, stop=stop, pad=tokenizer.pad)[:, max(map(len, part)) :].tolist()
        ended = [row[: row.index(tokenizer.eos)] if tokenizer.eos in row else row for row in new]
        texts += [tokenizer.decode(row).strip().split("\n")[0] for row in ended]
    return texts
