"""Remove attention heads: each attention becomes narrower.

    attention(x) = sum over the heads i of    W_o^i o_i(x)        W_o^i = W_o[:, columns of i]

    score_i² = sum over the columns j of i of    ||o_j||₂² ||W_o[:, j]||₂²

A head is a group of rows of W_q, W_k and W_v and the same group of columns of W_o (Michel et al.
2019, arXiv 1905.10650). Where several query heads share one key/value head (grouped-query
attention, Ainslie et al. 2023, arXiv 2305.13245), the unit is a key/value head with all its query
heads. So each group keeps its size, and the key/value cache shrinks too. (Without single query
heads the groups break: Torch-Pruning's issues 461 and 516.)

    code      meaning                                               shape
    scores    score_i², one for each key/value head                 (kv_heads,)
    unit      the rows of one such head in W_q: its queries * size

||o_j|| is over the tokens of the examples. Without examples it is 1, and then the norm of W_o alone
says little of a head: so give examples.

Cost: as for `neurons`. GPT-2 in transformers has no field for heads that are fewer than
width / head_size, so its configuration could not describe the result: that is an error. minillm's
GPT-2 has such a field, but `minillm.save` has no checkpoint for it. Not included: another number of
heads in each block.

>>> import torch, minillm
>>> c = minillm.Config(vocab_size=50, width=8, layers=1, heads=4, kv_heads=2)
>>> model = minillm.Transformer(c)
>>> _ = model.layers[0].self_attn.o_proj.weight.data[:, :4].mul_(0)     # a group without effect
>>> before = model(ids := torch.tensor([[3, 1, 4]]))
>>> model = remove(model, share=0.5)
>>> torch.allclose(model(ids), before, atol=1e-6), model.config.heads, model.config.kv_heads
(True, 2, 1)
"""

import torch

from minillm import calibrate
from minillm.prune.structured.cut import check_free, check_plain, cut, field_of, kept, left, resize
from minillm.registry import roles

QUERIES, KEYS, SIZE = (("heads", "num_attention_heads"), ("kv_heads", "num_key_value_heads"),
                       ("head_size", "head_dim"))  # fields of configurations


def remove(model, examples=None, *, share=0.25, batch_size=8, progress=True):
    """Remove a share of the key/value heads of each block; in place, returns the model.

    Their query heads go with them. examples: texts to score the heads with, as
    `calibrate.stream` takes them; None scores by W_o alone. share: of the heads, above 0
    and below 1. batch_size: examples in a forward pass. progress: whether to show a bar.

    ValueError, before the model changes, for techniques that are attached, for a model
    whose configuration has no separate head size, and for a share that removes nothing.
    """
    check_plain(model)
    fields = [field_of(model, names, what) for names, what in
              ((QUERIES, "heads"), (KEYS, "key/value heads"), (SIZE, "the head size"))]
    if None in fields:
        raise ValueError(f"this {type(model).__name__} has no configuration with its heads")
    heads, kv_heads, size = (getattr(model.config, field) for field in fields)
    size = size or model.config.hidden_size // heads
    blocks = roles.parts(model).blocks
    for block in blocks:
        check(block, heads, kv_heads, size)
        check_free(model, [block.queries, *block.keys_values, block.output])
    count = left(share, kv_heads, "key/value heads")
    by_output = {block.output.name: block for block in blocks}
    unit = heads // kv_heads * size  # rows of W_q, columns of W_o

    def chosen(block, energies):  # ||o_j||² of each column -> the places of the units that stay
        W = block.output.stored()[0].detach().float()  # (width, heads * size)
        return kept((energies * W.square().sum(0)).view(kv_heads, unit).sum(1), count)

    def narrow(block, groups):
        cut(block.queries, rows=spread(groups, unit))
        for site in block.keys_values:
            cut(site, rows=spread(groups, size))
        cut(block.output, columns=spread(groups, unit))

    if examples is None:
        for block, groups in [(block, chosen(block, 1)) for block in blocks]:
            narrow(block, groups)
    else:
        def change(site, squares):
            narrow(by_output[site.name], chosen(by_output[site.name], squares.sum))

        calibrate.stream(model, examples, change, lambda name, _: name in by_output,
                         statistic=calibrate.Squares, batch_size=batch_size, progress=progress)
    resize(model, **dict(zip(fields, (heads // kv_heads * count, count, size))))
    return model


def spread(groups, unit):
    """The rows of the groups, each of `unit` neighbours: (n,) -> (n * unit,)"""
    return (groups[:, None] * unit + torch.arange(unit, device=groups.device)).flatten()


def check(block, heads, kv_heads, size):
    """ValueError unless the block has a query, a key, a value and an output leaf of these sizes."""
    shapes = [site.shape[0] for site in block.keys_values]
    whole = block.queries is not None and block.output is not None
    if not whole or shapes != [kv_heads * size] * 2 or (
            block.queries.shape[0], block.output.shape[1]) != (heads * size,) * 2:
        raise ValueError(f"{block.site.name!r} has no leaves of its own for queries, keys, values "
                         f"and output, of {heads} and {kv_heads} heads of {size}")
