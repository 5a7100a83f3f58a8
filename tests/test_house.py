"""The house: which part of minillm may import which. A file imports from its own folder
and from the floors below it."""

import ast
import graphlib
import pathlib

import minillm

FLOORS = [
    ["files", "swap", "ops", "options", "distributed"],
    ["registry", "data"],
    ["model"],
    ["calling", "calibrate"],
    ["freeze", "prompts", "lora", "adapters", "augment", "quant", "prune", "sparse",
     "classify"],
    ["train", "measure"],
    ["checkpoints"],
    ["zoo"],
    ["compare"],
    ["cli"],
    ["__main__"],
]
FLOOR = {part: i for i, parts in enumerate(FLOORS) for part in parts}
HELPERS = {"files": "swap", "calibrate": "calling"}  # one idea in two files, and no folder
ROOT = pathlib.Path(minillm.__file__).parent


def imports(path):
    """(the part of minillm that is imported, whether within a function) of every import in
    a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minillm":
            parts = node.module.split(".")[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".")[1] for alias in node.names
                     if alias.name.startswith("minillm.")]
        else:
            continue
        for part in parts:
            yield part, id(node) not in top


def test_every_file_has_a_floor():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert parts - {"__init__"} == set(FLOOR)


def test_imports_go_down():
    seen = 0
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for other, late in imports(path):
            seen += 1
            where = f"{path.relative_to(ROOT)} imports {other}"
            assert not late, f"{where} within a function: that hides a circle"
            inside = other == part or HELPERS.get(part) == other
            assert inside or FLOOR[other] < FLOOR[part], f"{where}, which is not below it"
    assert seen > 100


def files_of(path, here):
    """The modules of minillm that a file imports, of those in `here`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in here else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_two_files_import_each_other():
    here = {}
    for path in ROOT.rglob("*.py"):
        parts = ("minillm", *path.relative_to(ROOT).with_suffix("").parts)
        here[".".join(parts).removesuffix(".__init__")] = path
    graph = {name: set(files_of(path, here)) & here.keys() for name, path in here.items()
             if name not in ("minillm", "minillm.__main__")}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None


PAGES = ["freeze", "prompts", "lora", "adapters", "quant", "prune", "sparse",
         "classify"]


def test_a_page_is_short():
    for path in ROOT.rglob("*.py"):
        text, where = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        lines = text.splitlines()
        assert max(map(len, lines), default=0) <= 100, f"{where} has lines of over 100 columns"
        page = where.parts[0] in PAGES and where.name != "grid.py"  # which is a mechanism
        assert len(lines) <= (150 if page else 300), f"{where}: {len(lines)} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{where}: {node.name} has {length} lines"
