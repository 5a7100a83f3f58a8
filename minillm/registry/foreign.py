"""`save_pretrained` of a Hugging Face model while techniques are attached: an error, and no broken file.

It would write the names of the tree as it is, `q_proj.base.weight`. `from_pretrained` ignores such
names, and draws random weights for those that it misses. So the model gets an attribute of that name,
which says what to do, as long as a patch or a format is in the tree.
"""

from minillm.registry.kinds import Format
from minillm.registry.layer import Layer
from minillm.registry.sites import bare


def save_pretrained(*_, **__):
    raise ValueError("techniques of minillm are attached to this model, and from_pretrained could not read what would be written: "
                     "merge or unwrap them first (minillm.show(model) lists them); minillm.FAMILY.save writes each one alone")


def mark(model):
    """Put the error where `save_pretrained` is called, or take it away."""
    model = bare(model)
    if hasattr(type(model), "save_pretrained"):
        if any(isinstance(module, (Layer, Format)) for module in model.modules()):
            model.__dict__["save_pretrained"] = save_pretrained
        else:
            model.__dict__.pop("save_pretrained", None)
