"""Modules that a merge or a format replaced, and that wait outside the tree.

`unmerge` and `unwrap` put them back. The record is a module inside the new module, so it goes with
the model to another device, another dtype, into a copy and into a pickle. It registers no parameter
and no buffer: nothing in it learns, and nothing in it is in a `state_dict`. It does use memory, and
`report` counts its bytes.
"""

from torch import nn


class Aside(nn.Module):
    """Modules that are kept for later. As `shell` of a Format: the emptied leaf."""

    def __init__(self, *kept):
        super().__init__()
        self.kept = kept  # a tuple: torch sees no modules in it

    def _apply(self, fn, recurse=True):
        """`.to()`, `.half()` and the like apply to the kept modules too."""
        for module in self.kept:
            module._apply(fn)
        return super()._apply(fn, recurse)

    def tensors(self):
        """All parameters and buffers of the kept modules, and of what waits inside of them."""
        for module in self.kept:
            for part in module.modules():
                yield from (t for t in (*part._parameters.values(), *part._buffers.values())
                            if t is not None)
                if isinstance(part, Aside):
                    yield from part.tensors()


class Past(Aside):
    """The record of a merge, as `past` of the new base: the patch, the old base, the names beneath.

    A patch that changes the base when it comes, as PiSSA does, leaves a record that is `born`:
    `unwrap` puts the old base back, and `unmerge` ignores the record.
    """

    def __init__(self, patch, base, beneath=(), born=False):
        super().__init__(patch, base)
        self.beneath = beneath  # names of the patches that lay beneath: `unmerge` needs its place
        self.born = born

    @property
    def patch(self):
        return self.kept[0]

    @property
    def base(self):
        return self.kept[1]

    def extra_repr(self):
        return f"{self.patch.name} {'came' if self.born else 'is merged'}"


def past(module):
    """The Past of the last merge into this leaf that was kept, or of its birth; else None."""
    return module._modules.get("past")


def birth(module):
    """The Past of the patch that changed this leaf when it came; None if no patch did.

    `module` may be a Format that has replaced the leaf since.
    """
    record = past(module)
    if record is None and "shell" in module._modules:
        record = past(module.shell.kept[0])
    return record if record is not None and record.born else None


def before_birth(module):
    """The leaf as it was before a patch changed it when it came; None if no patch did."""
    record = birth(module)
    return record.base if record is not None else None
