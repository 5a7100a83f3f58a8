# %% [markdown]
# # 8 Prompts and prefixes
#
# **Nothing in the model changes: it reads a few learnt vectors before the text. How much can these
# teach it, and what do they cost in every call afterwards?**

# %%
import copy
import inspect
import logging
import os
import pathlib
import tempfile

import matplotlib.pyplot as plt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import minillm
from minillm.compare import sweep
from minillm.model.attention import attend
from minillm.model.rope import rope_table, rotate
from minillm.prompts import SoftPrompt, placeholders, prefix, ptuning, starts

logging.getLogger("minillm").setLevel(logging.WARNING)
plt.rcParams["figure.dpi"] = 80
torch.manual_seed(0)
SHORT = bool(os.environ.get("MINILLM_SHORT"))

original, tokenizer = minillm.load("tiny")
c = original.config
L, e, gd = c.layers, c.width, c.kv_heads * c.head_size
table = original.embed_tokens.weight.detach()
print(f"the model has {L} layers of width {e}, {c.kv_heads} key/value heads of {c.head_size}, "
      f"{c.positions} positions, and {sum(x.numel() for x in original.parameters()):,} parameters")

# %% [markdown]
# ## A prompt is a few new words
#
# Prompt tuning (Lester et al. 2021) puts $p$ vectors before the vectors of the text. Only these
# learn:
#
# $$\mathrm{model}([P;\ \mathrm{embed}(x)]), \qquad P \in \mathbb{R}^{p \times e}$$
#
# Here $P$ are $p$ more rows of the embedding, for ids that the tokenizer never gives: the
# placeholders. `prepare` puts these ids before each text.

# %%
print(inspect.getsource(SoftPrompt.forward))
print(inspect.getsource(placeholders.before))

# %% [markdown]
# So a model with a table of $p$ more rows computes the same. A text without the placeholders does
# not meet the prompt.

# %%
p = 20
ids = torch.tensor([tokenizer.encode("Return the event loop of the current thread.")])
model = minillm.prompts.wrap(copy.deepcopy(original), length=p, start="random")
P = model.embed_tokens.patches["prompts"].P.detach()
by_hand = copy.deepcopy(original)
by_hand.embed_tokens = torch.nn.Embedding.from_pretrained(torch.cat([table, P]))
prepared = minillm.prepare(model, ids)[0]
print(prepared[0].tolist())
with torch.no_grad():
    print("the same as with a longer table, bit for bit:",
          torch.equal(model(prepared), by_hand(prepared)))
    print("unchanged without placeholders, bit for bit:", torch.equal(model(ids), original(ids)))

# %% [markdown]
# ## Four starts
#
# A prompt is never neutral: the model reads it. The paper starts it at random numbers, at rows
# drawn from the vocabulary, or at the words of the classes. It can also be a text that a user
# would have written.

# %%
print(inspect.getsource(starts.vectors))

# %%
task = minillm.data.task("package", tokenizer, "train")
LABELS = [tokenizer.encode(name) for name in task.choices]
TEXT = tokenizer.encode("Which package is this docstring from?")
print("the labels:", ", ".join(task.choices))
with torch.no_grad():
    model = minillm.prompts.wrap(copy.deepcopy(original), length=len(TEXT), start=TEXT)
    as_prompt = model(minillm.prepare(model, ids)[0])
    print(f"a prompt that starts at a text of {len(TEXT)} tokens is that text, bit for bit:",
          torch.equal(as_prompt, original(torch.cat([torch.tensor([TEXT]), ids], 1))))

# %% [markdown]
# ## P-tuning: a network computes the prompt
#
# In P-tuning (Liu et al. 2021) all vectors come out of one network. So a step that helps one of
# them moves the others too.
#
# $$P = f(E), \qquad f(x) = W_3\,\mathrm{relu}(W_2\,\mathrm{relu}(W_1 x + b_1) + b_2) + b_3$$

# %%
print(inspect.getsource(ptuning.PTuning.vectors))

# %% [markdown]
# ## Prefix tuning: keys and values in each layer
#
# A prompt enters below the first layer, and what the upper layers see of it is what the model
# makes of it. Prefix tuning (Li & Liang 2021) learns the keys and the values of the placeholders
# themselves, in each layer. With the network they come out of one $\tanh$ layer:
#
# $$P[i] = W_2 \tanh(W_1 P'[i] + b_1) + b_2$$

