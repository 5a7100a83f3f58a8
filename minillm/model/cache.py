"""The key/value cache keeps what attention needs, so a step computes one token.

    memory    2 * layers * kv_heads * head_size numbers for each token of each row

A token's keys and values do not change when other tokens follow, because it does not
see them.
"""

import torch


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
        self.filled = 0  # columns in use
        self.mixed = False  # whether a column holds padding or a second document
        self.documents = torch.full((batch, length), -1, device=device)
        self.positions = torch.zeros_like(self.documents)

    def check(self, ids, config, dtype):
        """ValueError unless the cache fits the model and has room for ids (b, t)."""
        layers, b, g, length, d = self.k.shape
        if ids.shape[0] != b:
            raise ValueError(f"the cache is for a batch of {b} rows, ids have {ids.shape[0]}")
        if self.filled + ids.shape[1] > length:
            raise ValueError(f"the cache holds {self.filled} of at most {length} tokens, and "
                             f"{ids.shape[1]} more do not fit: make one with a greater length")
        if (layers, g, d) != (config.layers, config.kv_heads, config.head_size):
            raise ValueError(f"the cache is for layers={layers}, kv_heads={g}, head_size={d}, the "
                             f"model has layers={config.layers}, kv_heads={config.kv_heads}, "
                             f"head_size={config.head_size}")
        if self.k.dtype != dtype and not torch.is_autocast_enabled(ids.device.type):
            raise ValueError(f"the cache is {self.k.dtype}, the model {dtype}: "
                             f"make it with dtype={dtype}")

    def note(self, documents, positions, whole, static):
        """Record the new columns; returns documents and positions (b, s) of all keys."""
        end = self.filled + positions.shape[1]
        self.documents[:, self.filled : end] = documents
        self.positions[:, self.filled : end] = positions
        self.mixed = not whole
        end = self.documents.shape[1] if static else end
        return self.documents[:, :end], self.positions[:, :end]

    def stores(self, t, static):
        """For each layer, yield the k, v (b, g, s, d) and where (t,) that `write` takes."""
        end = self.k.shape[3] if static else self.filled + t
        where = torch.arange(self.filled, self.filled + t, device=self.k.device)
        for i in range(len(self.k)):  # one at a time: autograd must see what is written before it
            yield self.k[i, :, :, :end], self.v[i, :, :, :end], where


def write(k, v, where, new_k, new_v):
    """Store the new keys and values (b, g, t, d) in the columns `where` (t,) of k, v (b, g, s, d).

    Returns k and v. `where` is a tensor, so that the same compiled code serves every
    column. Under autocast the new keys and values may have another dtype than the
    cache.
    """
    return k.index_copy_(2, where, new_k.to(k.dtype)), v.index_copy_(2, where, new_v.to(v.dtype))
