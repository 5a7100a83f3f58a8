"""Prompt tuning: learn a few vectors that come before the text; the model is unchanged.

    model([P; embed(x)])        Lester et al. 2021, arXiv 2104.08691, section 2; only P learns

    code      paper    shape     at birth
    P         P_e      (p, e)    random rows of the embedding ("sampled vocabulary")
    length    p        ()        the paper uses 1 to 150; its curves flatten at 20

The vectors are rows of the embedding for ids that the tokenizer never gives:
vocabulary, vocabulary + 1, ... `prepare` (which minillm's generate, train and evaluate
call for every technique) puts these p ids, the placeholders, before every row, with the
label -100 and the mask True. So they are ordinary tokens, and lengths, positions, masks
and the key/value cache need no special case. A model called by hand without these ids
does not see the prompt. That is also why wrapping changes no output.

Cost: p * e parameters, the fewest of all methods here, and p more tokens of context in
every call. In training, the gradient runs through the whole frozen model. A prompt
cannot be merged: only the placeholders read its rows.

peft concatenates the vectors inside a wrapper of the model, and has to correct masks,
labels and positions for each model class. There and here, the logits have p more rows.
Not included: a reparameterising network (P-tuning), and vectors for each layer (prefix
tuning).

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
from minillm.registry import Patch, walk
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

    @torch.no_grad()
    def fill(self, site):
        some = torch.randint(self.vocabulary, (self.length,)).to(self.P.device)
        self.P.copy_((site.layer or site.module)(some))

    @classmethod
    def accepts(cls, site):
        return site.leaf is not None and site.leaf.lookup

    def forward(self, below, ids):
        soft = ids - self.vocabulary  # (b, t): 0 .. length - 1 at placeholders, negative at tokens
        is_soft = (soft >= 0) & (soft < self.length)
        others = ids - self.length * (soft >= 0)  # a prompt beneath has placeholders of its own
        x = below(torch.where(is_soft, 0, others))  # (b, t, e)
        return torch.where(is_soft[..., None], F.embedding(soft * is_soft, self.P.to(x.dtype)), x)

    def prepare(self, ids, labels, mask):
        def before(rows, fill):  # (b, t) -> (b, p + t)
            return None if rows is None else F.pad(rows, (self.length, 0), value=fill)

        if mask is not None and mask.dtype != torch.bool and bool((mask > 1).any()):
            raise ValueError("a soft prompt comes before one text, and these rows hold several: "
                             "give prompts the examples unpacked")
        # Padding on the left is then between prompt and text. It has no position, and no
        # token attends to it.
        placeholders = self.vocabulary + torch.arange(self.length, device=ids.device)
        ids = ids + self.length * (ids >= self.vocabulary)  # a prompt beneath: after ours
        ids = torch.cat([placeholders.expand(len(ids), -1), ids], 1)
        labels, mask = before(labels, -100), before(mask, True)
        if self.rows is not None and not self.rows.all():  # the other rows get padding there
            mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            ids[~self.rows, : self.length] = 0
            mask[~self.rows, : self.length] = False
        return ids, labels, mask

    def extra_repr(self):
        return f"length={self.length}, width={self.P.shape[1]}"


def wrap(model, targets=None, *, name=None, length=20):
    """Add `length` learnt rows to the token embedding; in place, returns the model.

    Only these rows learn afterwards. targets: the token embedding, by default the first
    embedding of the model. name: by default "prompts". torch's global generator draws
    the start: torch.manual_seed makes it reproducible.
    """
    return attach(SoftPrompt, model, targets, default=first_embedding, what="embedding",
                  name=name, length=length)


def first_embedding(model):
    first = next((site.name for site in walk(model) if SoftPrompt.accepts(site)), None)
    return lambda site: site.name == first


unwrap, merge, unmerge, save, load = verbs("prompts", SoftPrompt)
method("prompts", wrap, does="learns vectors that come before the text",
       paper="Lester et al. 2021, arXiv 2104.08691", rates=dict(tiny=3e-2, smollm2=1e-2),
       small={"": dict(length=3)})
