"""Prefix tuning: learn keys and values that come before the text, in each layer.

A soft prompt is learnt in front of the first layer alone. A prefix is learnt for the attention of
every layer: p keys and p values that all tokens see.

    h_i = P[i, :]                             i in the prefix       Li & Liang 2021,
          LM(z_i, h_<i)                       otherwise             arXiv 2101.00190, equation 3
    P[i, :] = MLP(P'[i, :])                   with `hidden`         section 4.3
            = W2 tanh(W1 P'[i, :] + b1) + b2

    code      paper      shape          at birth
    P         P          (p, out)       a slice of P for each leaf: the keys, or the values, of p
                                        tokens that the model has read (`start`)
    E         P'         (p, e)         N(0, 1); at the embedding
    W1, b1    MLP        (h, e), (h,)   as nn.Linear; at the embedding
    W2, b2    MLP        (out, h), (out,)   as nn.Linear; a slice for each leaf
    length, hidden       p, h

1. `prepare` puts p placeholders before each row, as for a soft prompt (see `placeholders`).
2. The patch at the embedding sees the ids. It notes in which columns the placeholders are.
3. The patch at each leaf of the keys and values puts P there, in the place of the leaf's output.

So the prefix has positions, a mask and a place in the key/value cache like any token. What the
model computes in the placeholders' columns reaches no token, because these see only P. Keys of a
model with RoPE are learnt as they are before their rotation.

Cost: p times the outputs of all leaves of keys and values (SmolLM2: 11,520 a token, 230,400 at
p = 20). With `hidden` h (e + 11,521) more, which a training needs; they also cost time in each
call. The placeholders cost p tokens in each call that has them. A prefix cannot be merged.

The authors and peft fill the key/value cache instead. That computes nothing at the p columns, but
needs the cache in training and positions corrected by each caller; peft refuses gradient
checkpointing with it. peft's prefix starts at N(0, 1), and its file has the keys after the
rotation: `checkpoints.peft` converts them. Not included: a prefix for an encoder.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=2, heads=2))
>>> ids = torch.tensor([[3, 1, 4]])
>>> before = model(ids)
>>> model = minillm.prompts.prefix.wrap(model, length=2)
>>> torch.equal(model(ids), before)                             # no placeholder, no change
True
>>> minillm.prepare(model, ids)[0].tolist()
[[50, 51, 3, 1, 4]]
>>> _ = model(minillm.prepare(model, ids)[0])
>>> layer = model.layers[1].self_attn.k_proj
>>> torch.equal(layer(torch.randn(1, 5, 8))[0, :2], layer.patches["prefix"].P)
True
"""

import torch
import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.prompts import placeholders, starts
from minillm.registry import Patch, roles, select
from minillm.registry.attach import attach
from minillm.registry.kinds import Facts
from minillm.registry.table import method, register


class Prefix(Patch):
    def __init__(self, site, length=20, hidden=None, queries=0):
        super().__init__()
        self.length = options.whole("length", length)
        self.hidden = None if hidden is None else options.whole("hidden", hidden)
        self.queries = options.whole("queries", queries, 0)  # GPT-2's c_attn has them first
        self.lookup = site.leaf.lookup
        self.touches = "ids" if self.lookup else "output"
        if self.lookup:
            e, self.vocabulary = site.shape
            if hidden is not None:
                self.E = site.new(length, e)
                self.W1, self.b1 = site.new(hidden, e), site.new(hidden)
        else:
            out = site.shape[0] - self.queries
            if hidden is not None:
                self.W2, self.b2 = site.new(out, hidden), site.new(out)
            else:
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
        """At the embedding: note the column of the first placeholder, (b,), -p if there is none.

        It is negative where this call begins within the prefix.
        """
        which, others = placeholders.split(self, below, ids)
        first = torch.arange(ids.shape[1], device=ids.device) - which  # (b, t)
        first = torch.where(which >= 0, first, -self.length).amax(1)
        inner = None if self.hidden is None else F.linear(self.E, self.W1, self.b1).tanh()  # (p, h)
        self.facts.now = first, inner
        return below(others)

    def put(self, y):
        """At a leaf: P in the placeholders' rows of its output y (b, t, out)."""
        if self.facts.now is None:  # a block that is called by itself
            return y
        first, inner = self.facts.now
        P = (self.P if self.hidden is None else F.linear(inner, self.W2, self.b2)).to(y.dtype)
        which = torch.arange(y.shape[1], device=y.device) - first[:, None]  # (b, t)
        ours = ((which >= 0) & (which < self.length))[..., None]
        new = F.embedding(which.clamp(0, self.length - 1), P)  # (b, t, out)
        if self.queries == 0:
            return torch.where(ours, new, y)
        queries, old = y[..., : self.queries], y[..., self.queries :]
        return torch.cat([queries, torch.where(ours, new, old)], -1)

    def extra_repr(self):
        return f"length={self.length}, hidden={self.hidden}"


