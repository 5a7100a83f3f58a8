"""Combine several LoRAs of one model into one: their weighted sum, TIES or DARE.

    linear    D = sum of w_i D_i                 task arithmetic, Ilharco et al. 2022,
                                                 arXiv 2212.04089; D_i = s_i B_i A_i
    ties      1. trim: in each D_i keep the `density` largest numbers by magnitude
              2. elect: at each place the sign of the sum of the D_i
              3. merge: the mean of w_i D_i over those that have this sign
                                                 Yadav et al. 2023, arXiv 2306.01708
    dare      each number of D_i is dropped with probability 1 - `density`, the others
              are divided by `density`; then the weighted sum
                                                 Yu et al. 2023, arXiv 2311.03099

Two adapters that were trained apart disturb each other when they are added: small
numbers that matter to neither add up to noise, and numbers of opposite sign cancel. TIES
and DARE remove these numbers before the sum.

The sum of LoRAs is a LoRA whose rank is the sum of theirs: B = [B_1 B_2], A = [A_1; A_2].
So `linear` is exact without a decomposition. With a smaller `r`, and always for ties and
dare, D is made whole and cut by its singular values, D ≈ U_r S_r V_rᵀ. This is the best
matrix of rank r (Eckart & Young 1936), and it loses what is beyond r.

Cost: a singular value decomposition for each leaf, nothing afterwards. peft's "linear",
"ties" and "dare_ties" combine A and B apart, which is fast, but the product of two sums
is not the sum of the products. Its names with "_svd" compute what is computed here. Not
included: a weight or a density for each leaf.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> for name in ("sql", "chat"):
...     model = minillm.lora.wrap(model, ["0"], name=name, r=2)
...     _ = nn.init.normal_(model[0].patches[name].B)
>>> W, D = model[0].base.weight, {name: p.product(p.A, p.B) for name, p in model[0].patches.items()}
>>> model = wrap(model, {"sql": 0.5, "chat": -1.0}, name="both")
>>> torch.allclose(model[0].dense()[0], W + 0.5 * D["sql"] - D["chat"], atol=1e-5)
True
>>> [patch.name for patch in model[0].stack()], model[0].patches["both"].r  # the others are idle
(['both'], 4)
"""

import math

import torch

from minillm import options
from minillm.lora import LoRA
from minillm.registry import patches_of, use
from minillm.registry.attach import check_free, surround
from minillm.registry.learning import patches
from minillm.registry.names import check_name
from minillm.registry.sites import check_whole


def linear(deltas, weights, density=1.0):
    """The weighted sum: deltas, a list of (out, in) -> (out, in)."""
    return sum(w * D for w, D in zip(weights, deltas))


def ties(deltas, weights, density=0.2):
    """Trim, elect a sign, and take the weighted mean of the numbers that have it."""
    kept = torch.stack([trimmed(D, density) for D in deltas])  # (k, out, in)
    agree = kept.sign() == kept.sum(0).sign()
    weighted = kept * kept.new_tensor(weights)[:, None, None]
    return (agree * weighted).sum(0) / agree.sum(0).clamp(min=1)


def trimmed(D, density):
    """D with its largest numbers by magnitude, a share of `density`, and zeros elsewhere."""
    count = max(1, int(density * D.numel()))
    least = D.abs().flatten().topk(count).values[-1]
    return D * (D.abs() >= least)


def dare(deltas, weights, density=0.2):
    """Drop each number with probability 1 - density, and scale the rest up, before the sum."""
    return sum(w * D * (torch.rand_like(D) < density) / density for w, D in zip(weights, deltas))


WAYS = {"linear": linear, "ties": ties, "dare": dare}


def wrap(model, weights, *, name, way="linear", density=None, r=None):
    """Put the combination of LoRAs around their leaves, as one LoRA; in place, returns the model.

    weights: {name of a LoRA: its weight}; a leaf that some of them lack gets the others.
    name: of the new one. way: "linear", "ties" or "dare". density: for ties and dare, the
    share of numbers that is kept, by default 0.2. r: the rank of the new one, by default
    the sum of the ranks, at most that of the matrix. Afterwards the combined ones take no
    part (see `minillm.use`), and the new one learns. torch's global generator draws for
    dare. ValueError for a name that is no LoRA here, a start (PiSSA: merge it), a kind
    other than LoRA, and options that are out of range or without effect.
    """
    options.one_of("way", way, WAYS)
    if way == "linear" and density is not None:
        raise ValueError(f"density={density!r} has no effect on way='linear'")
    density = options.real("density", 0.2 if density is None else density, lambda x: 0 < x <= 1,
                           "a number above 0, up to 1")
    if r is not None:
        options.whole("r", r)
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"weights={weights!r} is no dict {{name: weight}} with one name or more")
    check_whole(model, "combine")
    check_name(name, "lora", model)
    found = chosen(model, weights)
    for site, _ in found:
        check_free(site, name, "lora")
    places = {site.name: site.layer.place(weights) for site, _ in found}
    others = {p.name for p in patches(model) if p.active and any(True for _ in p.parameters())}
    pairs = [(site, combined(site, each, weights, WAYS[way], density, r)) for site, each in found]
    over = {one for _, parts in found for patch in parts for one in patch.over}
    use(model, *others - weights.keys())
    surround(model, name, pairs, over - weights.keys())
    for site, new in pairs:  # to where they lie, beneath what is around them (a mask, DoRA)
        site.layer.add(new, places[site.name])
    return model


def chosen(model, weights):
    """[(site, [LoRA])] of the leaves that have one of the names; ValueError for a wrong one."""
    every = patches_of("lora", model)
    known = sorted({patch.name for _, patch in every if type(patch) is LoRA and not patch.start})
    for one, weight in weights.items():
        options.real(f"the weight of {one!r}", weight, math.isfinite, "a finite number")
        if one not in known:
            raise ValueError(f"no LoRA is called {one!r}; there are: {', '.join(known) or 'none'}. "
                             "Other kinds, and PiSSA, are merged first")
    sites = {}
    for site, patch in every:
        if patch.name in weights:
            sites.setdefault(site.name, (site, []))[1].append(patch)
    return list(sites.values())


@torch.no_grad()
def combined(site, parts, weights, way, density, r):
    """The new LoRA of one leaf."""
    ranks, most = sum(len(patch.A) for patch in parts), min(site.shape)
    rank = min(r or ranks, most)
    new = LoRA(site, r=rank, alpha=float(rank))  # s = 1
    w = [weights[patch.name] for patch in parts]
    if way is linear and ranks <= rank:  # exact: the factors of all, one after the other
        roots = [abs(x * patch.scale) ** 0.5 for x, patch in zip(w, parts)]
        A = torch.cat([c * patch.A for c, patch in zip(roots, parts)])
        B = torch.cat([math.copysign(c, x) * patch.B for c, x, patch in zip(roots, w, parts)], 1)
        new.A[: len(A)], new.B[:, : len(A)] = A, B
        return new
    D = way([patch.product(patch.A, patch.B) for patch in parts], w, density)
    U, S, Vt = torch.linalg.svd(D, full_matrices=False)
    new.A.copy_(S[:rank, None].sqrt() * Vt[:rank])
    new.B.copy_(U[:, :rank] * S[:rank].sqrt())
    return new
