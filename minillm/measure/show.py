"""The model as a tree: each module with its class, format, patches, trainable parameters
and bytes.
"""

import re

from torch import nn

from minillm.registry import Format, Layer, leaf, walk


class Tree(str):
    """A str whose repr is the text itself, so that a prompt or a notebook shows it well."""

    __repr__ = str.__str__


def show(model):
    """The tree as text, one line for each module: name, class, [format], patches from the
    innermost outwards, trainable of all parameters, bytes.

    Equal neighbours in a list share one line, with the sums of their parameters and bytes.
    """
    if not isinstance(model, nn.Module):
        given = repr(model) if isinstance(model, str) else type(model).__name__
        raise TypeError(f"show takes a model, not {given}: model, tokenizer = minillm.load(...)")
    sites, seen, rows = walk(model), set(), []
    for site in sites:
        tensors = own_tensors(site)
        fresh = [t for t in tensors if t.data_ptr() not in seen or t.is_meta]
        shared = len(fresh) < len(tensors)
        seen.update(t.data_ptr() for t in tensors)
        rows.append(
            [
                site,
                describe(site, shared),
                sum(t.numel() for t in fresh if t.requires_grad),
                sum(t.numel() for t in fresh),
                sum(t.numel() * t.element_size() for t in fresh),
            ]
        )

    def below(name):
        return [row for row in rows if row[0].name == name or row[0].name.startswith(name + ".")]

    def shape(name):
        return [(row[0].name.removeprefix(name), *row[1:]) for row in below(name)]

    lines, folded = [], {}
    for site, text, *_ in rows:
        parent, _, key = site.name.rpartition(".")
        if (
            any(site.name.startswith(other + ".") for other in folded.values())
            or site.name in folded.values()
        ):
            continue
        name, times = key, 1
        if key.isdigit():
            while shape(f"{parent}.{int(key) + times}".lstrip(".")) == shape(site.name) != []:
                folded[len(folded)] = f"{parent}.{int(key) + times}".lstrip(".")
                times += 1
            name = key if times == 1 else f"{key}-{int(key) + times - 1}"
        times *= multiplicity(lines, site.name)
        learn, total, size = (times * sum(row[i] for row in below(site.name)) for i in (2, 3, 4))
        lines.append(
            (site.name, "  " * site.name.count(".") + name, text, learn, total, size, times)
        )
    total = [
        sum(row[i] for row in rows) + extra
        for i, extra in zip((2, 3, 4), root_tensors(model, seen))
    ]
    lines.insert(0, ("", type(model).__name__, "", *total, 1))
    widths = [max(least, *(len(row[i]) for row in lines)) for i, least in ((1, 28), (2, 44))]
    return Tree("\n".join(line(widths, *columns) for _, *columns, _ in lines))


def multiplicity(lines, name):
    """How many modules the nearest line above `name` in the tree represents."""
    return next((times for other, *_, times in reversed(lines) if name.startswith(other + ".")), 1)


def line(widths, name, text, learn, total, size):
    name, text = name.ljust(widths[0]), text.ljust(widths[1])
    return f"{name} {text} {f'{learn:,} of {total:,}':>26} {size / 2**20:>10,.2f} MiB"


def describe(site, shared):
    formatted = isinstance(site.module, Format)
    kind = type(site.module.shell.kept[0] if formatted else site.module).__name__
    kind += f" {site.shape[0]}x{site.shape[1]}" if leaf(site.module) else ""
    stored = ""
    if formatted:
        given = ", ".join(f"{k}={v}" for k, v in site.module.config().items() if v)
        stored = f" [{site.module.kind}({given})]" if given else f" [{site.module.kind}]"
    patches = "".join(
        f" + {name}({patch.extra_repr()})"
        for name, patch in (site.layer.patches.items() if site.layer else ())
    )
    return re.sub(r"\s+", " ", kind + (" (shared)" if shared else "") + stored + patches)


def own_tensors(site):
    """The parameters and buffers of the module itself and of the patches around it."""
    own = [
        t
        for table in (site.module._parameters, site.module._buffers)
        for t in table.values()
        if t is not None
    ]
    return own + [
        t
        for patch in (site.layer.patches.values() if site.layer else ())
        for t in (*patch.parameters(), *patch.buffers())
    ]


def root_tensors(model, seen):
    """(trainable parameters, all parameters and buffers, bytes) that the root module itself
    owns, without the storages in `seen`.
    """
    root = model.base if isinstance(model, Layer) else model
    own = [
        t for table in (root._parameters, root._buffers) for t in table.values() if t is not None
    ]
    own = [t for t in own if t.is_meta or t.data_ptr() not in seen]
    return (
        sum(t.numel() for t in own if t.requires_grad),
        sum(t.numel() for t in own),
        sum(t.numel() * t.element_size() for t in own),
    )
