"""Calibration: collect the real inputs of each leaf, block by block, and change it.

    1. All examples run through the blocks once. The hidden state before the first block
       is kept, and the other arguments of each block (masks, rotations).
    2. For each block in turn:
       a. Its leaves form groups that read one tensor: q, k, v; then o; then gate, up;
          then down.
       b. For each group the examples run through the block, up to the group. A
          statistic of its input adds up, batch by batch. Then `change(site, statistic)`
          changes each leaf.
       c. The examples run through the changed block: its output is the next block's
          input.

So each leaf is calibrated with the output of the changed leaves before it, as in GPTQ's
own code with `--true-sequential` (Frantar et al. 2022, arXiv 2210.17323). One pass for
all leaves of a block takes a third of the time, but it calibrates o and down with
inputs that they do not get in the changed model.

    statistic    content                                             shape
    Gram         H = sum of x xᵀ over the tokens, for GPTQ           (in, in)
    Squares      sum of x² over the tokens, for Wanda                (in,)

Memory: the hidden states of all tokens, and the activations of one block for one batch.
Time: about four forward passes. A group of leaves outside of the blocks (a head that is
named) costs one more pass of the whole model, and one pass looks at all of them first. So
does every group of a model without blocks, and of one that calls a block more than once
(ALBERT).

Padding never counts. Each block has to get the hidden state that the block before it
returns; a model that changes it in between is an error. GPTQ's code gives the masks of
the first block to all blocks. Here each block gets its own masks, because some layers
have a sliding window and others have none. Not included: hidden states on disk or on
another device.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=2, heads=2))
>>> seen = lambda site, gram: print(site.name, tuple(gram.H.shape), gram.count)
>>> stream(model, torch.randint(50, (4, 10)), seen, r"layers.0.*(k|down)_proj", progress=False)
layers.0.self_attn.k_proj (8, 8) 40
layers.0.mlp.down_proj (32, 32) 40
"""

import contextlib
import dataclasses

import torch
from tqdm.auto import tqdm

from minillm import options
from minillm.calibrate.watch import (
    called_again, enter, gather, groups, standing, state, survey, watching,
)
from minillm.calling import arguments, logits, native
from minillm.data import Example, check_examples, collate
from minillm.model.generate import evaluating
from minillm.registry import hidden_linears, prepare, roles, select, walk
from minillm.registry.names import taking
from minillm.registry.sites import check_whole


class Gram:
    """H = sum of x xᵀ over the tokens x, in float32 or float64."""

    def __init__(self):
        self.count, self.H = 0, 0

    def add(self, x):
        """x (tokens, in)"""
        self.count += len(x)
        self.H = self.H + x.T @ x


class Squares:
    """The sum of x² over the tokens x, for each input, in float32 or float64."""

    def __init__(self):
        self.count, self.sum = 0, 0

    def add(self, x):
        """x (tokens, in)"""
        self.count += len(x)
        self.sum = self.sum + x.square().sum(0)


@dataclasses.dataclass
class Batch:
    ids: torch.Tensor  # (b, t)
    mask: torch.Tensor | None  # (b, t), 0 at padding; None where there is none
    x: torch.Tensor | None = None  # (b, t, width), before the next block
    beside: list = dataclasses.field(default_factory=list)  # [(args, kwargs)] of the blocks to come
    parts: list = dataclasses.field(default_factory=list)  # how the patches take part in its call