# %%
print(inspect.getsource(prefix.Prefix.put))
print(inspect.getsource(prefix.Prefix.inner))
print(inspect.getsource(prefix.Prefix.vectors))

# %%
with torch.no_grad():
    model = prefix.wrap(copy.deepcopy(original), length=len(TEXT), start=TEXT)
    as_prefix = model(minillm.prepare(model, ids)[0])
    apart = (as_prefix - as_prompt)[:, len(TEXT):].abs().max()
print(f"at birth a prefix computes what the text does, up to {apart:.0e}")

# %% [markdown]
# ## The parameters, predicted
#
# - **a prompt**: $p\,e$.
# - **P-tuning** with $h$ units: $p\,e$ for $E$, and $2he + h^2 + 2h + e$ for the network.
# - **a prefix**: the keys and values of $p$ tokens in each layer, $2 p\,L\,g\,d$ for $g$ heads of
#   $d$.
# - **a prefix of a network**: $p\,e$ for $P'$, $h(e + 1)$, and $2 L\,g\,d\,(h + 1)$.

# %%
h = e
WAYS = {  # a function of the model and the length, and a usual rate
    "prompt, random": (
        lambda m, p: minillm.prompts.wrap(m, length=p, start="random"), 0.3),
    "prompt, vocabulary": (
        lambda m, p: minillm.prompts.wrap(m, length=p, start="vocabulary"), 0.3),
    "prompt, text": (lambda m, p: minillm.prompts.wrap(m, length=p, start=TEXT), 0.3),
    "prompt, labels": (lambda m, p: minillm.prompts.wrap(m, length=p, start=LABELS), 0.3),
    "P-tuning": (lambda m, p: ptuning.wrap(m, length=p, hidden=h), 1e-2),
    "prefix": (lambda m, p: prefix.wrap(m, length=p), 0.3),
    "prefix, network": (lambda m, p: prefix.wrap(m, length=p, hidden=h), 3e-2),
}
PREDICTED = dict.fromkeys(WAYS, p * e) | {
    "P-tuning": p * e + 2 * h * e + h * h + 2 * h + e,
    "prefix": 2 * p * L * gd,
    "prefix, network": p * e + h * (e + 1) + 2 * L * gd * (h + 1),
}


def wrapped(name, seed=0, length=p):
    torch.manual_seed(seed)
    return WAYS[name][0](copy.deepcopy(original), length)


print(f"{'':18} {'predicted':>10} {'measured':>10}")
for name in WAYS:
    count = sum(x.numel() for x in wrapped(name).parameters() if x.requires_grad)
    print(f"{name:18} {PREDICTED[name]:>10,} {count:>10,}")
    assert count == PREDICTED[name]

# %% [markdown]
# ## A fair comparison
#
# The task and the rules are those of notebook 7, on examples of at most 64 tokens. The model
# learns to say which of 8 packages a docstring comes from. Every way sees the same examples for
# the same number of steps, and has the best of its own learning rates, judged by the validation
# examples. At this rate it is trained with three seeds: each draws another order of the examples,
# and another start unless that is a text. The test examples are used at the end alone.
#
# Two figures to compare with: the model as it is, and one that knows the 8 names and nothing else,
# so that each of them is as likely as the others.
#
# **Predict: which start is the best of the four? Does P-tuning help them? What does a prefix gain
# from being in each layer?**

# %%
STEPS, SEEDS = (2, 1) if SHORT else (120, 3)
data = {split: [x for x in minillm.data.task("package", tokenizer, split).examples
                if len(x.ids) <= 64][: 8 if SHORT else None]
        for split in ("train", "validation", "test")}


def trained(name, lr, seed=0, length=p, steps=STEPS):
    """A copy of the model, wrapped in one way and trained at one rate."""
    model = wrapped(name, seed, length)
    minillm.train.train(model, data["train"], steps=steps, batch_size=4, lr=lr, warmup=0.1,
                        seed=seed, progress=False)
    return model


def quality(model, split="test"):
    return minillm.measure.completions(model, data[split])


labels = [label for x in data["test"] for label in x.labels[1:] if label != -100]
guess = len(LABELS) ** (len(data["test"]) / len(labels))
untrained = quality(original)
print(f"{', '.join(f'{len(rows)} {split}' for split, rows in data.items())} examples")
print(f"no training: {untrained!r}; a guess between the names: {guess:.2f}\n")

