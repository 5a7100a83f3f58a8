"""Forgetting: how much worse a model has become at what it could do before.

    f = a_best - a_now        a_best: its best earlier figure on the old task, a_now: the last one
                              Chaudhry et al. 2018, arXiv 1801.10112, equation 3

Measure the old task before the new training and after each stage of it, on the same examples:

    before = measure.perplexity(model, tokenizer, old_text)
    train(model, new_examples, ...)
    after = measure.perplexity(model, tokenizer, old_text)
    measure.forgetting([before, after])

The result is the paired change of `measure.change`, with its interval and its sign: +0.2 of a
perplexity is a fifth more perplexity, -0.2 of an accuracy is 20 points less. With two figures the
best is the first. A model that was never good at the old task has nothing to forget.
"""

from minillm.measure.scores import change, metric


def forgetting(history):
    """The change, a Score, from the best of the earlier Scores of one task to the last one.

    history: two Scores or more, in their order in time. ValueError for fewer, and for Scores that
    cannot be paired.
    """
    if len(history) < 2:
        raise ValueError(f"{len(history)} figures: forgetting compares one with an earlier one")
    *earlier, now = history
    return change(max(earlier, key=lambda one: metric(one.name).better * one), now)
