"""Calibration: the real inputs of each leaf, block after block, while the model is made small.

    1. All examples run up to the end of the blocks once. The hidden state before the first block is
       kept, and what each block gets beside it (masks, rotations).
    2. For each block in turn:
       a. Its leaves are sorted into groups that read one tensor: q, k and v, then o, then gate and
          up, then down.
       b. For each group the examples run through the block, as far as the group. A statistic of its
          input adds up, batch by batch. Then `change(site, statistic)` changes each leaf of it.
       c. The examples run through the changed block: what comes out is the next block's input.

So every leaf is calibrated with what the leaves before it really compute by then, as the original
GPTQ does where it is "true sequential" (Frantar et al. 2022, arXiv 2210.17323, section 4). One pass
for all leaves of a block would be a third of the time, and o and down would be calibrated with
inputs that they never get again.

    statistic    what it keeps                                       shape
    Gram         H = sum of x xᵀ over the tokens, for GPTQ           (in, in)
    Squares      the sum of x² over the tokens, for Wanda            (in,)

Memory: the hidden state of all tokens, and what one block computes for one batch. Time: about five
forward passes, two backward passes' worth. A leaf outside of the blocks (a head that is named) takes
one pass of the whole model for each group, and so does a model without blocks.

Padded places never count. Any model works whose blocks pass on one hidden state; one that changes it
in between is an error. GPTQ's own code catches the inputs of one block and gives the same masks to
all; here each block gets its own (layers with sliding windows have others). Not included: hidden
states on disk or on another device.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=2, heads=2))
>>> seen = lambda site, statistic: print(site.name, tuple(statistic.H.shape), statistic.count)
>>> stream(model, torch.randint(50, (4, 10)), seen, r"layers.0.*(k|down)_proj", progress=False)
layers.0.self_attn.k_proj (8, 8) 40
layers.0.mlp.down_proj (32, 32) 40
"""

import collections
import contextlib
import dataclasses

import torch
from tqdm.auto import tqdm

from minillm import options
from minillm.calling import arguments, logits, native
from minillm.data import Example, check_examples, collate
from minillm.model.generate import evaluating
from minillm.registry import hidden_linears, prepare, roles, select, walk


class Gram:
    """H = sum of x xᵀ over the tokens x, at least float32."""

    def __init__(self):
        self.count, self.H = 0, 0

    def add(self, x):
        """x (tokens, in)"""
        self.count += len(x)
        self.H = self.H + x.T @ x


class Squares:
    """The sum of x² over the tokens x, for each input, at least float32."""

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
    x: torch.Tensor | None = None  # (b, t, width) before the next block
    beside: list = dataclasses.field(default_factory=list)  # (args, kwargs) of each block


class Stop(Exception):
    """What is wanted has been seen: the rest of the forward pass is not computed."""


def stream(model, examples, change, targets=None, *, statistic=Gram, batch_size=8, progress=True):
    """Call change(site, statistic) for each leaf that `targets` names (see `registry.select`).

    examples: a list of Examples or of lists of ids, or a tensor (n, t) of ids. change: what changes
    the leaf; leaves with one input share one statistic, which it must not change. targets: by
    default every linear leaf but the output head and tied matrices. statistic: a class with `add`
    and `count`. batch_size: examples in a forward pass. progress: whether to show a bar. The model is
    in eval mode meanwhile. ValueError, before any leaf is changed, for a leaf that no example
    reaches, for blocks that are no chain, and for hidden states that are not finite.
    """
    sites = select(model, targets, linear, hidden_linears(model))
    for site in sites:
        if len(site.places) > 1:
            raise ValueError(f"{site.name!r} is used in {len(site.places)} places, which have "
                             "different inputs: leave it out of targets=")
    blocks = roles.blocks(model) if roles.lists(model) else []
    order = [site.name for site in walk(model)]
    first = order.index(blocks[0].name) if blocks else len(order)
    within = {block.name: [s for s in sites if s is block or roles.under(s, block)] for block in blocks}
    inside = {id(site) for group in within.values() for site in group}
    rest = [site for site in sites if id(site) not in inside]
    with quiet(model), tqdm(total=len(sites), desc="calibrating", disable=not progress) as bar:
        batches = list(cut(model, examples, options.whole("batch_size", batch_size)))

        def settle(run, chosen):
            for group, once in groups(run, batches[0], chosen):
                found = gather(run, batches, group[0], once, statistic())
                for site in group:
                    change(site, found)
                    bar.update()

        def whole(batch):
            give = model if native(model) else lambda *known: logits(model, *known)
            give(batch.ids, batch.mask)

        settle(whole, [site for site in rest if order.index(site.name) < first])
        if inside:
            enter(whole, blocks, batches, [site for site in sites if id(site) in inside])
        for block in blocks if inside else ():
            module = outside(block)

            def through(batch):
                args, kwargs = batch.beside[0]
                return state(module(batch.x, *args, **kwargs))

            settle(through, within[block.name])
            for batch in batches:
                batch.x = through(batch)
                del batch.beside[0]
        settle(whole, [site for site in rest if order.index(site.name) >= first])


def linear(site):
    """Whether a site is a leaf with inputs to look at: its input are no ids."""
    return site.leaf is not None and not site.leaf.lookup


