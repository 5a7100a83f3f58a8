"""Wrong options: one line that repeats what was written and says what is possible,
before the model is touched."""

import math

import pytest
import torch
from models import build, two
from torch import nn

import minillm
from minillm import options


@pytest.mark.parametrize("technique, wrong, message", [
    ("lora", dict(r=2.5), "r=2.5 is not a whole number of at least 1"),
    ("lora", dict(r="abc"), "r='abc' is not a whole number"),
    ("lora", dict(r=True), "r=True is not a whole number"),
    ("lora", dict(r=None), "r=None is not a whole number"),
    ("lora", dict(r=0), "r=0 is not a whole number of at least 1"),
    ("lora", dict(r=99), "r=99 at .*from 1 to"),
    ("lora", dict(alpha=math.nan), "alpha=nan is not a number above 0"),
    ("lora", dict(alpha=math.inf), "alpha=inf is not a number above 0"),
    ("lora", dict(alpha="x"), "alpha='x' is not a number above 0"),
    ("lora", dict(alpha=0), "alpha=0 is not a number above 0"),
    ("lora", dict(alpha=-1.0), "alpha=-1.0 is not"),
    ("lora", dict(rank_stabilized="false"), "rank_stabilized='false' is neither True nor False"),
    ("lora", dict(rank_stabilized=1), "rank_stabilized=1 is neither"),
    ("lora", dict(dropout="0.1"), "dropout='0.1' is not a number from 0"),
    ("lora", dict(dropout=True), "dropout=True is not a number from 0"),
    ("lora", dict(dropout=1.0), "dropout=1.0 is not a number from 0"),
    ("lora", dict(dropout=-0.1), "dropout=-0.1 is not a number from 0"),
    ("lora", dict(dropout=math.nan), "dropout=nan is not"),
    ("adapters", dict(size=2.5), "size=2.5 is not a whole number of at least 1"),
    ("adapters", dict(size=0), "size=0 is not"),
    ("adapters", dict(width=0), "width=0 is not a whole number of at least 1"),
    ("adapters", dict(width="16"), "width='16' is not"),
    ("prompts", dict(length=0), "length=0 is not a whole number of at least 1"),
    ("prompts", dict(length=2.5), "length=2.5 is not"),
    ("prune", dict(sparsity=math.nan), "sparsity=nan is not a number from 0 up to"),
    ("prune", dict(sparsity="half"), "sparsity='half' is not"),
    ("prune", dict(sparsity=1), "sparsity=1 is not"),
    ("prune", dict(sparsity=-0.1), "sparsity=-0.1 is not"),
    ("prune", dict(group="column"), "group='column' is unknown; known: 'row', 'matrix', 'model'"),
    ("prune", dict(group=["row"]), "is unknown; known"),
    ("sparse", dict(anyway="true"), "anyway='true' is neither True nor False"),
])
def test_a_wrong_option_is_one_line_and_changes_nothing(technique, wrong, message):
    model = build("llama")
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message) as error:
        minillm.techniques()[technique].wrap(model, **wrong)
    assert "\n" not in str(error.value)
    assert list(model.modules()) == modules and all(p.requires_grad for p in model.parameters())


def test_the_right_ones_are_taken():
    class Whole(int):
        """As numpy's whole numbers are: not int itself."""

    model = minillm.lora.wrap(two(), r=Whole(1), alpha=3, rank_stabilized=True, dropout=0)
    kept = model[0].patches["lora"].config()
    assert kept == dict(r=1, alpha=3.0, rank_stabilized=True, dropout=0.0, start=False)
    assert {key: type(value) for key, value in kept.items()} == dict(
        r=int, alpha=float, rank_stabilized=bool, dropout=float, start=bool)
    assert minillm.prune.wrap(two(), sparsity=0)[0].patches["prune"].mask.all()
    assert options.whole("n", 5, 1, 5) == 5
    with pytest.raises(ValueError, match="n=6 is not a whole number from 1 to 5"):
        options.whole("n", 6, 1, 5)


# --- the command line's texts ---------------------------------------------------------------------


