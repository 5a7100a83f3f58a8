"""Which sites a technique wraps: those that `targets` names, or its default."""

import difflib
import logging
import re

from torch.nn import UninitializedParameter

from minillm.registry.layer import leaf
from minillm.registry.leaf import kept
from minillm.registry.sites import bare, ties, walk

log = logging.getLogger("minillm")


def hidden_linears(model):
    """The default targets: linear leaves that are not the output head and share no matrix."""
    head = getattr(bare(model), "get_output_embeddings", lambda: None)()
    tied = ties(model)
    return lambda site: (not site.leaf.lookup and site.name not in tied
                         and head not in (site.module, site.layer or site.module))


def select(model, targets, accepts, default, what="leaf"):
    """The sites that `targets` names, among those that `accepts` returns True for.

    targets: one of
        None                      the sites that `default` returns True for
        a list of name endings    each must match a site
        a regular expression      it must match a whole name, or its end after a dot
        a function                (name, module) -> bool

    ValueError if one of them matches nothing, or if the model is itself a leaf.
    """
    every = walk(model)
    if leaf(model) is not None:
        raise ValueError(f"the model is itself a leaf ({type(model).__name__}), which cannot be "
                         "replaced in place: put it into an nn.Sequential")
    sites = [site for site in every if accepts(site)]
    if targets is None:
        chosen = [site for site in sites if default(site)]
        if not chosen:
            raise ValueError(f"no {what} to wrap by default in this {type(model).__name__}; "
                             f"{hint('', sites)}")
        if what == "leaf":
            warn_of_stacks(every)
        return chosen
    if callable(targets):
        chosen = [site for site in sites if targets(site.name, site.module)]
        if not chosen:
            called = getattr(targets, "__name__", targets)
            raise ValueError(f"the function {called!r} picked no {what}; {hint('', sites)}")
        return chosen
    return by_name(targets, sites, every, what)


def by_name(targets, sites, every, what):
    """The sites that a regular expression or a list of name endings names: see `select`."""
    listed = isinstance(targets, str | list | tuple | set | frozenset)
    if not listed or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"targets={targets!r} is neither a regular expression, nor a list of "
                         f"name endings, nor a function; {hint('', sites)}")
    patterns = {}  # {as written: regular expression}
    if isinstance(targets, str):
        # without brackets, each alternative must match: one misspelt name is an error
        plain = not re.search(r"[()\[\]\\]", targets)
        patterns = {part: part for part in (targets.split("|") if plain else [targets])}
    else:
        patterns = {ending: re.escape(ending) for ending in targets}
    if not patterns:
        raise ValueError(f"targets={targets!r} is empty; {hint('', sites)}")
    chosen = set()
    for written, pattern in patterns.items():
        try:
            found = re.compile(rf"(?:.*\.)?(?:{pattern})")
        except re.error as error:
            raise ValueError(f"targets={written!r} is not a regular expression: {error}") from error
        matching = [site.name for site in sites if found.fullmatch(site.name)]
        if not matching:
            others = [site for site in every if found.fullmatch(site.name)]
            if others:
                why = (f"{others[0].name!r} is a {type(others[0].module).__name__}, no {what} "
                       f"that can be wrapped{computed(others[0])}")
            else:
                why = f"no module's name ends like this ({len(every)} were checked)"
            raise ValueError(f"target {written!r} matches no {what}: {why}; {hint(written, sites)}")
        chosen.update(matching)
    return [site for site in sites if site.name in chosen]


def warn_of_stacks(sites):
    """Log a warning if the model holds weights of three dimensions, which no technique wraps."""
    stacks = [(f"{site.name}.{key}", p) for site in sites
              for key, p in site.module._parameters.items() if p is not None and p.dim() == 3]
    if stacks:
        name, p = stacks[0]
        log.warning("%d weights of three dimensions stay as they are, first %r %s (%s numbers in "
                    "all): a leaf has one matrix, and these hold several, as the experts of a "
                    "mixture do", len(stacks), name, tuple(p.shape),
                    f"{sum(p.numel() for _, p in stacks):,}")


def computed(site):
    """Why a site is no leaf although its class is one, for an error message; else ""."""
    if isinstance(getattr(site.module, "weight", None), UninitializedParameter):
        return ": it has no weight yet; run a batch through the model first"
    if kept(site.module) and not leaf(site.module):
        return (
            ": its weight is computed from other parameters (by weight_norm or nn.utils.prune, "
            "for example); make it a parameter again first, with torch's remove_parametrizations, "
            "remove_weight_norm or prune.remove"
        )
    return ""


def hint(written, sites):
    """The names that would have matched: those closest to what was written, or the first few."""
    endings = [re.sub(r"^.*\.(?=[^.]*[^.\d][^.]*$)", "", site.name) for site in sites]
    endings = list(dict.fromkeys(endings))
    asked = written.rsplit(".", 1)[-1]
    names = difflib.get_close_matches(asked, endings, n=4, cutoff=0.5) or endings[:8]
    if not names:
        return "this model has nothing that could be wrapped"
    return "what would have matched: " + ", ".join(repr(name) for name in names)
