"""The learning rate: over the steps of a training, and for each group of parameters.

    rate of parameter p at step s  =  lr * factor(p) * share(s)

    share(s)     (s + 1) / (warmup + 1)              while s < warmup
                 schedule(x)                         x = (s - warmup) / (steps - warmup), 0 <= x < 1
    schedule(x)  1, 1 - x or (1 + cos(pi x)) / 2

The cosine is that of Loshchilov & Hutter 2017, arXiv 1608.03983.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354) is rates={r"B$": 16}.
"""

import math
import re

SCHEDULES = {  # the share of the rate at x, from 0 (end of the warm-up) to 1 (after the last step)
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def rate(step, steps, schedule="cosine", warmup=0):
    """The share of the peak learning rate at `step`, counted from 0.

    It rises over `warmup` steps, then follows the schedule. ValueError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))


def groups(model, lr, weight_decay=0.0, rates=None):
    """AdamW's parameter groups: what learns, by its learning rate and its weight decay.

    Matrices decay. Vectors, which are biases and norms, do not.
    rates: {regular expression: factor}. A parameter learns at factor * lr if the expression
    matches its name from the start or after a dot; of several that match, the last counts.
    ValueError for an expression that matches no learning parameter, and if nothing learns.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("nothing in this model learns: every parameter is frozen "
                         "(requires_grad is False)")
    factors = dict.fromkeys((name for name, _ in named), 1.0)
    for pattern, factor in (rates or {}).items():
        matching = [name for name in factors if found(pattern, name)]
        if not matching:
            raise ValueError(f"rates: {pattern!r} matches no parameter that learns; "
                             f"the first are: {', '.join(list(factors)[:8])}")
        factors.update(dict.fromkeys(matching, factor))
    sets = {}
    for name, p in named:
        key = factors[name] * lr, weight_decay if p.dim() > 1 else 0.0
        sets.setdefault(key, []).append(p)
    return [dict(params=params, lr=peak, peak=peak, weight_decay=decay)
            for (peak, decay), params in sets.items()]


def found(pattern, name):
    try:
        return re.search(rf"(?:^|\.)(?:{pattern})", name)
    except re.error as error:
        raise ValueError(f"rates: {pattern!r} is not a regular expression: {error}") from error
