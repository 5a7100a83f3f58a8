"""A patch that computes something else instead of its leaf: a head of classes.

Such a model predicts no tokens. What needs them says so here, and does not take the number of a
class for a token.
"""

from minillm.registry.sites import layers


def of(module):
    """The patch around a module that takes part and computes something else, or None."""
    patches = getattr(module, "patches", {}).values()
    return next((patch for patch in patches if patch.instead and patch.active), None)


def replacing(model):
    """The patch of a model that takes part and computes something else, or None."""
    return next(filter(None, map(of, layers(model).values())), None)


def check_tokens(patch, what):
    """ValueError if there is such a patch; `what` needs tokens."""
    if patch is not None:
        raise ValueError(f"{what} needs a model that predicts tokens, and this one computes "
                         f"{patch.kind}: minillm.use(model, ...) without {patch.name!r} switches "
                         f"it off, minillm.{patch.family}.unwrap(model) takes it away")
