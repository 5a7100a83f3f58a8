"""Wanda: zero the weights whose magnitude, times the norm of their input, is smallest.

    S_ij = |W_ij| ||X_j||₂      the smallest of each row go
                                             Sun et al. 2023, arXiv 2306.11695, eq. 1

    code       paper      shape
    W          W          (out, in)
    norms      ||X_j||₂   (in,), over all calibration tokens
    pattern               `row`, the paper's comparison group, or `n_m(2, 4)`, section 4.3

Language models have a few inputs that are a hundred times larger than the others. A
small weight on one of them matters more than a large weight elsewhere. No weight is
trained or changed: the result is a mask as from `prune.wrap`, and its file is a file of
`prune`.

Each leaf is scored with the inputs that the masked leaves before it compute (see
`calibrate`). So the whole model cannot be one group. The paper's code takes one pass
for all leaves of a block, which is faster: there o and down are scored with the inputs
that the dense leaves before them compute.

Cost: as many forward passes as `calibrate` says, and one sum of squares for each input.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=1, heads=2))
>>> model = wrap(model, torch.randint(50, (4, 10)), sparsity=0.25, progress=False)
>>> model.layers[0].mlp.up_proj.patches["prune"].mask.sum(1)[:4].tolist()     # six of eight
[6, 6, 6, 6]
"""

from minillm import calibrate, options
from minillm.prune import Mask, patterns
from minillm.prune.scores import magnitude
from minillm.registry import hidden_linears, select
from minillm.registry.attach import attach, check_free
from minillm.registry.names import check_name
from minillm.registry.table import method


def wrap(model, examples, targets=None, *, name=None, sparsity=0.5, pattern=patterns.row,
         batch_size=8, progress=True):
    """Put Wanda's masks on the leaves that `targets` names; in place, returns the model.

    examples: texts to calibrate with, as `calibrate.stream` takes them; the paper uses
    128 of 2048 tokens. targets: see `registry.select`; by default every linear leaf but
    the output head and tied matrices. name: what the masks are called. sparsity: the
    share of zeros. pattern: `prune.row`, `prune.matrix` or `prune.n_m(2, 4)`, or its
    name: "row", "2:4". batch_size: examples in a forward pass. progress: whether to
    show a bar.

    ValueError, before any leaf is changed, where prune.wrap or `calibrate.stream` has
    one. After an interruption, the leaves that were done keep their masks.
    """
    options.share("sparsity", sparsity)
    name = check_name(name, Mask.kind, model)
    pattern = patterns.given(pattern)
    if pattern.joint:
        raise ValueError(f"pattern={pattern.name} compares all leaves at once, and Wanda masks one "
                         "after another: use prune.row, prune.matrix or prune.n_m")
    sites = select(model, targets, calibrate.linear, hidden_linears(model))
    pattern.check(sparsity, sites)
    for site in sites:
        check_free(site, name, Mask.kind)

    def change(site, squares):
        norms = squares.sum.sqrt()  # (in,)
        scores = magnitude(site).to(norms.dtype) * norms

        def fill(patch, _):
            patch.mask.copy_(pattern.masks([(site.name, scores)], sparsity)[site.name])

        attach(Mask, model, lambda where, _: where == site.name, name=name, fill=fill,
               sparsity=sparsity, group=pattern.name)

    calibrate.stream(model, examples, change, targets, statistic=calibrate.Squares,
                     batch_size=batch_size, progress=progress)
    return model


method("wanda", wrap, kind="prune", does="zeroes small weights with small inputs",
       paper="Sun et al. 2023, arXiv 2306.11695",
       small={"": {}, "2:4": dict(pattern=patterns.n_m(2, 4)),
              "matrix": dict(sparsity=0.25, pattern=patterns.matrix)})
