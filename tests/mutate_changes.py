"""The one-token changes of a Python source text that tests should notice; `mutate.py` makes them.

    arithmetic     + - * / // % @ ** | & << >>    another operator; a minus, `not` or `~` dropped
    comparison     < <= > >= == != is in          a neighbour
    logic          and, or; if, while, assert     the other word; the condition negated
    constant       n, 0, x, True                  n - 1 or n + 1; 1; x / 2; False
    name           min, any, amin, argmin         max, all, amax, argmax, and back
    flow           break, continue                the other one
    call           f(x) alone on its line; k=v    dropped

What only speaks to a person is left out: docstrings and other texts, comments, annotations, all
of a `raise`, log lines, the progress bar, argparse's help. So are the options with which the laws
run a method (`small=`), for they are the tests'. Lines keep their numbers.
"""

import ast
import bisect
import dataclasses
import io
import itertools
import random
import tokenize

SWAPS = {"+": "-", "*": "/", "|": "&", "<<": ">>", "and": "or"}
SWAPS |= {new: old for old, new in SWAPS.items()} | {"//": "*", "%": "*", "**": "*", "@": "*"}
NEIGHBOURS = {
    "<": ("<=", ">"), "<=": ("<", ">="), ">": (">=", "<"), ">=": (">", "<="), "==": ("!=",),
    "!=": ("==",), "is": ("is not",), "is not": ("is",), "in": ("not in",), "not in": ("in",)}
NAMES = {"min": "max", "any": "all", "amin": "amax", "argmin": "argmax"}
NAMES |= {new: old for old, new in NAMES.items()}
NOISE = {"log", "logging", "logger", "tqdm", "bar", "warnings"}  # what their calls say is no result
# nor are these arguments of argparse, nor the laws' own options of a method
TEXTS = {"help", "metavar", "description", "prog", "small"}


@dataclasses.dataclass(frozen=True)
class Change:
    """source[start:end] becomes one of `news`; its statement covers the lines first .. last."""

    start: int
    end: int
    news: tuple
    first: int
    last: int
    in_function: bool


class Source:
    """A file's text, its tokens and the place of each node, all by offset in the text."""

    def __init__(self, text):
        self.text, self.lines = text, text.splitlines(keepends=True)
        self.starts = [0, *itertools.accumulate(map(len, self.lines))]
        plain = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        tokens = [
            t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in plain
        ]
        self.tokens = [(self.starts[t.start[0] - 1] + t.start[1], t.string) for t in tokens]

    def offset(self, line, column):
        """ast counts columns in bytes of UTF-8."""
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node):
        return self.offset(node.lineno, node.col_offset), self.offset(
            node.end_lineno, node.end_col_offset
        )

    def between(self, left, right):
        """(start, end, text) of the operator between two offsets: a token, or two (`is not`)."""
        found = self.tokens[
            bisect.bisect_left(self.tokens, (left,)) : bisect.bisect_left(self.tokens, (right,))
        ]
        found = [t for t in found if t[1] not in "()"]
        return found[0][0], found[-1][0] + len(found[-1][1]), " ".join(t[1] for t in found)

    def argument(self, node):
        """The span of a keyword argument with one of the commas beside it."""
        start, end = self.span(node)
        at, after = bisect.bisect_left(self.tokens, (start,)), bisect.bisect_left(
            self.tokens, (end,)
        )
        if self.tokens[at - 1][1] == ",":
            return self.tokens[at - 1][0], end
        return start, self.tokens[after + 1][0] if self.tokens[after][1] == "," else end


def changes(text):
    """All the places of a source text where one token can change, in order.

    >>> text = "if a < n:\\n    f(b=True)"
    >>> for change in changes(text):
    ...     print(repr(text[change.start : change.end]), change.news)
    'a < n' ('not (a < n)',)
    '<' ('<=', '>')
    'f(b=True)' ('pass',)
    'b=True' ('',)
    'True' ('False',)
    """
    source, found = Source(text), []

    def visit(node, lines, in_function):
        if silent(node):
            return
        if hasattr(node, "lineno") and isinstance(node, (ast.stmt, ast.ExceptHandler)):
            lines = header(node)
        for start, end, *news in edits(node, source):
            found.append(Change(start, end, tuple(news), *lines, in_function))
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.Lambda))
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, lines, in_function)

    visit(ast.parse(text), (1, 1), False)
    return found


