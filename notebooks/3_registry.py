# %% [markdown]
# # 3 The registry: formats and patches
#
# **How can all these techniques fit together, each in a file that knows nothing of the others?**

# %%
import inspect
import logging
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt
import torch
from torch import nn

import minillm
from minillm.measure.memory import bytes_by_format
from minillm.registry import CannotMerge, Format, Layer, Patch, layer, walk
from minillm.registry.attach import attach
from minillm.registry.verbs import verbs

logging.getLogger("minillm").setLevel(logging.WARNING)
plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
SHORT = bool(os.environ.get("MINILLM_SHORT"))

# %% [markdown]
# ## The idea
#
# A *leaf* is a module with one weight matrix $W$ (out, in), such as `nn.Linear`. A technique that
# touches a leaf is one of two things:
#
# - a **Format** says how $W$ is stored: `pack(W)` into buffers, and `dense()` back;
# - a **Patch** says what is computed around the leaf: `forward(below, x)`. If it is a change of the
#   weight, then also `fold(W, b)`, which gives the changed matrix.
#
# Both are in one `Layer`. Its base is the leaf, in whatever format, and its patches lie around
# it:
#
# $$y = p_n(\dots p_2(p_1(\text{base}))\dots)(x)$$
#
# A patch sees only `below`: what lies beneath it. That is why each technique is a file of its
# own.

# %%
print(inspect.getdoc(layer))

# %%
print(inspect.getsource(layer.Below))

# %% [markdown]
# ## A model, and what is wrapped
#
# Any `nn.Module` will do. Here are two layers of PyTorch.


# %%
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


model, x = small(), torch.randn(5, 64)
print(minillm.show(model))

minillm.quant.wrap(model)
minillm.lora.wrap(model, r=4)
print()
print(minillm.show(model))

# %% [markdown]
# The tree is the only state. There is no class around the model, and no list beside it.
# `model[0]` is now a `Layer`, and inside are the format and the patch:

# %%
print(model[0])

# %% [markdown]
# A *site* is a place in the tree under the name that its author gave it. `walk` gives the same
# sites, whatever is attached. So targets and files do not depend on it.

# %%
print("plain:  ", [site.name for site in walk(small())])
print("wrapped:", [site.name for site in walk(model)])
same = [site.name for site in walk(model)] == [site.name for site in walk(small())]
assert same and isinstance(model[0], Layer)

# %% [markdown]
# ## Predict: bytes
#
# int8 takes a byte a weight and a float32 scale a row. LoRA of rank 4 takes 4 (in + out) float32
# numbers. The biases stay.

# %%
rows, weights = 96 + 64, 2 * 64 * 96
predicted = {"int8": weights + 4 * rows, "lora and biases": 4 * (4 * 2 * (64 + 96) + rows)}
print("predicted:", predicted, "in all", sum(predicted.values()))
print("measured: ", dict(bytes_by_format(model)), "in all", sum(bytes_by_format(model).values()))
assert sum(predicted.values()) == sum(bytes_by_format(model).values())

# %% [markdown]
# ## Law: format then patch equals patch then format
#
# The format swaps the leaf. The patch asks the leaf. So their order does not matter.