models, rates = {}, {}
for name, (_, usual) in WAYS.items():
    seen = {}

    def at(lr):
        seen[lr] = trained(name, lr)
        return float(quality(seen[lr], "validation"))

    found = sweep(usual, at) if not SHORT else dict(rate=usual, sweep={usual: at(usual)})
    rates[name], models[name] = found["rate"], seen[found["rate"]]
    tried = ", ".join(f"{lr}: {value:.1f}" for lr, value in found["sweep"].items())
    print(f"{name:18} best at {found['rate']:.2g} of {{{tried}}}")

# %%
results = {}
print(f"{'':18} {'at birth':>8}   seed by seed")
for name in WAYS:
    results[name] = [quality(models[name])]
    results[name] += [quality(trained(name, rates[name], seed)) for seed in range(1, SEEDS)]
    each = "   ".join(f"{x:6.2f} [{x.low:.2f}, {x.high:.2f}]" for x in results[name])
    print(f"{name:18} {float(quality(wrapped(name))):>8.1f}   {each}")

# %%
fig, axes = plt.subplots(figsize=(8, 3.4))
for i, (name, scores) in enumerate(results.items()):
    for j, x in enumerate(scores):
        axes.errorbar([i + (j - 1) / 6], [float(x)], [[x - x.low], [x.high - x]], fmt="o",
                      markersize=4, capsize=2, color=f"C{i}")
axes.axhline(guess, color="gray", linestyle=":", label="a guess between the names")
axes.axhline(float(untrained), color="gray", linestyle="--", label="no training")
axes.set(yscale="log", ylabel="perplexity of the answers", title="three seeds of each way")
axes.set_xticks(range(len(results)), [name.replace(", ", ",\n") for name in results], fontsize=8)
axes.legend(fontsize=8)
fig.tight_layout()
plt.show()

# %% [markdown]
# Every way is far below the model as it is, and none is near the guess: in so few steps no way
# learns even the eight names for certain.
#
# No start is the best of the four. In three of them the seeds are further apart than the means of
# the starts are, so this run cannot put them in an order. The intervals do not show it, because
# they are those of the test text alone. P-tuning's figures lie among those of the starts, with
# more than 15 times their parameters.
#
# The first seed is the one that chose the rate, and in six of the seven ways it has the lowest
# figure. With this seed alone each of these ways would look better than it is.
#
# Every prefix is more than ten times lower than every prompt. Its network does not help here: with
# it the figure is higher, seed by seed.
#
# ## Does a prompt need more steps?
#
# Perhaps a prompt only learns more slowly. Here is one that is trained for four times the steps.

# %%
longer = quality(trained("prompt, random", rates["prompt, random"], steps=4 * STEPS))
print(f"prompt, random: {results['prompt, random'][0]!r} after {STEPS} steps, "
      f"{longer!r} after {4 * STEPS}")

# %% [markdown]
# It does go on, and it is still more than ten times above the prefix of the short training.
#
# ## More placeholders
#
# **Predict: what does a prompt of 60 gain over one of 20, and what does a prefix?** Each length is
# trained at the rate that was best for 20, so the others may be at a small disadvantage.

# %%
LENGTHS = (1, 20) if SHORT else (1, 5, 20, 60)
curves = {name: [results[name][0] if length == p else quality(trained(name, rates[name], 0, length))
                 for length in LENGTHS] for name in ("prompt, random", "prefix")}
print(f"{'placeholders':18}", *(f"{length:>8}" for length in LENGTHS))
for name, scores in curves.items():
    print(f"{name:18}", *(f"{float(x):>8.2f}" for x in scores))
    print(f"{'  its parameters':18}", *(f"{PREDICTED[name] // p * n:>8,}" for n in LENGTHS))
fig, axes = plt.subplots(figsize=(6, 3.2))
for name, scores in curves.items():
    error = [[x - x.low for x in scores], [x.high - x for x in scores]]
    axes.errorbar(LENGTHS, [float(x) for x in scores], error, fmt="o-", capsize=3, label=name)
