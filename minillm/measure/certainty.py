"""Calibration of a model's confidence: of the predictions it gives a probability of 0.8, are
8 of 10 right?

    ECE = sum_b  n_b / n  |acc(b) - conf(b)|          Guo et al. 2017, arXiv 1706.04599, eq. 3

    b       a bin of confidence: (0, 1/M], (1/M, 2/M], ..., (1 - 1/M, 1]
    conf    the mean probability of the likeliest class, over the n_b predictions of the bin
    acc     the share of them that is right

The expected calibration error is 0 for a perfect model, and also for one that knows nothing and
says so. So it stands beside a quality, and never alone. It has a bias upwards: a bin with few
predictions has a gap by chance alone, of about sqrt(acc (1 - acc) / n_b). More bins see more and
add more of this bias; M = 15 is the paper's.

`reliability` gives the bins, for the usual diagram. Not included: bins of equal counts, and
temperature scaling (`generate` has a temperature).

>>> error = calibration_error([0.9, 0.9, 0.9, 0.9, 0.6], [True, True, True, False, True], bins=10)
>>> round(error, 3)        # 4/5 |0.75 - 0.9| + 1/5 |1 - 0.6|
0.2
>>> for row in reliability(error):
...     print(*(f"{x:.3g}" for x in row))
0.5 0.6 1 0.6 1
0.8 0.9 4 0.9 0.75
"""

import numpy as np
import torch

from minillm import options
from minillm.calling import logits
from minillm.measure.intervals import score
from minillm.measure.likelihood import windows_of
from minillm.measure.scores import metric, paired
from minillm.model.generate import evaluating
from minillm.registry import instead, prepare


def calibration_error(confidences, correct, bins=15):
    """The expected calibration error, a Score over examples.

    confidences: the probability that the model gives its own prediction, from 0 to 1, for
    each example; correct: whether it was right. ValueError for lists of different lengths, a
    number that is no probability, and fewer than 1 bin.
    """
    bins = options.whole("bins", bins)
    confidences, correct = paired(confidences, correct)
    parts = np.zeros((len(correct), bins, 3))
    for i, (confidence, right) in enumerate(zip(confidences, correct)):
        within = options.real("confidence", float(confidence), lambda x: 0 <= x <= 1,
                              "a probability, from 0 to 1")
        parts[i, bin_of(within, bins)] = 1, within, bool(right)
    return score("calibration error", parts, metric("calibration error"))


def token_calibration_error(model, tokenizer, text, length=512, windows=None, bins=15):
    """The expected calibration error of next-token predictions in a text, a Score over windows.

    The windows are those of `perplexity`: at most `windows` of them, of `length` tokens, and
    the first token of each is not predicted. The model may be minillm's or Hugging Face's.
    """
    bins = options.whole("bins", bins)
    instead.check_tokens(instead.replacing(model), "the calibration of the next tokens")
    rows = windows_of(tokenizer, text, length, windows)
    parts = [window(model, torch.tensor([row]), bins) for row in rows]
    return score("calibration error", parts, metric("calibration error"))


@torch.inference_mode()
def window(model, ids, bins):
    """Of ids (1, t): (bins, 3), the number of predictions, the sums of confidence and of right."""
    with evaluating(model):
        ids = ids.to(next(model.parameters()).device)
        labels = ids.clone()
        labels[:, 0] = -100  # a soft prompt would predict it
        ids, labels, mask = prepare(model, ids, labels, None)
        keep = labels[:, 1:] != -100
        p = logits(model, ids, mask)[:, :-1][keep].float().softmax(-1)  # (t - 1, vocab)
    confidence, predicted = p.max(-1)
    right = (predicted == labels[:, 1:][keep]).double()
    where = bin_of(confidence.double().cpu().numpy(), bins)
    sums = np.zeros((bins, 3))
    columns = np.ones(len(where)), confidence.cpu().numpy(), right.cpu().numpy()
    for column, values in enumerate(columns):
        np.add.at(sums[:, column], where, values)
    return sums


def bin_of(confidence, bins):
    """The number of the bin, which holds its upper end and not its lower one."""
    return np.clip(np.ceil(np.asarray(confidence) * bins).astype(int) - 1, 0, bins - 1)


def reliability(error):
    """[(low, high, n, mean confidence, accuracy)] of the bins that hold a prediction.

    error: a Score of this page.
    """
    if getattr(error, "name", None) != "calibration error" or error.parts is None:
        raise ValueError(f"{error!r} is no Score of calibration_error or token_calibration_error")
    sums = error.parts.sum(0)
    return [(b / len(sums), (b + 1) / len(sums), int(n), confidence / n, right / n)
            for b, (n, confidence, right) in enumerate(sums.tolist()) if n]
