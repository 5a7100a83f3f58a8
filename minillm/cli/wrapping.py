"""What `minillm train` wraps: a new technique, or one that an --adapter file holds already."""

import dataclasses
import pathlib

import torch

from minillm import options, registry
from minillm.cli.adapters import held
from minillm.cli.words import of_technique
from minillm.registry import learning, opening, store


@dataclasses.dataclass(frozen=True)
class Brought:
    """What an --adapter holds."""

    path: str
    kind: str
    name: str
    over: frozenset  # the names of the techniques that it needs as they are

    @classmethod
    def read(cls, path):
        kind, name = held(path)
        metadata = {} if pathlib.Path(path).is_dir() else store.read(path)[1]
        over = set(opening.field(metadata, "over", path)) if "over" in metadata else set()
        if "beside" in metadata:  # formats are not in `over`
            beside = opening.field(metadata, "beside", path, list)
            over |= {one for one in beside if one in registry.KINDS and a_format(one)} - {name}
        return cls(path, kind, name, frozenset(over))


def a_format(kind):
    return issubclass(registry.KINDS[kind], registry.Format)


def wrap(model, technique, keywords, args):
    """Wrap the model with the technique, and return the patch's name.

    If an --adapter file holds what this technique makes, its training continues instead. The
    adapters of all other files are fixed, because --out holds one adapter.
    """
    brought = [Brought.read(path) for path in args.adapter]
    name, continued = chosen(technique, keywords, brought, args)
    for other in learning.patches(model):
        if other.name != name:
            other.fixed = True
            other.requires_grad_(False)
    torch.manual_seed(args.seed)  # for the random values that the technique starts with
    if not continued:
        named = dict(name=name) if "name" in options.known(technique.wrap) else {}
        try:
            technique.wrap(model, **keywords | named)
        except ValueError as error:
            over = [f"{one.path} ({one.kind})" for one in brought if a_format(one.kind)]
            both = over and a_format(technique.kind)
            where = f"--technique {technique.name} over {', '.join(over)}: " if both else ""
            same = [one for one in brought if one.kind == technique.kind and not a_format(one.kind)]
            hint = same and (f"; --technique {technique.kind} continues the training of "
                             f"{same[0].path}")
            raise ValueError(where + of_technique(error, keywords) + (hint or "")) from error
    learning.settle(model)  # what learns now: a fixed patch claims nothing
    check_saved(model, technique, name)
    try_out(model)
    return name


def chosen(technique, keywords, brought, args):
    """(the name of what learns, whether an --adapter file holds it already).

    Only a method that is called like its kind continues a file of that kind: PiSSA makes a LoRA,
    but it starts from other values, and a method that calibrates makes all its values anew.
    """
    goes_on = technique.kind == technique.name and not technique.calibrated
    same = [one for one in brought if one.kind == technique.kind]
    name, here = keywords.get("name"), {one.name: one for one in brought}
    if name is None and goes_on and len(same) > 1:
        raise ValueError(f"--adapter loads {', '.join(repr(one.name) for one in same)} of "
                         f"{technique.name}: --option name={same[0].name} continues the training "
                         "of that one, and a new name trains one more")
    if name is None and goes_on and same:
        name = same[0].name
    if goes_on and name in here and here[name] in same:
        if set(keywords) - {"name", "examples"}:
            raise ValueError(f"--option {args.option[0]}: the adapter whose training continues "
                             "keeps its own settings")
        check_needed(here[name], brought)
        return name, True
    if a_format(technique.kind) and same:
        raise ValueError(f"--technique {technique.name} cannot train over {same[0].path}, which "
                         f"holds {same[0].kind}: both store weights as {technique.kind}, and a "
                         "model holds that once")
    if name is None:
        possible = [one for one in (technique.kind, technique.name) if one not in here]
        if "name" in options.known(technique.wrap) and not possible:
            raise ValueError(f"{here[technique.name].path} holds {technique.name!r} already: "
                             f"--option name=NAME gives the new {technique.name} another name")
        return (possible or [technique.kind])[0], False
    if name in here:
        raise ValueError(f"--option name={name}: {here[name].path} holds {here[name].kind} under "
                         f"that name, which --technique {technique.name} does not continue: give "
                         "another name")
    return name, False


def check_needed(one, brought):
    """ValueError if another file needs this one's adapter as it is: no order would load both."""
    for other in brought:
        if one.name in other.over:
            raise ValueError(f"{other.path}: {other.name} was trained over {one.name}, and would "
                             f"fit no {one.name} that has learnt more. Continue {one.name} without "
                             f"--adapter {other.path}, and then train {other.name} anew over it")


@torch.no_grad()
def try_out(model):
    """Run the model on one token: an option that does not fit fails now, not in step 0."""
    model(torch.zeros(1, 1, dtype=torch.long, device=model.norm.weight.device))


def check_saved(model, technique, name):
    """ValueError if a parameter learns that the technique's file (see `store.save`) lacks."""
    patches = [patch for _, patch in registry.patches_of(technique.family, model, name)]
    held = {id(p) for patch in patches for p in patch.parameters()}
    held |= {id(p) for p in store.learned_of(name, model).values()}
    lost = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        first = lost[0].replace(".base.", ".")
        raise ValueError(f"--technique {technique.name}: {len(lost)} parameters would learn that "
                         f"its file does not hold, first {first!r}. Train them with --technique "
                         "freeze, or export the model with its --adapter first")
