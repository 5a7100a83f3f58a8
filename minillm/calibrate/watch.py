"""Temporary hooks that record the inputs of a model's leaves and blocks.

The hook for a leaf's inputs is on the Layer around the leaf, where there is one: a
patch that changes the weight computes with the weight and never calls the leaf. Where a
patch changes the input, the hook is on the leaf itself.
"""

import collections
import contextlib
import dataclasses

import torch

from minillm.registry.learning import patches
from minillm.registry.names import part


class Stop(Exception):
    """Raised by a hook that has its input, to skip the rest of the forward pass."""


# --- the inputs of a leaf -------------------------------------------------------------


@contextlib.contextmanager
def watching(*hooks):
    """A context with hooks. `hooks` are functions that register one hook each."""
    handles = []
    try:
        handles += [register() for register in hooks]
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_input(site, see):
    """A function that registers a hook: it calls see(x) for each input x of a leaf."""
    patches = site.layer.patches.values() if site.layer else ()
    changed = any(getattr(patch, "touches", None) == "input" for patch in patches)
    module = site.module if changed or not site.layer else site.layer

    def hook(module, args, kwargs):
        see(args[0] if args else next(iter(kwargs.values())))

    return lambda: module.register_forward_pre_hook(hook, with_kwargs=True)


def survey(sites):
    """(hooks, {site's name: the most calls in one batch}) for one run of each batch.

    The hooks raise a ValueError for an input that is not finite, or whose squares are not.
    `most` is complete when the hooks have seen every batch; call `most.start()` before each.
    """
    most = Calls()

    def see(x, name):
        most.count(name)
        total = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()
        if not total.isfinite():
            raise ValueError(f"the input of {name!r} holds nan or infinity, or is so large that "
                             "its square is infinity")

    return [on_input(site, lambda x, name=site.name: see(x, name)) for site in sites], most


class Calls(dict):
    """{name: the most calls in one batch}"""

    def start(self):
        self.now = collections.Counter()

    def count(self, name):
        self.now[name] += 1
        self[name] = max(self.get(name, 0), self.now[name])

    def check(self, sites):
        """ValueError for the first site that no batch has reached."""
        missed = [site.name for site in sites if site.name not in self]
        if missed:
            raise ValueError(f"no example reaches {missed[0]!r} ({len(missed)} such): give more of "
                             "them, or leave it out of targets=")


def groups(run, batch, sites, most):
    """[(sites that read the same tensor, whether no batch calls one twice)], in call order.

    most: {name: calls}, from `survey`. A site that this batch calls twice, or that gets no tokens,
    is a group of its own. A site that it does not reach (an expert) comes last.
    """
    calls, found, last = [], [], None  # `calls` keeps the inputs alive: none reuses memory
    notes = [on_input(site, lambda x, site=site: calls.append((site, x, contents(x))))
             for site in sites]
    with watching(*notes):
        if sites:
            run(batch)
    times = collections.Counter(site.name for site, *_ in calls)
    for site, _, held in calls:
        if any(site is other for group in found for other in group):
            continue
        held = held if times[site.name] == 1 else None
        found[-1].append(site) if held and held == last else found.append([site])
        last = held
    found += [[site] for site in sites if not times[site.name]]
    return [(group, all(most[site.name] == times[site.name] == 1 for site in group))
            for group in found]


def contents(x):
    """What two tensors have in common if they hold the same values in the same memory.

    None where that is not known. `_version` counts the changes in place. A tensor of
    torch.inference_mode has no such count.
    """
    if not x.numel() or x.is_inference():
        return None
    return x.data_ptr(), x.shape, x.stride(), x._version


def gather(run, batches, site, once, found):
    """Add all inputs of a site to the statistic `found` and return it."""
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
    """x (b, t, in) -> (tokens, in) without padding, in float32 or float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x.flatten(0, -2)  # (b, t, in) -> (b * t, in)
    if x.shape[:-1] == (mask.numel(),):
        mask = mask.flatten()  # OPT's blocks flatten (b, t) to (b * t)
    if x.shape[:-1] != mask.shape:
        raise ValueError(f"the input of {name!r} is {tuple(x.shape)} for a batch of "
                         f"{tuple(mask.shape)} tokens, which does not say what is padding: give "
                         "examples of one length")
    return x[mask != 0]


# --- the inputs of a block ------------------------------------------------------------


def enter(run, blocks, batches, sites):
    """Record the blocks' inputs in each batch; ValueError if they form no chain.

    Returns the most calls of each of the sites in one batch (see `survey`).
    """
    notes, most = survey(sites)
    for batch in batches if blocks else ():
        most.start()
        with watching(*notes, *doors(blocks, batch)), contextlib.suppress(Stop):
            run(batch)
        batch.parts = [part(patch) for block in blocks for patch in patches(standing(block))]
        if len(batch.beside) != len(blocks):
            raise ValueError(f"the model calls {len(batch.beside)} of its {len(blocks)} blocks")
    most.check(sites)
    return most


def called_again(run, blocks, batch):
    """Whether the model calls a block more than once, seen with one row of a batch."""
    calls = collections.Counter()

    def count(block):
        module = standing(block)
        return lambda: module.register_forward_pre_hook(lambda *_: calls.update([id(module)]))

    row = dataclasses.replace(batch, ids=batch.ids[:1],
                              mask=None if batch.mask is None else batch.mask[:1])
    with watching(*[count(block) for block in {id(block): block for block in blocks}.values()]):
        run(row)
    return any(n > 1 for n in calls.values())


def doors(blocks, batch):
    """Hooks that record each block's input in the batch, and stop after the last."""
    passed = [0, None]  # the number of blocks that have run; their hidden state

    def into(i, block):
        def hook(module, args, kwargs):
            x, *beside = apart(args, kwargs)
            if passed[0] != i or i and not torch.equal(x, passed[1]):
                raise ValueError(f"the input of {block.name!r} is not the output of the block "
                                 "before it: this model cannot be run block by block")
            if i == 0:
                batch.x = x.clone()  # the block may add in place
            batch.beside.append(beside)

        module = standing(block)
        return lambda: module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    def out(block):
        def hook(module, args, output):
            passed[:] = passed[0] + 1, state(output).clone()
            if passed[0] == len(blocks):
                if not passed[1].isfinite().all():
                    raise ValueError(f"the output of {block.name!r} holds nan or infinity")
                raise Stop

        return lambda: standing(block).register_forward_hook(hook)

    return [into(i, block) for i, block in enumerate(blocks)] + [out(block) for block in blocks]


def standing(block):
    """The module that is now at a block's place."""
    parent, key = block.places[0]
    return getattr(parent, key)


def state(output):
    """The hidden state in a block's output: all of it, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def apart(args, kwargs):
    """A block's arguments -> (hidden state, args, kwargs); None for a key/value cache."""
    kwargs = dict(kwargs)
    if args:
        x, *args = args
    else:
        x = kwargs.pop("hidden_states" if "hidden_states" in kwargs else next(iter(kwargs)))

    def plain(value):
        return None if hasattr(value, "get_seq_length") else value

    return x, [plain(value) for value in args], {key: plain(value) for key, value in kwargs.items()}
