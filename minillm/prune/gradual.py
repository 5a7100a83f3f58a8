"""Gradual pruning: a little more is pruned every few steps, and the model trains in between.

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_n - t_0))^3       t_0 <= t <= t_n

                              Zhu & Gupta 2017, "To prune, or not to prune", arXiv 1710.01878, eq. 1
    code       paper     meaning
    sparsity   s_f       the share of zeros at the end
    first      s_i       the share at t_0
    begin      t_0       as a share of all steps
    end        t_n       as a share of all steps; the rest of the training repairs what was pruned
    every      Delta t   steps from one pruning to the next

The cube prunes fast at first, when many weights are of no use, and slowly at the end.
The mask of step t keeps the largest weights of each group, as `prune.wrap` does. A
pruned weight gets no gradient, but AdamW still moves it beneath the mask: by its
momentum, for some steps, and by the weight decay. The weight comes back if it is then
larger than others that were kept.

The masks of one name are pruned together: a model that has masks of several names (say,
one that stays as it is) needs `name`. Masks of the pattern N:M prune round(s_t M) of each
M neighbours on the way, and must end at the pattern's own share.

    prune.wrap(model, sparsity=0.0)
    train(model, examples, ..., on_step=Gradual(sparsity=0.5))

Cost: a search for the smallest weights at every pruning. The masks depend only on the
step and the weights, so a training that was interrupted continues bit for bit.

>>> schedule = Gradual(sparsity=0.8, begin=0.0, end=1.0)
>>> [round(schedule.at(t, 101), 3) for t in (0, 25, 50, 100)]
[0.0, 0.39, 0.7, 0.8]
"""

import dataclasses

import torch

from minillm import options
from minillm.prune import magnitude, patterns
from minillm.registry import patches_of


@dataclasses.dataclass(frozen=True)
class Gradual:
    """An `on_step` for `train`. ValueError for numbers out of range.

    name: the name of the masks that it prunes; None if all masks have the same name.
    """

    sparsity: float = 0.5
    first: float = 0.0
    begin: float = 0.0
    end: float = 0.75
    every: int = 10
    name: str | None = None

    changes = ("sparsity",)  # the options of the patches that this changes

    def __post_init__(self):
        exact = dict(sparsity=options.share("sparsity", self.sparsity),
                     first=options.share("first", self.first),
                     every=options.whole("every", self.every))
        for name in ("begin", "end"):
            exact[name] = options.real(name, getattr(self, name), lambda x: 0 <= x <= 1,
                                       "a share of the steps, from 0 to 1")
        if not self.begin < self.end:
            raise ValueError(f"begin={self.begin!r}, end={self.end!r}: shares of the steps, "
                             "0 <= begin < end <= 1")
        for name, value in exact.items():
            object.__setattr__(self, name, value)  # it is frozen

    def masks(self, model):
        """[(site, mask)] that it prunes. ValueError for none, or for several names."""
        found = patches_of("prune", model)
        names = sorted({patch.name for _, patch in found})
        if not found:
            raise ValueError("gradual pruning changes masks, and this model has none: "
                             "minillm.prune.wrap(model, sparsity=0.0) first")
        if self.name is None and len(names) > 1 or self.name not in (None, *names):
            raise ValueError(f"name={self.name!r}: gradual pruning changes the masks of one name, "
                             f"and this model has masks of {', '.join(map(repr, names))}")
        return [(site, patch) for site, patch in found if self.name in (None, patch.name)]

    def check(self, model):
        """ValueError if it cannot prune this model, or a pattern cannot have its sparsity."""
        found = self.masks(model)
        for group in {patch.group for _, patch in found}:
            sites = [site for site, patch in found if patch.group == group]
            patterns.named(group).check(self.sparsity, sites)

    def settled(self, steps):
        """The step of the last pruning: from it on the model has the final sparsity."""
        return round(self.end * (steps - 1))

    def at(self, step, steps):
        """The sparsity at a step: that of the last pruning up to it."""
        begin, end = round(self.begin * (steps - 1)), self.settled(steps)
        if step >= end:
            return self.sparsity
        t = max(0, step - begin) // self.every * self.every
        return self.sparsity + (self.first - self.sparsity) * (1 - t / (end - begin)) ** 3

    @torch.no_grad()
    def __call__(self, model, step, steps):
        found = self.masks(model)
        now = self.at(step, steps)
        if step > 0 and now == self.at(step - 1, steps):
            return
        self.check(model)
        for group in {patch.group for _, patch in found}:
            sites = [(site, patch) for site, patch in found if patch.group == group]
            scores = ((site.name, magnitude(site, below=patch.name)) for site, patch in sites)
            masks = patterns.named(group).masks(scores, now)
            for site, patch in sites:
                patch.mask.copy_(masks[site.name])
                patch.sparsity = now
