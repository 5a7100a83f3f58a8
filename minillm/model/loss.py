"""The cross-entropy of next-token prediction, without the logits of all tokens in memory at once.

    L = sum over n of -log softmax(head(h_n))[y_n]         in nats

SmolLM2's head has 49,152 outputs: the float32 logits of 512 tokens are 96 MiB, as large as the
activations of several of its blocks. Three things keep them small:

1. Only tokens whose label is learnt reach the head.
2. The head takes `chunk` tokens at a time, and drops their logits before the next chunk.
3. The gradient, dL/d logits = softmax(logits) - onehot(y), is taken in the forward pass, where the
   chunk's logits still exist. The backward pass only multiplies it by the gradient from above.

So the head runs once, and not twice as under checkpointing. The price: the loss has
only a first derivative, and the gradient is computed even if the backward pass never
runs (but not under no_grad). The plain version is F.cross_entropy(head(h).float(), y,
reduction="sum").
"""

import torch
import torch.nn.functional as F


def learnt(labels, vocabulary):
    """labels (b, t) -> (mask (b, t - 1) of the labels to learn, these labels (n,)).

    The first label of a row has no token before it and is never learnt. ValueError
    where no label is left, and for labels outside the vocabulary.
    """
    keep = labels[:, 1:] != -100
    y = labels[:, 1:][keep]
    if not len(y):
        raise ValueError("no label is left to learn: "
                         "all are -100, or the sequences have fewer than two tokens")
    low, high = y.min().item(), y.max().item()
    if low < 0 or high >= vocabulary or y.is_floating_point():
        raise ValueError(f"the labels run from {low} to {high}, but the vocabulary has "
                         f"{vocabulary} entries; -100 is for what is not learnt")
    return keep, y.long()


def cross_entropy_sum(h, labels, head, chunk=256):
    """Sum over n of -log softmax(head(h))[label]: h (n, width), labels (n,) -> ().

    `head` is any module (n, width) -> (n, vocab). The sum is float32, or float64 for a
    float64 h. An adapter of the head that takes no part gets no gradient.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (h.requires_grad or parameters):
        return CrossEntropySum.apply(h, labels, head, chunk, *parameters)
    parts = zip(h.split(chunk), labels.split(chunk))
    return sum(F.cross_entropy(wide(head(x)), y, reduction="sum") for x, y in parts)


def wide(x):
    """x in float32; a float64 x stays as it is. Sums need more than 16 bits."""
    return x if x.dtype == torch.float64 else x.float()


class CrossEntropySum(torch.autograd.Function):
    """`cross_entropy_sum` with its gradient for h and for the head's parameters that learn."""

    @staticmethod
    def forward(ctx, h, labels, head, chunk, *parameters):
        total = wide(h.new_zeros(()))
        grads = [None if len(h) else wide(torch.zeros_like(p)) for p in parameters]
        grad_h = torch.empty_like(h)
        for i in range(0, len(h), chunk):
            y = labels[i : i + chunk, None]  # (c, 1)
            with torch.enable_grad():
                x = h[i : i + chunk].detach().requires_grad_()
                logits = head(x)  # (c, vocab)
            log_p = wide(logits.detach()).log_softmax(-1)
            total = total - log_p.gather(1, y).sum()
            onehot = torch.ones_like(y, dtype=log_p.dtype)
            d = log_p.exp_().scatter_add_(1, y, -onehot)  # in place: softmax - onehot
            d = d.to(logits.dtype)
            found = torch.autograd.grad(logits, [x, *parameters], d, allow_unused=True)
            grad_h[i : i + chunk], *more = found  # None for an adapter that takes no part
            grads = [old if new is None else wide(new).clone() if old is None else old.add_(new)
                     for old, new in zip(grads, more)]
        grads = [g if g is None else g.to(p.dtype) for g, p in zip(grads, parameters)]
        ctx.save_for_backward(grad_h, *grads)
        return total

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: the saved gradients are constants
            raise RuntimeError("the fused loss has no second derivative (create_graph=True): use "
                               "torch.nn.functional.cross_entropy on the model's logits instead")
        grad_h, *grads = (g if g is None else scaled(g, grad) for g in ctx.saved_tensors)
        return grad_h, None, None, None, *grads


def scaled(g, grad):
    """g * grad in g's dtype; `grad` alone may be too large for float16, as a GradScaler's is."""
    return (wide(g) * grad).to(g.dtype)
