"""A decoder-only transformer: the GPT-2 and the Llama family, chosen by its Config.

    x = embed(ids) [+ position]      Vaswani et al. 2017 (arXiv 1706.03762), the decoder alone
    x = x + attention(norm(x))       in each block; pre-norm, as in GPT-2 (Radford et al. 2019)
    x = x + mlp(norm(x))             in each block
    logits = head(norm(x))

                 GPT-2                  Llama (Touvron et al. 2023, arXiv 2302.13971),
                                        Qwen2 and 3, SmolLM2
    positions    learned, added to x    rotary, applied to q and k
                                        (RoPE, Su et al. 2021, arXiv 2104.09864)
    norm         LayerNorm              RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467)
    mlp          W2 gelu(W1 x)          SwiGLU: W_down (silu(W_gate x) * W_up x)
                                        (Shazeer 2020, arXiv 2002.05202)
    attention    as many k, v as q      grouped queries: `heads / kv_heads` queries share
                                        one k, v (arXiv 2305.13245)

Letters in the shapes: b batch, t tokens of this call, s tokens attended to, h heads,
g key/value heads, d head size.

`config` has the Config, `attention` the one rule for which tokens see which, `generate`
the continuation of a text, `loss` the cross-entropy.

In both families the leaves have the names of the Hugging Face Llama (`q_proj` ...
`down_proj`), so the targets of any LoRA recipe work here unchanged. transformers has a
file for each architecture and repeats code, so that each file can be read alone. Here
one page serves both families, and the price is a few `if`s in the constructors. Not
included: dropout, biases of attention by distance (ALiBi), mixtures of experts.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillm.model.attention import check_mask, fused, look
from minillm.model.cache import Cache, write  # noqa: F401
from minillm.model.config import ACTIVATIONS, NORMS, Config  # noqa: F401
from minillm.model.generate import generate, left_pad, sample  # noqa: F401
from minillm.model.loss import cross_entropy_sum, learnt, wide
from minillm.model.rope import rope_table, rotate
from minillm.ops import linear
from minillm.registry import instead, same_shape
from minillm.registry.names import again, by_rows


class Linear(nn.Linear):
    """nn.Linear by `ops.linear`, which is faster for a single row in compiled code."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(d) + mask) v in each head."""

    def __init__(self, c):
        super().__init__()
        self.head_size = c.head_size
        self.q_proj = Linear(c.width, c.heads * c.head_size, bias=c.qkv_bias)
        self.k_proj = Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.v_proj = Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.o_proj = Linear(c.heads * c.head_size, c.width, bias=c.out_bias)
        self.q_norm = NORMS[c.norm](c.head_size, eps=c.eps) if c.qk_norm else None
        self.k_norm = NORMS[c.norm](c.head_size, eps=c.eps) if c.qk_norm else None

    def forward(self, x, rope=None, mask=None, cache=None):
        def in_heads(y):
            # (b, t, h*d) -> (b, h, t, d)
            return y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

        q, k, v = in_heads(self.q_proj(x)), in_heads(self.k_proj(x)), in_heads(self.v_proj(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # over d
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = write(*cache, k, v)  # (b, g, t, d) -> (b, g, s, d)
        y = fused(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (b, h, t, d) -> (b, t, h*d)


class MLP(nn.Module):
    """down(act(up(x))), or with a gate: down(act(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        self.activation = ACTIVATIONS[c.activation]
        self.gate_proj = Linear(c.width, c.ffn, bias=c.mlp_bias) if c.gated else None
        self.up_proj = Linear(c.width, c.ffn, bias=c.mlp_bias)
        self.down_proj = Linear(c.ffn, c.width, bias=c.mlp_bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = NORMS[c.norm](c.width, eps=c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = NORMS[c.norm](c.width, eps=c.eps)
        self.mlp = MLP(c)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """ids (b, t) -> logits (b, t, vocab).

    With `recompute` the blocks keep no activations: the backward pass computes them
    again.
    """

    recompute = compiled = False
    source = ""  # the name or path given to `load`

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.embed_positions = None if c.rope_base else nn.Embedding(c.positions, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = NORMS[c.norm](c.width, eps=c.eps)
        self.lm_head = Linear(c.width, c.vocab_size, bias=False)
        if c.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """GPT-2's initialisation: N(0, 0.02), and 0 for biases.

        Where a block adds to the residual stream, the 0.02 is divided by sqrt(2
        layers).
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                end = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0, 0.02 / (2 * self.config.layers) ** 0.5 if end else 0.02)
            elif name.endswith("bias"):
                p.zero_()

    def get_output_embeddings(self):
        """The head, under the name that Hugging Face models give it."""
        return self.lm_head

    def hidden(self, ids, mask=None, cache=None):
        """ids (b, t) of int64 -> hidden states before the head (b, t, width).

        mask (b, t): the number of each token's document, 0 at padding; a bool mask
        where a row has one document; None where the document is the whole row. With a
        cache, ids are the tokens that follow those in the cache. IndexError for ids
        outside the vocabulary. ValueError for a text longer than `positions`, and for a
        mask or a cache that does not fit.
        """
        c = self.config
        check_mask(ids, mask)
        if cache is not None:
            cache.check(ids, c, self.norm.weight.dtype)
        # Compiled code for one token needs keys of one length: all columns, even empty.
        static = self.compiled and cache is not None and cache.filled > 0 and ids.shape[1] == 1
        x = self.embed(ids)  # (b, t) -> (b, t, width)
        positions, visible = look(ids, mask, cache, c.positions, c.window, static)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        rope = None
        if c.rope_base:
            rope = rope_table(positions, c.head_size, c.rope_base, c.rope_scaling)
        return self.norm(self.blocks(x, rope, visible, cache, static))

    def embed(self, ids):
        """ids (b, t) -> (b, t, width). An IndexError gives the range of the ids."""
        try:
            return self.embed_tokens(ids)
        except IndexError as error:
            low, high, size = ids.min().item(), ids.max().item(), self.config.vocab_size
            raise IndexError(f"the ids run from {low} to {high}, "
                             f"but the vocabulary has {size} entries") from error

    def blocks(self, x, rope, visible, cache, static):
        """x (b, t, width) through every block."""
        if cache is None:
            for block in self.layers:
                if self.recompute and torch.is_grad_enabled():
                    x = recomputed(block, x, rope, visible)
                else:
                    x = block(x, rope, visible)
            return x
        once = self.compiled and not static  # a prompt runs uncompiled: its length is new
        with torch.compiler.set_stance("force_eager") if once else contextlib.nullcontext():
            for block, store in zip(self.layers, cache.stores(x.shape[1], static)):
                x = block(x, rope, visible, store)
        cache.filled += x.shape[1]
        return x

    def forward(self, ids, mask=None, cache=None):
        """ids (b, t) -> logits (b, t, vocab); the arguments are those of `hidden`."""
        return self.lm_head(self.hidden(ids, mask, cache))

    def loss(self, ids, labels, mask=None, reduction="mean"):
        """Cross-entropy in nats of predicting labels (b, t) from the ids before them -> ().

        A label of -100 is not learnt. A label is in the column of its own id: this
        function shifts by one. "mean" divides by the number of labels learnt, "sum"
        does not divide. The logits of all tokens are never in memory at once: see
        `loss`. ValueError where no label is left, and for labels outside the
        vocabulary.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} is unknown; known: 'mean', 'sum'")
        instead.check_tokens(instead.of(self.lm_head), "the loss of the next tokens")
        same_shape(ids, labels=labels)  # `hidden` checks the mask
        keep, y = learnt(labels, self.config.vocab_size)  # (b, t - 1), (n,)
        h = self.hidden(ids, mask)[:, :-1]  # (b, t - 1, width)
        if by_rows(self.lm_head):  # its adapters need the rows of the batch
            total = F.cross_entropy(wide(self.lm_head(h)[keep]), y, reduction="sum")
        else:
            total = cross_entropy_sum(h[keep], y, self.lm_head)
        return total / len(y) if reduction == "mean" else total

    generate = generate

    def __getstate__(self):
        """A copy or a pickle is not compiled: torch omits the code, and we the flag."""
        return {key: value for key, value in super().__getstate__().items() if key != "compiled"}


def recomputed(block, *inputs):
    """block(*inputs), which keeps only its inputs: the backward pass calls the block again."""
    if torch.compiler.is_compiling():
        return checkpoint(block, *inputs, use_reentrant=False)
    second = again(block)
    return checkpoint(block, *inputs, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), second))


def compile(model):
    """Compile the blocks and the head with torch.compile; in place, returns the model.

    A block is a function of its weights, so blocks of one structure share one piece of
    code, and torch compiles one block for all. Single tokens and training then run
    compiled; a prompt does not. Techniques may be attached before or after.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"compile is for minillm's Transformer, not {type(model).__name__}: "
                        "torch.compile(model) takes any module")
    for module in (*model.layers, model.lm_head):
        module.compile()
    model.compiled = True
    return model
