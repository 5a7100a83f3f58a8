"""Which model a file belongs to: samples of the weights that the file itself does not hold.

An adapter is a change of one base model. Loaded onto another model of the same shapes, it computes
nonsense, and no shape shows it. So every file of a technique or of the training loop holds the
model's configuration, the names of its parameters, and four values of each weight that the file
relies on. Loading the file compares them.

    same dtype         the values must be equal, bit for bit
    another dtype      they must agree within the coarser dtype's rounding (a cast keeps the model)
    another format     they must agree within the rounding of both formats (an adapter that was
                       trained over int8 also belongs to the dense model)
    what learns        is not compared: the file holds it

An adapter that was trained over another adapter is useless without it. So the file also holds
four values of each tensor of the techniques beneath it.

A hash of all weights would also see a single changed value. But it would refuse the same model in
bfloat16, and take a second for each gigabyte.
"""

import dataclasses
import hashlib
import json
import math
import re

import torch

from minillm import distributed
from minillm.registry.learning import slots
from minillm.registry.kinds import Format
from minillm.registry.past import before_birth
from minillm.registry.sites import bare, parameters, walk

SAMPLES = 4  # values of each weight

# Fields of a configuration that do not change what the model computes from its weights in eval:
# names, dropout, how it is run. The parameters show `tied` and the number of learned positions.
ASIDE = re.compile(
    "_?name_or_path|.*version|architectures|(torch_)?dtype|device.*|use_cache|output_.*|"
    "return_dict|.*attn_implementation|.*(drop|dropout)|.*_token_id|id2label|label2id|"
    "problem_type|quantization_config|initializer_.*|tied|tie_.*|(n_)?positions|"
    "max_position_embeddings|pretraining_tp|chunk_size.*"
)


# --- writing ----------------------------------------------------------------------------------


def of(model, without=None):
    """A dict for JSON: the model's name, its configuration, and samples of its weights.

    The weights are the model's own parameters, and what a Format stores. Those in `without` have
    only their name in it. By default these are the ones that learn, because the caller saves them.
    """
    every = own(model)
    without = {name for name, p in every.items() if p.requires_grad} if without is None else without
    every |= originals(model)
    samples = {name: sample(p) for name, p in every.items() if name not in without}
    stored = {name: sample_stored(form) for name, form in formats(model) if name not in without}
    others = sorted({name for name, *_ in slots(model)} - samples.keys() - stored.keys())
    return dict(model=name_of(model), config=settings(model), samples=samples, stored=stored,
                others=others)


def own(model):
    """{name: parameter} of the model's own dense parameters; a tied one once, by its first name."""
    first = {}
    for name, _, _, p in parameters(model):
        first.setdefault(id(p), (name, p))
    return dict(first.values())


def originals(model):
    """{name: weight} of the leaves that a patch changed when it came, as they were before."""
    olds = {f"{site.name}.weight": before_birth(site.module) for site in walk(model) if site.leaf}
    return {name: old.weight for name, old in olds.items() if old is not None}


def formats(model):
    """[(name of the weight, Format)] of the leaves that a Format stores."""
    return [
        (f"{site.name}.weight", site.module)
        for site in walk(model)
        if isinstance(site.module, Format) and before_birth(site.module) is None
    ]


