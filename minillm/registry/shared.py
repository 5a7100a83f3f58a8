"""What the patches of one `wrap` share: tensors that stay, and facts of the present call."""

from torch import nn


class Common(nn.Module):
    """Tensors that all patches of one `wrap` share, as buffers: each patch has this same module.

    So they are in memory once, in a copy and a pickle once, and in a file once.
    """

    def __init__(self, **tensors):
        super().__init__()
        for name, t in tensors.items():
            self.register_buffer(name, t)


class Facts:
    """What one patch of a `wrap` finds out in a call of the model, for the others of that `wrap`.

    The patch at the embedding sees the ids of each call before any other leaf computes. It sets
    `now`, and the patches of the other leaves read it. All of them hold this same object (see
    `Patch.join`). A copy or a pickle keeps no call.
    """

    now = None  # None: no call has been yet

    def __getstate__(self):
        return {}
