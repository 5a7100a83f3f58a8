# %% [markdown]
# # 9 Freezing, rates and augmentation
#
# **Three choices add nothing to the model: which blocks learn, how fast, and from which copies of
# the data. What does each of them change?**

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
from minillm import augment, freeze, measure, train
from minillm.compare import sweep
from minillm.data.example import completion
from minillm.freeze.gradual import Unfreezing
from minillm.registry import roles

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
# ## Freezing: which parameters learn?
#
# `freeze.wrap(model, last=k)` lets the last $k$ blocks learn, and the final norm. A block has four
# matrices of the attention, three of the MLP, and two norms. So with $h$ for the width of all
# heads, $g$ for that of the keys and $f$ for that of the MLP:
#
# $$n(k) = k\,(2 d h + 2 d g + 3 d f + 2 d) + d$$

# %%
print(inspect.getsource(freeze.lowest))

# %%
config = original.config
h, g, f = config.heads * config.head_size, config.kv_heads * config.head_size, config.ffn
models = {"full": copy.deepcopy(original)}
print(f"{'':8} {'predicted':>10} {'measured':>10}")
for k in (1, 2, 3):
    models[f"last {k}"] = freeze.wrap(copy.deepcopy(original), last=k)
    n = sum(p.numel() for p in models[f"last {k}"].parameters() if p.requires_grad)
    predicted = k * (2 * d * h + 2 * d * g + 3 * d * f + 2 * d) + d
    print(f"last {k:<3} {predicted:>10,} {n:>10,}")
    assert n == predicted

# %% [markdown]
# ## The time of a step
#
# The forward pass goes through all $L$ blocks. The backward pass has two products for each product
# of the forward pass: one for the gradient of the input, one for the gradient of the weight. It
# stops at the lowest block that learns. **Predict the work of a step, as a share of a full step:**
#
# $$\frac{L + 2k}{L + 2L}$$
#
# The FLOPs of the blocks are counted. The time is that of a whole step, with AdamW, the shortest of
# several in turn. Only two tokens of a text are learnt, so the head costs little.

# %%
ids = torch.randint(tokenizer.vocab_size, (8, 128))
labels = torch.full_like(ids, -100)
labels[:, -2:] = ids[:, -2:]


def flops(model):
    with FlopCounterMode(display=False) as counter:
        model.hidden(ids).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def step(model, optimizer):
    train.loss_sum(model, ids, labels).backward()
    optimizer.step()
    optimizer.zero_grad()


optimizers = {name: torch.optim.AdamW(train.groups(model, lr=1e-5))
              for name, model in models.items()}
took = dict.fromkeys(models, float("inf"))
for _ in range(2 if SHORT else 12):
    for name, model in models.items():
        began = time.perf_counter()
        step(model, optimizers[name])
        took[name] = min(took[name], time.perf_counter() - began)
whole = flops(models["full"])
print(f"{'':8} {'predicted':>9} {'FLOPs':>7} {'time':>7}")
for name, model in models.items():
    k = L if name == "full" else int(name.split()[1])
    print(f"{name:8} {(L + 2 * k) / (3 * L):>9.1%} {flops(model) / whole:>7.1%} "
          f"{took[name] / took['full']:>7.1%}")

# %% [markdown]
# ## The quality after as many steps
#
# The model learns to say which of 8 packages a docstring comes from. Each way sees the same
# examples for the same number of steps, at the best of its own rates: `sweep` judges them by the
# validation text. A part of the test text is used once for these figures. The rest of it waits for
# the last experiment of this page.
#
# Gradual unfreezing starts with the last block alone. One more block joins at a time, until the
# middle of the training. Its source:

# %%
print(inspect.getsource(Unfreezing.waiting))
print(inspect.getsource(Unfreezing.around))

# %% [markdown]
# **Predict: does the quality follow the number of blocks that learn?**

# %%
STEPS = 4 if SHORT else 32
tasks = {split: minillm.data.task("package", tokenizer, split, limit=limit)
         for split, limit in (("train", 192 if SHORT else 800),
                              ("validation", 4 if SHORT else 96), ("test", 24 if SHORT else 400))}