@torch.no_grad()
def sample(p):
    """[dtype, shape, values] of a parameter, from places spread evenly over it."""
    p = distributed.whole(p.detach())
    places = [p.numel() * (2 * i + 1) // (2 * SAMPLES) for i in range(min(SAMPLES, p.numel()))]
    values = p.flatten()[torch.tensor(places, dtype=torch.long, device=p.device)]
    return [str(p.dtype).removeprefix("torch."), list(p.shape), values.double().tolist()]


@torch.no_grad()
def sample_stored(form):
    """[dtype, shape, values, format, distances] of what a Format stores.

    A distance is how far a value may be from the one that was packed; None if nothing is known.
    """
    off = form.rounding().expand(form.shape)  # (out, in)
    _, _, distances = sample(off.T if form.leaf.transposed else off)  # at the places of the values
    return [
        *sample(form.weight),
        form.called(),
        [d if math.isfinite(d) else None for d in distances],
    ]


def patches(model, names):
    """{name: {site: {tensor: its sample}}} of the patches that have these names."""
    found = {}
    for site in walk(model):
        for name, patch in site.layer.patches.items() if site.layer else ():
            if name in names:
                tensors = patch.state_dict()
                found.setdefault(name, {})[site.name] = {k: sample(t) for k, t in tensors.items()}
    return found


def settings(model):
    """{field: value} of the configuration, for JSON; {} if the model has none of a known type.

    Known are dataclasses, and objects with a `to_dict`, as in transformers.
    """
    config = getattr(bare(model), "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.asdict(config)
    elif callable(getattr(config, "to_dict", None)):
        fields = config.to_dict()
    else:
        return {}
    fields = json.loads(json.dumps(fields, default=str))
    return {str(key): value for key, value in fields.items() if not ASIDE.fullmatch(str(key))}


def name_of(model):
    """The model's name for an error: where it was loaded from, else its class."""
    model = bare(model)
    config = getattr(model, "config", None)
    told = getattr(model, "source", None) or getattr(config, "_name_or_path", None)
    return str(told or type(model).__name__)


# --- reading ----------------------------------------------------------------------------------


def differs(model, then):
    """A sentence that names both models if the fingerprint `then` is not this model's; else None.

    ValueError if `then` is no fingerprint. What a file of an earlier minillm lacks is not
    compared.
    """
    try:
        theirs, called, config, names = parsed(then)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"the fingerprint of its model is not whole "
                         f"({type(error).__name__}: {error})") from error
    both = f"it was made for {called!r} {{}}this model is {name_of(model)!r}{{}}: "
    mine = settings(model)
    odd = [key for key in mine if key in config and not alike(mine[key], config[key])]
    if odd:
        its, here = (", ".join(f"{key}={known[key]!r}" for key in odd) for known in (config, mine))
        return both.format(f"with {its}, ", f" with {here}").removesuffix(": ")
    here = {name for name, *_ in slots(model)}
    more = sorted(here - names) if names else []
    fewer = sorted((names | theirs.keys()) - here)
    if more or fewer:
        number, what, first = (
            (len(fewer), "lacks", fewer[0]) if fewer else (len(more), "has also", more[0])
        )
        return both.format("and ", "") + f"it {what} the parameter {first!r} ({number} such)"
    ours = {
        name: sample(p) + ["", [0.0] * SAMPLES]
        for name, p in (own(model) | originals(model)).items() if name in theirs
    }
    ours |= {name: sample_stored(form) for name, form in formats(model) if name in theirs}
    odd = [name for name in ours if not agree(ours[name], theirs[name])]
    if not odd:
        return None
    return (
        both.format(f"(fingerprint {digest(theirs)}), ", f" (fingerprint {digest(ours)})")
        + f"{len(odd)} of {len(theirs)} parameters differ, first {odd[0]!r}"
    )


def match(model, needs):
    """({name in `needs`: name here}, a sentence if the model lacks one, else None).

    needs: as `patches` returns them. The same name is tried first, then all others, because an
    adapter may be loaded under another name. ValueError if `needs` is no such dict.
    """
    here, found = patches(model, all_names(model)), {}
    for name, sites in needs.items():
        order = sorted(here, key=lambda one: one != name)
        try:
            fits = [one for one in order if same(here[one], sites)]
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise ValueError(f"what it says of the {name} beneath it is not whole "
                             f"({error})") from error
        if not fits:
            has = f"another one ({digest(here[name])})" if name in here else "none"
            return found, f"it was made over {name} ({digest(sites)}), and this model has {has}"
        found[name] = fits[0]
    return found, None


def same(ours, theirs):
    """Whether two entries of `patches` can belong to one adapter, up to a cast."""
    return ours.keys() == theirs.keys() and all(
        tensors.keys() == ours[where].keys()
        and all(agree_cast(ours[where][key], entry) for key, entry in tensors.items())
        for where, tensors in theirs.items()
    )


def all_names(model):
    return {name for site in walk(model) if site.layer for name in site.layer.patches}


def agree_cast(ours, theirs):
    """Whether two samples of a patch's tensor can belong to one tensor, up to a cast."""
    floats = all(getattr(torch, s[0]).is_floating_point for s in (ours, theirs))
    if ours[0] != theirs[0] and not floats:
        return False
    return agree([*ours, "", [0.0] * SAMPLES], [*theirs, "", [0.0] * SAMPLES])


def parsed(then):
    """({weight: sample as from `sample_stored`}, the model's name, its settings, all names)."""
    theirs = {name: [*entry, "", [0.0] * SAMPLES] for name, entry in then["samples"].items()}
    theirs |= then.get("stored", {})
    for name, (dtype, shape, values, form, off) in theirs.items():
        torch.finfo(getattr(torch, dtype))
        if len(off) < len(values):
            raise ValueError(f"{name!r} has {len(values)} values and {len(off)} distances")
        theirs[name] = [
            dtype,
            list(shape),
            [float(v) for v in values],
            str(form),
            [d if d is None else float(d) for d in off],
        ]
    config = dict(then.get("config") or {})
    names = {*then["others"], *theirs} if "others" in then else set()
    return theirs, str(then["model"]), config, names


def alike(a, b):
    """Whether two settings are equal. Numbers may differ by rounding to float32, as GGUF does."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def agree(ours, theirs):
    """Whether two samples can belong to one weight, up to a cast and the rounding of formats."""
    dtype, shape, values, form, off = ours
    other_dtype, other_shape, others, other_form, other_off = theirs
    if shape != other_shape or len(values) != len(others):
        return False
    if (dtype, form) == (other_dtype, other_form):
        return all(a == b or a != a and b != b for a, b in zip(values, others))
    rounding = [torch.finfo(getattr(torch, name)) for name in (dtype, other_dtype)]
    relative, absolute = max(f.eps for f in rounding), max(f.smallest_normal for f in rounding)
    return all(
        c is None or d is None or abs(a - b) <= c + d + relative * max(abs(a), abs(b)) + absolute
        for a, b, c, d in zip(values, others, off, other_off)
    )


def digest(samples):
    """Eight hex digits for an error message; a cast changes them."""
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()[:8]
