"""Generation: choose a token from the model's last logits, append it, and repeat.

    temperature    p = softmax(logits / temperature); 0: greedy, the likeliest token
    top_k          only the k likeliest tokens          Fan et al. 2018, arXiv 1805.04833
    top_p          only the fewest that together hold   Holtzman et al. 2020, arXiv 1904.09751
                   the share top_p ("nucleus")
    min_p          only those at least min_p times      Nguyen et al. 2024, arXiv 2407.01082
                   as likely as the likeliest

The filters apply in this order, each to the tokens that the one before kept. A cache
keeps the keys and values of the tokens so far, so each step computes only the new
token. Rows of different lengths are padded on the left, so that all rows end, and
continue, in the same column.

Not included: beam search, penalties for repetition, speculative decoding.

>>> import minillm
>>> model = minillm.Transformer(minillm.Config(vocab_size=50, width=8, layers=1, heads=2))
>>> model.generate([[3, 1, 4], [1, 5]], max_new_tokens=2).shape   # 3 of the prompt and 2 new
torch.Size([2, 5])
>>> model.generate([[3, 1, 4]], top_p=0.9)
Traceback (most recent call last):
ValueError: top_p=0.9 has no effect at temperature=0, which is greedy: give a temperature above 0
"""

import contextlib
import math
import numbers

import torch

from minillm.model.cache import Cache
from minillm.model.loss import wide
from minillm.registry import instead, prepare, same_shape


@torch.no_grad()
def generate(model, ids, max_new_tokens=64, *, temperature=0.0, top_k=None, top_p=None, min_p=None,
             stop=(), stream=None, mask=None, pad=None, generator=None):
    """Continue each row of ids; returns (b, t + new), where `new` is at most max_new_tokens.

    ids: (b, t), or a list of b lists, which are padded on the left. mask (b, t): True
    at the tokens of a tensor that is padded on the left, False at its padding.
    temperature, top_k, top_p, min_p: see the top of this page; temperature 0 is greedy.
    stop: an id or several. A row ends after one of them, and is filled with `pad`
    (None: the first of `stop`, or 0) until all rows have ended. `stream(tokens)` is
    called with each step's tokens (b,). The model computes in eval mode, and is in its
    own mode again afterwards, also after an error. ValueError for an option that is out
    of range or would have no effect, IndexError for ids outside the vocabulary, both
    before anything is computed.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, min_p)
    instead.check_tokens(instead.replacing(model), "generate")
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    stop, pad = check_stop(stop, pad, model.config.vocab_size)
    ids, mask = check_prompt(ids, mask, pad, model.config.vocab_size)
    ids, mask, stop = (None if x is None else x.to(device) for x in (ids, mask, stop))
    inputs, _, mask = prepare(model, ids, None, mask)  # soft prompts go in front
    check_room(inputs, mask, max_new_tokens, model.config.positions)
    if max_new_tokens == 0:
        return ids
    b, t = inputs.shape
    length, piece = ring(inputs, mask, t + max_new_tokens, model.config.window)
    cache = Cache(model.config, b, length, dtype, device)
    ended, new = torch.zeros(b, dtype=torch.bool, device=device), []
    with evaluating(model):
        for _ in range(max_new_tokens):
            for i in range(0, inputs.shape[1], piece):  # a prompt may be longer than the cache
                part = slice(i, i + piece)
                h = model.hidden(inputs[:, part], None if mask is None else mask[:, part], cache)
            logits = wide(model.lm_head(h[:, -1]))  # (b, vocab)
            if not bool(logits.isfinite().all()):
                raise ValueError("the model's logits are nan or inf: "
                                 "its weights or activations are out of range")
            tokens = sample(logits, temperature, top_k, top_p, min_p, generator)
            tokens = tokens.masked_fill(ended, pad)
            new.append(tokens)
            if stream is not None:
                stream(tokens)
            ended = ended | torch.isin(tokens, stop)
            if bool(ended.all()):
                break
            inputs, mask = tokens[:, None], None
    return torch.cat([ids, torch.stack(new, 1)], 1)


def ring(inputs, mask, total, window):
    """(the length of the cache, how many tokens of the prompt it takes at a time).

    With a window the cache is a ring (see `cache`), so its length does not grow with the text.
    Padding within the prompt (b, t) takes columns, but no part of a window.
    """
    if window is None:
        return total, total
    padding = 0 if mask is None else int((~mask).sum(1).max())
    length = 2 * window - 1 + padding
    return (total, total) if total <= length else (length, window)


def sample(logits, temperature=0.0, top_k=None, top_p=None, min_p=None, generator=None):
    """One token a row of logits (b, vocab) -> (b,); the options are those of `generate`."""
    check_options(0, temperature, top_k, top_p, min_p)
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = choices(logits, temperature, top_k, top_p, min_p)
    drawn = torch.multinomial(p, 1, generator=generator)  # (b, 1); divides by the sum of p itself
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def choices(logits, temperature, top_k=None, top_p=None, min_p=None):
    """What `sample` draws from: p (b, k), 0 where a filter drops a token, and the tokens (b, k).

    The sum of p may be below 1. The tokens are None where p covers the whole
    vocabulary, in its own order. The likeliest token passes every filter, so at least
    one is left.
    """
    ids = None
    if top_k is not None or top_p is not None:  # both need the tokens in order, the likeliest first
        vocabulary = logits.shape[-1]
        logits, ids = logits.topk(min(top_k or vocabulary, vocabulary))  # (b, vocab) -> (b, k) each
    logits = (logits - logits.amax(-1, keepdim=True)).double()  # <= 0: no inf at any temperature
    p = (logits / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        before = p.cumsum(-1) - p  # the share that the likelier tokens hold
        p = p.masked_fill(before >= top_p, 0)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0)
    return p, ids


def left_pad(rows, pad=0):
    """Lists of ids -> ids (b, t) padded on the left, and mask (b, t), True at real tokens."""
    if not len(rows):
        raise ValueError("there is no row of ids to pad: the list is empty")
    t = max(map(len, rows))
    ids = torch.tensor([[pad] * (t - len(r)) + list(r) for r in rows])
    if t and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f"the rows hold {ids.dtype}: ids are whole numbers")
    mask = torch.tensor([[False] * (t - len(r)) + [True] * len(r) for r in rows])
    return ids.long(), mask


@contextlib.contextmanager
def evaluating(model):
    """Eval mode (no dropout); afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# --- errors ---------------------------------------------------------------------------


