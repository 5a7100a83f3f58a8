"""The learning rate of each technique: the usual one, and the sweep that finds the best.

A technique at the rate of another says nothing about it. So each row of the table has its own.
"""

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
    together: a function of a list of rates that tries the first three at once, and returns
    {rate: its quality, or None}.
    """
    def best_of():
        return min(found, key=lambda lr: (found[lr] is None, -better * (found[lr] or 0), lr))

    grid = [usual / STEP, usual, usual * STEP]
    found = together(grid) if together else {lr: attempted(quality, lr) for lr in grid}
    while len(found) < MOST and (best := best_of()) in (min(found), max(found)):
        lr = best * STEP if best == max(found) else best / STEP
        found[lr] = attempted(quality, lr)
    best = best_of()
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


def attempted(quality, lr):
    """quality(lr), or None where the loss or the logits are no longer numbers."""
    try:
        return float(quality(lr))
    except ValueError as error:
        if "nan" not in str(error) and "inf" not in str(error):
            raise
        return None