axes.set(xscale="log", yscale="log", xlabel="placeholders", ylabel="perplexity of the answers")
axes.set_xticks(LENGTHS, LENGTHS)
axes.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# Both go down at each length, and the last step gains the least. One placeholder of a prefix does
# more than 60 of a prompt, with fewer parameters.
#
# ## What a prompt costs afterwards
#
# It cannot be merged: there is no weight that would compute it. A prompt and a prefix take the
# same room in every call.
#
# - **positions**: $p$ of the model's.
# - **memory**: the keys and values of $p$ tokens for each row, $2 p\,L\,g\,d$ numbers of 4 bytes.
# - **FLOPs**: two for each weight of the leaves and each token, and in attention $4 h d$ for each
#   pair of a token and a key (counted for all pairs, also for those that are masked).
#
# The network of P-tuning adds $2p(2he + h^2)$ to each call, that of a prefix $2p(he + 2h L g d)$.
#
# **Predict: how many more FLOPs does a text of 64 tokens take behind 20 placeholders?**


# %%
def flops(call):
    """The FLOPs of a call; the counter knows attention by its plain products alone."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


t = 64
weights = sum(site.shape[0] * site.shape[1] for site in minillm.registry.walk(original)
              if site.leaf is not None and not site.leaf.lookup)


def predicted(tokens, keys):
    return 2 * weights * tokens + 4 * L * c.heads * c.head_size * tokens * keys


ids = torch.randint(tokenizer.vocab_size, (1, t))
plain, expected = flops(lambda: original(ids)), predicted(p + t, p + t)
assert plain == predicted(t, t)
NETWORK = {"P-tuning": 2 * p * (2 * h * e + h * h),
           "prefix, network": 2 * p * (h * e + h * 2 * L * gd)}
print(f"{'':18} {'FLOPs':>12}")
print(f"{'no prompt':18} {plain:>12,}")
for name, model in models.items():
    prepared = minillm.prepare(model.eval(), ids)[0]
    count = flops(lambda: model(prepared))
    assert count == expected + NETWORK.get(name, 0), "as predicted"
    if not name.startswith("prompt") or name == "prompt, random":
        print(f"{name:18} {count:>12,} {count / plain - 1:+.1%}")

# %% [markdown]
# That is more than $p / t$, because attention grows with the product of tokens and keys.
#
# A cache pays for the prompt once. The keys and values of the placeholders do not depend on the
# text, so the same cache can begin every text.

# %%
model = models["prefix"]
prepared = minillm.prepare(model, ids)[0]
cache = minillm.Cache(c, 1, p + t)
with torch.no_grad():
    model(prepared[:, :p], cache=cache)
    size = 4 * (cache.k[..., :p, :].numel() + cache.v[..., :p, :].numel())
    assert size == 4 * 2 * p * L * gd
    begun = copy.deepcopy(cache)
    apart = (model(prepared[:, p:], cache=cache) - model(prepared)[:, p:]).abs().max()
after = flops(lambda: model(prepared[:, p:], cache=begun))
print(f"the placeholders' keys and values take {size:,} bytes a row")
print(f"a text behind them computes the same up to {apart:.0e}, for {after / plain - 1:+.1%} FLOPs")
print(f"{c.positions - p} of {c.positions} positions are left for the text")
try:
    minillm.prompts.wrap(copy.deepcopy(original), length=c.positions)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# The networks are for training. A file of peft holds what they computed, and nothing of them.

# %%
for name in ("P-tuning", "prefix, network"):
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "adapter"
        minillm.checkpoints.peft.save(models[name], path)
        size = (path / "adapter_model.safetensors").stat().st_size
        again = minillm.checkpoints.peft.load(copy.deepcopy(original), path).eval()
    count = sum(x.numel() for x in again.parameters() if x.requires_grad)
    with torch.no_grad():
        prepared = minillm.prepare(again, ids)[0]
        apart = (again(prepared) - models[name](prepared)).abs().max()
    print(f"{name:18} {PREDICTED[name]:>7,} parameters learnt, {count:>6,} are in the file of "
          f"{size:,} bytes; the outputs differ by at most {apart:.0e}")

# %% [markdown]
# ## What the model sees: which words are these?
#
# A prompt is made of vectors of the embedding's width, so one can ask for the nearest words. Here
# is the prompt that started at a text: each vector, how far it still is the word that it was, and
# the word that is nearest now (by the cosine, from -1 to 1).

# %%
start = wrapped("prompt, text").embed_tokens.patches["prompts"].P.detach()
P = models["prompt, text"].embed_tokens.patches["prompts"].P.detach()
near = torch.cosine_similarity(P[:, None], table, dim=-1)  # (p, vocabulary)
own = torch.cosine_similarity(P, start)
print(f"{'it was':>10} {'cosine':>7}   {'nearest':>10} {'cosine':>7}")
for i in range(8):
    word = int(near[i].argmax())
    print(f"{tokenizer.decode([TEXT[i]])!r:>10} {own[i]:>7.2f}   {tokenizer.decode([word])!r:>10} "
          f"{near[i, word]:>7.2f}")
words = torch.cosine_similarity(table[:, None], table, dim=-1).fill_diagonal_(-1).amax(1)
same = sum(int(near[i].argmax()) == TEXT[i % len(TEXT)] for i in range(p))
print(f"{same} of {p} vectors are still nearest to the word that they were")
print(f"mean length of a vector: {start.norm(dim=1).mean():.1f} at birth, "
      f"{P.norm(dim=1).mean():.1f} now")
print(f"mean cosine of the nearest word: {near.amax(1).mean():.2f} for a vector of the prompt, "
      f"{words.mean():.2f} for another word of the vocabulary")

# %% [markdown]
# No vector is still nearest to the word that it was, and on average they are further from all
# words than a word is from the next. So this prompt is no text that one could read. (A `�` is a
# token that is only a part of a character.)
#
# ## What the model sees: attention
#
# The last token of a text, behind `Package:`, predicts the answer. How much of its attention goes
# to the placeholders? If it looked at all tokens alike, it would be $p / (p + t)$. The attention is
# $\mathrm{softmax}(q k^T / \sqrt d)$ of the queries and keys that the leaves compute.

# %%
print(inspect.getsource(attend))


# %%
@torch.no_grad()
def looks(model, ids):
    """(L,): in each layer, the share of the last token's attention that the placeholders get."""
    ids, found = minillm.prepare(model, torch.tensor([ids]))[0], {}
    handles = [leaf.register_forward_hook(
        lambda module, args, out, key=(i, name): found.update({key: (args[0], out)}))
        for i, block in enumerate(model.layers)
        for name, leaf in block.self_attn.named_children() if "proj" in name]
    model(ids)
    for handle in handles:
        handle.remove()
    t, shares = ids.shape[1], []
    rope = rope_table(torch.arange(t)[None], c.head_size, c.rope_base)
    for i in range(L):
        q, k, v = (found[i, name][1].unflatten(-1, (-1, c.head_size)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))
        q, k = rotate(q, *rope), rotate(k, *rope)
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)  # (1, t, h*d)
        assert torch.allclose(mixed, found[i, "o_proj"][0], atol=1e-4), "this is what it computes"
        weights = attend(q, k, torch.eye(t).expand(1, c.kv_heads, t, t))  # (1, h, t, t)
        shares.append(weights[0, :, -1, :p].sum(-1).mean())
    return torch.stack(shares)


