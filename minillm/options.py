"""The options of techniques: one check for each kind of value, and a parser for the command line.

A check returns the value, or raises a ValueError of one line that repeats the value and says
what is possible. The techniques call it where they build their Patch or Format, so a wrong
option stops `wrap` and `load` before they change the model.
"""

import ast
import inspect
import math
import numbers


def whole(name, value, least=1, most=None):
    """A whole number from `least` to `most`, as int."""
    right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not right or value < least or most is not None and value > most:
        possible = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ValueError(f"{name}={value!r} is not a whole number {possible}")
    return int(value)


def real(name, value, fits, possible):
    """A number for which `fits` holds, as float; `possible` says the same in words."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not fits(value):
        raise ValueError(f"{name}={value!r} is not {possible}")
    return float(value)


def positive(name, value):
    """A finite number above 0."""
    return real(name, value, lambda x: 0 < x < math.inf, "a number above 0")


def share(name, value):
    """A number from 0 up to (but not) 1."""
    return real(name, value, lambda x: 0 <= x < 1, "a number from 0 up to (but not) 1")


def flag(name, value):
    """True or False; no other value counts as either."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither True nor False")
    return value


def one_of(name, value, known):
    """One of the texts in `known`."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(map(repr, known))}")
    return value


def known(wrap):
    """{name: default} of the options of `wrap(model, ...)`: the arguments that have a default.

    The examples that a method calibrates with have none, so they are no option.
    """
    every = list(inspect.signature(wrap).parameters.values())[1:]  # without the model
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p.default for p in every if p.kind in kinds and p.default is not p.empty}


def parse(wrap, texts):
    """The keyword arguments for `wrap` from the command line's {name: text}.

    The type of an option's default decides how its text is read: `16` as a whole number,
    `0.5`, `true` or `false`. If the default is None, the text is `none`, a number, names
    separated by commas, or a plain text. A `name` is always a text. ValueError for a name
    that `wrap` does not know, and for a text that is not of the type.

    >>> import minillm
    >>> parse(minillm.lora.wrap, {"r": "16", "rank_stabilized": "true", "targets": "q_proj,v_proj"})
    {'r': 16, 'rank_stabilized': True, 'targets': ['q_proj', 'v_proj']}
    """
    possible = known(wrap)
    for name in texts:
        if name not in possible:
            technique = wrap.__module__.rpartition(".")[2]
            shown = ", ".join(f"{key}={default}" for key, default in possible.items())
            raise ValueError(f"{technique} has no option {name!r}; its options and their "
                             f"defaults: {shown}")
    return {name: read(name, text, possible[name]) for name, text in texts.items()}


def read(name, text, default):
    """The value of `text`, read as the type of `default`; a `name` is always a text."""
    if name == "name":
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}={text!r} is neither true nor false")
        return text.lower() == "true"
    for kind, what in ((int, "a whole number"), (float, "a number")):
        if isinstance(default, kind):
            try:
                return kind(text)
            except ValueError:
                raise ValueError(f"{name}={text!r} is not {what}") from None
    return text if isinstance(default, str) else anything(text)


def anything(text):
    """A Python literal (a number, a list, None), names separated by commas, or the text itself."""
    if text.lower() == "none":
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        names = [part.strip() for part in text.split(",")]
        plain = all(part.replace(".", "").replace("_", "").isalnum() for part in names)
        return names if len(names) > 1 and plain else text
