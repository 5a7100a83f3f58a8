# %% [markdown]
# # 5 Making it small
#
# **How many bits does a weight need, and what does each bit that is left out cost?**

# %%
import copy
import inspect
import logging
import os
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

import minillm
from minillm.measure.memory import bytes_by_format, total_bytes
from minillm.registry import walk

logging.getLogger("minillm").setLevel(logging.WARNING)
plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
SHORT = bool(os.environ.get("MINILLM_SHORT"))

original, tokenizer = minillm.load("tiny")
text = minillm.data.task("language", tokenizer, "test").text
calibration = minillm.data.task("language", tokenizer, "validation").examples[: 4 if SHORT else 32]


def inner(model):
    """The leaves in the blocks: those that the techniques take by default."""
    return [site for site in walk(model) if site.leaf and ".layers." in f".{site.name}"]


def perplexity(model):
    windows = 2 if SHORT else 16
    return minillm.measure.perplexity(model, tokenizer, text, length=256, windows=windows)


N = sum(site.shape[0] * site.shape[1] for site in inner(original))
REST = total_bytes(original) - 4 * N  # the embedding and the norms
whole = perplexity(original)
print(f"{N:,} weights in the blocks take {4 * N:,} bytes, the rest {REST:,}; {whole!r}")

# %% [markdown]
# ## A grid
#
# A code $q$ of $b$ bits stands for the number $s\,q$. The scale $s$ belongs to a row or to a
# group of neighbours:
#
# $$s = \max |w| / 127, \qquad q = \mathrm{round}(w / s), \qquad w \approx s q$$
#
# That is 8 bits, with the codes -127 to 127. With fewer bits the codes go from $-2^{b-1}$ to
# $2^{b-1} - 1$, and $s$ is the smallest scale with which both ends of the row fit.

# %%
print(inspect.getsource(minillm.quant.grid.Grid.fit))
print(inspect.getsource(minillm.quant.grid.Grid.round))
print(inspect.getsource(minillm.quant.grid.Grid.dense))

# %% [markdown]
# ## Predict: the error
#
# Rounding moves a weight by something between $-s/2$ and $s/2$. If all of these are equally
# likely, the root of the mean square is $s / \sqrt{12}$. A bit less doubles $s$, and so the
# error.

# %%
W = original.layers[0].mlp.up_proj.weight.detach()
fig, axes = plt.subplots(1, 3, figsize=(11, 2.8))
for axis, bits in zip(axes, (8, 4, 2)):
    grid = minillm.quant.grid.Grid(bits, group=32)
    scale, zero = grid.fit(W)
    back = grid.dense(grid.round(W, scale, zero), scale, zero)
    predicted = float(scale.square().mean().sqrt()) / 12**0.5
    measured = float((back - W).square().mean().sqrt())
    print(f"{bits} bits: the error is {predicted:.5f} by the formula, {measured:.5f} measured, "
          f"of weights of {float(W.square().mean().sqrt()):.5f}")
    axis.scatter(W[0], back[0], s=6)
    axis.set(title=f"a row in {bits} bits", xlabel="weight", ylabel="what is stored")
fig.tight_layout()

# %% [markdown]
# With 2 bits only the codes -2, -1, 0 and 1 are left, and the error is more than half as large as
# the weights.
#
# ## Predict: the bytes
#
# A weight takes $b/8$ bytes, and a group of $g$ weights 4 bytes for its scale. (8 codes of 3 bits
# share 3 bytes.) So a weight costs $b / 8 + 4 / g$ bytes. A group of None is the whole row.

