# %% [markdown]
# # 7 Adapters
#
# **A frozen model and a few thousand new parameters: where do they do the most, and what do they
# cost afterwards?**

# %%
import copy
import inspect
import logging
import os
import time

import matplotlib.pyplot as plt
import torch
from torch.utils.flop_counter import FlopCounterMode

import minillm
from minillm.adapters import compacter, ia3, parallel
from minillm.compare import sweep
from minillm.freeze import norms
from minillm.registry import CannotMerge, roles

logging.getLogger("minillm").setLevel(logging.WARNING)
plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
SHORT = bool(os.environ.get("MINILLM_SHORT"))

original, tokenizer = minillm.load("tiny")
blocks = roles.parts(original).blocks
L, d = len(blocks), original.config.width
print(f"the model has {L} blocks of width {d} and "
      f"{sum(p.numel() for p in original.parameters()):,} parameters")

# %% [markdown]
# ## A bottleneck after a sublayer
#
# Houlsby et al. 2019 put a small network after the attention and after the MLP of each block. It
# takes the $d$ outputs down to $m$ numbers and up again, and adds the result:
#
# $$h \leftarrow h + W_{up}\, f(W_{down} h + b_{down}) + b_{up}$$
#
# $W_{up}$ is 0 at birth. **What does the model compute then?** What it computed before.

# %%
print(inspect.getsource(minillm.adapters.Bottleneck.adapt))
print(inspect.getsource(minillm.adapters.Bottleneck.change))

# %%
ids = torch.randint(tokenizer.vocab_size, (4, 128))
model = minillm.adapters.wrap(copy.deepcopy(original), size=16)
with torch.no_grad():
    print("unchanged at birth, bit for bit:", torch.equal(model(ids), original(ids)))
patch = model.layers[0].mlp.patches["adapters"]
with torch.no_grad():
    patch.up.normal_(), patch.b_up.normal_()
    h = torch.randn(5, d)
    inner = torch.nn.functional.gelu(h @ patch.down.T + patch.b_down)
    by_hand = h + inner @ patch.up.T + patch.b_up
    print(f"the library and the formula differ by {(patch.adapt(h) - by_hand).abs().max():.1e}")

# %% [markdown]
# ## Seven ways, and their parameters, predicted
#
# - **after both** sublayers: $2md + m + d$ each.
# - **with its norms**: the paper also trains the norms, here $d$ numbers each.
# - **after the MLP** alone: half of it (Pfeiffer et al. 2020).
# - **in parallel** (He et al. 2022): the network gets the input of the MLP, not its output, and has
#   no biases: $2md$.
# - **Compacter** (Mahabadi et al. 2021): the same shape as after both, but each matrix is a sum of
#   $n$ Kronecker products of small ones: $n^3 + 3(m + d)$.
# - **(IA)³** (Liu et al. 2022): no network. One factor for each key, each value and each inner
#   activation of the MLP.
# - **norms alone** (Zhao et al. 2023): nothing is added; the model's own norms learn.

# %%
m, n = 16, 4
key_values = original.config.kv_heads * original.config.head_size
WAYS = {
    "after both": (lambda model: minillm.adapters.wrap(model, size=m), 5e-3),
    "with its norms": (lambda model: minillm.adapters.wrap(model, size=m, norms=True), 5e-3),
    "after the MLP": (lambda model: minillm.adapters.wrap(model, ["mlp"], size=m), 5e-3),
    "in parallel": (lambda model: parallel.wrap(model, size=m), 6e-3),
    "Compacter": (lambda model: compacter.wrap(model, size=m, n=n), 3e-2),
    "(IA)3": (ia3.wrap, 1e-1),
    "norms alone": (norms.wrap, 1e-1),
}
each = 2 * m * d + m + d
PREDICTED = {
    "after both": 2 * L * each,
    "with its norms": 2 * L * each + (2 * L + 1) * d,
    "after the MLP": L * each,
    "in parallel": L * 2 * m * d,
    "Compacter": 2 * L * (n**3 + 3 * (m + d)),
    "(IA)3": L * (2 * key_values + original.config.ffn),
    "norms alone": (2 * L + 1) * d,
}


