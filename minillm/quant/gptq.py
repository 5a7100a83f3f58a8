"""GPTQ: round one column after another; the remaining columns compensate for the error.

    minimize |W X - Q X|² over the Q on the grid            H = X Xᵀ, summed over the tokens

    1. H^-1 = Uᵀ U, U upper triangular
    2. for each column j:
           q_j = round(w_j)                                 to the nearest on the grid
           e   = (w_j - q_j) / U_jj
           w_k = w_k - e U_jk      for each column k > j

                             Frantar et al. 2022, arXiv 2210.17323, eq. 2 and section 3, step 3

    code    paper                      shape
    W       W                          (out, in); a row is an output channel
    H       H = 2 X Xᵀ                 (in, in); the factor 2 changes nothing
    U       Cholesky(H^-1)ᵀ            (in, in)
    damp    lambda, 1%                 added to H's diagonal, as a share of its mean
    block   B                          columns of a block; it updates the later ones at its end
    order   `--act-order` of its code  columns with large inputs first

Row j of U gives the optimal update (Optimal Brain Surgeon) once the columns before j
are fixed, so no inverse has to be updated. All rows take the columns in the same order,
so a column is one vector operation.

The result is `quant`'s Integer, and its file is a file of quant. A group's scale is
fitted just before its first column is rounded, to the updated weights. With `order` the
columns of a group are rounded at different times, so all scales are fitted at the
start.

`order` is not in the paper. It rounds the columns that matter most first, while many
others are left to compensate. It is the default: on SmolLM2, with 4 bits and a scale
for each row, GPTQ closes 73% of the gap between rounding and the dense model with it,
and 51% without (`benchmarks/compress.py`).

Cost: in² operations for each token, and two Cholesky factors and an inverse (in, in)
for each input. The paper's code sets a weight to 0 if its input is always 0. Here it is
rounded to the nearest code, because another text may use it. An H without a Cholesky
factor is damped ten times as much, up to seven times; then it is an error, and no leaf
falls back to plain rounding. Not included: a scale below the largest weight (clipping),
and other grids than Integer's.

>>> from torch import nn; import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=32, layers=1, heads=2))
>>> wrap(model, torch.randint(50, (8, 32)), bits=4, progress=False).layers[0].mlp.up_proj
Integer(32 -> 128, bias=False)
"""

import dataclasses

import torch

from minillm import calibrate, options
from minillm.quant import Integer
from minillm.quant.grid import Grid, size_of
from minillm.registry import dense, hidden_linears, select
from minillm.registry.attach import attach, check_formats
from minillm.registry.table import method


def wrap(model, examples, targets=None, *, bits=4, group=None, zero_point=False, order=True,
         damp=0.01, block=128, batch_size=8, progress=True):
    """Store the leaves that `targets` names as integers that fit their inputs; returns the model.

    examples: texts to calibrate with, as `calibrate.stream` takes them; the paper uses
    128 of 2048 tokens. targets: see `registry.select`; by default every linear leaf but
    the output head and tied matrices. bits, group, zero_point: the grid, see
    `quant.wrap`. order: columns with large inputs first; False: in their own order, as
    in the paper. damp: a share above 0. block: columns of a block; it changes only the
    time. batch_size: examples in a forward pass. progress: whether to show a bar.

    ValueError, before any leaf is changed, where quant.wrap or `calibrate.stream` has
    one. After an interruption, the leaves that were done stay integers; `quant.unwrap`
    makes them floats again, rounded.
    """
    settings = dict(bits=bits, group=group, zero_point=zero_point)
    options.flag("order", order), options.positive("damp", damp), options.whole("block", block)
    grid = Grid(**settings)
    sites = select(model, targets, calibrate.linear, hidden_linears(model))
    check_formats(Integer, model, sites)
    for site in sites:
        Integer(site, **settings)

    factors = {}  # of the last statistic; leaves with the same input share it

    def change(site, gram):
        if gram not in factors:
            factors.clear()
            factors[gram] = factor(gram.H, damp, order, site.name)

        def fill(form, site):
            form.keep(*solve(dense(site.module)[0].float(), *factors[gram], grid, order, block))

        attach(Integer, model, lambda name, _: name == site.name, fill=fill, **settings)

    calibrate.stream(model, examples, change, targets, batch_size=batch_size, progress=progress)
    return model


def factor(H, damp, order, name):
    """(U (in, in), the order of the columns): with H in this order and damped, H^-1 = Uᵀ U."""
    if not H.isfinite().all():
        raise ValueError(f"the inputs of {name!r} hold nan or infinity, or are too large to square")
    H = H.double()
    places = H.diagonal().argsort(descending=True, stable=True) if order else torch.arange(len(H))
    H = H[places][:, places]
    mean = H.diagonal().mean().item() or 1.0  # 0: every input is 0, so this is plain rounding
    for times in range(8):
        damped = H + damp * 10**times * mean * torch.eye(len(H), dtype=H.dtype, device=H.device)
        L, wrong = torch.linalg.cholesky_ex(damped)
        if not wrong:
            U, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not wrong and U.isfinite().all():
            return U.float(), places
    raise ValueError(f"H of {name!r} has no Cholesky factor, even with damp={damp * 10**times:g}")


def solve(W, U, places, grid, order, block):
    """(q (out, in), scale, zero) as `Grid.round` and `Grid.fit` give them, for W (out, in)."""
    m, spots = W.shape[1], places.tolist()
    size, whole = size_of(grid.group, m), grid.group in (None, "tensor")
    column = grid if whole else dataclasses.replace(grid, group=None)
    block = block if whole else max(block // size, 1) * size  # a group ends where a block ends
    scale, zero = grid.fit(W)  # (n, groups)
    W, codes = W[:, places], torch.empty_like(W)
    for start in range(0, m, block):
        end = min(start + block, m)
        errors = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            g = spots[j] // size
            if j % size == 0 and not order:
                fitted = column.fit(W[:, j : j + size])
                scale[:, g] = fitted[0][:, 0]
                if zero is not None:
                    zero[:, g] = fitted[1][:, 0]
            numbers = scale[:, g : g + 1], None if zero is None else zero[:, g : g + 1]  # (n, 1)
            q = column.round(W[:, j : j + 1], *numbers)
            codes[:, j : j + 1] = q
            e = (W[:, j : j + 1] - column.dense(q, *numbers)) / U[j, j]
            W[:, j + 1 : end] -= e * U[j, j + 1 : end]  # (n, 1) (k,)
            errors[:, j - start : j - start + 1] = e
        W[:, end:] -= errors @ U[start:end, end:]
    return codes[:, places.argsort()], scale, zero


method("gptq", wrap, kind="quant", does="rounds column by column; the remaining columns compensate",
       paper="Frantar et al. 2022, arXiv 2210.17323",
       small={"": dict(bits=4), "group": dict(bits=3, group=4, zero_point=True),
              "paper": dict(bits=4, group=8, order=False)})
