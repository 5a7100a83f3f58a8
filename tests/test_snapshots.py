"""What users see and other programs read, as it was when somebody last looked at it.

Each test writes one thing out as text and compares it with a file in tests/snapshots. A
change that was meant:

    MINILLM_SNAPSHOTS=write python -m pytest tests/test_snapshots.py && git diff tests/snapshots
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import os
import pathlib

import pytest
import torch
from models import build
from test_hub import SHAPES

import minillm
from minillm import compare, options, train
from minillm.checkpoints import layouts
from minillm.cli import arguments
from minillm.measure import report
from minillm.registry import roles
from minillm.train import schedules, settings
from minillm.zoo import pretrain

HERE = pathlib.Path(__file__).parent / "snapshots"


def check(name, text):
    path = HERE / name
    if os.environ.get("MINILLM_SNAPSHOTS") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        f"{name} is another now; if that is meant, see {__file__}")


# --- the command line ---------------------------------------------------------------------------

PROBES = ["", "-1", "0", "1", "2", "0.0", "0.5", "1.0", "1.5", "9", "x", "1e400", "nan",
          str(2**63 - 1), str(2**63)]


def answers(kind):
    """What a type of an argument makes of some texts."""
    found = []
    for text in PROBES:
        try:
            found.append(repr(kind(text)))
        except (argparse.ArgumentTypeError, ValueError) as error:
            found.append(str(error))
    return found


def described(action):
    fields = ("nargs", "const", "default", "choices", "required", "metavar", "help", "dest")
    lines = [" ".join([*action.option_strings, type(action).__name__])]
    for field in fields:
        value = getattr(action, field)
        if isinstance(value, dict):
            value = list(value)
        lines += [f"    {field}: {value!r}"] if value not in (None, False) else []
    if action.type and action.type.__module__ != "builtins":
        found = zip(PROBES, answers(action.type))
        lines += [f"    {text!r} -> {answer}" for text, answer in found if answer != repr(text)]
    elif action.type:
        lines.append(f"    type: {action.type.__name__}")
    return lines


def test_the_command_line():
    (commands,) = (a for a in arguments.parser()._actions
                   if isinstance(a, argparse._SubParsersAction))
    lines = []
    for name, sub in commands.choices.items():
        lines += [f"== {name}: {sub.description}"]
        for group in sub._mutually_exclusive_groups:
            lines.append(
                f"one of: {[a.dest for a in group._group_actions]}, required: {group.required}"
            )
        lines += [line for action in sub._actions for line in described(action)]
    check("command_line.txt", "\n".join(lines) + "\n")


def test_the_signatures():
    """The defaults of what users call."""
    calls = {f"{name}.wrap": module.wrap for name, module in minillm.techniques().items()}
    calls |= {f"{name}.save": module.save for name, module in minillm.techniques().items()}
    calls |= {f"{name}.load": module.load for name, module in minillm.techniques().items()}
    calls |= {"lora.merge": minillm.lora.merge, "generate": minillm.Transformer.generate,
              "report": report.report}
    for home in (minillm, minillm.checkpoints, compare, minillm.data, minillm.measure,
                 minillm.registry, train, minillm.zoo):
        for name in getattr(home, "__all__", ["load", "save", "check_save"]):
            call = getattr(home, name)
            if callable(call) and not inspect.isclass(call) or dataclasses.is_dataclass(call):
                calls[f"{home.__name__}.{name}"] = call
    check("signatures.txt",
          "".join(f"{name}{inspect.signature(call)}\n" for name, call in calls.items()))


def test_the_constants():
    told = dict(rates=compare.RATES, of_tiny=compare.rates.OF_TINY, step=compare.rates.STEP,
                most=compare.rates.MOST,
                sizes=compare.SIZES, recipe=pretrain.RECIPE, compared=sorted(settings.COMPARED),
                schedules=sorted(schedules.SCHEDULES), groups=minillm.prune.GROUPS,
                attention=roles.ATTENTION, mlp=roles.MLP)
    check("constants.json", json.dumps(told, indent=2) + "\n")


def test_the_checks_of_options():
    """What each check of an argument takes and says."""
    values = [None, True, -1, 0, 1, 2, 3, 0.0, 0.5, 1.0, 1.5, float("inf"), float("nan"), "1", "x",
              [1]]
    checks = {"whole": lambda v: options.whole("n", v),
              "whole to 2": lambda v: options.whole("n", v, 0, 2),
              "positive": lambda v: options.positive("n", v),
              "share": lambda v: options.share("n", v),
              "flag": lambda v: options.flag("n", v),
              "one_of": lambda v: options.one_of("n", v, ("x", "y"))}
    lines = []
    for name, call in checks.items():
        for value in values:
            try:
                lines.append(f"{name} {value!r} -> {call(value)!r}")
            except ValueError as error:
                lines.append(f"{name} {value!r} -> {error}")
    for default in (True, 1, 1.0, "x", None):
        for text in ("true", "False", "1", "1.5", "none", "a,b", "a b", "[1, 2]", "x.y,z_", "é,(",
                     ""):
            try:
                lines.append(
                    f"read {text!r} by {default!r} -> {options.read('n', text, default)!r}"
                )
            except ValueError as error:
                lines.append(f"read {text!r} by {default!r} -> {error}")
    check("options.txt", "\n".join(lines) + "\n")


# --- files --------------------------------------------------------------------------------------


def test_the_configurations_that_are_written():
    told = {name: layouts.describe(config, torch.bfloat16) for name, config in SHAPES.items()}
    told["gpt2"] = layouts.describe(build("gpt2").config, torch.float32)
    check("configurations.json", json.dumps(told, indent=2) + "\n")


@pytest.mark.parametrize("shape, type", [
    ("llama", "f32"), ("llama", "f16"), ("llama", "bf16"), ("llama", "q8_0"), ("untied", "f32"),
    ("qwen2", "f32"),
    ("qwen3", "f32"), ("linear", "f32"), ("llama3", "f32")])
def test_the_gguf_that_is_written(shape, type, tmp_path):
    gguf = pytest.importorskip("gguf")
    from test_tokenizer import tables

    from minillm.model.tokenizer import BytePair

    tokenizer = BytePair.from_gguf(tables("smollm"))
    config = SHAPES[shape]
    config = minillm.Config(**{**vars(config), "vocab_size": tokenizer.vocab_size, "width": 64,
                               "head_size": None,
                               "ffn": 64})
    minillm.save(minillm.Transformer(config), tmp_path / "m.gguf", tokenizer=tokenizer, type=type)
    file, lines = gguf.GGUFReader(tmp_path / "m.gguf"), []
    for name, field in file.fields.items():
        value = field.contents()
        if isinstance(value, (list, str)) and len(value) > 40:
            value = f"{len(value)} items, {hashlib.sha256(repr(value).encode()).hexdigest()[:12]}"
        lines.append(f"{name}: {[t.name for t in field.types]} {value!r}")
    lines += [f"{t.name}: {t.tensor_type.name} {t.shape.tolist()}" for t in file.tensors]
    check(f"gguf-{shape}-{type}.txt", "\n".join(lines) + "\n")


# --- pictures and texts -------------------------------------------------------------------------


def drawn(call, tmp_path, monkeypatch):
    """All that a picture shows, as text."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    seen = []
    saved = Figure.savefig

    def catch(figure, *args, **kwargs):
        lines = [
            f"figure {figure.get_size_inches().tolist()} {figure.get_layout_engine()!r:.60}".split(
                " object"
            )[0],
            f"title {figure.get_suptitle()!r}",
            f"saved {dict(kwargs, metadata=None)}",
        ]
        for axes in figure.axes:
            lines.append(
                f"axes {axes.get_xlabel()!r} {axes.get_ylabel()!r} {axes.get_xscale()} "
                f"{axes.get_yscale()}"
            )
            lines.append(f"  limits {number(axes.get_xlim())} {number(axes.get_ylim())}")
            lines.append(f"  ratios {axes.get_subplotspec().get_gridspec().get_height_ratios()}")
            lines.append(
                f"  grid "
                f"{[(line.get_visible(), line.get_alpha()) for line in axes.get_xgridlines()[:1]]}"
            )
            for line in axes.get_lines():
                lines.append(
                    f"  line {line.get_label()!r} {line.get_color()} {line.get_alpha()} "
                    f"{line.get_linewidth()} "
                    f"{line.get_linestyle()} {line.get_marker()} {line.get_markersize()} "
                    f"{number(line.get_xdata())} {number(line.get_ydata())}"
                )
            for box in axes.containers:
                lines.append(f"  container {type(box).__name__} {box.get_label()!r}")
            for bars in axes.collections:
                lines += [f"  segment {number(segment.ravel())}" for segment in bars.get_segments()]
            for patch in axes.patches:
                lines.append(f"  bar {patch.get_label()!r} {number(patch.get_bbox().bounds)}")
            legend = axes.get_legend()
            if legend is not None:
                texts = [text.get_text() for text in legend.get_texts()]
                size = legend.get_texts()[0].get_fontsize()
                lines.append(f"  legend {texts} {size} {legend._ncols} {legend._loc} "
                             f"{number(legend.get_bbox_to_anchor()._bbox.bounds)}")
        seen.append("\n".join(lines) + "\n")
        return saved(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", catch)
    call(tmp_path / "a.png")
    return seen[0]


def number(values):
    return [round(float(v), 4) for v in values]


def history():
    made = []
    for i in range(60):
        made.append(dict(step=i, loss=4 - i / 30 + (i % 3) / 10, learnt=5 + i % 2, tokens=10,
                         seconds=0.5,
                         rate=1e-3 * (1 - i / 60), norm=1.0))
        if i % 20 == 19:
            made[-1] |= dict(held_out=3 - i / 30 if i < 50 else 2.5,
                             best=dict(step=39, value=3 - 39 / 30))
    return made


def test_the_picture_of_a_training(tmp_path, monkeypatch):
    check("training.txt", drawn(lambda path: train.picture(history(), path), tmp_path, monkeypatch))
    check("training-summary.txt", f"{train.summary(history())}\n")


def figures(name, i):
    score = dict(name="perplexity", value=40.0 - i, n=24, low=38.0 - i, high=43.5 - i)
    change = dict(name="change", value=-0.05 * i, n=24, low=-0.07 * i, high=-0.02 * i)
    row = dict(technique=name, metric="perplexity", rate=None if name == "none" else 1e-3 * i,
               before=dict(score, value=40.0), after=score, after_change=change,
               after_seeds=[40.0 - i, 39.5 - i],
               trainable=1000 * i, peak_bytes=10**8 + 10**7 * i, seconds=12.5 * i, bytes=4 * 10**6,
               rates=[] if name == "none" else [[1e-3 * i, 41.0], [3e-3 * i, 42.5]])
    for column in ("int8", "pruned"):
        row |= {column: dict(score, value=41.5 - i), f"{column}_change": dict(change, value=0.02),
                f"{column}_seeds": [41.0 - i], f"{column}_bytes": 10**6}
    return row


def test_the_picture_of_a_comparison(tmp_path, monkeypatch):
    rows = [figures("none", 0), figures("lora", 1), figures("full", 2),
            dict(technique="freeze", error="lost")]
    rows[2]["after"] |= dict(low=None, high=None)
    text = drawn(lambda path: compare.picture(rows, path, "a title"), tmp_path, monkeypatch)
    text += drawn(lambda path: compare.picture(rows, path), tmp_path,
                  monkeypatch).splitlines()[1] + "\n"
    check("comparison.txt", text)


def test_the_picture_of_a_report(tmp_path, monkeypatch):
    found = report.report(build("llama"), batch=2, length=16)
    fixed = type(found)(**{**vars(found), "activations": 10**6, "seconds_per_token": 1.5e-3})
    check("report.txt", drawn(fixed.picture, tmp_path, monkeypatch) + fixed.table() + "\n")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_tree(kind):
    model = minillm.quant.wrap(build(kind), r"layers\.0\..*proj")
    check(f"tree-{kind}.txt",
          minillm.show(build(kind)) + "\n\n" + minillm.show(minillm.lora.wrap(model, r=2)) + "\n")
