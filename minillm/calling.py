"""The logits of any model: minillm's, Hugging Face's, or any that maps ids (b, t) to logits."""

import inspect

import torch
from torch import nn

from minillm.model.transformer import Transformer
from minillm.registry import walk
from minillm.registry.names import by_rows

POSITIONS = ("position_embeddings", "embed_positions")  # tables of positions with a padding_idx
LEARNED = ("wpe", *POSITIONS)  # all of transformers' tables of positions


def native(model):
    """Whether this is minillm's Transformer, which has `hidden` and `loss`, compiled or not.

    The class decides, because a user's model may hold a module named `loss` or `hidden`.
    """
    return isinstance(getattr(model, "_orig_mod", model), Transformer)


def arguments(model):
    """{name: parameter} of the model's forward, without the wrapper of torch.compile or peft."""
    model = getattr(model, "_orig_mod", model)
    if callable(getattr(type(model), "get_base_model", None)):
        model = model.get_base_model()
    return inspect.signature(model.forward).parameters


def logits(model, ids, mask=None, alone=True):
    """The logits (b, t, vocab) of any model for ids (b, t).

    mask (b, t) is True at real tokens; None means that all are real.

    A model that takes `position_ids` gets them: the first real token of a row has the same
    position on whichever side the padding is, see `positions`. (Without them GPT-2 of
    transformers counts the padding.) A model that takes no mask gets its padded rows one by
    one, without padding. With alone=False that is a ValueError instead, and a forward with
    **kwargs is trusted to take the mask.
    """
    if mask is None or bool((mask == 1).all()):
        return logits_of(model(ids))
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{type(model).__name__} has no mask for packed examples: give it the "
            "examples unpacked"
        )
    takes = arguments(model)
    trusted = not alone and any(a.kind is a.VAR_KEYWORD for a in takes.values())
    if "attention_mask" in takes or trusted:
        given = dict(attention_mask=mask.long())
        if "position_ids" in takes:
            given["position_ids"] = positions(model, ids, mask)
        return logits_of(model(ids, **given))
    if not alone:
        raise ValueError(
            f"the forward of {type(model).__name__} takes no attention_mask, so it "
            "cannot know what is padding: give it examples of one length, or "
            "batch_size=1"
        )
    rows = [logits(model, row[real][None])[0] for row, real in zip(ids, mask)]  # (tokens, vocab)
    every = rows[0].new_zeros(*ids.shape, rows[0].shape[-1])
    every[mask] = torch.cat(rows)
    return every


def positions(model, ids, mask):
    """The positions (b, t) of the tokens ids (b, t); mask (b, t) is True at real tokens.

    A table of positions with a padding_idx (RoBERTa's) counts from padding_idx + 1. The token
    whose id is padding_idx is not counted there and has position padding_idx, as in the model's
    own rule. All other models count every token from 0.
    """
    tables = [site for site in walk(model) if site.name.rpartition(".")[2] in POSITIONS]
    pads = [site.padding for site in tables if site.leaf is not None and site.leaf.lookup]
    pad = next((pad for pad in pads if pad is not None), None)
    if pad is None:
        return (mask.long().cumsum(1) - 1).clamp(min=0)
    counted = (mask & (ids != pad)).long()
    return counted.cumsum(1) * counted + pad


def limit(model):
    """How many positions the model has; None if they are unlimited or unknown.

    A table with a padding_idx (RoBERTa's) has the first position in the row after it.
    """
    config = getattr(model, "config", None)
    own = getattr(config, "positions", None)  # of minillm's Transformer
    tables = [site for site in walk(model) if site.name.rpartition(".")[2] in LEARNED
              and (isinstance(site.module, nn.Embedding) or site.leaf and site.leaf.lookup)]
    rows = getattr(config, "max_position_embeddings", None)
    if own or not tables or rows is None:  # transformers' rotary positions are unlimited
        return own
    return rows - min(1 + site.padding if site.padding is not None else 0 for site in tables)


def logits_at(model, ids, mask, keep):
    """The logits (n, vocab) at the n places of ids[:, :-1] where keep (b, t - 1) is True."""
    if native(model):
        h, head = model.hidden(ids, mask)[:, :-1], model.lm_head  # (b, t - 1, width)
        return head(h)[keep] if by_rows(head) else head(h[keep])
    return logits(model, ids, mask, alone=False)[:, :-1][keep]


def logits_of(output):
    """The logits in a model's output: the output itself, or its `logits` (Hugging Face)."""
    found = getattr(output, "logits", output)
    if not isinstance(found, torch.Tensor) or found.dim() != 3:
        given = type(found).__name__
        if isinstance(found, torch.Tensor):
            given = f"a tensor of shape {tuple(found.shape)}"
        raise TypeError(f"the model's forward returned {given}: it has to return the logits "
                        "(b, t, vocab), or an object that holds them as .logits")
    return found
