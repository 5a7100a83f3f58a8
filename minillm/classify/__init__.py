"""Classification: a head of classes takes the place of the head of tokens.

    p(class | text) = softmax(W h + b)        h: the hidden state of the text, after the last norm
                                Radford et al. 2018, "Improving Language Understanding by
                                Generative Pre-Training", section 3.2; the mean over the
                                text: Howard & Ruder 2018, arXiv 1801.06146, section 3.3

    code      paper    shape     at birth
    W         W_y      (c, d)    N(0, 0.02^2); c classes, d the width of the hidden states
    b                  (c,)      0
    pool                         "last": h is that of the last real token (Radford), which has
                                 seen the whole text. "mean": the mean over all real tokens

1. `wrap` puts W and b around the head of any model. They compute c numbers for each token,
   (b, t, d) -> (b, t, c), and the head itself is not called.
2. `logits` pools: (b, t, c) -> (b, c). Padding is never pooled, on whichever side it is. The
   placeholders of a soft prompt count as tokens. The mean of W h + b is W times the mean of h,
   plus b. So it makes no difference that the pooling comes last.
3. `examples` ends each text with the end-of-text id, whose place has the class as its label.
4. `train(model, rows, loss=classify.loss)` learns it.

Only the head learns after `wrap`. Add `lora.wrap(model)`, in either order, or let all weights
learn: `for p in model.parameters(): p.requires_grad_(True)`. `minillm.use(model)` switches the
head off: the model predicts tokens again, so that what it forgot can be measured. While it is
on, whatever in minillm needs tokens is an error (Hugging Face's own `generate` is not).

Cost: c d + c parameters. The product with the vocabulary, 21% of SmolLM2's multiplications, is
saved. transformers has another class for it (LlamaForSequenceClassification): its `score` is W, it
has no b, it pools as "last", and it finds the last token by the id of the padding. Not included:
the loss of the next tokens beside that of the classes (Radford's L3); Howard and Ruder's hidden
layer, and their pooling, which joins the last state, the maximum and the mean; several texts a
row.

>>> import torch, minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=1, heads=2))
>>> minillm.classify.wrap(model, classes=["no", "yes"])(torch.tensor([[3, 1, 4]])).shape
torch.Size([1, 3, 2])
>>> minillm.classify.logits(model, torch.tensor([[3, 1, 4]])).shape
torch.Size([1, 2])
"""

import torch.nn.functional as F
from torch import nn

from minillm import options
from minillm.classify.texts import examples, logits, loss, mean_loss, predict
from minillm.registry import Patch, roles, select
from minillm.registry.attach import attach
from minillm.registry.instead import replacing
from minillm.registry.table import method
from minillm.registry.verbs import verbs

__all__ = ["Classifier", "examples", "load", "logits", "loss", "mean_loss", "merge", "predict",
           "save", "unmerge", "unwrap", "wrap"]
POOLS = ("last", "mean")


class Classifier(Patch):
    touches = "output"
    reads = False
    instead = True
    not_neutral = "it computes classes, and not tokens"

    def __init__(self, site, classes=2, pool="last"):
        super().__init__()
        self.classes, self.pool = classes, pool
        self.names = named(classes)
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r} is unknown; known: {', '.join(map(repr, POOLS))}")
        self.W, self.b = site.new(len(self.names), site.shape[1]), site.new(len(self.names))

    def fill(self, site):
        nn.init.normal_(self.W, std=0.02)

    def forward(self, below, x):
        for patch in below.patches():
            if patch.active:
                raise ValueError(f"{patch.name} is around the head too, and the classes take the "
                                 "head's place, so it would learn nothing and change nothing: "
                                 f"unwrap {patch.name}, or give it targets without the head")
        return F.linear(x, self.W.to(x.dtype), self.b.to(x.dtype))  # (..., d) -> (..., c)

    def mixed(self, y, z):
        raise ValueError(f"{self.name} is the head of all rows of a batch or of none, and "
                         "minillm.rows gives it some")

    def extra_repr(self):
        return f"{len(self.names)} classes, width={self.W.shape[1]}, pool={self.pool!r}"


def named(classes):
    """The list of the classes: names as they are given, or 0 .. n - 1 for a number n."""
    if isinstance(classes, (list, tuple)):
        if {*map(type, classes)} != {str} or len(classes) < 2 or len(set(classes)) < len(classes):
            raise ValueError(f"classes={classes!r}: a list of at least two different names")
        return list(classes)
    return list(range(options.whole("classes", classes, 2)))


def wrap(model, targets=None, *, name=None, classes=2, pool="last"):
    """Put a head of classes in the place of the model's head; in place, returns the model.

    Only it learns afterwards. targets: the head, by default the one that the model names, or its
    last linear leaf. name: by default "classify". classes: how many, or the list of their names,
    which the file keeps. pool: "last" or "mean", see above. torch's global generator draws W.
    ValueError for fewer than two classes, names that repeat, an unknown pool, several heads.
    """
    head = roles.head(model)
    sites = select(model, targets, Classifier.accepts,
                   lambda site: head is not None and site.name == head.name, "head")
    if len(sites) > 1:
        raise ValueError(f"targets={targets!r} names {len(sites)} leaves, {sites[0].name!r} and "
                         f"{sites[1].name!r} among them: a model has one head of classes")
    if taken := replacing(model):
        raise ValueError(f"the model has a head of classes already, called {taken.name!r}: "
                         f"minillm.use the others, or minillm.{taken.family}.unwrap(model)")
    return attach(Classifier, model, lambda name, module: name == sites[0].name, what="head",
                  name=name, classes=classes, pool=pool)


unwrap, merge, unmerge, save, load = verbs("classify", Classifier)
method("classify", wrap, does="puts a head of classes in the place of the head",
       paper="Howard & Ruder 2018, arXiv 1801.06146", rates=dict(tiny=3e-3, smollm2=1e-3),
       small={"": dict(classes=24), "mean": dict(classes=24, pool="mean")})