texts = [[i for i, label in zip(x.ids, x.labels) if label == -100] for x in data["test"][:32]]
alike = sum(p / (p + len(x)) for x in texts) / len(texts)
SHOWN = "prompt, random", "prompt, text", "prefix"
fig, axes = plt.subplots(1, len(SHOWN), figsize=(10, 2.8), sharey=True)
for axis, name in zip(axes, SHOWN):
    for shift, (when, model) in ((-0.2, ("at birth", wrapped(name).eval())),
                                 (0.2, ("learnt", models[name]))):
        share = torch.stack([looks(model, x) for x in texts]).mean(0)
        axis.bar(torch.arange(L) + shift, share, 0.4, label=when)
        print(f"{name:15} {when:8}", *(f"{x:>6.1%}" for x in share.tolist()))
    axis.axhline(alike, color="gray", linestyle=":", label="all tokens alike")
    axis.set(title=name, xlabel="layer")
    axis.set_xticks(range(L))
axes[0].set_ylabel("attention to the placeholders")
axes[0].legend(fontsize=8)
fig.tight_layout()
plt.show()
print(f"all tokens alike: {alike:.1%}")

# %% [markdown]
# At birth the two upper layers hardly look at the placeholders. The training changes that: in all
# layers but the first, the last token then gives them more than their even share. In the first
# layer the share of a prompt hardly changes, and that of a prefix grows. A prompt reaches the
# keys through the frozen leaves alone. A prefix is the keys, in each layer.
#
# To be looked at is not all: the two prompts get more attention than at birth in each upper layer,
# and they end far above the prefix.
#
# Exercises: a rate of its own for each length; a prefix that starts at a text, `start=TEXT`; a
# prefix and LoRA on one model.
