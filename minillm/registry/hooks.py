"""The hooks of a module that is replaced in the tree: the new module takes them.

A user registers a hook on a leaf, and expects it to see what the leaf computes. A Layer or a Format
that replaces the leaf takes the leaf's tables of hooks themselves. So the handle that torch gave
the user still removes the hook.
"""

import collections

TABLES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)


def take_hooks(new, old):
    """Move the hooks of `old` to `new`; the hooks of `new` are dropped."""
    for table in TABLES:
        new.__dict__[table] = old.__dict__[table]
        old.__dict__[table] = collections.OrderedDict()
    new.__dict__["_is_full_backward_hook"] = old.__dict__.get("_is_full_backward_hook")
    pre = new.__dict__["_forward_pre_hooks"]
    for key in [key for key, hook in pre.items() if hook is no_shortcut]:
        del pre[key]


def no_shortcut(layer, inputs):
    """Does nothing: it is enough that the Layer has a hook (see Layer.__init__)."""
