# %% [markdown]
# # 4 LoRA, from its formula to a merged model
#
# **Why can a thin matrix change a large one, what does it cost, and what is left of it in the
# end?**

# %%
import inspect
import logging
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt
import torch
from torch.utils.flop_counter import FlopCounterMode

import minillm
from minillm.measure.memory import total_bytes
from minillm.registry import walk

logging.getLogger("minillm").setLevel(logging.WARNING)
plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
SHORT = bool(os.environ.get("MINILLM_SHORT"))

# %% [markdown]
# ## The formula
#
# Hu et al. 2021, arXiv 2106.09685, equation 3. The weight $W$ (out, in) is frozen. $A$ (r, in)
# and $B$ (out, r) learn:
#
# $$y = W x + b + s\,B A x, \qquad s = \frac{\alpha}{r}$$
#
# First by hand, with numbers that fit on a screen.

# %%
out, into, r, alpha = 6, 5, 2, 4.0
W, x = torch.randn(out, into), torch.randn(into)
A, B = torch.randn(r, into), torch.zeros(out, r)
s = alpha / r
print("B = 0: nothing changes:", torch.equal(W @ x + s * B @ (A @ x), W @ x))

B = torch.randn(out, r)
change = s * B @ A
print("after learning, W changes by a matrix of shape", tuple(change.shape))
print("its singular values are", [round(v, 3) for v in torch.linalg.svdvals(change).tolist()])
print("so its rank is", int(torch.linalg.matrix_rank(change)), "= r")

# %% [markdown]
# ## The library
#
# The same, as a page of code. `forward` computes $W x$ and the branch apart, which takes
# $r\,(\text{in} + \text{out})$ products for each token. `fold` gives the matrix that computes
# both.

# %%
print(inspect.getsource(minillm.lora.LoRA))

# %%
layer = torch.nn.Sequential(torch.nn.Linear(into, out))
minillm.lora.wrap(layer, r=r, alpha=alpha)
patch = minillm.layers(layer)["0"].patches["lora"]
with torch.no_grad():
    patch.A.copy_(A), patch.B.copy_(B)
    layer[0].base.weight.copy_(W), layer[0].base.bias.zero_()
    print("the library and the formula differ by",
          f"{(layer(x[None])[0] - (W @ x + s * B @ (A @ x))).abs().max():.1e}")

# %% [markdown]
# ## Parameters, bytes and FLOPs, predicted
#
# For a model of $n$ parameters, and $m$ of them in LoRA, AdamW keeps two numbers for each
# parameter that learns, and the backward pass one gradient. So training all of it takes $4 + 12$
# bytes a parameter in float32. With LoRA that is 4 bytes for each of the $n$, and 16 for each of
# the $m$.

# %%
model, tokenizer = minillm.load("tiny")
n = sum(p.numel() for p in model.parameters())
leaves = [site for site in walk(model) if site.leaf and ".layers." in f".{site.name}"]
ranks = [1, 2, 4, 8, 16, 32]
count = {r: sum(r * sum(site.shape) for site in leaves) for r in ranks}

ids = torch.randint(tokenizer.vocab_size, (1, 64))
with torch.no_grad(), FlopCounterMode(display=False) as plain:
    model(ids)
print(f"the model itself: {plain.get_total_flops():,} FLOPs for {ids.numel()} tokens")
print(f"{'r':>4} {'predicted':>10} {'measured':>10} {'MiB to train':>13} "
      f"{'more FLOPs, predicted':>22} {'measured':>11}")
for r in ranks:
    minillm.lora.wrap(model, r=r)
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    more = counter.get_total_flops() - plain.get_total_flops()
    predicted = 2 * ids.numel() * count[r]  # a product and a sum for each parameter and token
    print(f"{r:>4} {count[r]:>10,} {learns:>10,} {(4 * n + 16 * learns) / 2**20:>13.2f} "
          f"{predicted:>22,} {more:>11,}")
    assert learns == count[r] and more == predicted
    minillm.lora.unwrap(model)
print(f"all {n:,} parameters would take {16 * n / 2**20:.2f} MiB to train")

# %% [markdown]
# ## Training: which ranks does the task need?
#
# The model learns to say which of 8 packages a docstring comes from. Each rank begins at the same
# model, with the same data in the same order, and the same learning rate. That is what $s =
# \alpha / r$ is for.

# %%
train = minillm.data.task("package", tokenizer, "train", limit=64 if SHORT else 800).examples
test = minillm.data.task("package", tokenizer, "test", limit=8 if SHORT else 96).examples
steps = 3 if SHORT else 60
curves, results = {}, {0: minillm.measure.completions(model, test)}
for r in ranks[:2] if SHORT else [1, 4, 16]:
    torch.manual_seed(0)
    minillm.lora.wrap(model, r=r)
    log = minillm.train.train(model, train, steps=steps, lr=6e-3, progress=False)
    curves[r] = [record["loss"] for record in log]
    results[r] = minillm.measure.completions(model, test)
    minillm.lora.unwrap(model)  # the model itself never changed
