"""Remove feed-forward neurons: each MLP becomes narrower.

    MLP(x) = sum over the neurons j of    w_j a_j(x)        w_j = W_down[:, j]
    a_j(x) = act(W_gate[j] x) (W_up[j] x),    or act(W_1[j] x + b_j) without a gate

    score_j = ||a_j||₂ ||w_j||₂        the neurons with the smallest scores go

The sum shows that a neuron is one row of each first matrix and one column of the last. Without
them, the rest computes what it did with a_j at 0. ||a_j|| is over the tokens of the examples, so
score_j² is the energy that the neuron alone adds to the residual stream. It is Wanda's score (Sun
et al. 2023, arXiv 2306.11695) with the norm of a column of W_down in place of one weight. Without
examples the norms of the neuron's rows replace ||a_j||.

    code      meaning                                             shape
    scores    score_j                                             (ffn,)
    inner     W_gate and W_up, or W_1: their rows are cut         (ffn, width)
    last      W_down, or W_2: its columns are cut                 (width, ffn)

Cost: with examples, the forward passes of `calibrate`. Afterwards the MLP's products shrink by
the share. LLM-Pruner (Ma et al. 2023, arXiv 2305.11627) scores by gradients, and Torch-Pruning
follows every shape through the graph; here `registry.roles` names the leaves. Not included:
another number of neurons in each block.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=2, heads=2, ffn=16))
>>> _ = model.layers[0].mlp.up_proj.weight.data[5].mul_(0)              # a neuron that does nothing
>>> before = model.layers[0].mlp(x := torch.randn(3, 8))
>>> model = remove(model, share=1 / 16)
>>> torch.allclose(model.layers[0].mlp(x), before, atol=1e-6), model.config.ffn
(True, 15)
"""

import math

from minillm import calibrate
from minillm.prune.structured.cut import check_free, check_plain, cut, field_of, kept, left, resize
from minillm.registry import roles

FIELDS = ("ffn", "intermediate_size", "n_inner", "ffn_dim")  # of configurations


def remove(model, examples=None, *, share=0.25, multiple=1, batch_size=8, progress=True):
    """Remove a share of the neurons of each MLP; in place, returns the model.

    examples: texts to score the neurons with, as `calibrate.stream` takes them; None
    scores by the weights alone. share: of the neurons, above 0 and below 1. multiple:
    the number that stays is rounded up to a multiple of it (GGUF's q8_0 needs 32).
    batch_size: examples in a forward pass. progress: whether to show a bar.

    ValueError, before the model changes, for techniques that are attached, for blocks
    without an MLP of matrices (a mixture of experts), and for a share that removes
    nothing.
    """
    check_plain(model)
    field = field_of(model, FIELDS, "neurons")
    blocks = roles.in_blocks(model)
    for block in blocks:
        if block.last is None or not block.inner:
            where = block.site.name if block.site else type(model).__name__
            raise ValueError(f"{where!r} has no MLP of two or three matrices, in which a "
                             "neuron is a row of the first and a column of the last")
        check_free(model, [*block.inner, block.last])
    sizes = {block.last.shape[1] for block in blocks}
    if len(sizes) > 1:
        raise ValueError(f"the blocks have {sorted(sizes)} neurons, and a configuration has one "
                         "number for all")
    count = left(share, sizes.pop(), "neurons", multiple)
    by_last = {block.last.name: block for block in blocks}

    def chosen(block, energies):  # ||a_j||² of each neuron -> the places of those that stay
        columns = block.last.stored()[0].detach().float().norm(dim=0)
        return kept(energies.sqrt() * columns, count)

    def narrow(block, places):
        cut(block.last, columns=places)
        for site in block.inner:
            cut(site, rows=places)

    if examples is None:
        energies = [math.prod(site.stored()[0].detach().float().square().sum(1)
                              for site in block.inner) for block in blocks]
        for block, places in [(b, chosen(b, e)) for b, e in zip(blocks, energies)]:
            narrow(block, places)
    else:
        def change(site, squares):
            narrow(by_last[site.name], chosen(by_last[site.name], squares.sum))

        calibrate.stream(model, examples, change, lambda name, _: name in by_last,
                         statistic=calibrate.Squares, batch_size=batch_size, progress=progress)
    if field is not None:
        resize(model, **{field: count})
    return model
