"""What a merge replaced: the old base, and the patch whose change is in the new one.

`unmerge` and `unwrap` put it back. The record is a module inside the merged leaf, so it goes with
the model to another device, another dtype, into a copy and into a pickle. It registers no parameter
and no buffer: nothing of it learns, and nothing of it is in a `state_dict`. Its bytes are real, and
`report` counts them.
"""

from torch import nn


class Past(nn.Module):
    def __init__(self, technique, patch, base):
        super().__init__()
        self.technique = technique
        self.kept = patch, base  # a tuple: torch sees no modules in it

    def _apply(self, fn, recurse=True):
        """`.to()`, `.half()` and the like."""
        for module in self.kept:
            module._apply(fn)
        return super()._apply(fn, recurse)

    def tensors(self):
        """All parameters and buffers that are kept, those of earlier merges among them."""
        for module in self.kept:
            for part in module.modules():
                yield from (t for t in (*part._parameters.values(), *part._buffers.values())
                            if t is not None)
                if isinstance(part, Past):
                    yield from part.tensors()

    def extra_repr(self):
        return f"{self.technique} is merged"


def past(module):
    """The Past of the last merge into this leaf that was kept, or None."""
    return module._modules.get("past")
