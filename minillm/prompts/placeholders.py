"""Placeholders: the ids that a technique puts before a text, for vectors that no text has.

    vocabulary, vocabulary + 1, ..., vocabulary + length - 1

The tokenizer never gives these ids. `prepare` (which minillm's generate, train and evaluate
call for every technique) puts them before every row, with the label -100 and the mask True. So
they are ordinary tokens, and lengths, positions, masks and the key/value cache need no special
case. A model called by hand without these ids does not see them.

Several techniques of one embedding each have their own ids: the one wrapped last comes first in
the row and has the highest ids. So ids that were prepared before its `wrap` mean the same after it.
"""

import torch
import torch.nn.functional as F

from minillm.calling import limit
from minillm.registry import prepare, walk


def split(patch, below, ids):
    """(which, others), each (b, t): which placeholder is in each column, and the other ids.

    which: 0 .. length - 1, or -1 where there is none of the patch's. others: the ids for what lies
    below; 0 at the patch's own placeholders.
    """
    taken = sum(one.length for one in below.patches() if one.touches == "ids" and one.active)
    which = ids - (patch.vocabulary + taken)
    ours = (which >= 0) & (which < patch.length)
    return torch.where(ours, which, -1), torch.where(ours, 0, ids)


def column(which, length):
    """In each row (b,), the column of placeholder 0 of which (b, t); -length if there is none.

    It is negative where this call begins within the placeholders (a prompt taken in pieces).
    """
    first = torch.arange(which.shape[-1], device=which.device) - which
    return torch.where(which >= 0, first, -length).amax(-1)


def before(patch, ids, labels, mask):
    """(ids, labels, mask), each (b, p + t) or None, with the patch's p placeholders in front."""
    p = patch.length

    def padded(rows, fill):  # (b, t) -> (b, p + t)
        return None if rows is None else F.pad(rows, (p, 0), value=fill)

    if mask is not None and mask.dtype != torch.bool and bool((mask > 1).any()):
        raise ValueError("a soft prompt comes before one text, and these rows hold several: "
                         "give prompts the examples unpacked")
    # Padding on the left is then between prompt and text. It has no position, and no
    # token attends to it.
    first = max(patch.vocabulary, int(ids.max()) + 1 if ids.numel() else 0)  # after those below
    placeholders = first + torch.arange(p, device=ids.device)
    ids = torch.cat([placeholders.expand(len(ids), -1), ids], 1)
    labels, mask = padded(labels, -100), padded(mask, True)
    if patch.rows is not None and not patch.rows.all():  # the other rows get padding there
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        ids[~patch.rows, :p] = 0
        mask[~patch.rows, :p] = False
    return ids, labels, mask


def first_embedding(model):
    """A function: whether a site is the first embedding of the model."""
    first = next((site.name for site in walk(model) if lookup(site)), None)
    return lambda site: site.name == first


def lookup(site):
    return site.leaf is not None and site.leaf.lookup


def check_room(model, length):
    """ValueError if `length` more placeholders leave no position for a text."""
    most, taken = limit(model), prepare(model, torch.zeros(1, 1, dtype=torch.long))[0].shape[1] - 1
    if most is not None and taken + length >= most:
        others = f" and {taken} placeholders of other prompts" if taken else ""
        raise ValueError(f"length={length!r}{others}: the model has {most} positions, and the text "
                         f"needs one, so length is at most {most - taken - 1}")
