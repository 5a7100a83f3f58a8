"""A Transformer's configuration: its sizes, and the choices of each family."""

import dataclasses
import functools
import math

import torch.nn.functional as F
from torch import nn

from minillm.model.rope import check_scaling

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


@dataclasses.dataclass
class Config:
    """A Transformer's configuration. The defaults are Llama's; `gpt2` has GPT-2's.

    ValueError for a value that is out of range, or that contradicts another field.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int | None = None  # None: as many as heads
    head_size: int | None = None  # None: width / heads
    ffn: int | None = None  # the MLP's hidden width; None: 4 * width
    positions: int = 2048  # the longest sequence
    norm: str = "rms"
    eps: float = 1e-5
    activation: str = "silu"
    gated: bool = True  # SwiGLU's gate
    rope_base: float | None = 10000.0  # None: learned positions
    rope_scaling: dict | None = None  # for contexts beyond the trained ones; see rope.py
    # how many tokens a token sees, itself included (sliding window, Mistral); None: all
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # normalize q and k in each head, before RoPE rotates them (Qwen3)
    tied: bool = True  # the head is the embedding

    def __post_init__(self):
        for field in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "ffn",
                      "positions", "window"):
            value = getattr(self, field)
            whole = type(value) is int and 1 <= value < 1 << 31
            if not (whole or value is None and getattr(Config, field, 0) is None):
                raise ValueError(f"{field}={value!r} is not a whole number from 1")
        for field in ("eps", "rope_base"):
            value = getattr(self, field)
            positive = isinstance(value, (int, float)) and 0 < value < math.inf
            if not (positive or value is None and field == "rope_base"):
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
            raise ValueError(f"rope_scaling={self.rope_scaling!r} is for RoPE, "
                             "and rope_base is None")
        check_scaling(self.rope_scaling, self.head_size)
        for field, known in (("activation", ACTIVATIONS), ("norm", NORMS)):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"{field}={value!r} is unknown; known: {', '.join(known)}")

    @classmethod
    def gpt2(cls, vocab_size, width, layers, heads, **others):
        """The GPT-2 family: learned positions, LayerNorm, GELU, biases everywhere."""
        family = dict(norm="layer", activation="gelu_tanh", gated=False, rope_base=None,
                      positions=1024)
        biases = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
        return cls(vocab_size, width, layers, heads, **{**family, **biases, **others})
