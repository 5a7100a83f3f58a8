"""`minillm train --adapter`: the technique that is asked for trains, and every output loads."""
# flake8: noqa: F811  (fixtures)

import pytest
from small_model import model, run  # noqa: F401
from test_nothing_lost import learn

import minillm
from minillm.registry import METHODS, store


@pytest.mark.parametrize("first, second, kind, name", [
    ("lora", "dora", "dora", "dora"), ("dora", "lora", "lora", "lora"),
    ("lora", "pissa", "lora", "pissa"), ("prune", "wanda", "prune", "wanda"),
])
def test_another_technique_of_the_family_trains_over_the_file(first, second, kind, name, run):
    learn(run, first, "--out", "a.safetensors", steps=2)
    learn(run, second, "--adapter", "a.safetensors", "--out", "b.safetensors", steps=2)
    told = store.read("b.safetensors")[1]
    assert (told["kind"], told["name"]) == (kind, name)
    both = ("--adapter", "a.safetensors", "--adapter", "b.safetensors")
    run("eval", *both, "--text", "a.txt", "--length", 64)
    if kind == name:  # the same technique again continues the new file
        learn(run, second, *both, "--out", "c.safetensors", steps=2)
        assert store.read("c.safetensors")[0].keys() == store.read("b.safetensors")[0].keys()


@pytest.mark.parametrize("first, second", [("quant", "gptq"), ("nf4", "quant"), ("quant", "nf4")])
def test_a_format_over_a_format_is_one_line_with_both(first, second, run):
    narrow = {"nf4": ("--option", "group=32")}
    learn(run, first, *narrow.get(first, ()), "--out", "a.safetensors", steps=1)
    said = learn(run, second, *narrow.get(second, ()), "--adapter", "a.safetensors", "--out",
                 "b.safetensors", code=1)
    assert f"--technique {second} " in said and "a.safetensors" in said
    assert METHODS[first].kind in said
    assert "continues the training" not in said


def test_a_second_pissa_is_told_how_the_first_goes_on(run):
    learn(run, "pissa", "--out", "a.safetensors", steps=1)
    said = learn(run, "pissa", "--adapter", "a.safetensors", "--option", "name=more", "--out",
                 "b.safetensors", code=1)
    assert said.strip().endswith("; --technique lora continues the training of a.safetensors"), said


def test_a_name_that_another_kind_has_is_refused(run):
    learn(run, "lora", "--option", "name=sql", "--out", "a.safetensors", steps=1)
    for technique in ("dora", "pissa"):
        said = learn(run, technique, "--adapter", "a.safetensors", "--option", "name=sql", "--out",
                     "b.safetensors", code=1)
        assert "--option name=sql: a.safetensors holds lora under that name" in said


@pytest.mark.parametrize("first", ["lora", "quant"])
def test_what_lies_beneath_another_adapter_does_not_learn_on(first, run):
    learn(run, first, "--out", "one.safetensors", steps=2)
    learn(run, "dora", "--adapter", "one.safetensors", "--out", "two.safetensors", steps=2)
    said = learn(run, first, "--adapter", "one.safetensors", "--adapter", "two.safetensors",
                 "--out", "more.safetensors", code=1)
    assert f"two.safetensors: dora was trained over {first}, and would fit no {first}" in said
    assert f"Continue {first} without --adapter two.safetensors" in said
    learn(run, "dora", "--adapter", "one.safetensors", "--adapter", "two.safetensors", "--out",
          "more.safetensors", steps=2)


@pytest.mark.parametrize("second, options", [
    ("qat", ()), ("bitfit", ("--option", "targets=.*norm")), ("wanda", ())])
def test_another_technique_over_quant_and_freeze_trains(second, options, run):
    first = dict(qat="quant", bitfit="freeze", wanda="quant")[second]
    learn(run, first, "--out", "a.safetensors", steps=1)
    learn(run, second, *options, "--adapter", "a.safetensors", "--out", "b.safetensors", steps=2)
    assert store.read("b.safetensors")[1]["kind"] == dict(wanda="prune").get(second, second)
    run("eval", "--adapter", "a.safetensors", "--adapter", "b.safetensors", "--text", "a.txt",
        "--length", 64)


def test_an_adapter_goes_to_peft_and_comes_back(run):
    learn(run, "lora", "--option", "r=2", "--out", "a.safetensors", steps=2)
    out = ("--out", "peft", "--type", "peft")
    assert run("export", "--adapter", "a.safetensors", *out) == "wrote peft\n"
    ask = ("--text", "a.txt", "--length", 64)
    assert run("eval", "--adapter", "peft", *ask) == run("eval", "--adapter", "a.safetensors", *ask)
    learn(run, "lora", "--adapter", "peft", "--out", "b.safetensors", steps=2)  # and goes on
    assert store.read("b.safetensors")[1]["name"] == "lora"
    run("export", "--adapter", "peft", "--out", "merged")
    for adapters in ((), ("--adapter", "a.safetensors", "--adapter", "b.safetensors")):
        said = run("export", *adapters, "--out", "two", "--type", "peft", code=1)
        assert f"give one --adapter FILE, not {len(adapters) // 2}" in said
    assert "merged has no adapter_config.json" in run("eval", "--adapter", "merged", *ask, code=1)


def test_a_directory_of_save_all_is_a_model(run):
    whole = minillm.lora.wrap(minillm.quant.wrap(minillm.load(run.model)[0]), r=2)
    minillm.save_all(whole, "tuned")
    said = run("show", "--model", "tuned")
    assert "[quant(bits=8)] + lora(r=2" in said
    run("export", "--model", "tuned", "--out", "merged")
    said = run("train", "--model", "tuned", "--task", "package", "--steps", 1, "--out",
               "tuned/1-lora.safetensors", "--force", code=2)
    assert "--model tuned/1-lora.safetensors would be replaced by --out" in said
