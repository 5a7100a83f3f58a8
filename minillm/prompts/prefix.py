"""Prefix tuning: learn keys and values that come before the text, in each layer.

    h_i = P[i]  for i in the prefix, else LM(z_i, h_<i)        Li & Liang 2021,
    P[i] = MLP(P'[i]) = W2 tanh(W1 P'[i] + b1) + b2            arXiv 2101.00190

    code      paper   shape               at birth
    P         P       (p, out), a leaf's slice: keys or values of p tokens (`start`)
    E         P'      (p, e)              N(0, 1); at the embedding
    W1, b1    MLP     (h, e), (h,)        as in nn.Linear; at the embedding; h: `hidden`
    W2, b2    MLP     (out, h), (out,)    as in nn.Linear; a slice for each leaf

1. `prepare` puts p placeholders before each row (see `placeholders`).
2. The patch at the embedding sees the ids, and notes in which columns these are.
3. The patch at each leaf of keys and values puts P there, instead of the leaf's output.

So a prefix has positions, a mask and a place in the cache like any token. What the model
computes in the placeholders' columns reaches no other token. P has the keys before RoPE.

Cost: p times the outputs of all leaves of keys and values (SmolLM2: 230,400 at p = 20),
and p more tokens of context. With `hidden`, h (e + 1) + h times these outputs more, which
only training needs; each call computes the network once. A prefix cannot be merged.

The authors and peft fill the cache instead. That computes nothing at the p columns, but
training needs the cache, each caller corrects positions, and peft refuses gradient
checkpointing. peft's P starts at N(0, 1), and its file has the keys after RoPE, which
`checkpoints.peft` converts. Not included: encoders.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=2, heads=2))
>>> model = minillm.prompts.prefix.wrap(model, length=2)
>>> _ = model(minillm.prepare(model, torch.tensor([[3, 1, 4]]))[0])     # [[50, 51, 3, 1, 4]]
>>> leaf = model.layers[1].self_attn.k_proj
>>> torch.equal(leaf(torch.randn(1, 5, 8))[0, :2], leaf.patches["prefix"].P)
True
"""

import torch
import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.prompts import attended, placeholders, starts
from minillm.registry import Patch, select
from minillm.registry.attach import attach
from minillm.registry.shared import Facts
from minillm.registry.table import method, register


class Prefix(Patch):
    def __init__(self, site, length=20, hidden=None, queries=0):
        super().__init__()
        self.length = options.whole("length", length)
        self.hidden = hidden if hidden is None else options.whole("hidden", hidden)
        self.queries = options.whole("queries", queries, 0)  # the first outputs of c_attn
        self.lookup = site.leaf.lookup
        self.touches = "ids" if self.lookup else "output"
        out, self.vocabulary = site.shape[0] - queries, site.shape[1]
        if self.lookup and hidden:
            self.E = site.new(length, out)
            self.W1, self.b1 = site.new(hidden, out), site.new(hidden)
        elif hidden:
            self.W2, self.b2 = site.new(out, hidden), site.new(out)
        elif not self.lookup:
            self.P = site.new(length, out)

    @classmethod
    def accepts(cls, site):
        return site.leaf is not None

    @classmethod
    def join(cls, patches):
        facts = Facts()
        for patch in patches:
            patch.facts = facts

    def prepare(self, ids, labels, mask):
        return placeholders.before(self, ids, labels, mask) if self.lookup else (ids, labels, mask)

    def forward(self, below, x):
        return self.note(below, x) if self.lookup else self.put(below(x))

    def note(self, below, ids):
        """At the embedding: note in which columns the placeholders are."""
        which, others = placeholders.split(self, below, ids)  # (b, t) each
        self.facts.now = placeholders.column(which, self.length), self.inner()
        return below(others)

    def put(self, y):
        """At a leaf: P in the placeholders' rows of its output y (b, t, out)."""
        if self.facts.now is None:  # a block that is called by itself
            return y
        column, inner = self.facts.now  # (b,), (p, h)
        P, q = self.vectors(inner).to(y.dtype), self.queries
        which = torch.arange(y.shape[1], device=y.device) - column[:, None]  # (b, t)
        ours = ((which >= 0) & (which < self.length))[..., None]
        new = F.embedding(which.clamp(0, self.length - 1), P)  # (b, t, out - q)
        new = torch.where(ours, new, y[..., q:])
        return torch.cat([y[..., :q], new], -1) if q else new

    def inner(self):
        """At the embedding: the network's inner activations (p, h), or None."""
        return None if self.hidden is None else F.linear(self.E, self.W1, self.b1).tanh()

    def vectors(self, inner):
        """At a leaf: P (p, out - queries)."""
        return self.P if self.hidden is None else F.linear(inner, self.W2, self.b2)

    def extra_repr(self):
        return f"length={self.length}, hidden={self.hidden}"


def wrap(model, targets=None, *, name=None, length=20, hidden=None, start="vocabulary"):
    """Put a prefix before the text in each layer; in place, returns the model.

    targets: the leaves of keys and values, by default those of each block; the first
    embedding is wrapped too. Only the prefix learns afterwards. name: by default "prefix".
    length: p. hidden: the units of the network, by default none. start: the text that the
    model reads for P, "vocabulary" (random ids) or a list of ids, repeated or cut to
    `length`. A network starts at random instead. ValueError for a length that leaves no
    position for a text, a start that is empty, outside of the vocabulary or beside
    `hidden`, and an attention whose leaves are not known.
    """
    placeholders.check_room(model, options.whole("length", length))
    first = placeholders.first_embedding(model)
    embedding, = select(model, None, placeholders.lookup, first, "embedding")
    leaves = attended.keys_values(model, targets)
    skip = {site.name: attended.queries(site) for site in leaves} | {embedding.name: 0}
    if hidden is not None and start != "vocabulary":
        raise ValueError(f"start={start!r} with hidden={hidden!r}: a network starts at random")
    ids = starts.ids_of(start, length, embedding.shape[1])
    born = starts.outputs(model, leaves, ids) if hidden is None else {}

    @torch.no_grad()
    def fill(patch, site):
        for key, p in patch.named_parameters():
            bound = (hidden if key in ("W2", "b2") else site.shape[0]) ** -0.5  # 1 / sqrt(fan-in)
            if key == "P":
                p.copy_(born[site.name][:, patch.queries :])
            else:
                nn.init.normal_(p) if key == "E" else nn.init.uniform_(p, -bound, bound)

    return attach(Prefix, model, lambda name, module: name in skip, name=name, fill=fill,
                  each=lambda site: dict(queries=skip[site.name]), length=length, hidden=hidden)


register("prefix", Prefix, family="prompts")
method("prefix", wrap, does="learns keys and values that come before the text, in each layer",
       paper="Li & Liang 2021, arXiv 2101.00190", rates=dict(tiny=1e-1, smollm2=1e-2),
       small={"": dict(length=3, targets=r".*(k_proj|v_proj|c_attn|mlp\.2)"),
              "network": dict(length=2, hidden=5, targets=r".*(k_proj|v_proj|c_attn|mlp\.2)")})
