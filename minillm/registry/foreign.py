"""`save_pretrained` of a Hugging Face model raises an error while techniques are attached.

It would write the names of the tree as it is, `q_proj.base.weight`. `from_pretrained` ignores such
names and draws random weights for those that it misses. So while a patch or a format is in the
tree, the model has an attribute `save_pretrained` that raises an error and says what to do.
"""

from minillm.registry.kinds import Format
from minillm.registry.layer import Layer
from minillm.registry.sites import bare


def save_pretrained(*_, **__):
    raise ValueError("techniques of minillm are attached to this model, and from_pretrained could "
                     "not read what would be written: merge or unwrap them first "
                     "(minillm.show(model) lists them); minillm.FAMILY.save writes each one alone")


def mark(model):
    """Put the error in the place of `save_pretrained`, or remove it."""
    model = bare(model)
    if hasattr(type(model), "save_pretrained"):
        if any(isinstance(module, (Layer, Format)) for module in model.modules()):
            model.__dict__["save_pretrained"] = save_pretrained
        else:
            model.__dict__.pop("save_pretrained", None)
