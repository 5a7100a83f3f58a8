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
    """Of a merge, as `past` of the new base: the patch, the old base, and the patches beneath it."""

    def __init__(self, patch, base, beneath):
        super().__init__(patch, base)
        self.beneath = beneath  # their names, which says where `unmerge` puts the patch

    @property
    def patch(self):
        return self.kept[0]

    @property
    def base(self):
        return self.kept[1]

    def extra_repr(self):
        return f"{self.patch.name} is merged"


def past(module):
    """The Past of the last merge into this leaf that was kept, or None."""
    return module._modules.get("past")