data = {split: task.examples for split, task in tasks.items()}
CUT = 8 if SHORT else 120
data["first test"], data["second test"] = data["test"][:CUT], data["test"][CUT:]


def trained(examples, lr, last=None, steps=STEPS, seed=0, layers=None, warmup=0.1, **options):
    """(A trained copy of the model, the log of its training)."""
    model = copy.deepcopy(original)
    if last:
        freeze.wrap(model, last=last)
    rates = train.layerwise(model, layers) if layers else None
    log = train.train(model, examples, steps=steps, lr=lr, warmup=warmup, seed=seed, rates=rates,
                      progress=False, **options)
    return model, log


def quality(model, split):
    return measure.completions(model, data[split])


def best(usual, examples, **options):
    """(The best rate, a text with all rates and their perplexities on the validation text)."""
    def at(lr):
        return float(quality(trained(examples, lr, **options)[0], "validation"))

    found = sweep(usual, at) if not SHORT else dict(rate=usual, sweep={f"{usual:.2g}": at(usual)})
    said = ", ".join(f"{lr}: {value:.2f}" for lr, value in found["sweep"].items())
    return found["rate"], f"best at {found['rate']:.2g} of {{{said}}}"


WAYS = {"full": ({}, 1e-3), "last 2": (dict(last=2), 3e-3), "last 1": (dict(last=1), 3e-3),
        "gradual": (dict(on_step=Unfreezing(until=0.5)), 1e-3)}
results, seconds, rate_of, logs = {}, {}, {}, {}
for name, (options, usual) in WAYS.items():
    rate_of[name], said = best(usual, data["train"], **options)
    print(f"{name:8} {said}")
    model, logs[name] = trained(data["train"], rate_of[name], **options)
    results[name] = quality(model, "first test")
    seconds[name] = sum(record["seconds"] for record in logs[name])
print(f"\nno training: {quality(original, 'first test')!r}")
for name, perplexity in results.items():
    against = "" if name == "full" else f"   change from full: " \
        f"{measure.change(results['full'], perplexity)!r}"
    print(f"{name:8} {seconds[name] / seconds['full']:>5.0%} of the time   {perplexity!r}{against}")

# %% [markdown]
# The prediction holds in part. One or two blocks that learn take about half of the time, and end
# far behind full training, at nearly the same place. On this small model, freezing pays for its
# time with quality. Gradual unfreezing ends close to full training, but a little worse. It saves no
# time here: its last block joins in the middle of the training.
#
# The interval behind each figure is that of the test text, with one training for each way. Where
# an interval of a change holds 0, this test cannot tell the way from full training.
#
# ## Which rate? The range test
#
# A copy of the model trains while the rate grows from step to step. With $T$ steps:
#
# $$\eta(s) = \eta_{low} \left(\frac{\eta_{high}}{\eta_{low}}\right)^{s / (T - 1)}$$
#
# The loss is first flat, then falls, then explodes. The suggestion is a tenth of the rate at which
# the smoothed loss is lowest. **Predict: is it above or below the best rate of the sweep?**

# %%
print(inspect.getsource(train.finder.grown))
found = train.find_rate(original, data["train"], steps=12 if SHORT else 80, progress=False)
print(found)
print(f"the sweep's best rate for full: {rate_of['full']:.2g}")
fig, axes = plt.subplots(figsize=(7, 3.2))
x = [record["rate"] for record in found.history]
axes.plot(x, [record["loss"] for record in found.history], alpha=0.3, label="loss of each step")
axes.plot(x, [record["smooth"] for record in found.history], color="C0", label="smoothed")
axes.axvline(found.rate, color="C2", ls="--", label="suggested")
axes.axvline(rate_of["full"], color="C1", ls=":", label="best of the sweep")
axes.set(xscale="log", xlabel="learning rate", ylabel="nats per learnt token",
         ylim=(0, 1.5 * max(record["smooth"] for record in found.history[:5])))
