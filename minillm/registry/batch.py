"""What the attached techniques add to a batch before the model sees it."""

from minillm.registry.sites import layers


def same_shape(ids, **others):
    """ValueError for what is there and has another shape than ids (b, t)."""
    for name, rows in others.items():
        if rows is not None and rows.shape != ids.shape:
            raise ValueError(f"{name} {tuple(rows.shape)} and ids {tuple(ids.shape)} differ in shape")


def prepare(model, ids, labels=None, mask=None):
    """The batch with what the attached techniques add to it (soft prompts put their placeholders in front).

    ids, labels, mask: each (b, t); ValueError where they differ in shape.
    """
    same_shape(ids, labels=labels, mask=mask)
    for layer in layers(model).values():
        for patch in layer.stack():
            ids, labels, mask = patch.prepare(ids, labels, mask)
    return ids, labels, mask
