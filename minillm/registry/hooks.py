"""The hooks of a module that is replaced in the tree: they go to what stands in its place.

A user registers a hook on a leaf, and expects it to see what the leaf computes. A Layer or a Format
that takes the leaf's place takes its tables of hooks too, as they are: so the handle that torch gave
the user removes the hook wherever it is by then.
"""

import collections

TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")


def take_hooks(new, old):
    """Move the hooks of `old` to `new`, which has none that are to be kept."""
    for table in TABLES:
        new.__dict__[table] = old.__dict__[table]
        old.__dict__[table] = collections.OrderedDict()
    new.__dict__["_is_full_backward_hook"] = old.__dict__.get("_is_full_backward_hook")
    pre = new.__dict__["_forward_pre_hooks"]
    for key in [key for key, hook in pre.items() if hook is no_shortcut]:
        del pre[key]


def no_shortcut(layer, inputs):
    """Changes nothing: that the Layer has a hook is what counts."""