axes.legend(fontsize=8)
fig.tight_layout()
plt.show()

# %% [markdown]
# ## How does the rate change? The schedules
#
# A schedule gives the share of the peak rate at each step. **Predict: which of them has the largest
# mean rate?**

# %%
print(inspect.getsource(train.schedules.warmup_stable_decay))
SCHEDULES = ("cosine", "linear", "inverse_sqrt", "warmup_stable_decay", "slanted_triangular")
fig, axes = plt.subplots(figsize=(7, 3.2))
for name in SCHEDULES:
    shares = [train.rate(step, 100, name, 10) for step in range(100)]
    print(f"{name:20} mean share {sum(shares) / 100:.2f}, last share {shares[-1]:.3f}")
    axes.plot(shares, label=name)
axes.set(xlabel="step", ylabel="share of the peak rate", title="10 steps of warm-up, 100 in all")
axes.legend(fontsize=8)
fig.tight_layout()
plt.show()

# %% [markdown]
# ## A rate for each depth
#
# Layer-wise decay gives block $l$ the rate $\eta\,\gamma^{L - l}$. The embedding has
# $\eta\,\gamma^{L + 1}$, and the final norm $\eta$.

# %%
decayed = train.layerwise(original, 0.65)
for pattern, factor in decayed.items():
    print(f"{pattern:28} {factor:.3f}")
assert all(abs(decayed[rf"^layers\.{i}\."] - 0.65 ** (L - i)) < 1e-12 for i in range(L))

# %% [markdown]
# Three schedules and the decay, on one task and at one peak rate: the best of `full` with cosine.
# So this comparison favours cosine. The figures are those of the validation text, which also chose
# that rate. They show a tendency, and not a proof.

# %%
RECIPES = {"cosine": {}, "inverse_sqrt": dict(schedule="inverse_sqrt"),
           "warmup_stable_decay": dict(schedule="warmup_stable_decay"),
           "layer-wise decay": dict(layers=0.65)}
fig, axes = plt.subplots(figsize=(7, 3.2))
first = None
for name, options in RECIPES.items():
    model, log = trained(data["train"], rate_of["full"], **options)
    perplexity = quality(model, "validation")
    first = first or perplexity
    against = "" if name == "cosine" else f"   change: {measure.change(first, perplexity)!r}"
    print(f"{name:20} {perplexity!r}{against}")
    mean, smooth = log[0]["loss"], []
    for record in log:
        mean = 0.8 * mean + 0.2 * record["loss"]
        smooth.append(mean)
    axes.plot(smooth, label=name)
axes.set(xlabel="step", ylabel="smoothed loss", title="four recipes at one peak rate")
axes.legend(fontsize=8)
fig.tight_layout()
plt.show()

# %% [markdown]
# The range test suggested a rate somewhat below the best of the sweep, for the price of one
# training. Warm-up-stable-decay has the largest mean rate, and ended lowest. The inverse square
# root cannot be told from cosine: the interval of its change holds 0. Layer-wise decay did harm. At
# the same peak rate it slows every block, and it would need a sweep of its own.
#
# ## Augmentation: what it does to one text
#
# EDA makes four copies of a text, one by each of its operations. Each operation changes about a
# share $\alpha$ of the words. The synonyms are the nearest rows of the model's own embedding. Token
# dropout leaves out tokens that are read, and none that is learnt.

# %%
print(inspect.getsource(augment.words.apply))
ASK = "\n\nPackage:"
records = [dict(text=prompt.removesuffix(ASK), label=answer)
           for prompt, answer in zip(tasks["train"].prompts, tasks["train"].references)]
nearest = augment.Nearest(original, tokenizer)
sample = next(r for r in records if 8 < len(r["text"].split()) < 14 and "\n" not in r["text"])
more = augment.eda([sample], nearest, copies=4, alpha=0.2)
for name, record in zip(("original", "replace", "insert", "swap", "delete"), more):
    print(f"{name:9} {record['text']}")
print(f"\n{more.report}\n")


