"""Prompt tuning: learn a few vectors that come before the text; the model is unchanged.

    model([P; embed(x)])        Lester et al. 2021, arXiv 2104.08691, section 2; only P learns

    code      paper    shape     at birth
    P         P_e      (p, e)    `start`: random rows of the embedding ("sampled vocabulary"),
                                 random numbers, a text, or class labels (see `starts`)
    length    p        ()        the paper uses 1 to 150; its curves flatten at 20

The vectors are rows of the embedding for ids that the tokenizer never gives, the
placeholders. `prepare` puts them before every row (see `placeholders`). A model called
by hand without these ids does not see the prompt. That is also why wrapping changes no
output.

Cost: p * e parameters, the fewest of all methods here, and p more tokens of context in
every call. In training, the gradient runs through the whole frozen model. A prompt
cannot be merged: only the placeholders read its rows.

peft concatenates the vectors inside a wrapper of the model, and has to correct masks,
labels and positions for each model class. There and here, the logits have p more rows.
A network that computes P is `ptuning`, and vectors for each layer are `prefix`. Not
included: ensembles of prompts.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=1, heads=2))
>>> ids = torch.tensor([[3, 1, 4]])
>>> before = model(ids)
>>> torch.equal(minillm.prompts.wrap(model, length=2)(ids), before)     # no placeholder, no change
True
>>> minillm.prepare(model, ids)[0].tolist()
[[50, 51, 3, 1, 4]]
"""

import torch
import torch.nn.functional as F

from minillm import options
from minillm.prompts import placeholders, starts
from minillm.registry import Patch
from minillm.registry.attach import attach
from minillm.registry.table import method
from minillm.registry.verbs import verbs


class SoftPrompt(Patch):
    touches = "ids"  # a patch of the embedding's weight does not get the placeholders

    def __init__(self, site, length=20):
        super().__init__()
        self.length = length = options.whole("length", length)
        width, self.vocabulary = site.shape
        self.P = site.new(length, width)

    @classmethod
    def accepts(cls, site):
        return placeholders.lookup(site)

    def vectors(self):
        """P (p, e)"""
        return self.P

    def forward(self, below, ids):
        which, others = placeholders.split(self, below, ids)  # (b, t) each
        x = below(others)  # (b, t, e)
        ours = (which >= 0)[..., None]
        return torch.where(ours, F.embedding(which.clamp(min=0), self.vectors().to(x.dtype)), x)

    def prepare(self, ids, labels, mask):
        return placeholders.before(self, ids, labels, mask)

    def extra_repr(self):
        return f"length={self.length}, width={self.P.shape[1]}"


def wrap(model, targets=None, *, name=None, length=20, start="vocabulary"):
    """Add `length` learnt rows to the token embedding; in place, returns the model.

    Only these rows learn afterwards. targets: the token embedding, by default the first
    embedding of the model. name: by default "prompts". start: "vocabulary", "random", a
    list of ids (a text), or a list of lists of ids (labels); see `starts`. torch's global
    generator draws: torch.manual_seed makes it reproducible. ValueError for a length that
    leaves no position for a text, and for a start that is empty, has ids outside of the
    vocabulary, or has more labels than `length`.
    """
    length = options.whole("length", length)
    placeholders.check_room(model, length)

    @torch.no_grad()
    def fill(patch, site):
        def embed(ids):
            return (site.layer or site.module)(ids.to(patch.P.device))

        patch.P.copy_(starts.vectors(start, length, embed, patch.vocabulary))

    return attach(SoftPrompt, model, targets, default=placeholders.first_embedding,
                  what="embedding", name=name, fill=fill, length=length)


unwrap, merge, unmerge, save, load = verbs("prompts", SoftPrompt)
method("prompts", wrap, does="learns vectors that come before the text",
       paper="Lester et al. 2021, arXiv 2104.08691", rates=dict(tiny=3e-2, smollm2=1e-2),
       small={"": dict(length=3), "labels": dict(length=2, start=[[3, 1], [4]])})
