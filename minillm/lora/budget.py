"""AdaLoRA's budget: in training, ranks go from weights that need few to weights that need many.

A triplet i of a leaf is a column of P, the number λ_i, and a row of Q. In each step t:

    1. I(w)  = | w dL/dw |                                of each parameter w: its sensitivity
    2. Ī(w)  = β1 Ī(w) + (1 - β1) I(w)                    smoothed over the steps
       Ū(w)  = β2 Ū(w) + (1 - β2) | I(w) - Ī(w) |         its uncertainty
       s(w)  = Ī(w) Ū(w)
    3. S_i   = s(λ_i) + mean of s over the column + mean of s over the row
    4. after the optimizer's step: of all leaves' triplets, the b(t) with the largest S keep
       their λ; the others get λ_i = 0

    b(t) = b_0                                            t < t_i
           b_T + (b_0 - b_T) (1 - (t - t_i) / (end - t_i))^3
           b_T                                            end <= t, where the choice stays

                              Zhang et al. 2023, "AdaLoRA", arXiv 2303.10512, algorithm 1

    code      paper        meaning
    target    b_T          the average rank of a leaf at the end; b_T is target times the leaves
    begin     t_i          as a share of all steps
    end       T - t_f      as a share of all steps; the rest of them keeps the choice
    every     Δ_T          steps from one cut to the next
    beta1, beta2  β1, β2   how slowly the averages move

A λ_i that was cut has a gradient, and AdamW moves it: its triplet competes again at the next cut.

Ī and Ū are float32 buffers beside P, Λ and Q. A checkpoint holds them, so a training that was
interrupted continues bit for bit; an adapter's file does not. peft is called after the optimizer's
step, so it multiplies the weight after the step by the gradient before it. Here both are of one
step, as in the paper. Where the last that would stay has the score of others, peft cuts them all.

>>> budget = Budget(target=2, begin=0.0, end=1.0)
>>> [budget.at(t, 101, 12, 4) for t in (0, 25, 50, 100)]      # of 12 ranks in 4 leaves, 8 remain
[12, 9, 8, 8]
"""

import dataclasses
import itertools

import torch

from minillm import options
from minillm.registry import patches_of

LEARN = ("P", "E", "Q")


@dataclasses.dataclass(frozen=True)
class Budget:
    """An `on_step` for `train`, for a model with AdaLoRA; name: which one, if it has several.

    ValueError for numbers out of range."""

    target: float = 8
    begin: float = 0.1
    end: float = 0.75
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    name: str | None = None

    def __post_init__(self):
        exact = dict(target=options.positive("target", self.target),
                     every=options.whole("every", self.every))
        for key in ("begin", "end", "beta1", "beta2"):
            value = getattr(self, key)
            exact[key] = options.real(key, value, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        if not self.begin < self.end:
            raise ValueError(f"begin={self.begin!r}, end={self.end!r}: shares of the steps, "
                             "0 <= begin < end <= 1")
        if max(self.beta1, self.beta2) == 1:
            raise ValueError(f"beta1={self.beta1!r}, beta2={self.beta2!r}: an average with 1 "
                             "never moves; give numbers below 1")
        for key, value in exact.items():
            object.__setattr__(self, key, value)  # it is frozen

    def patches(self, model):
        """The AdaLoRAs that it changes. ValueError for none, or for several names."""
        found = [patch for _, patch in patches_of("lora", model) if patch.kind == "adalora"]
        names = sorted({patch.name for patch in found})
        if not found:
            raise ValueError("Budget allots the ranks of AdaLoRA, and this model has none: "
                             "minillm.lora.adalora.wrap(model) first")
        if self.name is None and len(names) > 1 or self.name not in (None, *names):
            raise ValueError(f"name={self.name!r}: Budget allots the ranks of one name, and this "
                             f"model has AdaLoRA of {', '.join(map(repr, names))}")
        return [patch for patch in found if self.name in (None, patch.name)]

    def check(self, model):
        """ValueError if it cannot allot this model's ranks; gives each patch its averages."""
        found = self.patches(model)
        most = sum(patch.r for patch in found)
        if round(self.target * len(found)) > most:
            raise ValueError(f"target={self.target}: the ranks of these {len(found)} leaves are "
                             f"{most / len(found):.3g} on average: wrap with a larger r")
        for patch in found:
            for name, key in itertools.product(("mean", "spread"), LEARN):
                now = torch.zeros_like(getattr(patch, key), dtype=torch.float32)
                patch.register_buffer(f"{name}_{key}", now, persistent=False)

    def settled(self, steps):
        """The step of the last cut: from it on the model has the final ranks."""
        return round(self.end * (steps - 1))

    def at(self, step, steps, most, leaves):
        """b(t): how many triplets of all leaves stay at this step; most: b_0."""
        first, last = round(self.begin * (steps - 1)), self.settled(steps)
        least = round(self.target * leaves)
        if step >= last:
            return least
        t = max(0, step - first) / (last - first)
        return int(least + (most - least) * (1 - t) ** 3)

    @torch.no_grad()
    def __call__(self, model, step, steps):
        if step > self.settled(steps):
            return
        for patch in self.patches(model):
            for key in LEARN:
                w = getattr(patch, key)
                mean, spread = getattr(patch, f"mean_{key}"), getattr(patch, f"spread_{key}")
                if w.grad is None:  # it takes no part in this step
                    continue
                now = (w.float() * w.grad.float()).abs()  # I(w)
                mean.mul_(self.beta1).add_((1 - self.beta1) * now)
                spread.mul_(self.beta2).add_((1 - self.beta2) * (now - mean).abs())

    @torch.no_grad()
    def after(self, model, step, steps):
        """Cut, if a cut is due; `train` calls it after the optimizer's step."""
        found, last = self.patches(model), self.settled(steps)
        ranks = [patch.r for patch in found]
        keep = self.at(step, steps, sum(ranks), len(found))
        due = step == last or step < last and keep < sum(ranks) and step % self.every == 0
        if due:
            scores = torch.cat([score(patch) for patch in found])
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen[scores.topk(keep).indices] = True
            for patch, kept in zip(found, chosen.split(ranks)):
                patch.kept.copy_(kept)
        if due or step > last:
            for patch in found:
                patch.E.masked_fill_(~patch.kept, 0)


def score(patch):
    """S (r,) of a leaf's triplets."""
    P, E, Q = (getattr(patch, f"mean_{key}") * getattr(patch, f"spread_{key}") for key in LEARN)
    return E + P.mean(0) + Q.mean(1)
