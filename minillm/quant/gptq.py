"""GPTQ: round one column of a matrix after another, and let the columns that are left repair the error.

    minimize  |W X - Q X|²  over matrices Q on the grid         H = X Xᵀ, summed over calibration tokens

    for each column j:
        q_j = round(w_j)                                        to the nearest on the grid
        e   = (w_j - q_j) / U_jj
        w_k = w_k - e U_jk       for each column k > j           Frantar et al. 2022, arXiv 2210.17323, eq. 2

    code    paper                    shape
    W       W                        (out, in); a row is an output channel
    H       H = 2 X Xᵀ               (in, in); the factor changes nothing
    U       Cholesky(H^-1)ᵀ          (in, in), upper: H^-1 = Uᵀ U
    damp    lambda                   a share of the mean of H's diagonal, added to it
    block   B                        columns that are repaired at once; the others wait (section 3, step 2)
    order   --act-order in its code  the columns with the largest inputs first

Row j of U holds what the optimal repair (Optimal Brain Surgeon) needs after the columns before j are
fixed, so no inverse is updated on the way (section 3, step 3). All rows use the same order, so a column
is one vector operation.

The result is an ordinary `quant` Integer: the grid is `quant.grid`'s, and a file of it is quant's. A
group's scale is fitted when its first column comes up, to the weights as they are repaired by then. With
`order` the columns of a group are not neighbours in time, so all scales are fitted at the start.

Cost: for each leaf a Cholesky of (in, in), and as many operations as in² tokens for H; no training.

Where the paper's code sets a weight whose input is always 0 to 0, it is rounded to the nearest here:
another text may use it. A matrix H that has no Cholesky factor is damped ten times as much, until it has
one; if that fails, it is an error and never a silent rounding to the nearest. Not included: searching for
a scale below the largest weight (clipping), grids other than Integer's.

>>> from torch import nn; import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=32, layers=1, heads=2))
>>> texts = torch.randint(50, (8, 32))
>>> form = wrap(model, texts, bits=4, progress=False).layers[0].mlp.up_proj
>>> form
Integer(32 -> 128, bias=False)
"""

import dataclasses

import torch

from minillm import calibrate, options
from minillm.quant import Integer
from minillm.quant.grid import Grid
from minillm.registry import dense, hidden_linears, select
from minillm.registry.attach import attach, check_formats
from minillm.registry.table import method


def wrap(model, examples, targets=None, *, bits=4, group=None, zero_point=False, order=False, damp=0.01,
         block=128, batch_size=8, progress=True):
    """Store the leaves that `targets` names as integers that fit their inputs; returns the model.

    examples: texts to calibrate with, as `calibrate.stream` takes them; the paper uses 128 of 2048
    tokens. targets: see `registry.select`; by default every linear leaf but the output head and tied
    matrices. bits, group, zero_point: the grid, see `quant.wrap`. order: the columns with the largest
    inputs first. damp: a share above 0. block: columns that are repaired at once; changes the time
    alone. batch_size: examples in a forward pass. progress: whether to show a bar.

    ValueError, before any leaf is changed, where quant.wrap or `calibrate.stream` has one. If it is
    interrupted, the leaves up to there are stored, and `quant.unwrap` gives them back rounded.
    """
    settings = dict(bits=bits, group=group, zero_point=zero_point)
    options.flag("order", order), options.positive("damp", damp), options.whole("block", block)
    grid = Grid(**settings)
    sites = select(model, targets, calibrate.linear, hidden_linears(model))
    check_formats(Integer, model, sites)
    for site in sites:
        Integer(site, **settings)

    factors = {}  # of the last statistic: leaves with one input share it

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
        raise ValueError(f"the inputs of {name!r} hold nan or infinity, or are too large to be squared")
    H = H.double()
    places = H.diagonal().argsort(descending=True, stable=True) if order else torch.arange(len(H))
    H = H[places][:, places]
    least = H.diagonal().mean().item() or 1.0  # 0: every input is 0, and all is rounded to the nearest
    for times in range(8):
        damped = H + damp * 10**times * least * torch.eye(len(H), dtype=H.dtype, device=H.device)
        L, wrong = torch.linalg.cholesky_ex(damped)
        if not wrong:
            U, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not wrong and U.isfinite().all():
            return U.float(), places
    raise ValueError(f"H of {name!r} has no Cholesky factor, even with damp={damp * 10**times:g}")


def solve(W, U, places, grid, order, block):
    """(q (out, in), scale, zero) as `Grid.round` and `Grid.fit` give them, for W (out, in)."""
    n, m = W.shape
    size, column = grid.group or m, dataclasses.replace(grid, group=None)
    block = max(block // size, 1) * size if grid.group else block  # a group ends where a block ends
    scale, zero = grid.fit(W)  # (n, groups)
    W, codes = W[:, places], torch.empty_like(W)
    for start in range(0, m, block):
        end = min(start + block, m)
        errors = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            g = int(places[j]) // size
            if j % size == 0 and not order:
                fitted = column.fit(W[:, j : j + size])
                scale[:, g] = fitted[0][:, 0]
                if zero is not None:
                    zero[:, g] = fitted[1][:, 0]
            numbers = scale[:, g : g + 1], None if zero is None else zero[:, g : g + 1]  # each (n, 1)
            q = column.round(W[:, j : j + 1], *numbers)
            codes[:, j : j + 1] = q
            e = (W[:, j : j + 1] - column.dense(q, *numbers)) / U[j, j]
            W[:, j + 1 : end] -= e * U[j, j + 1 : end]  # (n, 1) (k,)
            errors[:, j - start : j - start + 1] = e
        W[:, end:] -= errors @ U[start:end, end:]
    return codes[:, places.argsort()], scale, zero


method("gptq", wrap, kind="quant", does="rounds column by column, and the columns left repair the error",
       paper="Frantar et al. 2022, arXiv 2210.17323",
       small={"": dict(bits=4), "group": dict(bits=3, group=4, zero_point=True), "order": dict(bits=4, group=8, order=True)})
