"""P-tuning: a soft prompt that a small network computes from learnt embeddings.

A prompt whose vectors learn one by one starts badly and gets stuck, says the paper. Here
all vectors come out of one network, so a step that helps one of them moves the others too.

    P = f(E),   f(x) = W3 relu(W2 relu(W1 x + b1) + b2) + b3      Liu et al. 2021,
    model([P; embed(x)])                                          arXiv 2103.10385

    code      paper      shape          at birth
    E         h          (p, e)         N(0, 1), as in nn.Embedding
    W1, b1    MLP        (h, e), (h,)   as in nn.Linear
    W2, b2               (h, h), (h,)   as in nn.Linear
    W3, b3               (e, h), (e,)   as in nn.Linear
    length, hidden       p, h; by default h = e

Everything but P is as in `minillm.prompts`: the placeholders, the cost in tokens, and
that it cannot be merged. The network is for training: it has p e + 2 h e + h^2 + 2 h + e
parameters (1.0 million on SmolLM2, where P has 11,520). It is computed once in each call.
Its file here holds the network, so a training can go on. A file of peft holds P alone
(see `checkpoints.peft`), and `minillm.prompts` reads it.

The paper puts an LSTM before the MLP, and places vectors between the tokens of a
pattern too. peft's default is this MLP; its LSTM is an option. Not included: the LSTM,
and vectors at other places than the front.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=1, heads=2))
>>> ids = torch.tensor([[3, 1, 4]])
>>> before = model(ids)
>>> model = minillm.prompts.ptuning.wrap(model, length=2, hidden=4)
>>> torch.equal(model(ids), before)                                     # no placeholder, no change
True
>>> patch = model.embed_tokens.patches["ptuning"]
>>> torch.equal(model.embed_tokens(torch.tensor([50, 51])[None])[0], patch.vectors())
True
"""

import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.prompts import SoftPrompt, placeholders
from minillm.registry import Patch
from minillm.registry.attach import attach
from minillm.registry.table import method, register


class PTuning(SoftPrompt):
    reads = False

    def __init__(self, site, length=20, hidden=None):
        Patch.__init__(self)  # P is computed
        self.length = p = options.whole("length", length)
        e, self.vocabulary = site.shape
        self.hidden = h = e if hidden is None else options.whole("hidden", hidden)
        self.E = site.new(p, e)
        self.W1, self.b1 = site.new(h, e), site.new(h)
        self.W2, self.b2 = site.new(h, h), site.new(h)
        self.W3, self.b3 = site.new(e, h), site.new(e)

    def fill(self, site):
        nn.init.normal_(self.E)
        for W, b in ((self.W1, self.b1), (self.W2, self.b2), (self.W3, self.b3)):
            for p in (W, b):
                nn.init.uniform_(p, -(W.shape[1] ** -0.5), W.shape[1] ** -0.5)

    def vectors(self):
        """P (p, e)"""
        x = F.linear(self.E, self.W1, self.b1).relu()  # (p, h)
        x = F.linear(x, self.W2, self.b2).relu()
        return F.linear(x, self.W3, self.b3)

    def extra_repr(self):
        return f"length={self.length}, hidden={self.hidden}"


def wrap(model, targets=None, *, name=None, length=20, hidden=None):
    """Put a prompt that a network computes before the text; in place, returns the model.

    Only the network and its embeddings learn afterwards. targets: the token embedding, by
    default the first embedding of the model. name: by default "ptuning". length: p.
    hidden: the units of the network, by default the width of the embedding. torch's
    global generator draws. ValueError for a length that leaves no position for a text.
    """
    length = options.whole("length", length)
    placeholders.check_room(model, length)
    return attach(PTuning, model, targets, default=placeholders.first_embedding,
                  what="embedding", name=name, length=length, hidden=hidden)


register("ptuning", PTuning, family="prompts")
method("ptuning", wrap, does="a small network computes the vectors before the text",
       paper="Liu et al. 2021, arXiv 2103.10385", rates=dict(tiny=1e-2, smollm2=3e-3),
       small={"": dict(length=3, hidden=6)})
