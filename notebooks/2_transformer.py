# %% [markdown]
# # 2 The transformer, piece by piece
#
# **What happens between a text and the next word, and where are the parameters and the work?**
#
# Each piece is computed twice: by its formula, in a line or two, and by the library. The two have
# to agree.

# %%
import inspect
import logging
import os

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import minillm
from minillm.model import attention, rope, transformer

logging.getLogger("minillm").setLevel(logging.WARNING)
plt.rcParams["figure.dpi"] = 80
SHORT = bool(os.environ.get("MINILLM_SHORT"))
torch.set_grad_enabled(False)  # nothing is trained on this page

model, tokenizer = minillm.load("tiny")
c = model.config
print(c)


def agree(what, ours, theirs):
    gap = float((ours - theirs).abs().max())
    print(f"{what}: {tuple(theirs.shape)}, formula and library differ by at most {gap:.1e}")
    assert gap < 1e-4


# %% [markdown]
# ## From text to ids
#
# The tokenizer cuts a text into pieces of its vocabulary. Each piece has a number.

# %%
text = "Return True if the object is a string, and False if it is a number."
ids, spans = tokenizer.spans(text)
print([text[start:end] for start, end in spans])
print(ids)
ids = torch.tensor([ids])  # (b, t)
t = ids.shape[1]
print(f"{len(text)} characters, {t} tokens, of a vocabulary of {tokenizer.vocab_size}")

# %% [markdown]
# ## From ids to vectors
#
# The embedding is a table with a row for each id: $x_i = E_{\mathrm{id}_i}$. That is a product
# with a vector that is 1 in one place. So the embedding is a matrix like the others.

# %%
E = model.embed_tokens.weight  # (vocab, width)
x = model.embed(ids)  # (b, t, width)
agree("lookup", E[ids], x)
agree("one-hot product", F.one_hot(ids, c.vocab_size).float() @ E, x)

# %% [markdown]
# ## The norm
#
# RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) divides each vector by the root of its mean
# square:
#
# $$\mathrm{norm}(x) = \frac{x}{\sqrt{\frac{1}{n} \sum_i x_i^2 + \epsilon}} * g$$

# %%
block = model.layers[0]
g = block.input_layernorm.weight
h = block.input_layernorm(x)
agree("RMSNorm", x / (x.square().mean(-1, keepdim=True) + c.eps).sqrt() * g, h)

# %% [markdown]
# ## Positions
#
# RoPE (Su et al. 2021, arXiv 2104.09864) turns pairs of coordinates of $q$ and $k$. At position
# $p$ the pair $i$ turns by the angle $p f_i$:
#
# $$f_i = \mathrm{base}^{-2i/d}$$
#
# The product of two turned vectors depends on the distance of their positions alone.

# %%
print(inspect.getsource(rope.rope_table))
print(inspect.getsource(rope.rotate))

# %%
torch.manual_seed(0)
q, k = torch.randn(2, 1, 1, 1, c.head_size)


def turned(x, p):
    return rope.rotate(x, *rope.rope_table(torch.tensor([[p]]), c.head_size, c.rope_base))


for a, b in ((5, 2), (105, 102), (305, 302)):
    print(f"positions {a:3} and {b:3}: q k = {float((turned(q, a) * turned(k, b)).sum()):.4f}")

