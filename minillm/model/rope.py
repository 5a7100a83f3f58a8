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
    yarn      f_i * (s_i + (1 - s_i) / factor)     Peng et al. 2023, arXiv 2309.00071
              s_i = (slow - i) / (slow - fast)     clamped to 0 .. 1
              fast, slow                           the i whose f_i turns beta_fast (32) and
                                                   beta_slow (1) times in the original context
              cos, sin * m                         m = 0.1 ln(factor) + 1: q k grows by m^2
    NTK       f_i of the base * factor^(d/(d-2))   Peng et al. 2023, definition 1: `ntk_base`
    factors   f_i / factors_i                      as GGUF files store llama3

llama3 and yarn leave the fast pairs as they are and stretch the slow ones. They differ
in between: llama3 goes by the turns, yarn by the number i of the pair. (yarn's paper
goes by the turns too. Its authors' code, transformers and llama.cpp go by i.) NTK's
slowest pair is the one of linear, its fastest is untouched. It needs no type of its
own: it is a model with another `rope_base`.

`stretch` prepares a model for texts that are `factor` times as long as those of its
training. A short training on long texts may follow.

Letters in the shapes: b batch, h heads, t tokens, d head size. transformers has seven
types, one function for each. Not included: LongRoPE, and dynamic NTK, whose factor
depends on the length of the text: keys in the cache would keep the angles of an earlier
length.
"""

import dataclasses
import math

import torch

from minillm import options

SCALINGS = {  # type: its fields, by the names that transformers gives them
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "factors": ("factors",),
}
OPTIONAL = {"yarn": dict(beta_fast=32.0, beta_slow=1.0, attention_factor=None, truncate=True)}


def frequencies(head_size, base, scaling=None, device=None):
    """How fast each pair turns, (d/2,) of float32, in radians a token."""
    f = base ** -(torch.arange(0, head_size, 2, device=device).float() / head_size)
    return f if scaling is None else f / divisors(f, base, scaling)


def divisors(f, base, scaling):
    """What the frequencies f (d/2,) of `base` are divided by, (d/2,); see `check_scaling`."""
    if scaling["rope_type"] == "factors":
        return torch.tensor(scaling["factors"], device=f.device)
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return torch.full_like(f, factor)
    original = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "yarn":
        s = kept(len(f), base, original, **(OPTIONAL["yarn"] | scaling)).to(f.device)
    else:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * f / (2 * math.pi)
        s = ((turns - low) / (high - low)).clamp(0, 1)
    return factor / (1 + s * (factor - 1))


def kept(pairs, base, original, *, beta_fast, beta_slow, truncate, **others):
    """yarn's s_i (d/2,): 1 where pair i keeps its frequency, 0 where it is stretched.

    truncate: `fast` is rounded down and `slow` up to whole pairs, as the authors' code does.
    """
    # original * base^(-i/pairs) / 2 pi = turns, solved for i
    fast, slow = (pairs * math.log(original / (2 * math.pi * turns)) / math.log(base)
                  for turns in (beta_fast, beta_slow))
    if truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, 2 * pairs - 1)
    return 1 - ((torch.arange(pairs) - fast) / (slow - fast or 0.001)).clamp(0, 1)


def attention_factor(scaling):
    """What cos and sin are multiplied by: yarn's m, and 1 for all other types."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    given = scaling.get("attention_factor")
    return 0.1 * math.log(max(1, scaling["factor"])) + 1 if given is None else given


def ntk_base(base, factor, head_size):
    """base * factor^(d/(d-2)): the base with which the slowest pair turns `factor` times slower.

    ValueError for a head of one pair, whose only frequency is 1 with any base.

    >>> base = ntk_base(10000.0, 4, 64)
    >>> round(base)
    41829
    >>> slow = frequencies(64, 10000.0)[-1] / frequencies(64, base)[-1]
    >>> round(slow.item(), 3)
    4.0
    """
    if head_size == 2:
        raise ValueError("head_size=2 is one pair, which turns by 1 with any base: ntk cannot slow "
                         "it down")
    return base * factor ** (head_size / (head_size - 2))


def stretch(model, kind, factor, original=None):
    """Make a `Transformer` take `factor` times as many positions; in place, returns the model.

    kind: "linear", "ntk", "llama3" (with the bounds of Llama 3.1, 1 and 4 turns) or "yarn";
    "none" leaves the angles as they are, to measure how a model fails beyond its training.
    original: the length of the texts of its training, by default the model's positions. A model
    that was trained on shorter texts needs it. Files hold the change, as transformers names it.
    A cache that was filled before the change is of no use after it.

    TypeError for another class than minillm's; ValueError for a model with learned positions or
    stretched already, an unknown kind, a factor that is not above 1.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "rope_base"):
        raise TypeError(f"stretch changes a minillm.Transformer, and this is a "
                        f"{type(model).__name__}: minillm.load reads its checkpoint")
    if not config.rope_base:
        raise ValueError("this model has learned positions, and RoPE scaling is for rotary ones")
    if config.rope_scaling:
        raise ValueError(f"this model has rope_scaling={config.rope_scaling!r} already")
    factor = options.real("factor", factor, lambda x: 1 < x < math.inf, "a number above 1")
    original = options.whole("original", config.positions if original is None else original)
    fields = dict(
        linear=dict(factor=factor),
        llama3=dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=original),
        yarn=dict(factor=factor, original_max_position_embeddings=original))
    if kind == "none":
        change = {}
    elif kind == "ntk":
        change = dict(rope_base=ntk_base(config.rope_base, factor, config.head_size))
    elif isinstance(kind, str) and kind in fields:
        change = dict(rope_scaling=dict(rope_type=kind, **fields[kind]))
    else:
        raise ValueError(f"kind={kind!r} is unknown; known: none, ntk, {', '.join(fields)}")
    positions = max(config.positions, int(original * factor))
    model.config = dataclasses.replace(config, positions=positions, **change)
    return model


def rope_table(positions, head_size, base, scaling=None):
    """cos and sin of the angles, each (b, 1, t, d), float32, for positions (b, t)."""
    f = frequencies(head_size, base, scaling, positions.device)
    angle = positions[:, None, :, None].float() * f  # (b, 1, t, d/2)
    angle, m = torch.cat([angle, angle], -1), attention_factor(scaling)
    return angle.cos() * m, angle.sin() * m


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
    fields, optional = {"rope_type", *SCALINGS[kind]}, OPTIONAL.get(kind, {})
    if set(scaling) - set(optional) != fields:
        may = f", and may have {', '.join(sorted(optional))}" if optional else ""
        raise ValueError(f"rope_scaling={scaling!r}: the type {kind} has the fields "
                         f"{', '.join(sorted(fields))}{may}")
    numbers = scaling["factors"] if kind == "factors" else [scaling[n] for n in SCALINGS[kind]]
    if kind == "yarn":
        numbers += check_yarn(scaling)
    listed = numbers if isinstance(numbers, list) else [None]
    if not all(type(n) in (int, float) and 0 < n < math.inf for n in listed):
        raise ValueError(f"rope_scaling={scaling!r}: the fields are numbers above 0")
    if kind == "factors" and len(numbers) != head_size // 2:
        raise ValueError(f"rope_scaling has {len(numbers)} factors, and heads of {head_size} have "
                         f"{head_size // 2} pairs")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"rope_scaling={scaling!r}: low_freq_factor is not below high_freq_factor")


def check_yarn(scaling):
    """The optional numbers of the type yarn; ValueError if they contradict each other."""
    found = {**OPTIONAL["yarn"], **scaling}
    if not isinstance(found["truncate"], bool):
        raise ValueError(f"rope_scaling={scaling!r}: truncate is neither true nor false")
    fast, slow = found["beta_fast"], found["beta_slow"]
    if type(fast) in (int, float) and type(slow) in (int, float) and fast < slow:
        raise ValueError(f"rope_scaling={scaling!r}: beta_fast is below beta_slow")
    given = found["attention_factor"]
    return [fast, slow] + ([] if given is None else [given])