for r, perplexity in results.items():
    print(f"r = {r:<3} {perplexity!r}")

fig, axes = plt.subplots(1, 2, figsize=(9, 3))
for r, losses in curves.items():
    axes[0].plot(losses, label=f"r = {r}")
axes[0].set(title="loss of each step", xlabel="step", ylabel="nats per token", yscale="log")
axes[0].legend()
names = [str(r) if r else "none" for r in results]
axes[1].bar(names, [float(value) for value in results.values()], width=0.5)
axes[1].set(title="perplexity of the test's answers", xlabel="r", yscale="log")
fig.tight_layout()

# %% [markdown]
# A rank of 1 already learns most of this task.
#
# ## What was learnt
#
# $B A$ has rank $r$ at most. Its singular values say how much of the rank is used: a few directions
# carry most of the change. Beside them is its norm, as a share of the norm of $W$.

# %%
torch.manual_seed(0)
minillm.lora.wrap(model, r=8)
minillm.train.train(model, train, steps=steps, lr=6e-3, progress=False)

fig, axes = plt.subplots(1, 2, figsize=(9, 3))
shares = {}
with torch.no_grad():
    for name, layer in minillm.layers(model).items():
        patch = layer.patches["lora"]
        change = patch.scale * patch.B @ patch.A
        shares[name] = float(change.norm() / layer.base.weight.norm())
        if name.startswith("layers.2."):
            values = torch.linalg.svdvals(change)[:8]
            axes[0].plot(range(1, 9), values, marker=".", label=name.split(".")[-1])
axes[0].set(title="singular values of s B A, block 2", xlabel="number")
axes[0].legend(fontsize=7, ncol=2)
axes[1].bar(range(len(shares)), shares.values())
axes[1].set(title="|s B A| / |W| of each leaf", xlabel="leaf, from the first block to the last")
fig.tight_layout()
low, high = min(shares.values()), max(shares.values())
print(f"the change is {low:.2f} to {high:.2f} of the weight's norm")

# %% [markdown]
# ## The file
#
# 4 bytes a parameter, the names, and a fingerprint of the model. Another model of the same shapes
# is an error, and not a wrong answer.

# %%
folder = tempfile.TemporaryDirectory()
path = pathlib.Path(folder.name) / "adapter.safetensors"
minillm.lora.save(model, path)
print(f"predicted from {4 * count[8]:,} bytes on; the file has {path.stat().st_size:,}")

torch.manual_seed(1)
other = minillm.Transformer(model.config)
try:
    minillm.lora.load(other, path)
except ValueError as error:
    print("ValueError:", str(error).replace(f"{folder.name}/", ""))

twin, _ = minillm.load("tiny")
minillm.lora.load(twin, path)
with torch.no_grad():
    print("the model that it belongs to computes the same:", torch.equal(twin(ids), model(ids)))
folder.cleanup()

# %% [markdown]
# ## Merging
#
# $W' = W + s\,B A$ is a matrix of the shape of $W$. So a merged model has the size and the speed
# that it had before LoRA. `merge` keeps the old weight, and `unmerge` gives back its very bits.
# Subtracting $s\,B A$ again would not: floats round.

# %%
before = {site.name: site.module.weight.clone() for site in walk(model) if site.leaf}
with torch.no_grad():
    wrapped = model(ids)
    minillm.lora.merge(model)
    print(f"merged and wrapped differ by {(model(ids) - wrapped).abs().max():.1e}, "
          f"of logits up to {wrapped.abs().max():.1f}")
    minillm.lora.unmerge(model)
same = all(torch.equal(site.module.weight, before[site.name]) for site in walk(model) if site.leaf)
print("after unmerge, all weights are the same, bit for bit:", same)

different = 0
for layer in minillm.layers(model).values():
    W, patch = layer.base.weight.detach(), layer.patches["lora"]
    change = (patch.scale * patch.B @ patch.A).detach()
    different += int((W + change - change != W).sum())
print(f"by subtraction {different:,} weights would have other bits")

minillm.lora.merge(model, keep=False)  # for good: no second copy is kept
with torch.no_grad(), FlopCounterMode(display=False) as counter:
    model(ids)
print(f"merged for good: {total_bytes(model):,} bytes, and {counter.get_total_flops():,} FLOPs, "
      f"as before LoRA: {counter.get_total_flops() == plain.get_total_flops()}")

# %% [markdown]
# ## Further
#
# `minillm.lora.dora` learns direction and length apart. `minillm.lora.pissa` begins with the
# largest part of $W$. Several adapters of different names fit around one model: `minillm.use`
# chooses among them. QLoRA is two lines: `minillm.quant.nf4.wrap(model)`, then
# `minillm.lora.wrap(model)`.
