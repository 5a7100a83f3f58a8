"""Gradual unfreezing: the top block learns first, and one more block joins at a time.

    block L - k learns from step  t_k = k / L * until * steps  on, k = 0, ..., L - 1

                             Howard & Ruder 2018, "ULMFiT", arXiv 1801.06146, section 3.3: one
                             more block each epoch

The low blocks hold general knowledge. At the start the gradient is large and does not
fit the task well, so it should not change the low blocks yet. The modules after the
blocks learn from the start. The modules before them, such as the embedding, join with
the lowest block.

    train(model, examples, ..., on_step=Unfreezing(until=0.5))

The parameters of a technique in a block, such as LoRA, wait with the block. A head that
shares its matrix with the embedding waits with the embedding. A parameter that waits has
no gradient, so AdamW neither moves nor decays it, and its moments start when it joins.
The schedule depends only on the step, so a training that was interrupted continues bit
for bit.

Cost: a step costs what it trains, as with `freeze.wrap(model, last=k)`: the backward pass
stops at the lowest block that learns, and the blocks beneath keep no activations. On
average over a training with until=0.5 that is three quarters of the blocks. In several
processes (torchrun) the gradients of all are computed, and those that wait are dropped,
because DDP waits for each of them.

>>> import minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=4, heads=2))
>>> for step in (0, 10, 20, 30):
...     names = [site.name for site in Unfreezing(until=0.5).waiting(model, step, 80)]
...     print(step, [name for name in names if name.startswith("layers.") and name.count(".") == 1])
0 ['layers.0', 'layers.1', 'layers.2']
10 ['layers.0', 'layers.1']
20 ['layers.0']
30 []
"""

import contextlib
import dataclasses
import math

from minillm import options
from minillm.freeze import lowest, own, within
from minillm.registry import parameters, roles


@dataclasses.dataclass(frozen=True)
class Unfreezing:
    """An `on_step` for `train`. until: the share of the steps after which all blocks learn."""

    until: float = 0.5

    def __post_init__(self):
        options.real("until", self.until, lambda x: 0 < x <= 1, "a share of the steps, above 0")

    def settled(self, steps):
        """The step from which on all blocks learn, for any number of blocks."""
        return math.ceil(self.until * steps)

    def waiting(self, model, step, steps):
        """The Sites of the modules that do not learn yet."""
        n = len(roles.blocks(model))
        joined = min(n, 1 + int(step * n / (self.until * steps)))
        return [] if joined == n else lowest(model, joined)

    def held(self, model, step, steps):
        """The parameters that do not learn yet, those of techniques among them."""
        sites = self.waiting(model, step, steps)
        names = within(model, sites) | own(model) if sites else ()
        every = [p for name, _, _, p in parameters(model) if name in names]
        for site in sites:
            every += site.layer.patches.parameters() if site.layer else ()
        return every

    @contextlib.contextmanager
    def around(self, model, step, steps):
        """The forward and the backward pass of a step, in which what waits has no gradient.

        If nothing would be left to learn in this step (LoRA in the lowest block alone), the
        gradients are computed, and `__call__` drops them.
        """
        stopped = [p for p in self.held(model, step, steps) if p.requires_grad]
        ids = {id(p) for p in stopped}
        if all(id(p) in ids for p in model.parameters() if p.requires_grad):
            stopped = []
        try:
            for p in stopped:
                p.requires_grad_(False)
            yield
        finally:
            for p in stopped:
                p.requires_grad_(True)

    def __call__(self, model, step, steps):
        for p in self.held(model, step, steps):
            p.grad = None
