"""The script that changes tokens of minillm: what it changes, which tests it runs."""

import ast

import pytest
from mutate import candidates
from mutate_changes import changes, choose

SOURCE = '''
"""A docstring with 1 + 1."""
def f(x: int = 1 << 2, *, share=0.5) -> None | int:
    """Not 3 < 4 either."""
    if x <= 2 and share is not None:  # nor 5 > 6
        g(x, k=1, text=f"{x + 1}")
    log.info("%s", x + 1)
    for i in tqdm(range(7), total=x - 1):
        if not i:
            continue
        raise ValueError(f"{i} is more than {x * 2}" + str(x % 3))
    method("f", small={"": dict(r=4)})
    return max(-x, x.any(), "é" + x, [y @ y for y in x if y != 1], True)
'''


def edits(source):
    return {(source[c.start : c.end], new) for c in changes(source) for new in c.news}


def test_all_that_it_changes_and_nothing_else():
    assert edits(SOURCE) == {
        ("<<", ">>"), ("1", "0"), ("1", "2"), ("2", "1"), ("2", "3"), ("0.5", "0.25"),
        ("x <= 2 and share is not None", "not (x <= 2 and share is not None)"), ("<=", "<"),
        ("<=", ">="), ("and", "or"), ("is not", "is"), ('g(x, k=1, text=f"{x + 1}")', "pass"),
        (", k=1", ""), (', text=f"{x + 1}"', ""), ("not ", ""), ("continue", "break"),
        ('method("f", small={"": dict(r=4)})', "pass"),
        ("max", "min"), ("-", ""), ("any", "all"), ("@", "*"), ("y != 1", "not (y != 1)"),
        ("!=", "=="), ("True", "False")}


@pytest.mark.parametrize("source, mutant", [
    ("f(\n    a=1,\n    b=g(2),\n)", "f(\n    \nb=g(2),\n)"),
    ("f(a=1)", "f()"), ("f(x, a=(1))", "f(x)"), ("f(a=(1), b=x)", "f(b=x)"),
    ("f(**x, a=1)", "f(**x)"), ("x = f(a=1,)", "x = f()"),
    ("x = (a) + (b)", "x = (a) - (b)"), ("x = ('é', a + b)", "x = ('é', a - b)"),
    ("x = a not  in b", "x = a in b"), ("x //= y", "x *= y"), ("x = not (a)", "x = (a)"),
    ("if (a or\n    b): pass", "if (not (a or\n    b)): pass"),
    ("f(\n    x,\n    y)\nz", "pass\n\n\nz"), ("x = 1 if a else b", "x = 1 if not (a) else b"),
])
def test_a_change_is_one_token_and_keeps_the_lines(source, mutant):
    found = {m.text for seed in range(20) for m in choose({"x.py": source}, 9, seed)}
    assert mutant in found
    assert all(text.count("\n") == source.count("\n") for text in found)
    assert all(ast.dump(ast.parse(text)) != ast.dump(ast.parse(source)) for text in found)


def test_the_seed_alone_chooses():
    files = {"a.py": SOURCE, "b.py": SOURCE}
    one, same, other = (choose(files, 9, seed) for seed in (0, 0, 1))
    assert one == same != other and len(one) == 9 == len(set(map(str, one)))


def test_it_runs_the_tests_that_execute_the_statement_those_of_the_mirroring_file_first():
    source = "N = 1\ndef f(x):\n    y = (x\n        + 1)\n    return y\n"
    mutants = {m.old: m for m in choose({"minillm/a.py": source}, 9, 0)}

    def note(seconds, *lines):
        return dict(seconds=seconds, lines={"minillm/a.py": lines})

    notes = {
        "tests/test_b.py::slow": note(9, 2, 3), "tests/test_b.py::quick": note(1, 2, 3, 4),
        "tests/test_a.py::other": note(5), "tests/test_c.py::elsewhere": note(1, 2, 5),
        "minillm/a.py::minillm.a": note(6, 4)}
    mirror, b = ["tests/test_a.py::other", "minillm/a.py::minillm.a"], "tests/test_b.py::"
    assert list(candidates(mutants["+"], notes)) == [*mirror, f"{b}quick", f"{b}slow"]
    (constant,) = (m for m in choose({"minillm/a.py": source}, 9, 0) if m.line == 1)
    assert len(candidates(constant, notes)) == 5, "it runs at import: all that execute the file"
