"""How good a model is: perplexity, accuracy, F1, BLEU, ROUGE, each with the number of
examples and an interval.

    perplexity   exp(-1/n sum log p(x_i | x_<i))       over windows that do not overlap
    accuracy     correct / n
    F1           2 TP / (2 TP + FP + FN)               mean over classes (macro), or of all counts
    F1 (tokens)  the same for the tokens of two texts  Rajpurkar et al. 2016 (SQuAD)
    BLEU         Papineni et al. 2002, by sacrebleu    0 to 100, of the whole corpus
    ROUGE        Lin 2004, by rouge-score              0 to 1, the mean F-measure
    calibration  Guo et al. 2017, see `certainty`      0 to 1, the gap of confidence and accuracy

A Score is a float that also carries n and its 95% interval (`intervals` says what the
interval covers). `change` compares two models on the same examples, in pairs, and
`forgetting` one model with its past. Not included: overlapping windows. They give lower
perplexities, and with a stride of 1/k of a window they cost k times as much.
"""

from minillm.measure.answers import Answers, answers, generate_text, measures, room
from minillm.measure.certainty import calibration_error, reliability, token_calibration_error
from minillm.measure.forgetting import forgetting
from minillm.measure.intervals import Score, difference, digits
from minillm.measure.likelihood import choose, completions, logits, nll, perplexity
from minillm.measure.positions import by_position
from minillm.measure.scores import accuracy, bleu, change, f1, metric, rouge, token_f1, words

__all__ = [
    "Answers",
    "Score",
    "accuracy",
    "answers",
    "bleu",
    "by_position",
    "calibration_error",
    "change",
    "choose",
    "completions",
    "difference",
    "digits",
    "f1",
    "forgetting",
    "generate_text",
    "logits",
    "measures",
    "metric",
    "nll",
    "perplexity",
    "reliability",
    "room",
    "rouge",
    "token_calibration_error",
    "token_f1",
    "words",
]