@contextlib.contextmanager
def quiet(model):
    """Eval mode, no gradients, nothing compiled; afterwards each module is in its mode again."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with evaluating(model), torch.no_grad(), stance:
        yield


def cut(model, examples, size):
    """The examples as Batches. Those of a model that takes no mask are single rows, if padded."""
    every = examples.tolist() if isinstance(examples, torch.Tensor) else examples
    if isinstance(every, (list, tuple)):
        every = [Example(list(e), list(e)) if isinstance(e, (list, tuple)) else e for e in every]
    check_examples(every)
    if not len(every):
        raise ValueError("there are no examples to calibrate with")
    every = sorted(every, key=lambda example: len(example.ids))  # so that little is padded
    device = next(model.parameters()).device
    masks = native(model) or "attention_mask" in arguments(model)
    for i in range(0, len(every), size):
        ids, _, mask = prepare(model, *(
            t if t is None else t.to(device) for t in collate(every[i : i + size])))
        if mask is None or masks:
            yield Batch(ids, mask)
        else:
            yield from (Batch(row[real != 0][None], None) for row, real in zip(ids, mask))


def place(site):
    """The module to watch for what a site gets."""
    inner = site.layer and any(getattr(patch, "touches", None) == "input"
                               for patch in site.layer.patches.values())
    return site.module if inner or site.layer is None else site.layer


@contextlib.contextmanager
def watching(*hooks):
    """Hooks, as functions that register one, while the context lasts."""
    handles = []
    try:
        handles += [register() for register in hooks]
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_input(site, see):
    """What registers a hook that calls see(x) with each input x of a site."""
    def hook(module, args, kwargs):
        see(args[0] if args else next(iter(kwargs.values())))

    return lambda: place(site).register_forward_pre_hook(hook, with_kwargs=True)


def groups(run, batch, sites):
    """[(sites that read one and the same tensor, whether each is called once)], as they are called.

    A site that this batch does not reach (an expert) comes last, alone.
    """
    calls = []  # [(site, its input)]: while the inputs are kept, no other has their memory
    with watching(*(on_input(site, lambda x, site=site: calls.append((site, x))) for site in sites)):
        if sites:
            run(batch)
    found, last = [], None
    times = collections.Counter(id(site) for site, _ in calls)
    for site, x in calls:
        if any(site is other for group in found for other in group):
            continue
        same = last is not None and x.data_ptr() == last.data_ptr() and (
            (x.shape, x.stride()) == (last.shape, last.stride()))
        found[-1].append(site) if same else found.append([site])
        last = x
    found += [[site] for site in sites if not times[id(site)]]
    return [(group, all(times[id(site)] <= 1 for site in group)) for group in found]


def gather(run, batches, site, once, found):
    """Add all inputs of a site to the statistic `found`; returns it."""
    for batch in batches:
        def see(x):
            found.add(tokens(x, batch.mask, site.name))
            if once:
                raise Stop

        with watching(on_input(site, see)), contextlib.suppress(Stop):
            run(batch)
    if not found.count:
        raise ValueError(f"no example reaches {site.name!r}: give more of them, or leave it out of "
                         "targets=")
    return found


def tokens(x, mask, name):
    """x (b, t, in) -> (tokens, in) without what is padded, at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x.flatten(0, -2)  # (b, t, in) -> (b * t, in)
    if x.shape[:-1] == (mask.numel(),):
        mask = mask.flatten()  # OPT's blocks make one list of all tokens
    if x.shape[:-1] != mask.shape:
        raise ValueError(f"the input of {name!r} is {tuple(x.shape)} for a batch of "
                         f"{tuple(mask.shape)} tokens, so nobody can say which of it is padding: "
                         "give examples of one length")
    return x[mask != 0]


def enter(run, blocks, batches, sites):
    """Note in each batch what the blocks get. ValueError where they cannot be run one by one."""
    if len({id(block.module) for block in blocks}) < len(blocks):
        raise ValueError(f"some of the blocks of {blocks[0].name.rpartition('.')[0]!r} are one and "
                         "the same module, which has different inputs each time")
    reached = set()
    notes = [on_input(site, lambda x, name=site.name: reached.add(name)) for site in sites]
    for batch in batches:
        with watching(*notes, *doors(blocks, batch)), contextlib.suppress(Stop):
            run(batch)
        if len(batch.beside) != len(blocks):
            raise ValueError(f"the model calls {len(batch.beside)} of its {len(blocks)} blocks")
    missed = [site.name for site in sites if site.name not in reached]
    if missed:
        raise ValueError(f"no example reaches {missed[0]!r} ({len(missed)} such): give more of them, "
                         "or leave it out of targets=")


def doors(blocks, batch):
    """Hooks that note in the batch what goes into each block, and stop behind the last."""
    passed = [0, None]  # how many blocks the hidden state has passed; the state

    def into(i, block):
        def hook(module, args, kwargs):
            x, *beside = apart(args, kwargs)
            if passed[0] != i or i and not torch.equal(x, passed[1]):
                raise ValueError(f"what {block.name!r} gets is not what the block before it gives: "
                                 "this model changes it in between, and cannot be run block by block")
            batch.x = x if i == 0 else batch.x
            batch.beside.append(beside)

        return lambda: outside(block).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    def out(block):
        def hook(module, args, output):
            passed[:] = passed[0] + 1, state(output)
            if passed[0] == len(blocks):
                if not passed[1].isfinite().all():
                    raise ValueError(f"what {block.name!r} gives holds nan or infinity")
                raise Stop

        return lambda: outside(block).register_forward_hook(hook)

    return [into(i, block) for i, block in enumerate(blocks)] + [out(block) for block in blocks]


def outside(block):
    return block.layer or block.module


def state(output):
    """The hidden state in what a block returns: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def apart(args, kwargs):
    """The hidden state of a block's arguments, and the others, without a cache of keys and values."""
    kwargs = dict(kwargs)
    if args:
        x, *args = args
    else:
        x = kwargs.pop("hidden_states" if "hidden_states" in kwargs else next(iter(kwargs)))

    def plain(value):
        return None if hasattr(value, "get_seq_length") else value

    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    return x, [plain(value) for value in args], {key: plain(value) for key, value in kwargs.items()}