def whole_number(x):
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def check_options(max_new_tokens=0, temperature=0.0, top_k=None, top_p=None, min_p=None):
    """ValueError for an option that is out of range or would have no effect."""
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    real = {name: isinstance(x, numbers.Real) and not isinstance(x, bool)
            for name, x in (filters | {"temperature": temperature}).items()}
    if not whole_number(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} is not a whole number from 0")
    if not real["temperature"] or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} is not a number from 0, which is greedy")
    if top_k is not None and not (whole_number(top_k) and top_k >= 1):
        raise ValueError(f"top_k={top_k!r} is not a whole number from 1; None keeps all tokens")
    if top_p is not None and not (real["top_p"] and 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p!r} is not a number above 0 and at most 1; None keeps all")
    if min_p is not None and not (real["min_p"] and 0 <= min_p <= 1):
        raise ValueError(f"min_p={min_p!r} is not a number from 0 to 1; None keeps all tokens")
    for name, value in filters.items():
        if value is not None and temperature == 0:
            raise ValueError(f"{name}={value!r} has no effect at temperature=0, which is greedy: "
                             "give a temperature above 0")


def check_stop(stop, pad, vocabulary):
    """(stop as a tensor (n,), pad as an int); ValueError for what is no id of the vocabulary."""
    if isinstance(stop, torch.Tensor):
        stop = stop.flatten().tolist()
    stop = list(stop) if hasattr(stop, "__iter__") and not isinstance(stop, str) else [stop]
    for name, value in [("stop", x) for x in stop] + [("pad", pad)] * (pad is not None):
        if not whole_number(value) or not 0 <= value < vocabulary:
            raise ValueError(f"{name}={value!r} is no id of the vocabulary, 0 to {vocabulary - 1}")
    pad = pad if pad is not None else stop[0] if stop else 0
    return torch.tensor(stop, dtype=torch.long), int(pad)


def check_prompt(ids, mask, pad, vocabulary):
    """(ids (b, t), mask (b, t) of bool or None) from generate's arguments, or an error."""
    if not isinstance(ids, torch.Tensor):
        if mask is not None:
            raise ValueError("mask= says where a tensor is padded; "
                             "a list of rows is padded here: leave mask out")
        if not len(ids) or any(isinstance(row, str) or not hasattr(row, "__len__") for row in ids):
            raise ValueError(f"ids={ids!r} is no list of rows: "
                             "give [[id, id, ...], ...], at least one row")
        ids, mask = left_pad(ids, pad)
    elif ids.dim() != 2 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}: "
                         "give whole numbers (b, t), at least one row")
    if mask is not None:
        same_shape(ids, mask=mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"mask runs from {mask.min()} to {mask.max()}: give 1 or True at "
                             "tokens, 0 or False at padding; a packed row cannot be continued")
        mask = mask.bool()
        if ids.shape[1] and not bool(mask[:, -1].all()):
            row = int((~mask[:, -1]).nonzero()[0, 0])
            raise ValueError(f"row {row} ends in padding, or is empty: each needs a token in its "
                             "last column, so pad on the left (minillm.model.generate.left_pad)")
    check_ids(ids, vocabulary)
    return ids, mask


def check_ids(ids, vocabulary):
    """IndexError for ids outside the vocabulary."""
    if ids.numel() and not (0 <= ids.min() and ids.max() < vocabulary):
        raise IndexError(f"the ids run from {ids.min()} to {ids.max()}, "
                         f"but the vocabulary has {vocabulary} entries")


def check_room(inputs, mask, max_new_tokens, positions):
    """ValueError unless the prompt (b, t) and its new tokens fit the positions."""
    t = inputs.shape[1] if mask is None else int(mask.sum(1).max()) if mask.numel() else 0
    if t == 0:
        raise ValueError("nothing to continue: the prompt is empty")
    if t + max_new_tokens > positions:
        raise ValueError(f"a prompt of {t} tokens and max_new_tokens={max_new_tokens} "
                         f"are together beyond this model's {positions} positions")
