"""The leaves that compute the keys and the values, for a prefix."""

from minillm.registry import roles, select

MIXED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv")  # with the queries


def keys_values(model, targets=None):
    """The Sites of a model's leaves of keys and values, or the linear leaves that `targets` names.

    ValueError, without targets, for a block in which they are not found.
    """
    def linear(site):
        return site.leaf is not None and not site.leaf.lookup

    if targets is not None:
        return select(model, targets, linear, None)
    names = set()
    for block in roles.parts(model).blocks:
        if block.attention is None or not block.keys_values:
            part = block.attention or block.site
            raise ValueError(f"{part.name!r} is a {type(part.module).__name__}, in which a prefix "
                             "does not find the leaves of the keys and the values: name them in "
                             "targets=")
        names |= {site.name for site in block.keys_values}
    return select(model, None, linear, lambda site: site.name in names)


def queries(site):
    """How many of a leaf's outputs, the first ones, are queries.

    ValueError for a leaf that computes them too, in an order that is not known.
    """
    last = site.name.rpartition(".")[2]
    if last == "c_attn" and site.leaf.transposed and site.shape[0] == 3 * site.shape[1]:
        return site.shape[1]  # GPT-2: q, k, v
    if last in MIXED:
        raise ValueError(f"{site.name!r} computes queries, keys and values in an order that is not "
                         "known here, so a prefix cannot find the keys")
    return 0
