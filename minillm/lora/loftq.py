"""LoftQ: LoRA that starts with what the rounding of each weight will lose.

A weight that is stored in few bits is no longer W. LoftQ chooses A and B so that the
stored weight and s B A together are near W again. Two steps alternate, T times:

    1. Q_t       = q(W - s B_{t-1} A_{t-1})      q: what the format stores; B_0 A_0 = 0
    2. s B_t A_t = the r largest parts of the singular value decomposition of W - Q_t

                                Li et al. 2023, "LoftQ", arXiv 2310.08659, algorithm 1
    code         paper         shape
    A, B         B^T, A        (r, in), (out, r)      these learn; LoRA's names
    A0, B0       the same                             A and B at birth, as in `pissa`
    iterations   T             ()
    into         q_N           the format: minillm.quant.nf4, or a `wrap` with its options

`wrap` attaches only LoRA. It leaves W - s B A in the dense base, so that no output
changes and `unwrap` restores W bit for bit. The next line stores the base in the same
format:

    minillm.lora.loftq.wrap(model, into=minillm.quant.nf4)
    minillm.quant.nf4.wrap(model)

So the stored weight is q(W - s B_t A_t). The paper returns Q_t and B_t A_t; this is half
a step further. On leaves of the tiny model in NF4, the error ||W - (Q + s B A)|| is 1 to
2% smaller than the paper's after one iteration, and 0 to 2% larger after five, because
the new scales move the levels. With 2 bits it may grow with t. So `wrap` keeps the t of
the smallest error, which costs one rounding more.

Cost: a decomposition and a rounding for each leaf and iteration, and a copy of W until
the adapter is merged with keep=False. peft computes Q_t with bitsandbytes, replaces the
base by Q_t and keeps no copy.

>>> from torch import nn; import copy, torch, minillm
>>> model, nf4 = nn.Sequential(nn.Linear(64, 64)), minillm.quant.nf4
>>> W, plain = model[0].weight.clone(), nf4.wrap(copy.deepcopy(model))[0]
>>> layer = nf4.wrap(minillm.lora.loftq.wrap(model, into=nf4, r=8))[0]
>>> bool((layer.dense()[0] - W).norm() < 0.9 * (plain.dense() - W).norm())
True
"""

import torch
from torch import nn

from minillm import options
from minillm.lora import LoRA
from minillm.registry import METHODS, dense
from minillm.registry.attach import attach
from minillm.registry.bases import rebased
from minillm.registry.table import method


def wrap(model, targets=None, *, name=None, r=8, alpha=16.0, rank_stabilized=False, dropout=0.0,
         into="nf4", iterations=5):
    """Put LoRA that makes up for a format's rounding around leaves; returns the model, in place.

    into: the format in which the leaves will be stored: its module (`minillm.quant.nf4`),
    its `wrap`, one with options (`partial(minillm.quant.wrap, bits=4, group=32)`), or its
    name in the table of methods. iterations: how often the two steps alternate. The other
    arguments are those of `minillm.lora.wrap`. ValueError also for an `into` that stores
    no leaf, and for a leaf that a format stores, that has a mask, or that shares its matrix.
    """
    options.whole("iterations", iterations)
    stores = method_of(into)

    @torch.no_grad()
    def fill(patch, site):
        W = site.stored()[0].detach().to(patch.A.dtype)  # (out, in)
        rank, least, Q = len(patch.A), torch.inf, rounded(site, W, stores)
        for _ in range(iterations):
            U, S, Vt = torch.linalg.svd(W - Q, full_matrices=False)
            root = (S[:rank] / patch.scale).sqrt()
            A, B = root[:, None] * Vt[:rank], U[:, :rank] * root
            rest = W - patch.product(A, B)
            Q = rounded(site, rest, stores)
            if (error := (rest - Q).norm()) < least:
                least = error
                patch.A.copy_(A), patch.A0.copy_(A), patch.B.copy_(B), patch.B0.copy_(B)

    return attach(LoRA, model, targets, name=name, fill=fill, r=r, alpha=alpha,
                  rank_stabilized=rank_stabilized, dropout=dropout, start=True)


def method_of(into):
    """The `wrap` that `into` names; ValueError if it is none."""
    found = METHODS[into].wrap if isinstance(into, str) and into in METHODS else into
    found = getattr(found, "wrap", found)
    if not callable(found):
        raise ValueError(f"into={into!r} is no format: give one such as minillm.quant.nf4, or its "
                         "wrap with options")
    return found


def rounded(site, W, stores):
    """q(W) (out, in): what the format stores of W, by itself, at this site."""
    leaf = rebased(site.module, W, None)
    leaf._modules.pop("past", None)
    tree = leaf  # the leaf alone, under its own name, which errors repeat
    for key in reversed(site.name.split(".")):
        tree, inner = nn.Module(), tree
        tree.add_module(key, inner)
    stores(tree, lambda name, _: name == site.name)
    stored = tree.get_submodule(site.name)
    if not hasattr(stored, "pack"):
        raise ValueError(f"into= leaves {site.name!r} as {type(stored).__name__}: it has to be the "
                         "wrap of a format, such as minillm.quant.nf4.wrap")
    return dense(stored)[0].to(W.dtype)


method("loftq", wrap, kind="lora", does="LoRA that starts with what rounding a weight will lose",
       paper="Li et al. 2023, arXiv 2310.08659", rates=dict(tiny=2e-3, smollm2=7e-4),
       small={"": dict(r=4, into="quant"), "once": dict(r=2, into="quant", iterations=1)})
