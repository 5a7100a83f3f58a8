"""Compacter: an adapter whose two matrices are sums of Kronecker products of small ones.

    h  ->  h + W_up f(W_down h + b_down) + b_up        as in `minillm.adapters`, with
    W = sum_i A_i (x) B_i,    B_i = s_i t_i^T          i = 1 ... n, for both matrices
                                Mahabadi et al. 2021, "Compacter", arXiv 2106.04647, section 3

A Kronecker product A (x) B has a block A[p, j] B for each entry of A. So W (m, d) is
cut into n x n blocks, and each is a mixture of the same n matrices B_i of rank one.

    code              paper            shape             at birth
    A                 A_1 ... A_n      (n, n, n)         N(0, 1/n), for both matrices
    s_down, t_down    s_i, t_i         (n, m/n), (n, d/n)    N(0, 1), N(0, 1/d)
    s_up, t_up        s_i, t_i         (n, d/n), (n, m/n)    0, N(0, 1/m): W_up is 0
    b_down, b_up                       (m,), (d,)        0
    size, n           the bottleneck, n

So W_down has the variance 1/d of an ordinary adapter. W is never built. With x cut into
n parts x_j and y into n parts y_p:

    y_p = sum_i s_i sum_j A_i[p, j] (t_i . x_j)

Cost: n^3 + 3 (m + d) parameters a sublayer, and 2 n (m + d) + 2 n^3 multiplications a
token. An ordinary adapter has 2 m d + m + d, and 2 m d. With m = 32, d = 576 and n = 4
these are 1,888 parameters and not 37,472. It cannot be merged.

The paper has one set of A_i for all adapters of the model ("slow weights"), and each
adapter its own s_i, t_i. Here each adapter has its own A, because no parameter that
learns belongs to several sites. The price is n^3 parameters an adapter, 64 at n = 4.
`targets="mlp"` is the paper's Compacter++, without the adapter after the attention.
The authors' code builds W in every call; peft has no Compacter. Not included: a B_i of
a rank above one, and trained layer norms (see `freeze.norms`).

>>> from torch import nn; import torch, minillm
>>> model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 8)
>>> before = model(x)
>>> model = minillm.adapters.compacter.wrap(model, ["0"], size=4, n=2)
>>> torch.equal(model(x), before)                                       # nothing changes at birth
True
>>> A, s, t = (getattr(model[0].patches["compacter"], key) for key in ("A", "s_down", "t_down"))
>>> W = sum(torch.kron(A[i], torch.outer(s[i], t[i])) for i in range(2))     # (4, 8), the naive way
>>> torch.allclose(kronecker(x, A, s, t), x @ W.T, atol=1e-5)
True
"""

import torch
import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.adapters import Bottleneck, sublayers
from minillm.registry import roles
from minillm.registry.attach import attach
from minillm.registry.kinds import Patch
from minillm.registry.table import method, register


class Compacter(Bottleneck):
    def __init__(self, site, size=32, n=4, width=None):
        Patch.__init__(self)  # the matrices are others than Bottleneck's
        self.size, self.n = m, n = options.whole("size", size), options.whole("n", n, 1, 64)
        self.width = d = site.width if width is None else options.whole("width", width)
        for what, value in (("size", m), ("width", d)):
            if value % n:
                raise ValueError(f"n={n} at {site.name!r}: {what}={value} is no multiple of n")
        self.A = site.new(n, n, n)
        self.s_down, self.t_down = site.new(n, m // n), site.new(n, d // n)
        self.s_up, self.t_up = site.new(n, d // n), site.new(n, m // n)
        self.b_down, self.b_up = site.new(m), site.new(d)

    def fill(self, site):
        nn.init.normal_(self.A, std=self.n**-0.5)
        nn.init.normal_(self.s_down)
        nn.init.normal_(self.t_down, std=self.width**-0.5)
        nn.init.normal_(self.t_up, std=self.size**-0.5)

    def change(self, h):
        A = self.A.to(h.dtype)
        s, t, b = (p.to(h.dtype) for p in (self.s_down, self.t_down, self.b_down))
        inner = F.gelu(kronecker(h, A, s, t) + b)  # (..., m)
        s, t, b = (p.to(h.dtype) for p in (self.s_up, self.t_up, self.b_up))
        return kronecker(inner, A, s, t) + b  # (..., d)

    def extra_repr(self):
        return f"{super().extra_repr()}, n={self.n}"


def kronecker(x, A, s, t):
    """W x with W = sum_i A_i (x) s_i t_i^T, without W: (..., d) -> (..., m)"""
    x = x.unflatten(-1, (len(A), -1))  # (..., d) -> (..., n, d/n): x_j
    y = torch.einsum("...jl,il,ipj,iq->...pq", x, t, A, s)  # (..., n, m/n): y_p
    return y.flatten(-2)  # (..., n, m/n) -> (..., m)


def wrap(model, targets=None, *, name=None, size=32, n=4, width=None):
    """Put a Compacter adapter after each sublayer of `targets`; in place, returns the model.

    targets: by default the attention and the MLP of each block, as for
    `minillm.adapters.wrap`; so is width. name: by default "compacter". size: the units
    of the bottleneck, m. n: the number of the matrices A_i and the size of each, from 1
    to 64; at n = 1 both matrices have the rank one. Only the adapters learn afterwards.
    ValueError where n does not divide the size or the width.
    """
    default = sublayers if targets is None else lambda model: None
    if targets is None and width is None:
        width = roles.width_of_experts(model)
    return attach(Compacter, model, targets, default=default, what="sublayer", name=name,
                  size=size, n=n, width=width)


register("compacter", Compacter, family="adapters")
method("compacter", wrap, does="adapters whose matrices are sums of Kronecker products",
       paper="Mahabadi et al. 2021, arXiv 2106.04647", rates=dict(tiny=3e-2, smollm2=1e-2),
       small={"": dict(size=4, n=2), "four": dict(targets="mlp", size=8, n=4)})
