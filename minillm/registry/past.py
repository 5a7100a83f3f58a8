"""Modules that wait outside of the tree: what a merge or a format replaced.

`unmerge` and `unwrap` put them back. The record is a module inside the one that took the place, so it
goes with the model to another device, another dtype, into a copy and into a pickle. It registers no
parameter and no buffer: nothing of it learns, and nothing of it is in a `state_dict`. Its bytes are
real, and `report` counts them.
"""

from torch import nn


class Aside(nn.Module):
    """Modules that are kept for later. Of a Format, as `shell`: the emptied leaf."""

    def __init__(self, *kept):
        super().__init__()
        self.kept = kept  # a tuple: torch sees no modules in it

    def _apply(self, fn, recurse=True):
        """`.to()`, `.half()` and the like."""
        for module in self.kept:
            module._apply(fn)
        return super()._apply(fn, recurse)

    def tensors(self):
        """All parameters and buffers that are kept, also those that wait inside of what is kept."""
        for module in self.kept:
            for part in module.modules():
                yield from (t for t in (*part._parameters.values(), *part._buffers.values())
                            if t is not None)
                if isinstance(part, Aside):
                    yield from part.tensors()


class Past(Aside):
    """Of a merge, as `past` of the new base: the patch, the old base, and the patches beneath it.

    Where a patch changed the base when it came, as PiSSA does, the record is `born`: `unwrap` puts the
    old base back, and `unmerge` has nothing to do with it.
    """

    def __init__(self, patch, base, beneath=(), born=False):
        super().__init__(patch, base)
        self.beneath = beneath  # their names, which says where `unmerge` puts the patch
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
    """The Past of the last merge into this leaf that was kept, or None."""
    return module._modules.get("past")


def before_birth(module):
    """The leaf as it was before a patch changed it when it came; None where none did.

    `module` may be a Format that has taken the leaf's place since.
    """
    record = past(module)
    if record is None and "shell" in module._modules:
        record = past(module.shell.kept[0])
    return record.base if record is not None and record.born else None
