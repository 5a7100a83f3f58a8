# %% [markdown]
# # 10 Long contexts
#
# **A model was trained on texts of 256 tokens. What does it do with the 257th, and how does
# one help it?**

# %%
import inspect
import logging
import os

import matplotlib.pyplot as plt
import torch

import minillm
from minillm.measure import by_position
from minillm.model import rope
from minillm.zoo.pretrain import RECIPE

logging.getLogger("minillm").setLevel(logging.WARNING)
plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
SHORT = bool(os.environ.get("MINILLM_SHORT"))

original, tokenizer = minillm.load("tiny")
config = original.config
TRAINED, FACTOR = RECIPE["length"], 4
LENGTH = FACTOR * TRAINED
text = minillm.data.task("language", tokenizer, "test").text
print(f"the model takes {config.positions} positions, was trained on {TRAINED}, and is measured on "
      f"{LENGTH}; the test text has {len(tokenizer.encode(text)):,} tokens")

# %% [markdown]
# ## Positions are angles
#
# RoPE turns pair $i$ of a head by the angle $p f_i$ at position $p$:
#
# $$f_i = \mathrm{base}^{-2i/d}$$
#
# The product of a query and a key depends on the difference of their angles only. The fast pairs
# turn many times in 256 tokens: the model has seen all their angles. The slow pairs turn through
# a part of the circle. **Which pairs meet angles beyond the trained ones?** Those that turn less
# than once.
#
# The configuration does not say how long the texts of the training were. It says how many
# positions are allowed, here twice as many.

# %%
print(inspect.getsource(rope.frequencies))
f = rope.frequencies(config.head_size, config.rope_base)
turns = TRAINED * f / (2 * torch.pi)
print(f"turns in {TRAINED} tokens:", *(f"{t:.3g}" for t in turns.tolist()))
print(f"{(turns < 1).sum()} of {len(turns)} pairs never close the circle")

# %% [markdown]
# ## Four ways to turn more slowly
#
# Each divides $f_i$ by something between 1 and the factor. They differ in what they do to the fast
# pairs, which tell neighbours apart.

# %%
print(inspect.getsource(rope.divisors))


def stretched(kind):
    return rope.stretch(minillm.load("tiny")[0], kind, FACTOR, original=TRAINED)


KINDS = "none", "linear", "ntk", "llama3", "yarn"
for kind in KINDS[1:]:
    c = stretched(kind).config
    slower = f / rope.frequencies(c.head_size, c.rope_base, c.rope_scaling)
    plt.plot(range(len(f)), slower, "o-", label=kind, markersize=3)
plt.xlabel("pair i")
plt.ylabel("times slower")
plt.legend()
plt.show()

# %% [markdown]
# ## Perplexity by position
#
# **Predict: where does each curve leave the level of the first 256 tokens?** Without scaling, soon
# after 256. Linear scaling slows every pair, also those that tell neighbours apart, so its curve
# starts higher. The others leave the fast pairs as they are. NTK slows the middle pairs by less
# than the factor, so some of them reach new angles before the end: its curve rises first.


# %%
def curve(model):
    windows = 1 if SHORT else 16
    return by_position(model, tokenizer, text, LENGTH, parts=8, windows=windows)


def draw(curves):
    for name, parts in curves.items():
        middles = [(first + end) / 2 for first, end, _ in parts]
        plt.plot(middles, [value for *_, value in parts], "o-", label=name, markersize=3)
    plt.axvline(TRAINED, color="gray", linestyle=":")
    plt.xlabel("position")
    plt.ylabel("perplexity")
    plt.ylim(bottom=0)
    plt.legend()
    plt.show()


curves = {kind: curve(stretched(kind)) for kind in KINDS}
for kind, parts in curves.items():
    print(f"{kind:7}", *(f"{value:6.1f}" for *_, value in parts))
draw(curves)

# %% [markdown]
# ## A short training on long texts
#
# The papers train a few hundred steps on long texts afterwards. A LoRA is enough to see it. Sixty
# steps teach this small model the new angles even without a scaling; with YaRN it ends lower at
# every position.

# %%
ids = tokenizer.encode(minillm.data.task("language", tokenizer, "train").text)
rows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]
examples = [minillm.data.Example(row, row) for row in rows]
STEPS = 2 if SHORT else 60
tuned = {}
for kind in ("none", "yarn"):
    model = minillm.lora.wrap(stretched(kind), r=16, alpha=32)
    minillm.train.train(model, examples, steps=STEPS, lr=3e-3, batch_size=1 if SHORT else 2,
                        warmup=0.1, progress=False)
    tuned[f"{kind}, trained {STEPS} steps"] = curve(model)
    print(f"{kind:7}", *(f"{value:6.1f}" for *_, value in tuned[f"{kind}, trained {STEPS} steps"]))
draw({kind: curves[kind] for kind in ("none", "yarn")} | tuned)

# %% [markdown]
# ## What a file keeps
#
# The scaling is a part of the configuration, by the names that transformers gives it. NTK is
# another base and needs no name.

# %%
for kind in ("yarn", "ntk"):
    c = stretched(kind).config
    print(f"{kind}: positions={c.positions}, rope_base={c.rope_base:.0f}, "
          f"rope_scaling={c.rope_scaling}")

# %% [markdown]
# Exercises: a factor of 8 with each kind; YaRN without its `attention_factor` (set it to 1.0 in
# `rope_scaling`); the loss of short texts after the training on long ones.