def learns(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


models = {name: wrap(copy.deepcopy(original)) for name, (wrap, _) in WAYS.items()}
print(f"{'':15} {'predicted':>10} {'measured':>10}")
for name, model in models.items():
    print(f"{name:15} {PREDICTED[name]:>10,} {learns(model):>10,}")
    assert learns(model) == PREDICTED[name]

# %% [markdown]
# ## A fair comparison
#
# The model learns to say which of 8 packages a docstring comes from. Every way sees the same
# examples in the same order, for the same number of steps. Each has the best of its own learning
# rates, because one rate for all would only show whom it suits: `sweep` tries three around a usual
# one and goes on while the best is at the edge. It judges by the validation text. The test text is
# used once, at the end.
#
# **Predict: does the order follow the number of parameters?**

# %%
print(inspect.getsource(sweep))

# %%
STEPS = 2 if SHORT else 40
data = {split: minillm.data.task("package", tokenizer, split, limit=limit).examples
        for split, limit in (("train", 32 if SHORT else 800), ("validation", 4 if SHORT else 64),
                             ("test", 8 if SHORT else 96))}


def trained(name, lr):
    """A copy of the model, wrapped in one way and trained at one rate."""
    torch.manual_seed(0)
    model = WAYS[name][0](copy.deepcopy(original))
    minillm.train.train(model, data["train"], steps=STEPS, lr=lr, warmup=0.1, progress=False)
    return model


def quality(model, split):
    return minillm.measure.completions(model, data[split])


results = {"no training": (0, quality(original, "test"))}
for name, (_, usual) in WAYS.items():
    seen = {}

    def at(lr):
        seen[lr] = trained(name, lr)
        return float(quality(seen[lr], "validation"))

    found = sweep(usual, at) if not SHORT else dict(rate=usual, sweep={usual: at(usual)})
    models[name] = seen[found["rate"]]
    results[name] = PREDICTED[name], quality(models[name], "test")
    rates = ", ".join(f"{lr}: {value:.2f}" for lr, value in found["sweep"].items())
    print(f"{name:15} best at {found['rate']:.2g} of {{{rates}}}")
print()
for name, (count, perplexity) in results.items():
    print(f"{name:15} {count:>8,} parameters   {perplexity!r}")

# %% [markdown]
# The interval behind each figure is that of the test text alone. Where two overlap, this test
# cannot tell them apart.
#
# The order does not follow the number. The norms alone, the fewest of all, come before Compacter
# and (IA)³ here, at a rate far above those of the networks. At the same size, beside the MLP is
# better than after it, as He et al. found. And the norms beside the adapters help more than twice
# as many bottlenecks do.

# %%
fig, axes = plt.subplots(figsize=(7, 3.6))
for i, (name, (count, perplexity)) in enumerate(list(results.items())[1:]):
    value, low, high = float(perplexity), perplexity.low, perplexity.high
    axes.errorbar([count], [value], [[value - low], [high - value]], fmt="o", capsize=3, label=name)
axes.set(xscale="log", xlabel="parameters that learn", ylabel="perplexity of the answers",
         title="fewer parameters, higher perplexity?")
axes.legend(fontsize=8)
fig.tight_layout()
plt.show()

# %% [markdown]
# ## What they cost afterwards
#
# A token takes $2md$ more products for each bottleneck, also after the training, because $f$ is
# between the two matrices: no single matrix computes both. A factor of (IA)³ is a factor of a row
# or a column of a weight, so it can be merged.
#
# **Predict: which of the seven cost nothing in the end?** The FLOPs are counted. The time is that
# of a forward pass, the shortest of several in turn, beside the model without an adapter.


# %%
def flops(model):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    return counter.get_total_flops()


@torch.no_grad()
def times(every, rounds=2 if SHORT else 15):
    """{name: the shortest time of a forward pass, in seconds}"""
    best = dict.fromkeys(every, float("inf"))
    for _ in range(rounds):
        for name, model in every.items():
            began = time.perf_counter()
            model(ids)
            best[name] = min(best[name], time.perf_counter() - began)
    return best


took = times({"": original} | models)
plain = flops(original)
tokens = ids.numel()
for name in ("after both", "after the MLP", "in parallel"):
    number = 2 * L if name == "after both" else L
    assert flops(models[name]) - plain == 2 * tokens * 2 * m * d * number, "as predicted"
print(f"{'':15} {'FLOPs':>7} {'time':>7}  merges")
for name, model in models.items():
    row = f"{name:15} {flops(model) / plain - 1:>+7.1%} {took[name] / took[''] - 1:>+7.1%}"
    if name == "norms alone":
        print(f"{row}  nothing to merge: it is the model itself")
        continue
    try:
        with torch.no_grad():
            before = model(ids)
            minillm.adapters.merge(model, keep=False)
            apart = (model(ids) - before).abs().max()
        print(f"{row}  yes, and computes the same up to {apart:.0e}")
    except CannotMerge:
        print(f"{row}  no")

# %% [markdown]
# Norms, factors and biases need no matrix product, so they do not count as FLOPs. They do take
# time, because each is a pass over the activations. On so small a model the calls themselves are
# most of it.
#
# ## Taking an adapter off
#
# What an adapter learnt is beside the model, its norms too. So `use` switches it, and `unwrap`
# gives back the model's own bits. What `norms alone` learnt is the model itself.

# %%
model = models["with its norms"]
with torch.no_grad():
    learnt = model(ids)
    print("switched off, the model is the old one:",
          torch.equal(minillm.use(model)(ids), original(ids)))
    print("switched on again:", torch.equal(minillm.use(model, "adapters")(ids), learnt))
    minillm.adapters.unwrap(model)
    print("unwrapped:", torch.equal(model(ids), original(ids)))
    model = minillm.freeze.unwrap(models["norms alone"])
    print("norms alone, unwrapped:", torch.equal(model(ids), original(ids)))

# %% [markdown]
# Exercises: a bottleneck of $m = 2$ (does the perplexity rise?); LoRA at the rank with as many
# parameters as `after both`; both at once, `minillm.lora.wrap` around the model with adapters.
