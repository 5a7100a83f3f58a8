"""PiSSA: LoRA that starts with the principal part of each weight, and not at zero.

LoRA's B is zero, so at first A gets no gradient and learning is slow. PiSSA gives A and
B the principal part of W, and freezes the rest of W.

    1. W = U S V^T                       the singular value decomposition
    2. A = S_r^(1/2) V_r^T / s^(1/2),    B = U_r S_r^(1/2) / s^(1/2)       of the r largest
    3. W_res = W - s B A                 replaces W, and is frozen

                      Meng et al. 2024, "PiSSA", arXiv 2404.02948, equations 2 to 4

    code     paper       shape
    A, B     A, B        (r, in), (out, r)         these learn
    A0, B0               the same                  A and B at birth, kept to make W_res
    s        (theirs is 1)                         alpha / r, as for LoRA

The result is an ordinary LoRA, W_res x + s B A x, but wrapping changes the base.
While `minillm.use` leaves it out, s B0 A0 takes its place, so the model is the original.
`unwrap` restores the old base, bit for bit. The file holds A, B, A0 and B0 and belongs
to the *original* model: loading subtracts s B0 A0 again, without a decomposition.

A weight that is quantized afterwards loses less, because its principal part is not in
the integers (QPiSSA, section 4): `pissa.wrap(model)` first, then `quant.wrap(model)`.

Cost: one decomposition a leaf, and a copy of W until the adapter is merged with
keep=False. Training costs as much as LoRA. peft changes the base too, but keeps no
copy: its file fits the changed base, unless it is converted to a LoRA of twice the
rank.

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before, W = model(x), model[0].weight.clone()
>>> model = minillm.lora.pissa.wrap(model, ["0"], r=2)
>>> torch.allclose(model(x), before, atol=1e-5)                         # the same output
True
>>> S, S_res = torch.linalg.svdvals(W), torch.linalg.svdvals(model[0].base.weight)
>>> torch.allclose(S[2:], S_res[:6], atol=1e-5)                         # the two largest are in B A
True
>>> torch.equal(minillm.lora.unwrap(model)[0].weight, W)
True
"""

import torch

from minillm import options
from minillm.lora import LoRA
from minillm.registry.attach import attach
from minillm.registry.table import method


def wrap(model, targets=None, *, name=None, r=8, alpha=16.0, rank_stabilized=False, dropout=0.0,
         iterations=None):
    """Put LoRA with the principal part of W around leaves; in place, returns the model.

    iterations: None for the exact decomposition; a number for the randomized one with
    so many power iterations, which is faster (section 5.4 uses 16). The other arguments
    are those of `minillm.lora.wrap`. ValueError also for a leaf that a format stores,
    that has a mask, or that shares its matrix.
    """
    if iterations is not None:
        options.whole("iterations", iterations)

    @torch.no_grad()
    def fill(patch, site):
        W = site.stored()[0].detach().to(patch.A.dtype)  # (out, in)
        rank = patch.A.shape[0]
        if iterations is None:
            U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, rank, niter=iterations)
            Vt = V.T
        root = (S[:rank] / patch.scale).sqrt()
        patch.A.copy_(root[:, None] * Vt[:rank])
        patch.B.copy_(U[:, :rank] * root)
        patch.A0.copy_(patch.A)
        patch.B0.copy_(patch.B)

    return attach(LoRA, model, targets, name=name, fill=fill, r=r, alpha=alpha,
                  rank_stabilized=rank_stabilized, dropout=dropout, start=True)


method("pissa", wrap, kind="lora", does="LoRA that starts with the principal part of each weight",
       paper="Meng et al. 2024, arXiv 2404.02948", rates=dict(tiny=2e-3, smollm2=7e-4),
       small={"": dict(r=4), "stable": dict(r=2, alpha=3.0, rank_stabilized=True)})
