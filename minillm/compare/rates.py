"""The learning rate of each technique: the usual one, and the sweep around it."""

from minillm.registry import METHODS

# The usual learning rate of each technique, at which its sweep begins. For the base methods it is
# near the best that `compare` has found, on SmolLM2 and on the tiny model, whose weights take
# larger steps; for the others (bitfit, dora, ia3, ...) it is a guess. "full" trains everything,
# "none" nothing.
RATES, OF_TINY = (
    {"none": None, "full": full}
    | {method.name: method.rates[model] for method in METHODS.values()
       if method.rates and method.tokens}
    for model, full in (("smollm2", 1e-4), ("tiny", 4e-4))
)
BASIC = [name for name in RATES if name not in METHODS or METHODS[name].family == name]
STEP = 10**0.5  # between neighbouring rates of a sweep
MOST = 6  # the most rates that a sweep tries


def usual(name, model):
    """The usual learning rate of a technique on a model, named as `zoo.load` takes it."""
    return (OF_TINY if str(model) == "tiny" else RATES).get(name)


def sweep(usual, quality, better=-1, together=None):
    """dict(rate: the best learning rate, sweep: {rate: quality(rate)}, at_edge: whether
    the best is the smallest or the largest rate tried).

    It tries three rates around the usual one, then one more at a time while the best is at
    an edge, at most MOST. A tie goes to the smaller rate, which changes the model less. A
    rate at which the loss is no longer a number gets None, and is worse than all others.
    together: a function of the first three rates that trains them at once, and returns
    {rate: its quality or None}.
    """

    def rank(lr):
        return found[lr] is None, -better * (found[lr] or 0), lr

    first = [usual / STEP, usual, usual * STEP]
    found = together(first) if together else {lr: number(lambda: quality(lr)) for lr in first}
    while (best := min(found, key=rank)) in (min(found), max(found)) and len(found) < MOST:
        lr = best * STEP if best == max(found) else best / STEP
        found[lr] = number(lambda: quality(lr))
    if found[best] is None:
        raise ValueError(
            f"at every learning rate tried ({', '.join(f'{lr:.2g}' for lr in sorted(found))}) "
            "the loss became nan or inf"
        )
    return dict(
        rate=best,
        sweep={f"{lr:.2g}": found[lr] for lr in sorted(found)},
        at_edge=best in (min(found), max(found)),
    )


def number(quality):
    """quality() as a float; None if the loss or the logits are no longer numbers."""
    try:
        return float(quality())
    except ValueError as error:
        if "nan" not in str(error) and "inf" not in str(error):
            raise
        return None
