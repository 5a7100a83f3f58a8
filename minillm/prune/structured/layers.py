"""Remove whole blocks: those whose output is most like their input.

    influence_i = 1 - E[ x_iᵀ x_{i+1} / (||x_i|| ||x_{i+1}||) ]      over the tokens
                                        Men et al. 2024, "ShortGPT", arXiv 2403.03853

    code         paper                          shape
    x            X_i, the input of block i      (tokens, width)
    influence    BI_i, Block Influence          one number for each block

A block adds to the residual stream. Where it adds little, or only makes the stream longer, the next
block sees nearly the same without it. The blocks with the least influence go, all at once.

Cost: one forward pass over the examples; afterwards time, weights and key/value cache shrink by the
removed share. Another model than before, and not only by rounding: heal it by training, for example
with LoRA or by distillation (`minillm.train.distill`). Gromov et al. 2024 (arXiv 2403.17887) remove
one run of neighbours instead: `which=range(20, 25)`. Not included: to score again after each
removal.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=3, heads=2))
>>> for p in (model.layers[1].self_attn.o_proj.weight, model.layers[1].mlp.down_proj.weight):
...     _ = p.data.mul_(0)                                              # a block that adds nothing
>>> before = model(ids := torch.tensor([[3, 1, 4]]))
>>> torch.allclose(remove(model, ids, count=1)(ids), before), len(model.layers)
(True, 2)
"""

import torch.nn.functional as F

from minillm import calibrate, options
from minillm.calibrate.watch import standing, state, tokens, watching
from minillm.calling import logits, native
from minillm.prune.structured.cut import check_plain, field_of, resize
from minillm.registry import roles

FIELDS = ("layers", "num_hidden_layers", "n_layer", "num_layers")


def influence(model, examples, *, batch_size=8):
    """[1 - the mean cosine between a block's input and its output] for each block, by place.

    examples: as `calibrate.stream` takes them. Padding does not count.
    """
    blocks, sums, count = roles.blocks(model), [], 0
    with calibrate.quiet(model):
        for batch in calibrate.cut(model, examples, options.whole("batch_size", batch_size)):
            seen = []

            def see(module, args, kwargs, output):
                x = args[0] if args else kwargs["hidden_states"]
                a, b = (tokens(t, batch.mask, "a block") for t in (x, state(output)))
                seen.append((F.cosine_similarity(a, b, dim=-1).double().sum().item(), len(a)))

            hooks = [lambda module=standing(block): module.register_forward_hook(
                see, with_kwargs=True) for block in blocks]
            with watching(*hooks):
                (model if native(model) else lambda *known: logits(model, *known))(
                    batch.ids, batch.mask)
            if len(seen) != len(blocks):
                raise ValueError(f"the model calls its {len(blocks)} blocks {len(seen)} times")
            sums.append([cosine for cosine, _ in seen])
            count += seen[0][1]
    return [1 - sum(column) / count for column in zip(*sums)]


def remove(model, examples=None, *, count=None, which=None, batch_size=8):
    """Remove blocks; in place, returns the model.

    Give examples and `count`: the blocks with the least influence go. Or give `which`,
    the places of the blocks, from 0. batch_size: examples in a forward pass.

    ValueError, before the model changes, for techniques that are attached, for a place
    that there is not, and if no block would stay.
    """
    check_plain(model)
    field, sites = field_of(model, FIELDS, "layers"), roles.blocks(model)
    if (which is None) == (count is None) or (count is None) != (examples is None):
        raise ValueError("give examples and count=, the number of blocks to remove, or which=, "
                         "their places")
    if which is None:
        count = options.whole("count", count, 1, len(sites) - 1)
        order = influence(model, examples, batch_size=batch_size)
        which = sorted(range(len(sites)), key=lambda i: order[i])[:count]
    which = {options.whole("which", place, 0, len(sites) - 1) for place in which}
    if not 0 < len(which) < len(sites):
        raise ValueError(f"which={sorted(which)} removes {len(which)} of {len(sites)} blocks")
    (parent,) = roles.lists(model)
    members = [block for i, block in enumerate(parent.module) if i not in which]
    del parent.module[len(members):]
    for i, block in enumerate(members):
        parent.module[i] = block
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # Hugging Face: the block's place in the cache
                module.layer_idx = i
    if field is not None:
        kinds = getattr(model.config, "layer_types", None)  # of each block: sliding or full
        if kinds is not None:
            model.config.layer_types = [kind for i, kind in enumerate(kinds) if i not in which]
        resize(model, **{field: len(members)})
    return model
