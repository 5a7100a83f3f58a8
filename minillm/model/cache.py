"""The key/value cache keeps what attention needs, so a step computes one token.

    memory    2 * layers * kv_heads * head_size numbers for each token of each row

A token's keys and values do not change when other tokens follow, because it does not
see them.

With a sliding window of w tokens, only the last w count. The cache is then a ring: token
number n is in column n mod length, where it overwrites one that no token sees any more.
So the memory stays the same however long the text gets. A call with t tokens needs
length >= w - 1 + t: its first token still sees w - 1 older ones. The order of the
columns does not matter, because `attention` goes by positions.
"""

import torch

from minillm.model.attention import visible


class Cache:
    """The keys and values so far, (b, g, length, d) for each layer; filled in place.

    `documents` and `positions` (b, length) describe the token in each column (see
    `attention`). A column that is not filled yet has document -1.
    """

    def __init__(self, config, batch, length, dtype=torch.float32, device=None):
        for name, value in (("batch", batch), ("length", length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} of a Cache is not a whole number from 1")
        shape = (config.layers, batch, config.kv_heads, length, config.head_size)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.filled = 0  # tokens so far; beyond `length` they have gone round the ring
        self.mixed = False  # whether a column holds padding or a second document
        self.documents = torch.full((batch, length), -1, device=device)
        self.positions = torch.zeros_like(self.documents)

    def check(self, ids, config, dtype):
        """ValueError unless the cache fits the model and has room for ids (b, t)."""
        layers, b, g, length, d = self.k.shape
        if ids.shape[0] != b:
            raise ValueError(f"the cache is for a batch of {b} rows, ids have {ids.shape[0]}")
        t, least = ids.shape[1], config.window and config.window - 1 + ids.shape[1]
        if self.filled + t > length and not (least and least <= length):
            ring = f", of at least {least} for a window of {config.window}" if least else ""
            raise ValueError(f"the cache holds {self.filled} of at most {length} tokens, and "
                             f"{t} more do not fit: make one with a greater length{ring}")
        if (layers, g, d) != (config.layers, config.kv_heads, config.head_size):
            raise ValueError(f"the cache is for layers={layers}, kv_heads={g}, head_size={d}, the "
                             f"model has layers={config.layers}, kv_heads={config.kv_heads}, "
                             f"head_size={config.head_size}")
        if self.k.dtype != dtype and not torch.is_autocast_enabled(ids.device.type):
            raise ValueError(f"the cache is {self.k.dtype}, the model {dtype}: "
                             f"make it with dtype={dtype}")

    def columns(self, t, static):
        """Where (t,) the next t tokens are written, and the end of the columns in use."""
        length = self.documents.shape[1]
        where = torch.arange(self.filled, self.filled + t, device=self.k.device) % length
        return where, length if static else min(self.filled + t, length)

    def note(self, documents, positions, whole, static, window=None):
        """Record the new columns; returns documents and positions (b, s) of all keys.

        ValueError if a new token would see one that it overwrites: padding within a text makes
        a window longer, in columns, than w.
        """
        where, end = self.columns(positions.shape[1], static)
        if not whole and self.filled + positions.shape[1] > self.documents.shape[1]:
            old = self.documents[:, where], self.positions[:, where]
            lost = visible(documents, positions, *old, window) & (documents > 0)[:, :, None]
            if bool(lost.any()):
                raise ValueError(f"a row has padding between its tokens, and a cache of "
                                 f"{self.documents.shape[1]} columns no longer holds all that a "
                                 f"window of {window} sees: make one with a greater length")
        self.documents[:, where] = documents
        self.positions[:, where] = positions
        self.mixed = not whole
        return self.documents[:, :end], self.positions[:, :end]

    def stores(self, t, static):
        """For each layer, yield the k, v (b, g, s, d) and where (t,) that `write` takes."""
        where, end = self.columns(t, static)
        for i in range(len(self.k)):  # one at a time: autograd must see what is written before it
            yield self.k[i, :, :, :end], self.v[i, :, :, :end], where


def write(k, v, where, new_k, new_v):
    """Store the new keys and values (b, g, t, d) in the columns `where` (t,) of k, v (b, g, s, d).

    Returns k and v. `where` is a tensor, so that the same compiled code serves every
    column. Under autocast the new keys and values may have another dtype than the
    cache.
    """
    return k.index_copy_(2, where, new_k.to(k.dtype)), v.index_copy_(2, where, new_v.to(v.dtype))
