"""A full disk: found before the training where it can be known, and no loss of the
training where not."""
# flake8: noqa: F811  (fixtures)

import os
import pathlib
import shutil
import types

import pytest
import safetensors.torch
import torch
from models import build
from small_model import model, run  # noqa: F401
from test_checkpoints import ctrl_c_at, names, same
from test_nothing_lost import FAST, last_line, learn
from test_train import losses, quiet

import minillm
from minillm import train
from minillm.train import Interrupted, disk


# --- before the training --------------------------------------------------------------------------


def free(monkeypatch, size):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=size))


@pytest.mark.parametrize("technique, out", [("lora", "a.safetensors"), ("quant", "a.safetensors"),
                                            ("full", "a"), ("full", "a.gguf")])
def test_an_out_that_does_not_fit_is_found_before_the_training(
    technique, out, run, tmp_path, monkeypatch
):
    learn(run, technique, "--out", out)
    size = sum(p.stat().st_size
               for p in ([tmp_path / out] if "." in out else (tmp_path / out).iterdir()))
    free(monkeypatch, size // 3)
    said = learn(run, technique, "--out", f"more/{out}", "--log", "log.jsonl", code=1)
    assert f"--out more/{out} takes " in said and "but the disk has only " in said
    assert not {"log.jsonl", "more"} & set(os.listdir())
    free(monkeypatch, size)
    learn(run, technique, "--out", f"more/{out}", "--log", "log.jsonl")


def test_out_and_checkpoints_share_a_disk(run, monkeypatch):
    learn(run, "lora", "--out", "a.safetensors", "--checkpoints", "c")
    one, out = (p.stat().st_size for p in (train.newest("c"), pathlib.Path("a.safetensors")))
    for kept, size in ((2, 3 * one), (1, 2 * one)):
        free(monkeypatch, size + out // 2)
        said = learn(run, "lora", "--out", "b.safetensors", "--checkpoints", "d", "--keep",
                     kept + 1, code=1)
        assert "--out b.safetensors takes" in said and " and --checkpoints d takes " in said
    free(monkeypatch, 3 * one + out)
    learn(run, "lora", "--out", "b.safetensors", "--checkpoints", "d")


def test_the_checkpoints_of_the_library_are_asked_for_too(tmp_path, monkeypatch):
    free(monkeypatch, 1000)
    with pytest.raises(OSError, match="^checkpoints .* takes .* but the disk has only 1.0 kB left"):
        quiet(build("llama"), checkpoints=tmp_path)
    assert len(quiet(build("llama"), checkpoints=tmp_path, save_every=0)) == 6, "on Ctrl-C alone"
    assert len(quiet(build("llama"))) == 6


def test_a_limit_of_the_process_is_found_too(run, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        said = learn(run, "lora", "--out", "a.safetensors", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ("--out a.safetensors takes a file of " in said
            and "files of at most 1.0 kB (ulimit -f)" in said)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("best", [True, False])
def test_about_how_large_a_checkpoint_is(dtype, best, tmp_path):
    config = minillm.Config(24, 64, 2, 2)
    model = minillm.Transformer(config).to(getattr(torch, dtype))
    values = iter([1.0, 2.0])
    more = dict(evaluate=lambda model: next(values), every=1) if best else {}
    quiet(model, steps=2, checkpoints=tmp_path, save_every=2, **more)
    size = train.newest(tmp_path).stat().st_size
    assert 0.8 * size < disk.checkpoint_bytes(model, best) <= size


def test_sizes_are_shown_in_their_unit():
    assert [disk.shown(n)
            for n in (12, 1000, 2_340_000, 7.25e9)] == ["12 bytes", "1.0 kB", "2.3 MB", "7.2 GB"]


# --- in the training ------------------------------------------------------------------------------


def full(monkeypatch, *directories):
    """No file can be written in these directories."""
    write = safetensors.torch.save_file

    def refuse(tensors, path, *rest):
        if any(pathlib.Path(d).resolve() in pathlib.Path(path).resolve().parents
               for d in directories):
            pathlib.Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        write(tensors, path, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)


def test_a_periodic_checkpoint_that_fails_costs_nothing(tmp_path, monkeypatch, caplog):
    written = []
    full(monkeypatch, tmp_path / "d")
    model = build("llama")
    history = quiet(model, checkpoints=tmp_path / "d", save_every=1, write=written.append)
    assert losses(history) == losses(quiet(build("llama"))) and written == [model]
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1 and "No space left on device" in said[0] and "step-00000001" in said[0]
    assert "no checkpoint after step 1, and the training goes on" in said[0]


@pytest.mark.parametrize("cache", [True, False])
def test_ctrl_c_saves_where_there_is_room(cache, tmp_path, monkeypatch):
    own, there = tmp_path / "own", tmp_path / ("cache" if cache else "tmp")
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    model = build("llama")
    hook = ctrl_c_at(model, 3)
    with monkeypatch.context() as patched:
        full(patched, own, *[tmp_path / "cache"] * (not cache))
        message = (f"saved {there}/interrupted-.*/step-00000003.safetensors: "
                   f"checkpoints='{there}/.*', resume=True goes")
        with pytest.raises(Interrupted, match=message) as caught:
            quiet(model, checkpoints=own, save_every=0)
    hook.remove()
    again, whole = build("llama"), build("llama")
    rest = quiet(again, checkpoints=caught.value.path.parent, save_every=0, resume=True)
    assert losses(rest) == losses(quiet(whole)) and same(again, whole)
    assert list((tmp_path / "cache").glob("*")) == [caught.value.path.parent] * cache


def test_a_last_write_that_fails_saves_where_there_is_room(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    more = ["--data", "a.txt", "--length", 64, "--out", "out/a.safetensors"]
    with monkeypatch.context() as patched:
        full(patched, tmp_path / "out")
        said = last_line(run, capsys, 1, *more)
    assert "out/a.safetensors: no space left on device; all steps are done, and saved in " in said
    (there,) = (tmp_path / "cache").iterdir()
    assert (
        f"{there}/step-00000004.safetensors: --checkpoints {there} --resume goes on from there"
        in said
    )
    assert not os.path.exists("out/a.safetensors.interrupted")
    args = ("train", *FAST, "--steps", 4, *more)
    run(*args, "--checkpoints", there, "--resume")
    run(*args[:-1], "b.safetensors")
    assert (
        pathlib.Path("b.safetensors").read_bytes() == pathlib.Path("out/a.safetensors").read_bytes()
    )


def test_nowhere_is_any_room(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))
    full(monkeypatch, "/")
    model = build("llama")
    hook = ctrl_c_at(model, 3)
    with pytest.raises(OSError, match="No space") as caught:
        quiet(model, checkpoints=tmp_path / "own", save_every=0)
    hook.remove()
    assert "the training is lost: a checkpoint cannot" in caught.value.__notes__[0]
    assert not list((tmp_path / "cache").glob("*")) and names(tmp_path / "own") == []