def test_what_wrap_takes_is_known():
    assert options.known(minillm.lora.wrap) == dict(targets=None, name=None, r=8, alpha=16.0,
                                                    rank_stabilized=False, dropout=0.0)
    assert options.known(minillm.prune.wrap) == dict(
        targets=None, name=None, sparsity=0.5, score=minillm.prune.magnitude,
        pattern=minillm.prune.row, group=None)
    for method in minillm.registry.METHODS.values():
        assert not {"model", "examples"} & options.known(method.wrap).keys()
    with pytest.raises(ValueError, match="wanda has no option 'examples'"):
        options.parse(minillm.prune.wanda.wrap, {"examples": "a.txt"})


@pytest.mark.parametrize("technique, texts, values", [
    ("lora", dict(r="16", alpha="32", dropout="0.1"), dict(r=16, alpha=32.0, dropout=0.1)),
    ("lora", dict(rank_stabilized="false"), dict(rank_stabilized=False)),
    ("lora", dict(rank_stabilized="True"), dict(rank_stabilized=True)),
    ("lora", dict(targets="q_proj,v_proj"), dict(targets=["q_proj", "v_proj"])),
    ("lora", dict(targets="attn.q_proj, 0"), dict(targets=["attn.q_proj", "0"])),
    ("lora", dict(targets="['q_proj']"), dict(targets=["q_proj"])),
    ("lora", dict(targets=r"layers\.[0,1]\..*"), dict(targets=r"layers\.[0,1]\..*")),
    ("lora", dict(targets="q_proj|v_proj"), dict(targets="q_proj|v_proj")),
    ("lora", dict(targets="None"), dict(targets=None)),
    ("adapters", dict(width="16"), dict(width=16)),
    ("adapters", dict(width="none"), dict(width=None)),
    ("prune", dict(group="model", sparsity="0.25"), dict(group="model", sparsity=0.25)),
    ("sparse", dict(anyway="true"), dict(anyway=True)),
    ("lora", {}, {}),
])
def test_a_text_becomes_what_the_default_is(technique, texts, values):
    read = options.parse(minillm.techniques()[technique].wrap, texts)
    assert read == values and all(type(read[key]) is type(values[key]) for key in values)


@pytest.mark.parametrize(
    "texts, message",
    [
        (
            dict(foo="1"),
            "lora has no option 'foo'; its options and their defaults: targets=None, name=None, "
            "r=8, alpha=16.0",
        ),
        (dict(model="x"), "lora has no option 'model'"),
        (dict(r="abc"), "r='abc' is not a whole number"),
        (dict(r="2.5"), "r='2.5' is not a whole number"),
        (dict(r=""), "r='' is not a whole number"),
        (dict(alpha="x"), "alpha='x' is not a number"),
        (dict(rank_stabilized="maybe"), "rank_stabilized='maybe' is neither true nor false"),
        (dict(rank_stabilized="1"), "rank_stabilized='1' is neither"),
    ],
)
def test_a_wrong_text_is_one_line(texts, message):
    with pytest.raises(ValueError, match=message) as error:
        options.parse(minillm.lora.wrap, texts)
    assert "\n" not in str(error.value)


def test_a_text_that_nests_without_end_stays_a_text():
    deep = "(" * 100_000
    assert options.parse(minillm.lora.wrap, dict(targets=deep)) == dict(targets=deep)


def test_a_file_with_a_wrong_setting_is_refused():
    for cls, settings in ((minillm.lora.LoRA, dict(r=2, dropout=5)),
                          (minillm.prune.Mask, dict(sparsity="half")),
                          (minillm.adapters.Bottleneck, dict(size=2.5)),
                          (minillm.sparse.CSR, dict(anyway=3))):
        with pytest.raises(ValueError, match="is n"):
            cls(minillm.registry.Site("x", nn.Linear(4, 4), None, []), **settings)
    assert torch.is_tensor(
        minillm.prune.Mask(minillm.registry.Site("x", nn.Linear(4, 4), None, [])).mask
    )
