"""Several LoRAs at once over one base: each computes its own rows of a batch.

    y_i = W x_i + b + s_i B_i A_i x_i        i = 1, ..., k         `lora`'s equation for each LoRA

The rows of all LoRAs lie one under the other in one batch: x = [x_1; ...; x_k]. So the
product with W runs once over all rows, and W is in memory once. Each branch computes
its own rows alone. No row depends on another row, and so no LoRA on another LoRA: y_i
and the gradients of A_i and B_i are those of LoRA i alone in the model.

    code          formula   shape
    x             x         (b, t, in); of an embedding: ids (b, t)
    rows[name]    b_i       how many rows LoRA i has in this batch; b = b_1 + ... + b_k
    loras[name]             LoRA i of this leaf, with its own rank, scale and targets

Where `x.split` and `torch.cat` divide a batch and join it again, autograd does the same with
the gradients: each is copied once. A slice for each LoRA would have a gradient of the size of
the whole batch, k times.

Cost: that of k runs, without k - 1 copies of the base. The arithmetic stays, because
each LoRA changes what the blocks after it compute. A processor that one run's batch
leaves idle finishes sooner; one that it fills does not. The activations of all rows are
in memory at once, so k runs need more memory than one run after the other.

`train.many` is the training loop. `minillm.rows` also gives each row its own adapters:
any kind, several in one row, and rows in any order. It computes every adapter for all rows.
peft refuses rows of several adapters in training. mLoRA (VLDB 2025) trains several LoRAs at
once, inside of Llama classes of its own. Not included: other kinds than LoRA; one product
for all branches (B_i and A_i of equal ranks, stacked), which would pay on a GPU.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 8)
>>> for name, r in (("a", 2), ("b", 3)):
...     model = minillm.lora.wrap(model, name=name, r=r)
>>> for layer in minillm.layers(model).values():
...     for patch in layer.patches.values():
...         _ = nn.init.normal_(patch.B)                                # as if after training
>>> with minillm.lora.many.together(model, ["a", "b"]) as cut:
...     cut(a=2, b=3)                                                   # b = 2 + 3 rows
...     y = model(x)
>>> torch.allclose(y[:2], minillm.use(model, "a")(x[:2]), atol=1e-5)
True
>>> torch.allclose(y[2:], minillm.use(model, "b")(x[2:]), atol=1e-5)
True
"""

import contextlib

import torch

from minillm.registry import Patch, layers
from minillm.registry.names import adapters, follow


class Many(Patch):
    """The LoRAs of one leaf, while `together` lasts: each adds its branch to its own rows."""

    name = "LoRAs at once"  # no adapter can have a name with spaces

    def __init__(self, loras, rows):
        super().__init__()
        self.loras, self.rows = loras, rows  # {name: LoRA}; {name: its rows}, of all leaves

    def forward(self, below, x):
        sizes, y = list(self.rows.values()), below(x)
        if len(x) != sum(sizes):
            raise ValueError(f"the LoRAs {', '.join(map(repr, self.rows))} have {sizes} rows, and "
                             f"a leaf of this model has an input of {len(x)} rows")
        parts = zip(self.rows, x.split(sizes), y.split(sizes))  # (b_i, t, in), (b_i, t, out)
        return torch.cat([
            y_i + self.loras[name].branch(below, x_i, y.dtype) if name in self.loras else y_i
            for name, x_i, y_i in parts])

    def select(self, below, x):
        return self(below, x)


@contextlib.contextmanager
def together(model, names):
    """A context in which the LoRAs with these names compute at once, each in its own rows.

    It yields a function cut(name=rows, ...), to be called before a batch: how many rows each
    LoRA has in it, in the order of the rows. A LoRA without a row need not be named. All other
    adapters take no part meanwhile. Afterwards the same adapters as before take part.

    ValueError for a name that no adapter has, an adapter that is no LoRA or that took a part of
    the base (`pissa`), and a patch around a LoRA that computes with one folded weight (a mask).
    """
    every = check(model, names)
    follow(model)
    before, rows, wrapped = [(patch, patch.active) for patch in every], {}, []
    try:
        for patch in every:
            patch.active = False
        for layer in layers(model).values():
            loras = {name: layer.patches[name] for name in names if name in layer.patches}
            if loras:
                layer.add(Many(loras, rows))
                wrapped.append(layer)

        def cut(**sizes):
            rows.clear()
            rows.update(sizes)

        yield cut
    finally:
        for layer in wrapped:
            del layer.patches[Many.name]
        follow(model)
        for patch, active in before:
            patch.active = active


def check(model, names):
    """The adapters of the model; ValueError if those with these names cannot compute at once."""
    every = adapters(model, names)
    if any(patch.rows is not None for patch in every):
        raise ValueError("each row has its own adapter here (minillm.rows): call it outside of "
                         "that context")
    for where, layer in layers(model).items():
        inner = None  # the first of these LoRAs in this layer
        for patch in layer.patches.values():
            if patch.name in names and patch.kind != "lora":
                raise ValueError(f"{patch.name!r} is a {patch.kind}, and only LoRAs compute at "
                                 "once: train it alone")
            if patch.name in names and patch.start:
                raise ValueError(f"{patch.name!r} took a part out of the base when it came "
                                 "(pissa), and the other LoRAs need that part: train it alone")
            if patch.name in names:
                inner = inner or patch.name
            elif inner and patch.touches == "weight" and patch.active and patch not in every:
                raise ValueError(f"{patch.name} is around {inner!r} at {where!r} and computes "
                                 "with one folded weight, which differs from LoRA to LoRA: wrap "
                                 f"{patch.name} before the LoRAs")
    return every