p = torch.arange(64)[None]
cos, _ = rope.rope_table(p, c.head_size, c.rope_base)
fig, axis = plt.subplots(figsize=(7, 2.4))
for i in range(0, c.head_size // 2, 3):
    axis.plot(cos[0, 0, :, i], label=f"pair {i}")
axis.set(title="the cosine of each pair's angle", xlabel="position")
axis.legend(fontsize=7, loc="upper right")
fig.tight_layout()

# %% [markdown]
# ## Attention
#
# Each token asks ($q$), and the tokens up to it answer ($k$) and give ($v$):
#
# $$\mathrm{attention}(q, k, v) = \mathrm{softmax}(q k^\top / \sqrt d + \mathrm{mask})\, v$$
#
# This model has 4 heads of queries and 2 of keys and values: two heads of queries share one.

# %%
print(inspect.getsource(transformer.Attention.forward))
print(inspect.getsource(attention.attend))

# %%
a = block.self_attn


def heads(y):
    return y.unflatten(-1, (-1, c.head_size)).transpose(1, 2)  # (b, t, h*d) -> (b, h, t, d)


table = rope.rope_table(torch.arange(t)[None], c.head_size, c.rope_base)
q = rope.rotate(heads(a.q_proj(h)), *table)  # (b, h, t, d)
k = rope.rotate(heads(a.k_proj(h)), *table)  # (b, g, t, d)
v = heads(a.v_proj(h))
share = c.heads // c.kv_heads
score = q @ k.repeat_interleave(share, 1).mT / c.head_size**0.5  # (b, h, t, t)
score = score.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
weights = score.softmax(-1)
y = weights @ v.repeat_interleave(share, 1)  # (b, h, t, d)
y = a.o_proj(y.transpose(1, 2).flatten(2))
agree("attention", y, a(h, table))
print("each row of the weights sums to one:", torch.allclose(weights.sum(-1), torch.ones(1)))

# %%
fig, axes = plt.subplots(1, c.heads, figsize=(11, 3))
for i, axis in enumerate(axes):
    axis.imshow(weights[0, i], cmap="viridis", vmin=0, vmax=1)
    axis.set(title=f"block 0, head {i}", xlabel="sees", ylabel="token" if i == 0 else None)
fig.tight_layout()

# %% [markdown]
# A token sees itself and what comes before it. That is why the upper right is empty.
#
# ## The MLP
#
# SwiGLU (Shazeer 2020, arXiv 2002.05202) works on each token by itself:
#
# $$\mathrm{mlp}(x) = W_{\text{down}}\,(\mathrm{silu}(W_{\text{gate}} x) * W_{\text{up}} x),
# \qquad \mathrm{silu}(z) = z\,\sigma(z)$$

# %%
print(inspect.getsource(transformer.Block.forward))
m = block.mlp
z = x + y
h = block.post_attention_layernorm(z)
gate = h @ m.gate_proj.weight.T
out = (gate * gate.sigmoid() * (h @ m.up_proj.weight.T)) @ m.down_proj.weight.T
agree("MLP", out, m(h))
agree("the whole block", z + out, block(x, table))

# %% [markdown]
# ## From vectors to the next token
#
# After all blocks comes a norm, and then the embedding's table once more: $\mathrm{logits} =
# E\,x$. The softmax of the last token's logits is the probability of each next token.

# %%
x = model.embed(ids)
for block in model.layers:
    x = block(x, table)
logits = model.norm(x) @ E.T
agree("logits", logits, model(ids))

start = torch.tensor([tokenizer.encode("Return True if the")])
top = model(start)[0, -1].softmax(-1).topk(8)
words = [tokenizer.decode([i]) for i in top.indices.tolist()]
print("after 'Return True if the':", words)
fig, axis = plt.subplots(figsize=(6, 2.4))
axis.bar([repr(word) for word in words], top.values)
axis.set(title="the likeliest next tokens", ylabel="probability")
fig.tight_layout()

# %% [markdown]
# ## The loss
#
# The loss is the mean of $-\log p$ of the token that really comes next, and perplexity is its
# exponential. A model that knows nothing has the perplexity of the vocabulary's size.

# %%
logp = model(ids)[0, :-1].log_softmax(-1)
own = -logp[torch.arange(t - 1), ids[0, 1:]]
agree("the loss", own.mean(), model.loss(ids, ids))
torch.manual_seed(0)
blank = minillm.Transformer(c)
print(f"perplexity {own.mean().exp():.1f}; of random weights {blank.loss(ids, ids).exp():.0f}, "
      f"and the vocabulary has {c.vocab_size}")
fig, axis = plt.subplots(figsize=(10, 2.4))
axis.bar(range(t - 1), own)
axis.set_xticks(range(t - 1), [repr(text[s:e]) for s, e in spans[1:]], rotation=70, fontsize=7)
axis.set(title="how much each token surprises", ylabel="nats")
fig.tight_layout()

# %% [markdown]
# ## Predict: the parameters
#
# With the width $n$, the inner width $f$, $h$ heads of size $d$, and $g$ of keys and values, a
# block has
#
# $$\underbrace{2 n h d + 2 n g d}_{\text{attention}} + \underbrace{3 n f}_{\text{MLP}}
# + \underbrace{2 n}_{\text{norms}}$$

# %%
n, f, hd, gd = c.width, c.ffn, c.heads * c.head_size, c.kv_heads * c.head_size
parts = {"embedding": c.vocab_size * n, "attention": c.layers * (2 * n * hd + 2 * n * gd),
         "MLP": c.layers * 3 * n * f, "norms": (2 * c.layers + 1) * n}
measured = sum(p.numel() for p in model.parameters())
print(parts)
print(f"predicted: {sum(parts.values()):,} parameters, {4 * sum(parts.values()):,} bytes")
print(f"measured:  {measured:,} parameters, {minillm.measure.memory.total_bytes(model):,} bytes")
assert measured == sum(parts.values())

big = minillm.Config(49152, 576, 30, 9, kv_heads=3, ffn=1536)  # SmolLM2-135M
with torch.device("meta"):  # shapes without numbers
    count = sum(p.numel() for p in minillm.Transformer(big).parameters())
formula = big.vocab_size * 576 + 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 61 * 576
print(f"SmolLM2-135M: predicted {formula:,}, measured {count:,}")
assert formula == count

# %% [markdown]
# ## Predict: the work
#
# A product with a matrix takes a multiplication and an addition for each weight and token: $2 N$
# FLOPs a token, where $N$ counts the matrices, the head among them. Attention adds $4\,h\,d\,s$
# for each block and token that looks at $s$ tokens. That is little for a short text, and most for
# a long one.

# %%
N = parts["attention"] + parts["MLP"] + parts["embedding"]
with FlopCounterMode(display=False) as counter:
    model(ids)
print(f"matrices:  predicted {2 * N * t:,}, measured {counter.get_total_flops():,}")
assert counter.get_total_flops() == 2 * N * t  # torch does not count its fused attention on a CPU
with FlopCounterMode(display=False) as counter:
    attention.attend(q, k, v)
print(f"attention: predicted {4 * hd * t * t:,}, measured {counter.get_total_flops():,} a block")
assert counter.get_total_flops() == 4 * hd * t * t

lengths = torch.arange(1, 4 * N // (4 * hd * c.layers))
shares = 4 * hd * c.layers * lengths / (4 * hd * c.layers * lengths + 2 * N)
even = 2 * N // (4 * hd * c.layers)
print(f"attention is half of the work at {even:,} tokens")
fig, axis = plt.subplots(figsize=(6, 2.4))
axis.plot(lengths, shares)
axis.axvline(even, color="grey", linestyle=":")
axis.set(title="attention's share of a token's FLOPs", ylim=(0, 1),
         xlabel="tokens that it looks at")
fig.tight_layout()

# %% [markdown]
# ## The cache
#
# The keys and values of a token never change, for it sees only those before it. So they are kept,
# and each step computes one token: $2 N$ FLOPs instead of $2 N t$. The price is memory:
#
# $$2 \cdot \text{layers} \cdot g \cdot d \quad\text{numbers a token}$$

# %%
new = 4 if SHORT else 32
cache = minillm.Cache(c, 1, t + new)
predicted = 4 * 2 * c.layers * gd * (t + new)
print(f"predicted {predicted:,} bytes, measured {cache.k.nbytes + cache.v.nbytes:,}")
model(ids, cache=cache)
with FlopCounterMode(display=False) as counter:
    step = model(ids[:, -1:], cache=cache)
print(f"a step with the cache: predicted {2 * N:,} FLOPs, measured {counter.get_total_flops():,}")
assert counter.get_total_flops() == 2 * N

longer = torch.cat([ids, ids[:, -1:]], 1)
agree("the last token, with the cache and without", model(longer)[:, -1:], step)

print(tokenizer.decode(model.generate(start, new)[0].tolist()))
