"""All techniques of a model in one directory, and back onto the plain model.

    minillm.save_all(model, "tuned")      LoRA over int8 with a soft prompt and a frozen half, say
    minillm.load_all(base, "tuned")       onto the model that it was; or, with its tokenizer,
    minillm.load("tuned")                 if `minillm.load` had loaded the base

The directory holds

    1-lora.safetensors, 2-...    one file for each technique, as its own `save` writes it
    techniques.json              their order, which adapters take part, what base they belong to,
                                 and the checksums of the files

The order is that of the `wrap` calls, except that formats come last. (Patches and formats commute.
But PiSSA took its part out of a weight before the weight was stored.) The base itself is not in the
directory. Its name or path is, and samples of its weights, which `load_all` compares (see
`registry.fingerprint`). So the directory is as small as what the techniques added and trained.

Alone, a technique's file refuses a model that lacks what was beneath it. Here all of them come, so
only the base is compared. Every file is checked before the model changes.
"""

import pathlib

from minillm import distributed, files
from minillm.checkpoints import huggingface
from minillm.registry import (
    KINDS, Format, attached, claiming, fingerprint, store, techniques, use, walk,
)
from minillm.registry.learning import held_by, noted, patches
from minillm.registry.past import past

LIST = "techniques.json"
NAMES = r"\d+-[\w-]+\.safetensors|techniques\.json"  # what a save may write


# --- saving -------------------------------------------------------------------------------------


def save_all(model, directory, *, force=False):
    """Write every technique that is attached to the model to one directory, whole or not at all.

    The directory may be new, empty, or that of an earlier `save_all`; force=True writes beside
    files of others, which stay. ValueError if nothing is attached, or if a technique is merged:
    its change is then in the base, which the directory does not hold. FileExistsError as for
    `minillm.save`. ValueError also with several processes, whose saves wait for each other.
    """
    names = in_order(model)
    if not names:
        raise ValueError("nothing is attached to this model: minillm.save(model, path) writes it")
    check_unmerged(model)
    if distributed.place()[1] > 1 or distributed.sharded(model):
        raise ValueError("save_all needs one process: with several, and of a sharded model, each "
                         "technique's own save writes its file")
    own = huggingface.written(directory, LIST)
    files.check_writable(directory, directory=True, force=force, own=own, needs=NAMES)
    told = dict(source=getattr(model, "source", None) or None, base=base_of(model), techniques=[],
                active=sorted({patch.name for patch in adapters(model) if taking_part(patch)}))
    with files.atomic(directory, own) as new:
        new.mkdir()
        for i, (family, name) in enumerate(names, 1):
            file = f"{i}-{name}.safetensors"
            techniques()[family].save(model, new / file, name=name)
            told["techniques"].append(dict(file=file, technique=family, name=name))
        huggingface.write_json(new / LIST, dict(told, sha256=files.checksums(new)))


def in_order(model):
    """[(family, name)] of all techniques: as they were wrapped, and the formats last."""
    every = {patch.name: patch for patch in patches(model)}
    here = every.keys() | noted(model)
    # A patch knows the names that were there before it. So count those that came before each.
    came = {name: len(patch.before & here) for name, patch in every.items()}
    came |= {name: sum(name not in patch.before for patch in every.values())
             for name in noted(model)}
    family = {name: patch.family for name, patch in every.items()}
    family |= {name: KINDS[name].family for name in noted(model)}
    stored = {site.module.name: site.module.family for site in walk(model)
              if isinstance(site.module, Format)}
    return ([(family[name], name) for name in sorted(here, key=lambda name: (came[name], name))]
            + [(stored[name], name) for name in sorted(stored)])


def check_unmerged(model):
    for site in walk(model):
        record = past(site.module)
        if record is not None and not record.born:
            one = record.patch
            raise ValueError(f"{one.name} is merged into {site.name!r}, and the directory does not "
                             f"hold the base: minillm.{one.family}.unmerge(model) first. Or merge "
                             "it with keep=False, save the model as a new base, and load that")


def base_of(model):
    """The fingerprint of the base, without what the techniques' files hold."""
    held = {name for name, _ in fingerprint.formats(model)}
    for _, name in in_order(model):
        of = held_by(model, name) if name in noted(model) else store.learned_of(name, model)
        held |= of.keys()
    return fingerprint.of(model, held)


def adapters(model):
    """The patches with parameters of their own, which `minillm.use` switches."""
    return [patch for patch in patches(model) if any(True for _ in patch.parameters())]


def taking_part(patch):
    """Whether the patch is active, outside of the context `minillm.rows`."""
    return patch.active if patch.rows is None else patch.outside


# --- loading ------------------------------------------------------------------------------------


def load_all(model, directory, *, any_base=False):
    """Attach what `save_all` wrote; in place, returns the model. All checks come before any change.

    model: the plain base. ValueError for a model that has techniques attached, for another base
    (unless `any_base`), and for a file that is broken or does not fit; FileNotFoundError for a
    directory that `save_all` did not write.
    """
    told, path = read(directory), pathlib.Path(directory)
    if (here := attached(model)) != "nothing":
        raise ValueError(f"{directory} holds all techniques of a model, and this one has {here}: "
                         "load it onto the plain model")
    difference = fingerprint.differs(model, told["base"])
    if difference and not any_base:
        raise ValueError(f"{directory} belongs to another model: {difference}; any_base=True loads "
                         "it all the same")
    plans = []
    for one in told["techniques"]:
        file, family = path / one["file"], one["technique"]
        claims = issubclass(KINDS.get(one["name"], object), claiming.Claim)
        plan = claiming.planned if claims else store.planned
        plans.append(plan(family, model, file, one["name"], alone=False))
    for attach in plans:
        attach(model)
    found = {patch.name for patch in adapters(model)}
    active = found & set(told["active"])
    return use(model, *sorted(active)) if active != found else model


def written(directory):
    """Whether `save_all` wrote the directory."""
    return (pathlib.Path(directory) / LIST).is_file()


def read(directory):
    """The contents of techniques.json; ValueError if it is not what `save_all` writes."""
    path = pathlib.Path(directory) / LIST
    if not written(directory):
        raise FileNotFoundError(f"{directory} has no {LIST}: minillm.save_all did not write it")
    told = files.read_json(path)
    every, active = told.get("techniques"), told.get("active")
    whole = isinstance(every, list) and isinstance(active, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(key), str)
                                      for key in ("file", "technique", "name"))
        and pathlib.PurePath(one["file"]).name == one["file"] for one in every)
    if not whole or not isinstance(told.get("base"), dict):
        raise ValueError(f"{path} does not list techniques as minillm.save_all does")
    return told
