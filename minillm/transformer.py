"""A decoder-only transformer: the GPT-2 and the Llama family, one by configuration.

    x = embed(ids) [+ position]                        Vaswani et al. 2017 (arXiv 1706.03762), the decoder alone
    x = x + attention(norm(x))     for each block      pre-norm, as GPT-2 (Radford et al. 2019) has it
    x = x + mlp(norm(x))
    logits = head(norm(x))

                     GPT-2                  Llama (Touvron et al. 2023, arXiv 2302.13971), Qwen2 and 3, SmolLM2
    positions        learned, added to x    rotary (RoPE, Su et al. 2021, arXiv 2104.09864), applied to q and k
    norm             LayerNorm              RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467)
    mlp              W2 gelu(W1 x)          SwiGLU: W_down (silu(W_gate x) * W_up x) (Shazeer 2020, arXiv 2002.05202)
    attention        as many k, v as q      grouped queries: `heads / kv_heads` queries share one k, v (arXiv 2305.13245)

Letters in the shapes: b batch, t tokens of this call, s tokens attended to, h heads, g key/value heads, d head size.

Who sees whom is one rule. Every token has a document number (0: padding), and a token sees those of its own document that do not come
after it, itself included. Its position is how many it sees, less one. Padding, packing (several documents in a row) and
cached decoding need nothing else. A batch of whole rows needs no mask at all, and gets none: torch's causal kernels are the fast way.

The leaves carry the names of the Hugging Face Llama (`q_proj` ... `down_proj`), in both families, so the targets of any LoRA
recipe can be written here as they stand. transformers keeps a file for each architecture and lets them repeat each
other, so that each can be read alone; here one page serves both, and the price is the few `if`s in the constructors.
Not included: dropout, biases of attention by distance (ALiBi), mixtures of experts.
"""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillm.registry import linear, prepare
from minillm.rope import check_scaling, rope_table, rotate

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


