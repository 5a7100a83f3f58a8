"""Attention: which tokens see which, and softmax(q kᵀ / sqrt(d) + mask) v.

    document    the number of the text that a token belongs to; 0: padding
    position    how many tokens of its own document lie before it: 0, 1, 2, ...

    A token sees the tokens of its own document at its own position or before,
    and with a window w only the last w of them, itself included.

This one rule uses documents and positions, never columns. So these are right without a
case of their own:

    padding     it belongs to no text, so it has no place in a position or in a window
    packing     several texts in one row: each starts at position 0 and sees itself alone
    cache       the keys of earlier calls keep their document and their position, also where
                new keys overwrite those that a window has left behind

A batch of whole rows gets no mask, because torch's causal kernels are faster. The
letters in the shapes: b batch, t tokens of this call, s tokens attended to, h heads, g
key/value heads, d head size.

A packed row with one token of padding and two documents. With a window of 2 the third token
of the first document no longer sees the first:

>>> documents = torch.tensor([[0, 1, 1, 1, 2, 2]])
>>> positions = count(documents)
>>> positions.tolist()
[[0, 0, 1, 2, 0, 1]]
>>> for row in visible(documents, positions, documents, positions, window=2)[0].int().tolist():
...     print(*row)
1 0 0 0 0 0
0 1 0 0 0 0
0 1 1 0 0 0
0 0 1 1 0 0
0 0 0 0 1 0
0 0 0 0 1 1
"""

import torch
import torch.nn.functional as F

from minillm import ops
from minillm.registry import same_shape


def count(documents, cache=None):
    """The positions (b, t) of the tokens of documents (b, t), after those in the cache.

    Padding has position 0: no text counts it, and a table of learned positions has no row for it.
    A document whose keys have all left the cache starts at 0 again. It would see none of them.
    """
    own = documents[:, :, None] == documents[:, None]  # (b, t, t)
    positions = own.tril().sum(-1) - 1
    if cache is not None:  # a document goes on after its last position there
        own = documents[:, :, None] == cache.documents[:, None]  # (b, t, s)
        positions = positions + (own * (cache.positions[:, None] + 1)).amax(-1)
    return positions * (documents > 0)


def visible(documents, positions, key_documents, key_positions, window=None):
    """Which keys each token sees: (b, t, s), True where it does.

    documents and positions (b, t) belong to the tokens, key_documents and key_positions
    (b, s) to the keys. A padding token sees other padding: nothing uses its output, but
    it must not be nan.
    """
    distance = positions[:, :, None] - key_positions[:, None]  # (b, t, s)
    sees = (documents[:, :, None] == key_documents[:, None]) & (distance >= 0)
    return sees if window is None else sees & (distance < window)


def check_mask(ids, mask):
    """ValueError for a mask that is not the documents (b, t) of these ids."""
    same_shape(ids, mask=mask)
    if mask is not None and mask.is_floating_point():
        raise ValueError(f"mask is {mask.dtype}: give bool, True at tokens, or the documents "
                         "as whole numbers from 1, with 0 at padding")


def look(ids, mask, cache, limit, window=None, static=False):
    """Positions of the tokens (b or 1, t), and their mask (b, 1, t, s) or None.

    ids (b, t). mask (b, t): the documents, None where every row is one whole text.
    cache: a Cache with the tokens before these, or None. static: the keys are all
    columns of the cache, filled or not, so that their number is the same at each call.
    The mask that is returned is None where plain causal attention is right. ValueError
    for a text longer than `limit` tokens.
    """
    t, start = ids.shape[1], cache.filled if cache else 0
    documents = ids.new_ones(1, t) if mask is None else mask.long()
    whole = (mask is None or bool((documents == 1).all())) and not (cache and cache.mixed)
    length = start + t  # of the longest text, at most
    if whole:
        documents = documents[:1]  # every row is the same
        positions = torch.arange(start, length, device=ids.device)[None]  # (1, t)
    else:
        documents = documents.expand(len(ids), t)
        positions = count(documents, cache)
        length = length if length <= limit else int(positions.max()) + 1
    if length > limit:
        raise ValueError(f"a sequence of {length} tokens is beyond this model's {limit} positions")
    keys = documents, positions
    if cache:
        keys = cache.note(documents, positions, whole, static, window)
    causal = whole and not static and (start == 0 or t == 1)
    if causal and (window is None or length <= window):
        return positions, None
    return positions, visible(documents, positions, *keys, window)[:, None]


def attend(q, k, v, mask=None):
    """softmax(q kᵀ / sqrt(d) + mask) v, written out; `fused` computes the same.

    q (b, h, t, d), k and v (b, g, s, d), h a multiple of g -> (b, h, t, d). mask (b, 1,
    t, s): True where a token sees a key. None: each token sees itself and the tokens
    before it; a single token (t = 1) sees every key.
    """
    t, s, share = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))  # (b, g, s, d) -> (b, h, s, d)
    if mask is None:
        mask = q.new_ones(t, s, dtype=torch.bool).tril(0 if t > 1 else s)
    score = q @ k.mT / q.shape[-1] ** 0.5  # (b, h, t, s)
    return score.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def attend_once(q, k, v, mask):
    """What `attend` computes for one token of one row, as multiplications and sums.

    torch.compile fuses these with the operations around them, where a call of `fused`'s
    kernel would divide the block into two pieces.
    """
    q = q.unflatten(1, (k.shape[1], -1)) / q.shape[-1] ** 0.5  # (1, h, 1, d) -> (1, g, h/g, 1, d)
    score = (q * k[:, :, None]).sum(-1)  # (1, g, h/g, s)
    p = score.masked_fill(~mask, -torch.inf).softmax(-1)
    return (p[..., None] * v[:, :, None]).sum(-2)[:, :, :, None].flatten(1, 2)  # (1, h, 1, d)


def fused(q, k, v, mask=None):
    """What `attend` computes, in one kernel: the scores (b, h, t, s) are never stored whole."""
    if mask is not None and q.shape[2] == 1 and ops.single(q.flatten(1)):  # one row, one token
        return attend_once(q, k, v, mask)
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
