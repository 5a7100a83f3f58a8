"""What `export` writes of several adapters, and which paths it refuses."""
# flake8: noqa: F811  (fixtures)

import pytest
from small_model import model, run  # noqa: F401


def test_export_merges_a_stack_that_is_not_the_same_everywhere(run):
    """LoRA lies beneath the mask at v_proj; at the other leaves the mask is alone."""
    train = ("train", "--data", "a.txt", "--length", 64, "--steps", 3, "--rate", 0.02)
    run(*train, "--option", "targets=v_proj", "--out", "l.safetensors")
    stack = ["--adapter", "l.safetensors"]
    run(*train, *stack, "--technique", "prune", "--out", "p.safetensors")
    stack += ["--adapter", "p.safetensors"]
    run("export", *stack, "--out", "merged")
    plain, stacked, merged = (
        float(run("eval", *which, "--text", "a.txt", "--length", 64).split()[1])
        for which in ([], stack, ["--model", "merged"]))
    assert merged == pytest.approx(stacked, rel=1e-3) and merged != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("out", ["merged", "merged.gguf"])
@pytest.mark.parametrize("target", ["lm_head", "lm_head,embed_tokens"])
def test_export_gives_a_tied_head_that_changed_a_matrix_of_its_own(out, target, run):
    if out.endswith(".gguf"):
        pytest.importorskip("gguf", reason="needs the extra 'hub'")
    run("train", "--data", "a.txt", "--length", 64, "--steps", 3, "--rate", 0.02, "--option",
        f"targets={target}", "--out", "a.safetensors")
    said = run("export", "--adapter", "a.safetensors", "--out", out)
    assert f"{out} stores the head and the embedding apart: --adapter changes " in said
    plain, adapted, merged = (
        float(run("eval", *which, "--text", "a.txt", "--length", 64).split()[1])
        for which in ([], ["--adapter", "a.safetensors"], ["--model", out]))
    assert merged == pytest.approx(adapted, rel=1e-3) and merged != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("args", [
    ("export", "--out"), ("train", "--out"), ("compare", "--out"), ("train", "--log"),
    ("train", "--checkpoints"), ("train", "--picture"), ("train", "--data"), ("eval", "--text"),
    ("show", "--adapter"), ("show", "--model")])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_path_is_said_to_be_empty(args, empty, run):
    said = run(*args, empty, code=2)
    assert f"{args[1]}: '{empty}' is empty: a path is needed" in said