@dataclasses.dataclass
class Config:
    """The shape of a Transformer. The defaults are the Llama family's; `Config.gpt2` has GPT-2's."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int | None = None  # None: as many as heads
    head_size: int | None = None  # None: width / heads
    ffn: int | None = None  # None: 4 * width
    positions: int = 2048  # the longest sequence
    norm: str = "rms"
    eps: float = 1e-5
    activation: str = "silu"
    gated: bool = True  # SwiGLU's gate
    rope_base: float | None = 10000.0  # None: learned positions
    rope_scaling: dict | None = None  # for contexts beyond the trained ones; see rope.py
    window: int | None = None  # a token sees so many, itself included (Mistral's sliding window); None: all before it
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # the norm of q and of k in each head, before they turn (Qwen3)
    tied: bool = True  # the head is the embedding

    def __post_init__(self):
        for field in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "ffn", "positions", "window"):
            value = getattr(self, field)
            if not (isinstance(value, int) and 1 <= value < 1 << 31 or value is None and getattr(Config, field, 0) is None):
                raise ValueError(f"{field}={value!r} is not a whole number from 1")
        for field in ("eps", "rope_base"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf or value is None and field == "rope_base"):
                raise ValueError(f"{field}={value!r} is not a number above 0")
        for field in ("gated", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tied"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field}={getattr(self, field)!r} is neither true nor false")
        self.kv_heads = self.kv_heads or self.heads
        self.head_size = self.head_size or self.width // self.heads
        self.ffn = self.ffn or 4 * self.width
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.rope_base and self.head_size % 2:
            raise ValueError(f"RoPE turns pairs: head_size={self.head_size} is odd")
        if self.rope_scaling and not self.rope_base:
            raise ValueError(f"rope_scaling={self.rope_scaling!r} is for RoPE, and rope_base is None")
        check_scaling(self.rope_scaling, self.head_size)
        for field, known in (("activation", ACTIVATIONS), ("norm", NORMS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; known: {', '.join(known)}")

    @classmethod
    def gpt2(cls, vocab_size, width, layers, heads, **others):
        """The GPT-2 family: learned positions, LayerNorm, GELU, biases everywhere."""
        family = dict(norm="layer", activation="gelu_tanh", gated=False, rope_base=None, positions=1024)
        biases = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
        return cls(vocab_size, width, layers, heads, **{**family, **biases, **others})


class Linear(nn.Linear):
    """nn.Linear by `registry.linear`, which reads W at the speed of memory where a single row is computed in compiled code."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(d) + mask) v, in heads."""

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
            return y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # (b, t, h*d) -> (b, h, t, d)

        q, k, v = in_heads(self.q_proj(x)), in_heads(self.k_proj(x)), in_heads(self.v_proj(x))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # over d
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = write(*cache, k, v)  # (b, g, t, d) -> (b, g, s, d)
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (b, h, t, d) -> (b, t, h*d)


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x))."""

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


class Cache:
    """The keys and values of all positions so far, for each layer (b, g, length, d), written in place."""

    def __init__(self, config, batch, length, dtype=torch.float32, device=None):
        shape = (config.layers, batch, config.kv_heads, length, config.head_size)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.filled, self.masked = 0, False
        self.documents = torch.zeros(batch, length, dtype=torch.long, device=device)  # of each token; 0: padding, or not yet there


def write(k, v, where, new_k, new_v):
    """Store the new keys and values (b, g, t, d) at the positions `where` (t,), a tensor: compiled code serves every position."""
    return k.index_copy_(2, where, new_k), v.index_copy_(2, where, new_v)


class Transformer(nn.Module):
    """ids (b, t) -> logits (b, t, vocab). With `recompute` the blocks keep no activations for the backward pass but compute them again."""

    recompute = compiled = False
    source = ""  # the name or the path that `load` was given

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
        """GPT-2's initialisation: N(0, 0.02), divided by sqrt(2 layers) where a block adds to the residual stream."""
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

        mask (b, t): the document of each token, 0 at padding; bool does for a single one (None: the whole row is one). With a cache, ids
        are the tokens that follow those it holds. IndexError for ids outside the vocabulary, ValueError for a sequence
        beyond the positions.
        """
        t, c = ids.shape[1], self.config
        start = cache.filled if cache else 0
        if start + t > c.positions:
            raise ValueError(f"a sequence of {start + t} tokens is beyond this model's {c.positions} positions")
        try:
            x = self.embed_tokens(ids)  # (b, t) -> (b, t, width)
        except IndexError as error:
            low, high, size = ids.min().item(), ids.max().item(), c.vocab_size
            raise IndexError(f"the ids run from {low} to {high}, but the vocabulary has {size} entries") from error

        one_token = cache is not None and start > 0 and t == 1
        static = one_token and self.compiled  # compiled code wants one length of the cache for all steps
        documents = torch.ones_like(ids) if mask is None else mask.long()
        masked = mask is not None and not bool((documents == 1).all()) or cache is not None and cache.masked
        end = start + t
        if cache is not None:
            cache.documents[:, start:end], cache.masked = documents, masked
            end = cache.documents.shape[1] if static else end
            documents = cache.documents[:, :end]  # (b, s)
        where = torch.arange(start, start + t, device=ids.device)
        positions, mask = where[None], None  # (1, t)
        if masked or (start and not one_token) or static or c.window and end > c.window:
            order = torch.arange(end, device=ids.device)
            visible = (documents[:, None] == documents[:, start : start + t, None]) & (order <= where[:, None])  # (b, t, s)
            if masked:
                positions = visible.sum(-1) - 1  # (b, t)
            if c.window:
                visible = visible & (order > where[:, None] - c.window)
            mask = visible[:, None]  # (b, 1, t, s)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        rope = rope_table(positions, c.head_size, c.rope_base, c.rope_scaling) if c.rope_base else None

        once = cache is not None and self.compiled and not static  # the prompt: its length is new each time
        with torch.compiler.set_stance("force_eager") if once else contextlib.nullcontext():
            for i, block in enumerate(self.layers):
                if cache is not None:
                    x = block(x, rope, mask, (cache.k[i, :, :, :end], cache.v[i, :, :, :end], where))
                elif self.recompute and torch.is_grad_enabled():
                    x = checkpoint(block, x, rope, mask, use_reentrant=False)
                else:
                    x = block(x, rope, mask)
        if cache is not None:
            cache.filled += t
        return self.norm(x)

    def forward(self, ids, mask=None, cache=None):
        """ids (b, t) -> logits (b, t, vocab); the arguments are those of `hidden`."""
        return self.lm_head(self.hidden(ids, mask, cache))

    def loss(self, ids, labels, mask=None, reduction="mean"):
        """Cross-entropy in nats of predicting labels (b, t) from the ids before them; a label of -100 is not learnt.

        `labels` stand where the ids stand (the shift happens here). "mean" divides by the number of labels learnt, "sum"
        does not divide. The head sees only positions that have a label, in chunks, so the whole (tokens x vocabulary)
        logits never exist. ValueError where no label is left.
        """
        if labels.shape != ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)} and ids {tuple(ids.shape)} differ in shape")
        h = self.hidden(ids, mask)[:, :-1]
        keep = labels[:, 1:] != -100
        count = int(keep.sum())
        if not count:
            raise ValueError("no label is left to learn: all are -100, or the sequences have fewer than two tokens")
        total = cross_entropy_sum(h[keep], labels[:, 1:][keep], self.lm_head)  # (n, width), (n,)
        return total / count if reduction == "mean" else total

    @torch.no_grad()
    def generate(self, ids, max_new_tokens=64, *, temperature=0.0, top_k=None, top_p=None, min_p=None, stop=(), stream=None,
                 mask=None, pad=None, generator=None):
        """Continue each row of ids; returns (b, t + new), where `new` is at most max_new_tokens.

        ids: (b, t), or a list of b lists, which are padded on the left (`mask` (b, t) says where a tensor is padded).
        temperature 0 is greedy. top_k keeps the k likeliest tokens, top_p the fewest that hold this share of the
        probability, min_p those at least this share as likely as the likeliest. A row ends after a token of `stop` (an id
        or several) and is filled with `pad`. `stream(tokens)` is called with each step's (b,) tokens as they come.
        """
        stop = torch.as_tensor([stop] if isinstance(stop, int) else list(stop), dtype=torch.long, device=self.norm.weight.device)
        pad = pad if pad is not None else int(stop[0]) if len(stop) else 0
        if not isinstance(ids, torch.Tensor):
            ids, mask = left_pad(ids, pad)
        ids = ids.to(self.norm.weight.device)
        inputs, _, mask = prepare(self, ids, None, mask)  # soft prompts put their placeholders in front
        b, t = inputs.shape
        if t == 0:
            raise ValueError("nothing to continue: the prompt is empty")
        if t + max_new_tokens > self.config.positions:
            raise ValueError(f"a prompt of {t} tokens and max_new_tokens={max_new_tokens} are together beyond this "
                             f"model's {self.config.positions} positions")
        cache = Cache(self.config, b, t + max_new_tokens, self.norm.weight.dtype, inputs.device)
        ended, new = torch.zeros(b, dtype=torch.bool, device=inputs.device), []
        for _ in range(max_new_tokens):
            logits = self.lm_head(self.hidden(inputs, mask, cache)[:, -1])  # (b, vocab)
            tokens = sample(logits.float(), temperature, top_k, top_p, min_p, generator).masked_fill(ended, pad)
            new.append(tokens)
            if stream is not None:
                stream(tokens)
            ended = ended | torch.isin(tokens, stop)
            if bool(ended.all()):
                break
            inputs, mask = tokens[:, None], None
        return torch.cat([ids, torch.stack(new, 1)], 1) if new else ids


def compile(model):
    """Have torch.compile make one block, and use it for all of them, and the head; in place, returns the model.

    A block is a function of its weights, so blocks of one structure share one piece of code: what compiles is 1/layers of the model.
    Single tokens and training then run compiled; a prompt does not. Techniques may be attached before or after.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"compile is for minillm's Transformer, not {type(model).__name__}: torch.compile(model) takes any module")
    for module in (*model.layers, model.lm_head):
        module.compile()
    model.compiled = True
    return model