# %%
def learnt(model):
    """Move what the patches have to learn, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for one in minillm.layers(model).values():
            for p in one.patches.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


one, two = small(), small()
minillm.quant.wrap(one), minillm.lora.wrap(one, r=4)
minillm.lora.wrap(two, r=4), minillm.quant.wrap(two)
for a, b in zip(minillm.layers(one).values(), minillm.layers(two).values()):
    b.patches.load_state_dict(a.patches.state_dict())  # the same A: each was drawn at random
print("equal:", torch.equal(learnt(one)(x), learnt(two)(x)))

# %% [markdown]
# ## Law: `fold` equals `forward`
#
# `forward` is the fast way, `fold` the matrix that computes the same. Merging writes what `fold`
# gives.

# %%
print(inspect.getsource(minillm.prune.Mask.fold))
with torch.no_grad():
    for technique in (minillm.lora, minillm.prune, minillm.lora.dora):
        model = small()
        technique.wrap(model)
        first = learnt(model)[0]
        W, b = first.dense()
        gap = (nn.functional.linear(x, W, b) - first(x)).abs().max()
        print(f"{list(first.patches)[0]:6} the two differ by at most {gap:.1e}")

# %% [markdown]
# ## Law: all comes back, bit for bit
#
# `merge` keeps the old base on the new one. Nothing is ever subtracted.

# %%
model = small()
first, before = model[0], {key: t.clone() for key, t in model.state_dict().items()}
minillm.lora.wrap(model, r=4)
merged = minillm.lora.merge(learnt(model))
print("merged, the first module is", type(merged[0]).__name__, "and differs:",
      not torch.equal(merged[0].weight, before["0.weight"]))
minillm.lora.unwrap(model)
after = model.state_dict()
same = all(torch.equal(after[key], before[key]) for key in before)
print(f"unwrapped, the bits are the same: {same}, and so is the module: {model[0] is first}")

# %% [markdown]
# What is no change of a weight cannot be merged. It says so, and changes nothing.

# %%
minillm.adapters.wrap(model, ["0"], width=64)
try:
    minillm.adapters.merge(model)
except CannotMerge as error:
    print("CannotMerge:", error)
model = minillm.adapters.unwrap(model)

# %% [markdown]
# ## Order: what a patch touches
#
# Patches that change the weight lie inside those that change the output. Among equals the order
# is that of the `wrap` calls. A mask around LoRA prunes what LoRA has learnt too, and LoRA around
# a mask fills the zeros.


# %%
def zeros(model):
    return float((model[0].dense()[0] == 0).float().mean())


with torch.no_grad():
    outside, inside = small(), small()
    learnt(minillm.lora.wrap(outside, r=4))
    minillm.prune.wrap(outside, sparsity=0.5)
    minillm.prune.wrap(inside, sparsity=0.5)
    learnt(minillm.lora.wrap(inside, r=4))
    for model in (outside, inside):
        print(f"{list(model[0].patches)}: {zeros(model):.0%} zeros")

# %% [markdown]
# ## A format and a patch of our own
#
# A format that stores only the sign of each weight, and one mean for each row (Rastegari et al.
# 2016, arXiv 1603.05279, equation 6):
#
# $$W \approx \alpha_i \,\mathrm{sign}(W_{ij}), \qquad \alpha_i = \frac{1}{m} \sum_j |W_{ij}|$$
#
# And a patch that adds a learnt vector to the output. Each is a class and a `wrap`.


# %%
class Signs(Format):
    not_neutral = "rounding to a sign"

    def allocate(self, device):
        self.register_buffer("sign", torch.zeros(self.shape, dtype=torch.int8, device=device))
        self.register_buffer("alpha", torch.zeros(self.shape[0], 1, device=device))

    def pack(self, W):
        self.sign, self.alpha = torch.sign(W).to(torch.int8), W.abs().mean(1, keepdim=True).float()

    def dense(self):
        return self.sign.to(self.dtype) * self.alpha.to(self.dtype)


class Shift(Patch):
    def __init__(self, site):
        super().__init__()
        self.shift = site.new(site.shape[0])  # zeros: neutral at birth

    def forward(self, below, x):
        y = below(x)  # (..., out)
        return y + self.shift.to(y.dtype)

    def fold(self, W, b):
        return W, self.shift.to(W.dtype) if b is None else b + self.shift.to(W.dtype)


class signs:
    unwrap, merge, unmerge, save, load = map(staticmethod, verbs("signs", Signs))


class shift:
    unwrap, merge, unmerge, save, load = map(staticmethod, verbs("shift", Shift))


# %% [markdown]
# They fit into everything that is there: the tree, the files, LoRA, each other. A module would
# hold the verbs, as `minillm.lora` does. On this page two classes hold them.

# %%
model = small()
attach(Shift, model), attach(Signs, model)
minillm.lora.wrap(model, r=4)
print(minillm.show(model))
with torch.no_grad():
    expected = learnt(model)(x)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "shift.safetensors"
        shift.save(model, path)
        print("\nshift's file:", path.stat().st_size, "bytes, of them", 4 * rows, "for the vectors")
    shift.merge(model)
    print(f"merged, the output differs by {(model(x) - expected).abs().max():.1e}")

# %% [markdown]
# ## How much does each format lose?
#
# The tool that measures it does not know which format it looks at: `dense()` is enough.

# %%
W = minillm.load("tiny")[0].layers[0].mlp.up_proj.weight.detach()


def leaf():
    one = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    one[0].weight.data.copy_(W)
    return one


formats = {
    "int8": lambda m: minillm.quant.wrap(m),
    "int4, groups of 32": lambda m: minillm.quant.wrap(m, bits=4, group=32),
    "nf4, groups of 32": lambda m: minillm.quant.nf4.wrap(m, group=32),
    "int2, groups of 32": lambda m: minillm.quant.wrap(m, bits=2, group=32),
    "signs": lambda m: attach(Signs, m),
}
found = {}
for name, wrap in formats.items():
    model = leaf()
    wrap(model)
    error = float((model[0].dense() - W).norm() / W.norm())
    bits = 8 * sum(bytes_by_format(model).values()) / W.numel()
    found[name] = bits, error
    print(f"{name:20} {bits:5.2f} bits a weight, off by {error:.3f} of the norm")
print("(signs uses a byte for a sign, and so 8 bits: packing 8 in a byte would make it 1)")

fig, axis = plt.subplots(figsize=(6, 3))
for (name, (bits, error)), marker in zip(found.items(), "osv^D"):
    axis.scatter(bits, error, marker=marker, label=name)
axis.set(title="what a format costs and loses", xlabel="bits a weight", yscale="log",
         ylabel="|W' - W| / |W|", xlim=(0, 11))
axis.legend(fontsize=7)
fig.tight_layout()