# %%
settings = {
    "int8": (8, None),
    "int4": (4, None),
    "int4, groups of 32": (4, 32),
    "int3, groups of 32": (3, 32),
    "int2, groups of 32": (2, 32),
}
table = {"float32": (total_bytes(original), whole)}
for name, (bits, group) in settings.items():
    groups = sum(site.shape[0] * (site.shape[1] // (group or site.shape[1]))
                 for site in inner(original))
    predicted = REST + N * bits // 8 + 4 * groups
    model = minillm.quant.wrap(copy.deepcopy(original), bits=bits, group=group)
    table[name] = total_bytes(model), perplexity(model)
    print(f"{name:20} predicted {predicted:>9,} bytes, measured {table[name][0]:>9,}   "
          f"perplexity {table[name][1]:.2f}")
    assert predicted == table[name][0]

# %% [markdown]
# int8 costs next to nothing. The rows here are short, 96 or 256 weights, so a scale for each 32
# of them gains little over a scale for each row. With 3 and 2 bits the way of rounding begins to
# matter.
#
# ## Rounding that looks at the inputs
#
# What counts is $W x$, and not $W$. GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds one
# column after the other, and moves the columns that are left so that they repair the error:
#
# $$\min_{\hat W} \|\hat W X - W X\|^2$$
#
# NF4 (Dettmers et al. 2023, arXiv 2305.14314) keeps the rounding and changes the grid: 16 levels
# that lie as densely as a normal distribution does.

# %%
print(inspect.getsource(minillm.quant.gptq).split('"""')[1][:1500])

# %%
for bits in (4, 3, 2):
    model = copy.deepcopy(original)
    minillm.quant.gptq.wrap(model, calibration, bits=bits, group=32, progress=False)
    name = f"GPTQ int{bits}, groups of 32"
    table[name] = total_bytes(model), perplexity(model)
    nearest = table[f"int{bits}, groups of 32"][1]
    print(f"{bits} bits: perplexity {nearest:.2f} to the nearest, {table[name][1]:.2f} by GPTQ")
model = minillm.quant.nf4.wrap(copy.deepcopy(original), group=32)
table["nf4, groups of 32"] = total_bytes(model), perplexity(model)
print(f"nf4:    perplexity {table['nf4, groups of 32'][1]:.2f}")

# %% [markdown]
# ## Pruning: which weights are not needed?
#
# $$W' = M * W, \quad M_{ij} = 1 \text{ if } \mathrm{score}(W_{ij}) \text{ is among the largest}$$
#
# Magnitude pruning takes $|w|$ as the score. Wanda (Sun et al. 2023, arXiv 2306.11695) takes
# $|w|\,\|x\|$: a weight matters as much as its input is large. Random numbers show what a score
# is worth.

# %%
print(inspect.getsource(type(minillm.prune.magnitude)))
print(inspect.getsource(minillm.prune.Mask.fold))

# %%
shares = [0.25, 0.5] if SHORT else [0.125, 0.25, 0.375, 0.5, 0.625, 0.75]
ways = {
    "random": lambda m, s: minillm.prune.wrap(m, sparsity=s, score=minillm.prune.Random(0)),
    "magnitude": lambda m, s: minillm.prune.wrap(m, sparsity=s),
    "wanda": lambda m, s: minillm.prune.wanda.wrap(m, calibration, sparsity=s, progress=False),
}
curves = {name: [perplexity(wrap(copy.deepcopy(original), share)) for share in shares]
          for name, wrap in ways.items()}
print("sparsity ", *(f"{share:>9.1%}" for share in shares))
for name, values in curves.items():
    print(f"{name:9}", *(f"{float(value):>9.2f}" for value in values))

# %% [markdown]
# Training goes on through the mask: what is pruned stays pruned, and the others repair it. Here
# it is with half of the weights gone, and a few steps on other docstrings.

# %%
half = minillm.prune.wanda.wrap(copy.deepcopy(original), calibration, sparsity=0.5, progress=False)
cut = perplexity(half)
examples = minillm.data.task("language", tokenizer, "train").examples
steps = 2 if SHORT else 60
minillm.train.train(half, examples, steps=steps, lr=1e-3, progress=False)
repaired = perplexity(half)
weights = [layer.dense()[0] for layer in minillm.layers(half).values()]
zeros = sum(int((W == 0).sum()) for W in weights) / N
print(f"perplexity {whole:.2f} as it was, {cut:.2f} pruned, {repaired:.2f} after {steps} steps; "
      f"{zeros:.1%} of the weights are zero")

fig, axis = plt.subplots(figsize=(6, 3))
for name, values in curves.items():
    axis.plot([0, *shares], [float(whole), *map(float, values)], marker=".", label=name)
axis.scatter([0.5], [float(repaired)], color="black", zorder=3, label="wanda, trained on")
axis.set(title="what a pruned share costs", xlabel="sparsity", ylabel="perplexity", yscale="log",
         ylim=(30, 150))
axis.legend()
fig.tight_layout()

# %% [markdown]
# ## Zeros alone save nothing
#
# A mask is a byte more for each weight, and after `merge` a zero takes as many bytes as any
# number. CSR stores the values that are not zero, a column for each (4 bytes), and where each row
# begins (4 bytes). With the share $z$ of zeros in a matrix (n, m):
#
# $$\text{bytes} = 8\,(1 - z)\,n m + 4\,(n + 1) \quad\text{instead of}\quad 4\,n m$$
#
# So it pays from a little above half of zeros on: the $4\,(n + 1)$ bytes have to be saved too.

# %%
print(inspect.getsource(minillm.sparse.CSR.pack))

# %%
print(f"{'sparsity':>9} {'predicted':>11} {'measured':>11}   of {4 * N:,} bytes dense")
for share in (0.5, 0.75, 0.875):
    model = minillm.prune.wrap(copy.deepcopy(original), sparsity=share)
    minillm.prune.merge(model, keep=False)
    kept = sum(int((site.module.weight != 0).sum()) for site in inner(model))
    rows = sum(site.shape[0] + 1 for site in inner(model))
    minillm.sparse.wrap(model, anyway=share == 0.5)  # at a half it would cost a few bytes more
    measured = bytes_by_format(model)["sparse"]
    print(f"{share:>9.1%} {8 * kept + 4 * rows:>11,} {measured:>11,}")
    assert measured == 8 * kept + 4 * rows

# %% [markdown]
# ## FLOPs and time
#
# A dense product takes $2 n m$ FLOPs for each row of $x$, a sparse one $2 (1 - z) n m$. But a
# sparse product reads its weights in an order that a processor cannot foresee. So fewer FLOPs are
# not at once less time. The times are of this machine, at this moment.


# %%
def seconds(model, x, times=3 if SHORT else 15):
    """The median of some runs."""
    found = []
    with torch.no_grad():
        for _ in range(times):
            began = time.perf_counter()
            model(x)
            found.append(time.perf_counter() - began)
    return sorted(found)[times // 2]


size = 512 if SHORT else 1024
x = torch.randn(32, size)
dense = nn.Sequential(nn.Linear(size, size, bias=False))
plain = seconds(dense, x)
print(f"dense:          {2 * 32 * size * size / 1e6:6.1f} MFLOPs, {plain * 1e3:6.2f} ms")
points = []
for share in (0.5, 0.75, 0.9, 0.95):
    model = minillm.prune.wrap(copy.deepcopy(dense), ["0"], sparsity=share)
    minillm.prune.merge(model, keep=False)
    minillm.sparse.wrap(model, ["0"], anyway=True)
    took = seconds(model, x)
    points.append((share, took / plain))
    flops = 2 * 32 * model[0].values.numel()
    print(f"{share:.0%} zeros, CSR: {flops / 1e6:6.1f} MFLOPs, {took * 1e3:6.2f} ms")

# %% [markdown]
# ## All on one picture
#
# Left: the formats. The nearer to the lower left corner, the better. Right: the time of CSR.

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6))
for i, (name, (size, value)) in enumerate(table.items()):
    axes[0].scatter(size / 2**20, float(value), marker="osv^D<>Pp*X"[i], label=name)
axes[0].set(title="bytes and perplexity", xlabel="MiB", ylabel="perplexity", yscale="log")
axes[0].legend(fontsize=7)
axes[1].plot(*zip(*points), marker=".")
axes[1].axhline(1, color="grey", linestyle=":", label="dense")
axes[1].set(title="time of a CSR product", xlabel="share of zeros", ylabel="of the dense time")
axes[1].legend()
fig.tight_layout()
for name, (size, value) in table.items():
    print(f"{name:26}{size:>10,} bytes   perplexity {value:.2f}")