def left_pad(rows, pad=0):
    """Lists of ids -> ids (b, t) padded on the left, and mask (b, t), True at real tokens."""
    t = max(map(len, rows), default=0)
    ids = torch.tensor([[pad] * (t - len(r)) + list(r) for r in rows], dtype=torch.long)
    mask = torch.tensor([[False] * (t - len(r)) + [True] * len(r) for r in rows])
    return ids, mask


def sample(logits, temperature=0.0, top_k=None, top_p=None, min_p=None, generator=None):
    """One token a row of logits (b, vocab) -> (b,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it hold the share already
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    if min_p is not None:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def cross_entropy_sum(h, labels, head, chunk=256):
    """Sum over n of -log softmax(head(h))[label]: h (n, width), labels (n,), `head` any module."""
    learnt = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (h.requires_grad or learnt):
        return _CrossEntropySum.apply(h, labels, head, chunk, *learnt)
    return sum(F.cross_entropy(head(x).float(), y, reduction="sum") for x, y in zip(h.split(chunk), labels.split(chunk)))


class _CrossEntropySum(torch.autograd.Function):
    """The gradient, d loss / d logits = softmax(logits) - onehot(label), is taken chunk by chunk in the forward, where a chunk's logits
    still exist: backward only scales it.

    So the head runs once and not twice (as with checkpointing), and keeps (chunk x vocabulary) logits, not (n x vocabulary).
    """

    @staticmethod
    def forward(ctx, h, labels, head, chunk, *learnt):
        total, grads = h.new_zeros((), dtype=torch.float32), [torch.zeros_like(p) for p in learnt]
        grad_h = torch.empty_like(h)
        for i in range(0, len(h), chunk):
            y = labels[i : i + chunk, None]  # (c, 1)
            with torch.enable_grad():
                x = h[i : i + chunk].detach().requires_grad_()
                logits = head(x)  # (c, vocab)
            log_p = logits.detach().float().log_softmax(-1)
            total -= log_p.gather(1, y).sum()
            d = log_p.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=log_p.dtype))  # in place: softmax - onehot
            grad_h[i : i + chunk], *more = torch.autograd.grad(logits, [x, *learnt], d.to(logits.dtype))
            for total_grad, grad in zip(grads, more):
                total_grad += grad
        ctx.save_for_backward(grad_h, *grads)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_h, *grads = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), None, None, None, *(g * grad.to(g.dtype) for g in grads)
