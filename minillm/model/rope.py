"""Rotary positions (RoPE), also for contexts longer than those of the training.

    pair i of a head turns by p * f_i at position p    f_i = base^(-2i/d)
                                                       Su et al. 2021, arXiv 2104.09864

A model that was trained on `original` positions knows no larger angles. Scaling turns
more slowly.

    linear    f_i / factor                         Chen et al. 2023, arXiv 2306.15595
    llama3    f_i * (s_i + (1 - s_i) / factor)     Llama 3.1, arXiv 2407.21783
              n_i = original * f_i / 2 pi          turns in the original context
              s_i = (n_i - low) / (high - low)     clamped to 0 .. 1; 1: f_i as it is
            = f_i / (factor / (1 + s_i (factor - 1)))
    factors   f_i / factors_i                      as GGUF files store llama3

Letters in the shapes: b batch, h heads, t tokens, d head size. transformers has seven
types, one function for each; some depend on the length of the text. Not included: YaRN,
LongRoPE, dynamic NTK.
"""

import math

import torch

SCALINGS = {  # type: its fields, by the names that transformers gives them
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "factors": ("factors",),
}


def frequencies(head_size, base, scaling=None, device=None):
    """How fast each pair turns, (d/2,) of float32, in radians a token."""
    f = base ** -(torch.arange(0, head_size, 2, device=device).float() / head_size)
    return f if scaling is None else f / divisors(f, scaling)


def divisors(f, scaling):
    """What the frequencies f (d/2,) are divided by, (d/2,). scaling: see `check_scaling`."""
    if scaling["rope_type"] == "factors":
        return torch.tensor(scaling["factors"], device=f.device)
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return torch.full_like(f, factor)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    s = ((turns - low) / (high - low)).clamp(0, 1)
    return factor / (1 + s * (factor - 1))


def rope_table(positions, head_size, base, scaling=None):
    """cos and sin of the angles, each (b, 1, t, d), float32, for positions (b, t)."""
    f = frequencies(head_size, base, scaling, positions.device)
    angle = positions[:, None, :, None].float() * f  # (b, 1, t, d/2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i+d/2}) of x (b, h, t, d) by `rope_table`'s angles."""
    left, right = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], -1) * sin.to(x.dtype)


def check_scaling(scaling, head_size):
    """ValueError unless `scaling` is None, or a rope_type of SCALINGS with its fields."""
    if scaling is None:
        return
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_scaling={scaling!r} has no known rope_type; "
                         f"known: {', '.join(SCALINGS)}")
    fields = {"rope_type", *SCALINGS[kind]}
    if set(scaling) != fields:
        raise ValueError(f"rope_scaling={scaling!r}: the type {kind} has the fields "
                         f"{', '.join(sorted(fields))}")
    numbers = scaling["factors"] if kind == "factors" else [scaling[n] for n in SCALINGS[kind]]
    listed = numbers if isinstance(numbers, list) else [None]
    if not all(type(n) in (int, float) and 0 < n < math.inf for n in listed):
        raise ValueError(f"rope_scaling={scaling!r}: the fields are numbers above 0")
    if kind == "factors" and len(numbers) != head_size // 2:
        raise ValueError(f"rope_scaling has {len(numbers)} factors, and heads of {head_size} have "
                         f"{head_size // 2} pairs")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"rope_scaling={scaling!r}: low_freq_factor is not below high_freq_factor")