def wrap(model, targets=None, *, name=None, length=20, hidden=None, start="vocabulary"):
    """Put a prefix before the text in each layer; in place, returns the model.

    targets: the leaves of the keys and the values, by default those of each block's attention
    (see `registry.roles` and `select`). The first embedding is always wrapped too. Only the prefix
    learns afterwards. name: by default "prefix". length: p. hidden: the units of the
    reparametrizing network, by default none. start: the tokens whose keys and values the prefix
    has at birth, "vocabulary" (random ones) or a list of ids, which is repeated or cut to
    `length`; the model reads them. A network starts at random, whatever the start.

    torch's global generator draws. ValueError for a length that leaves no position for a text, a
    start that is empty or outside of the vocabulary or comes with `hidden`, and, without `targets`,
    an attention whose leaves of keys and values are not found.
    """
    length = options.whole("length", length)
    placeholders.check_room(model, length)
    embedding = select(model, None, placeholders.lookup, placeholders.first_embedding(model))[0]
    leaves = keys_values(model, targets)
    if hidden is None:
        ids = starts.ids_of(start, length, embedding.shape[1])
        born = starts.outputs(model, leaves, ids)
    elif start != "vocabulary":
        raise ValueError(f"start={start!r} with hidden={hidden!r}: a network starts at random")
    names = {site.name for site in leaves} | {embedding.name}

    def fill(patch, site):
        if patch.hidden is not None:
            network(patch)
        elif not patch.lookup:
            with torch.no_grad():
                patch.P.copy_(born[site.name][:, patch.queries :])

    return attach(Prefix, model, lambda name, module: name in names, name=name, fill=fill,
                  each=lambda site: dict(queries=0 if site is embedding else queries(site)),
                  length=length, hidden=hidden)


def keys_values(model, targets):
    """The Sites of the leaves whose output rows the prefix replaces."""
    def linear(site):
        return site.leaf is not None and not site.leaf.lookup

    if targets is not None:
        return select(model, targets, linear, None)
    names = set()
    for block in roles.parts(model).blocks:
        part = block.attention
        if part is None or not block.keys_values:
            what = part or block.site
            raise ValueError(f"{what.name!r} is a {type(what.module).__name__}, in which a prefix "
                             "does not find the leaves of the keys and the values: name them in "
                             "targets=")
        names |= {site.name for site in block.keys_values}
    return select(model, None, linear, lambda site: site.name in names)


def queries(site):
    """How many of a leaf's outputs, the first ones, are queries."""
    last = site.name.rpartition(".")[2]
    if last == "c_attn" and site.leaf.transposed and site.shape[0] == 3 * site.shape[1]:
        return site.shape[1]  # GPT-2: q, k, v
    if last in ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv"):
        raise ValueError(f"{site.name!r} computes queries, keys and values in an order that is not "
                         "known here, so a prefix cannot find the keys")
    return 0


def network(patch):
    """nn.Embedding's and nn.Linear's own starts."""
    for key, p in patch.named_parameters():
        fan_in = {"W1": patch.W1.shape[1], "b1": patch.W1.shape[1]} if patch.lookup else {}
        bound = fan_in.get(key, patch.hidden) ** -0.5
        nn.init.normal_(p) if key == "E" else nn.init.uniform_(p, -bound, bound)


register("prefix", Prefix, family="prompts")
method("prefix", wrap, does="learns keys and values that come before the text, in each layer",
       paper="Li & Liang 2021, arXiv 2101.00190", rates=dict(tiny=3e-2, smollm2=1e-2),
       small={"": dict(length=3, targets=r".*(k_proj|v_proj|c_attn|mlp\.2)"),
              "network": dict(length=2, hidden=5, targets=r".*(k_proj|v_proj|c_attn|mlp\.2)")})