def examples(records):
    return [completion(tokenizer, r["text"] + ASK, f" {r['label']}", 512) for r in records]


dropped = augment.drop(examples([sample]), p=0.2)
for name, example in zip(("original", "drop"), dropped):
    print(f"{name:9} {tokenizer.decode(example.ids)!r}")
print(f"\n{dropped.report}")

# %% [markdown]
# NEFTune changes no text. It adds noise to the embedding's output while the model trains, with $T$
# tokens in the text and $\epsilon$ uniform from $-1$ to $1$:
#
# $$x \leftarrow x + \frac{\alpha}{\sqrt{T d}}\, \epsilon$$

# %%
print(inspect.getsource(augment.NEFTune.noise))

# %% [markdown]
# ## Does it help? 64 examples
#
# Few examples are where augmentation should help most. Each seed has 64 examples of its own. All
# three ways make the same number of optimizer steps from them: the plain training sees its examples
# again and again, EDA sees them and four copies of each. Each way has the best of its own rates, by
# the validation text and the first seed. The second part of the test text is used once, here.
#
# **Predict: which of the two helps, and by how much?**

# %%
FEW, SEEDS, LONG = (16, 3, 4) if SHORT else (64, 3, 48)


def arm(name, seed):
    """(The examples, the options of the training)."""
    few = records[seed * FEW : (seed + 1) * FEW]
    if name == "EDA":
        return examples(augment.eda(few, nearest, copies=4, alpha=0.1, seed=seed)), {}
    noise = dict(loss=augment.NEFTune(train.loss_sum, alpha=5)) if name == "NEFTune" else {}
    return examples(few), noise


scores, losses = {}, {}
for name in ("plain", "EDA", "NEFTune"):
    texts, options = arm(name, 0)
    rate, said = best(5e-3, texts, steps=LONG, **options)
    print(f"{name:8} {said}")
    scores[name], losses[name] = [], []
    for seed in range(SEEDS):
        texts, options = arm(name, seed)
        model, log = trained(texts, rate, steps=LONG, seed=seed, **options)
        scores[name].append(quality(model, "second test"))
        losses[name].append(sum(record["loss"] for record in log[-8:]) / len(log[-8:]))
print(f"\nperplexity of the {len(data['second test'])} test answers, for each seed")
for name, found in scores.items():
    each = "  ".join(f"{float(one):.3f}" for one in found)
    print(f"{name:8} {each}   loss of the last training steps "
          f"{sum(losses[name]) / SEEDS:.2f}")
changes = {name: measure.change(scores["plain"], scores[name]) for name in ("EDA", "NEFTune")}
print("\nrelative change from plain, in pairs; its interval covers the texts and the seeds")
for name, change in changes.items():
    verdict = ("helps" if change.high < 0 else "harms" if change.low > 0 else
               "cannot be told from no effect")
    print(f"{name:8} {float(change):+.1%}  [{change.low:+.1%}, {change.high:+.1%}]   {verdict}")

# %%
fig, axes = plt.subplots(figsize=(7, 2.4))
for i, (name, change) in enumerate(changes.items()):
    value = 100 * float(change)
    axes.errorbar([value], [i], xerr=[[value - 100 * change.low], [100 * change.high - value]],
                  fmt="o", capsize=4)
axes.axvline(0, color="gray", lw=1)
axes.set(yticks=range(len(changes)), yticklabels=list(changes), ylim=(-0.6, 1.6),
         xlabel="change of the perplexity in %, below 0 is better",
         title=f"{FEW} examples, {SEEDS} seeds")
fig.tight_layout()
plt.show()

# %% [markdown]
# Neither can be told from no effect: both intervals hold 0. With both, the loss of the training
# texts stays higher, so the model learns its few examples less by heart. That did not become a
# gain that three seeds could show. EDA's interval is wide, because it helped one seed much and the
# others little. This says nothing about other tasks and models.
#
# Exercises: 16 examples (is there more to gain?); `augment.drop` as a fourth way; a floor of a
# tenth in the cosine; `freeze.wrap(model, embedding=True)`, which stops the embedding alone.
