"""README's table of techniques and that of `import minillm` are made of the table of methods.

`MINILLM_SNAPSHOTS=write python -m pytest tests/test_tables.py` writes them anew.
"""

import contextlib
import functools
import os
import pathlib
import re

import pytest
import torch
from models import build

import minillm
from minillm.checkpoints.peft import HELD
from minillm.registry import KINDS, METHODS, CannotMerge, Patch

ROOT = pathlib.Path(minillm.__file__).parent
SMOLLM2 = minillm.Config(49152, 576, 30, 9, kv_heads=3, ffn=1536, positions=8192,
                         rope_base=100000.0)
WRITE = os.environ.get("MINILLM_SNAPSHOTS") == "write"


def groups():
    """{heading: [Method]}: what learns, and what makes small."""
    every = list(METHODS.values())
    return {"fine-tune": [m for m in every if m.rates],
            "make small": [m for m in every if not m.rates]}


@functools.cache
def of_readme():
    columns = ("", "technique", "what it does", "paper", "lines", "learns", "merges", "peft")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|--:|--:|---|---|"]
    for heading, methods in groups().items():
        for i, method in enumerate(methods):
            file = pathlib.Path(method.module.__file__)
            where = file.relative_to(ROOT.parent).as_posix()
            fields = ("" if i else heading, f"[`{method.path}`]({where})", method.does,
                      method.paper, len(file.read_text(encoding="utf-8").splitlines()),
                      learns(method) if method.rates else "", "yes" if folds(method) else "",
                      "yes" if method.kind in HELD else "")
            lines.append(f"| {' | '.join(map(str, fields))} |")
    return "\n".join(lines) + "\n"


def learns(method):
    """The parameters that learn after a `wrap` of SmolLM2's shape with the usual options."""
    with torch.device("meta"):
        model = minillm.Transformer(SMOLLM2)
    if method.name == "bitfit":
        return ""  # a Llama has no bias
    base = METHODS[method.kind]  # LoftQ rounds, which meta tensors cannot; the count is the kind's
    learning = {id(p): p.numel() for p in base.wrap(model).parameters() if p.requires_grad}
    return f"{sum(learning.values()):,}"


def folds(method):
    """Whether `merge` puts it into the weights."""
    cls = KINDS[method.kind]
    return issubclass(cls, Patch) and cls.fold is not Patch.fold


def of_package():
    text = ""
    for heading, methods in zip(("Fine-tuning", "Making it small"), groups().values()):
        text += f"{heading}, wrapped in place with `minillm.NAME.wrap(model)`:\n\n"
        for method in methods:
            path = method.path.removeprefix("minillm.")
            text += f"    {path:<19}{method.does}\n{'':23}{method.paper}\n"
        text += "\n"
    return text


def between(path, start, end, expected):
    """The part of a file from after `start` to `end`; written first, if asked to."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(start, 1)
    found, after = rest.split(end, 1)
    if WRITE and found != expected:
        path.write_text(before + start + expected + end + after, encoding="utf-8")
        return expected
    return found


def test_readme():
    start, end = "<!-- made of the table of methods by tests/test_tables.py -->\n", "<!-- end -->"
    assert between(ROOT.parent / "README.md", start, end, of_readme()) == of_readme(), (
        "stale: see the top of this file")


@pytest.mark.parametrize("name", METHODS)
def test_what_merges_is_what_the_table_says(name):
    method, model = METHODS[name], build("gpt2")
    if method.calibrated:
        pytest.skip("ends as the kind of another method")
    method.wrap(model, **next(iter(method.small.values())))
    with contextlib.nullcontext() if folds(method) else pytest.raises(CannotMerge):
        minillm.techniques()[method.family].merge(model)


def test_the_shape_of_the_table_is_that_of_smollm2():
    assert sum(p.numel() for p in minillm.Transformer(SMOLLM2).parameters()) == 134_515_008


def test_the_page_of_the_package():
    expected = of_package()
    found = between(ROOT / "__init__.py", "small, one page for each technique.\n\n",
                    "Beneath them:", expected)
    assert found == expected, "stale: see the top of this file"


def test_a_method_is_a_page():
    """Each has a file with its paper, its `wrap`, and options for the laws."""
    for name, method in METHODS.items():
        assert method.kind in KINDS and name == method.path.rsplit(".", 1)[-1], name
        doc = method.module.__doc__
        number = re.search(r"\d{4}\.\d{4,5}|Saad", method.paper)[0]
        assert number in doc and ">>>" in doc, (
            f"{name}: the page names its paper and shows its facts")
        assert method.small and method.wrap.__doc__, name
        if issubclass(KINDS[method.kind], Patch):
            assert "name" in method.wrap.__kwdefaults__, name