def stream(model, examples, change, targets=None, *, statistic=Gram, batch_size=8, progress=True):
    """Call change(site, statistic) for each leaf of `targets`, in computing order.

    examples: a list of Examples or of lists of ids, or a tensor (n, t) of ids. change:
    a function that may change the leaf in the model; leaves with the same input share
    one statistic. targets: see `registry.select`; by default every linear leaf but the
    output head and tied matrices. statistic: a class with `add` and `count`, such as
    Gram. batch_size: examples in a forward pass. progress: whether to show a bar.

    Meanwhile the model is in eval mode. ValueError, before any leaf is changed, for a
    leaf that no example reaches, for blocks that do not form a chain, and for inputs and
    hidden states that are not finite, or whose squares are not.
    """
    check_whole(model, "calibrate")
    sites, order = select(model, targets, linear, hidden_linears(model)), walk(model)
    for site in sites:
        if len(site.places) > 1:
            raise ValueError(f"{site.name!r} is used in {len(site.places)} places, which have "
                             "different inputs: leave it out of targets=")

    def whole(batch):
        give = model if native(model) else lambda *known: logits(model, *known)
        give(batch.ids, batch.mask)

    blocks = roles.blocks(model) if roles.lists(model) else []
    with quiet(model), tqdm(total=len(sites), desc="calibrate", disable=not progress) as bar:
        batches = list(cut(model, examples, options.whole("batch_size", batch_size)))
        if called_again(whole, blocks, batches[0]):
            blocks = []
        inside = [[site for site in sites if f"{site.name}.".startswith(f"{block.name}.")]
                  for block in blocks]
        while inside and not inside[-1]:  # no leaf of the last block is chosen
            blocks, inside = blocks[:-1], inside[:-1]
        within = {site.name for group in inside for site in group}
        names = [site.name for site in order]
        first = names.index(blocks[0].name) if blocks else len(names)
        rest = [site for site in sites if site.name not in within]
        before = [site for site in rest if names.index(site.name) < first]

        def settle(run, chosen, most):
            for group, once in groups(run, batches[0], chosen, most):
                found = gather(run, batches, group[0], once, statistic())
                for site in group:
                    change(site, found)
                    bar.update()

        outside = looked(whole, batches, rest)
        settle(whole, before, outside)
        most = enter(whole, blocks, batches, [site for group in inside for site in group])
        for block, chosen in zip(blocks, inside):

            def through(batch):
                args, kwargs = batch.beside[0]
                with taking(batch.parts):  # a clone, because the block may add in place
                    return state(standing(block)(batch.x.clone(), *args, **kwargs))

            settle(through, chosen, most)
            for batch in batches:
                batch.x, _ = through(batch), batch.beside.pop(0)
        settle(whole, [site for site in rest if site not in before], outside)


def looked(run, batches, sites):
    """The most calls of each site in one batch, before any leaf is changed (see `survey`)."""
    notes, most = survey(sites)
    for batch in batches if sites else ():
        most.start()
        with watching(*notes):
            run(batch)
    most.check(sites)
    return most


def linear(site):
    """Whether a site is a leaf whose inputs are vectors and not ids."""
    return site.leaf is not None and not site.leaf.lookup


@contextlib.contextmanager
def quiet(model):
    """Eval mode, no gradients, nothing compiled.

    Afterwards each module is in its own mode again, and a new module in the mode of its
    site.
    """
    known = {id(module) for module in model.modules()}
    modes = {site.name: site.module.training for site in walk(model)}
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with evaluating(model), torch.no_grad(), stance:
            yield
    finally:
        for site in walk(model):  # a site after the sites that it lies in
            for module in (site.layer or site.module).modules():
                if id(module) not in known:
                    module.training = modes[site.name]


def cut(model, examples, size):
    """The examples as Batches; single rows for padded ones if the model takes no mask."""
    every = examples.tolist() if isinstance(examples, torch.Tensor) else examples
    if isinstance(every, (list, tuple)):
        every = [Example(list(e), list(e)) if isinstance(e, (list, tuple)) else e for e in every]
    check_examples(every)
    if not len(every):
        raise ValueError("there are no examples to calibrate with")
    every = sorted(every, key=lambda example: len(example.ids))  # for little padding
    device = next(model.parameters()).device
    masks = native(model) or "attention_mask" in arguments(model)
    for i in range(0, len(every), size):
        batch = [t if t is None else t.to(device) for t in collate(every[i : i + size])]
        ids, _, mask = prepare(model, *batch)
        if mask is None or masks:
            yield Batch(ids, mask)
        else:
            yield from (Batch(row[real != 0][None], None) for row, real in zip(ids, mask))
