"""What the attached techniques add to a batch before the model sees it."""

from minillm.registry.sites import layers


def same_shape(ids, **others):
    """ValueError if one of `others` is not None and differs from ids (b, t) in shape."""
    for name, rows in others.items():
        if rows is not None and rows.shape != ids.shape:
            raise ValueError(f"{name} {tuple(rows.shape)} and ids {tuple(ids.shape)} "
                             "differ in shape")


def prepare(model, ids, labels=None, mask=None):
    """(ids, labels, mask) with what the attached techniques add to the batch.

    A soft prompt puts its placeholders in front. ids, labels, mask: each (b, t), labels and mask
    may be None; ValueError if their shapes differ.
    """
    same_shape(ids, labels=labels, mask=mask)
    for layer in layers(model).values():
        for patch in layer.stack():
            ids, labels, mask = patch.prepare(ids, labels, mask)
    return ids, labels, mask
