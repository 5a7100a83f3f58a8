"""README's table of techniques and that of `import minillm` are made of the table of methods.

`MINILLM_SNAPSHOTS=write python -m pytest tests/test_tables.py` writes them anew.
"""

import os
import pathlib
import re

import minillm
from minillm.registry import KINDS, METHODS, Patch

ROOT = pathlib.Path(minillm.__file__).parent
WRITE = os.environ.get("MINILLM_SNAPSHOTS") == "write"


def groups():
    """{heading: [Method]}: what learns, and what makes small."""
    every = list(METHODS.values())
    return {"fine-tune": [m for m in every if m.rates],
            "make small": [m for m in every if not m.rates]}


def of_readme():
    lines = ["| | technique | what it does | paper |", "|---|---|---|---|"]
    for heading, methods in groups().items():
        for i, method in enumerate(methods):
            file = pathlib.Path(method.module.__file__).relative_to(ROOT.parent).as_posix()
            lines.append(f"| {'' if i else heading} | [`{method.path}`]({file}) | {method.does} "
                         f"| {method.paper} |")
    return "\n".join(lines) + "\n"


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