def silent(node):
    """Whether a node only speaks to a person: error texts, log lines, help, the progress bar."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return silent(node.value)
    if isinstance(node, ast.Call):
        while isinstance(node, (ast.Call, ast.Attribute)):
            node = node.func if isinstance(node, ast.Call) else node.value
        return isinstance(node, ast.Name) and node.id in NOISE
    if isinstance(node, ast.FunctionDef):
        return node.name in ("__repr__", "__str__", "extra_repr")
    if isinstance(node, ast.keyword):
        return node.arg in TEXTS
    return isinstance(node, (ast.Raise, ast.JoinedStr))


def header(node):
    """The lines of a statement, without the block below it."""
    body = getattr(node, "body", None)
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    last = max(node.lineno, body[0].lineno - 1) if isinstance(body, list) else node.end_lineno
    return first, last


def edits(node, source):
    """The (start, end, new text, ...) of one node's own token."""
    start, end = source.span(node) if hasattr(node, "end_lineno") else (0, 0)
    conditional = isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert))
    for test in [node.test] if conditional else getattr(node, "ifs", []):
        if not isinstance(test, ast.UnaryOp):  # that one loses its `not` instead
            yield negated(test, source)
    if isinstance(node, ast.BinOp) and not any(is_text(side) for side in (node.left, node.right)):
        yield swapped(source, node.left, node.right)
    if isinstance(node, (ast.BoolOp, ast.Compare)):
        parts = getattr(node, "values", None) or [node.left, *node.comparators]
        yield from (swapped(source, *pair) for pair in itertools.pairwise(parts))
    if isinstance(node, ast.AugAssign):
        at, to, operator = source.between(source.span(node.target)[1], source.span(node.value)[0])
        yield at, to, SWAPS[operator[:-1]] + "="
    if isinstance(node, ast.UnaryOp):
        word = {ast.Not: "not ", ast.USub: "-", ast.Invert: "~"}.get(type(node.op), "+")
        yield start, start + len(word), ""
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        yield start, end, *numbers(node.value)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield start, end, "pass"
    if isinstance(node, ast.keyword) and node.arg:
        yield *source.argument(node), ""
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in NAMES:
            yield end - len(name), end, NAMES[name]
    if isinstance(node, (ast.Break, ast.Continue)):
        yield start, end, "continue" if isinstance(node, ast.Break) else "break"


def is_text(node):
    """A text: another operator beside it is an error at once, which proves nothing of the tests."""
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def negated(test, source):
    start, end = source.span(test)
    return start, end, f"not ({source.text[start:end]})"


def swapped(source, left, right):
    start, end, operator = source.between(source.span(left)[1], source.span(right)[0])
    return start, end, *NEIGHBOURS.get(operator, (SWAPS.get(operator),))


def numbers(value):
    if isinstance(value, bool):
        return (str(not value),)
    if isinstance(value, float):
        return (repr(value / 2 if value else 1.0),)
    return ("1",) if value == 0 else (str(value - 1), str(value + 1))


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file: the old token, the new one, and the whole new text."""

    file: str
    line: int
    change: Change
    old: str
    new: str
    text: str

    def __str__(self):
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}:{self.line}  {old}  ->  {new or '(dropped)'}"


def choose(files, count, seed):
    """`count` mutants of {name: text}, in the order of the seed."""
    sites, chance, chosen = (
        [(name, change) for name in sorted(files) for change in changes(files[name])],
        random.Random(seed),
        [],
    )
    chance.shuffle(sites)
    for name, change in sites:
        text, new = files[name], chance.choice(change.news)
        old = text[change.start : change.end]
        filled = new + "\n" * (old.count("\n") - new.count("\n"))
        mutated = text[: change.start] + filled + text[change.end :]
        try:
            compile(mutated, name, "exec")
        except SyntaxError:
            continue
        line = text.count("\n", 0, change.start) + 1
        chosen.append(Mutant(name, line, change, old, new, mutated))
        if len(chosen) == count:
            break
    return chosen
