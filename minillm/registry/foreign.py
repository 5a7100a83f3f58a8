"""Two methods of a Hugging Face model raise an error while techniques are attached.

`save_pretrained` would write the names of the tree as it is, `q_proj.base.weight`, and
`from_pretrained` ignores such names and draws random weights for those that it misses.
`resize_token_embeddings` would make a new embedding without the technique on the old one. So while
techniques are there, the model has an attribute of that name: a function that raises an error and
says what to do.
"""

from minillm.registry.kinds import Format
from minillm.registry.layer import Layer
from minillm.registry.roles import asked
from minillm.registry.sites import bare, walk


def save_pretrained(*_, **__):
    raise ValueError("techniques of minillm are attached to this model, and from_pretrained could "
                     "not read what would be written: merge or unwrap them first "
                     "(minillm.show(model) lists them); minillm.FAMILY.save writes each one alone")


def resize_token_embeddings(*_, **__):
    raise ValueError("a technique of minillm is attached to the embedding or the output head of "
                     "this model, and would be lost with the old matrix: merge or unwrap it first, "
                     "or resize before the wrap (minillm.show(model) lists what is attached)")


def mark(model):
    """Put the errors in the place of the methods, or remove them."""
    model = bare(model)
    wrapped = any(isinstance(module, (Layer, Format)) for module in model.modules())
    replace(model, save_pretrained, wrapped)
    replace(model, resize_token_embeddings, wrapped and any(
        site and (site.layer or isinstance(site.module, Format)) for site in ends(model)))


def ends(model):
    """The Sites of the embedding and of the head, or None, of a Hugging Face model."""
    if not hasattr(type(model), "resize_token_embeddings"):
        return []
    sites = walk(model)
    return [asked(model, name, sites) for name in ("get_input_embeddings", "get_output_embeddings")]


def replace(model, error, where):
    """Put the function `error` in the place of the method of that name, if the model has one."""
    name = error.__name__
    if where and hasattr(type(model), name):
        model.__dict__[name] = error
    else:
        model.__dict__.pop(name, None)
