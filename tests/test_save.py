"""What `minillm.save` refuses before it writes, and what it leaves alone."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import hugging_face
from models import IDS, build
from test_files import full_disk, tree

import minillm
from minillm import checkpoints, data, zoo
from minillm.checkpoints import huggingface
from minillm.model.tokenizer import BytePair, SentencePiece


def small(**options):
    return minillm.Transformer(minillm.Config(24, 16, 2, 4, ffn=32, positions=32, **options)).eval()


@pytest.fixture(scope="module")
def sentence():
    return SentencePiece.train([data.topics()[:30000]], 500)


@pytest.fixture(scope="module")
def pairs():
    pytest.importorskip("gguf")
    from test_tokenizer import tables

    return BytePair.from_gguf(tables("smollm"))


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError,
                       match=r"thesis holds chapter.txt, .*force=True \(--force\)"):
        minillm.save(small(), tmp_path / "thesis")
    assert tree(tmp_path) == {"thesis/chapter.txt": "years of work"}
    minillm.save(small(), tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    minillm.load(tmp_path / "thesis")
    with pytest.raises(FileExistsError, match="thesis holds chapter.txt, which no earlier save"):
        minillm.save(small(), tmp_path / "thesis")
    model = small()
    minillm.save(model, tmp_path / "thesis", force=True)
    assert minillm.load(tmp_path / "thesis")[0].norm.weight.equal(model.norm.weight)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_an_existing_file_is_left_alone(tmp_path, pairs):
    model = minillm.Transformer(minillm.Config(pairs.vocab_size, 32, 1, 2, ffn=32))
    for name in ("notes", "m.gguf"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(OSError,
                           match=f"{name} (exists.*--force|is a file, and a directory is)"):
            minillm.save(model, tmp_path / name, tokenizer=pairs)
    with pytest.raises(NotADirectoryError, match="notes is a file, and a directory is"):
        minillm.save(model, tmp_path / "notes", force=True)
    assert tree(tmp_path) == {"notes": "mine", "m.gguf": "mine"}
    minillm.save(model, tmp_path / "m.gguf", tokenizer=pairs, force=True)
    minillm.load(tmp_path / "m.gguf")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(IsADirectoryError, match="d.gguf is a directory, and a file is"):
        minillm.save(model, tmp_path / "d.gguf", tokenizer=pairs, force=True)


def test_an_earlier_checkpoint_of_ours_is_replaced_without_a_rest(tmp_path, sentence):
    model = minillm.Transformer(minillm.Config(500, 16, 2, 4, ffn=32))
    minillm.save(model, tmp_path / "m", tokenizer=sentence, shard_bytes=9000)
    assert len(list((tmp_path / "m").glob("model-*"))) > 2
    minillm.save(small(), tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "minillm.json",
                                                  "model.safetensors"]
    minillm.save(model, tmp_path / "m", tokenizer=sentence, shard_bytes=9000)
    again, _ = minillm.load(tmp_path / "m")
    assert again.norm.weight.equal(model.norm.weight) and os.listdir(tmp_path) == ["m"]


def test_what_was_changed_since_is_no_longer_ours(tmp_path):
    minillm.save(small(), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text() + "\n")
    for force in (False, True):
        with pytest.raises(FileExistsError, match="config.json, .*changed since.*never replaces"):
            minillm.save(small(), tmp_path / "m", force=force)
    assert config.read_text().endswith("\n\n")


@pytest.mark.parity
def test_a_model_that_transformers_saved_is_never_replaced(tmp_path):
    transformers = hugging_face()
    minillm.save(small(), tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        theirs.model.norm.weight.mul_(3)
    for name in ("m", "n"):  # over ours, and elsewhere
        theirs.save_pretrained(tmp_path / name)
        for force in (False, True):
            with pytest.raises(FileExistsError, match="minillm never replaces it"):
                minillm.save(small(), tmp_path / name, force=force)
        assert minillm.load(tmp_path / name)[0].norm.weight.equal(theirs.model.norm.weight)


@pytest.mark.parametrize("record",
                         ["", "[]", '{"sha256": 3}', '{"sha256": {"../x": "0"}}', "\ud800"])
def test_a_record_that_lies_makes_nothing_ours(tmp_path, record):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "minillm.json").write_bytes(record.encode(errors="surrogatepass"))
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="config.json"):
        minillm.save(small(), tmp_path / "m", force=True)


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to("disk")
    for _ in range(2):
        minillm.save(small(), tmp_path / "m")
    assert (tmp_path / "m").is_symlink() and (tmp_path / "disk" / "config.json").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, pairs):
    model = minillm.Transformer(minillm.Config(pairs.vocab_size, 32, 1, 2, ffn=32))
    for name in ("m", "m.gguf"):
        minillm.save(model, tmp_path / name, tokenizer=pairs)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for name in ("m", "m.gguf"):
        with full_disk(100_000), pytest.raises(OSError) as error:
            minillm.save(model, tmp_path / name, tokenizer=pairs, force=True)
        assert str(error.value).count(str(tmp_path / name)) == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_all_files_have_the_mode_of_the_umask(tmp_path, sentence):
    before = os.umask(0o022)
    try:
        minillm.save(minillm.Transformer(minillm.Config(500, 16, 1, 2)), tmp_path / "m", sentence)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "m").iterdir()} == {0o644}


# --- what a checkpoint cannot hold --------------------------------------------------------------

REMEDIES = {
    "lora": r"lora \(minillm.lora.merge\(model\) or .unwrap\(model\) first; minillm.lora.save",
    "prune": r"prune \(minillm.prune.merge\(model\)",
    "prompts": r"prompts \(cannot be merged; minillm.prompts.save\(model, path\) writes it alone",
    "adapters": r"adapters \(cannot be merged; minillm.adapters.save",
    "quant": r"quant \(minillm.quant.unwrap\(model\) gives the dense weights back",
    "sparse": r"sparse \(minillm.sparse.unwrap",
}


@pytest.mark.parametrize("technique", REMEDIES)
def test_each_attached_technique_is_named_with_its_remedy(tmp_path, technique):
    options = dict(anyway=True) if technique == "sparse" else {}
    model = minillm.techniques()[technique].wrap(build("llama"), **options)
    with pytest.raises(ValueError, match=REMEDIES[technique]) as error:
        minillm.save(model, tmp_path / "m")
    assert "\n" not in str(error.value) and list(checkpoints.attached(model)) == [technique]
    minillm.techniques()[technique].unwrap(model)
    minillm.save(model, tmp_path / "m")


def test_all_of_them_are_named_at_once(tmp_path):
    model = minillm.prompts.wrap(minillm.lora.wrap(minillm.quant.wrap(build("llama"))))
    with pytest.raises(ValueError, match="quant .*lora .*|lora .*quant .*") as error:
        minillm.save(model, tmp_path / "m")
    assert "prompts (cannot be merged" in str(error.value) and not list(tmp_path.iterdir())


def test_a_frozen_model_is_a_plain_model(tmp_path):
    model = minillm.freeze.wrap(build("llama"), last=1)
    assert checkpoints.attached(model) == {}
    minillm.save(model, tmp_path / "m")
    assert minillm.load(tmp_path / "m")[0](IDS).equal(model(IDS))


def test_a_model_that_is_not_what_its_configuration_says(tmp_path):
    model = small()
    model.layers[1].mlp.up_proj = torch.nn.Linear(16, 20, bias=False)
    with pytest.raises(ValueError,
                       match=r"layers.1.mlp.up_proj.weight is \(20, 16\), should be \(32"):
        minillm.save(model, tmp_path / "m")
    model = small()
    del model.layers[1]
    with pytest.raises(ValueError, match="this model does not fit its configuration: it lacks 9"):
        minillm.save(model, tmp_path / "m")
    with pytest.raises(TypeError, match="not Linear"):
        minillm.save(torch.nn.Linear(2, 2), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_untied_or_tied_by_hand_is_saved_as_it_is(tmp_path):
    for tied in (True, False):
        model = small(tied=not tied)
        model.lm_head.weight = (
            model.embed_tokens.weight if tied else torch.nn.Parameter(torch.rand(24, 16))
        )
        minillm.save(model, tmp_path / str(tied))
        again, _ = minillm.load(tmp_path / str(tied))
        assert again.config.tied == tied and again(IDS).equal(model(IDS))
        assert model.config.tied != tied, "a save changes nothing in the model"


def test_two_layers_that_are_one_are_written_twice(tmp_path):
    model = small()
    model.layers[1] = model.layers[0]
    minillm.save(model, tmp_path / "m")
    assert minillm.load(tmp_path / "m")[0](IDS).equal(model(IDS))


def test_the_widest_type_is_kept(tmp_path):
    model = small().to(torch.bfloat16)
    model.lm_head.weight = torch.nn.Parameter(torch.rand(24, 16))
    minillm.save(model, tmp_path / "m")
    assert minillm.load(tmp_path / "m")[0].lm_head.weight.equal(model.lm_head.weight)


def test_a_type_and_an_ending_mean_what_they_say(tmp_path):
    model = small()
    with pytest.raises(ValueError,
                       match="type='q8_0' is for a .gguf file; .*own dtype, torch.float32"):
        minillm.save(model, tmp_path / "m", type="q8_0")
    with pytest.raises(ValueError,
                       match="type='f32' is for a .gguf file; .*own dtype, torch.bfloat16"):
        minillm.save(small().to(torch.bfloat16), tmp_path / "m", type="f32")
    for name in ("out.bin", "out.safetensors", "out.PT"):
        with pytest.raises(ValueError,
                           match=f"{name} looks like a file.* write to .*/out or .*/out.gguf"):
            minillm.save(model, tmp_path / name)
    assert not list(tmp_path.iterdir())
    minillm.save(model, tmp_path / "m-1.5", type="f32")
    minillm.load(tmp_path / "m-1.5")


def test_a_gguf_is_known_by_its_ending_in_any_case(tmp_path, pairs):
    model = minillm.Transformer(minillm.Config(pairs.vocab_size, 32, 1, 2, ffn=32))
    minillm.save(model, tmp_path / "m.GGUF", tokenizer=pairs)
    assert (tmp_path / "m.GGUF").read_bytes()[:4] == b"GGUF"
    assert minillm.load(tmp_path / "m.GGUF")[0].norm.weight.equal(model.norm.weight)
    with pytest.raises(ValueError,
                       match="a GGUF carries its tokenizer.* this is none: give tokenizer="):
        minillm.save(model, tmp_path / "n.gguf")


def test_what_a_16_bit_float_cannot_hold_is_not_written_as_one(tmp_path, pairs):
    model = minillm.Transformer(minillm.Config(pairs.vocab_size, 32, 1, 2, ffn=32))
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 4] = 1e7
    for type in ("f16", "q8_0"):
        with pytest.raises(ValueError,
                           match="ffn_up.weight holds .*16-bit float cannot.*'bf16' or"):
            minillm.save(model, tmp_path / "m.gguf", tokenizer=pairs, type=type)
    assert not list(tmp_path.iterdir())
    minillm.save(model, tmp_path / "m.gguf", tokenizer=pairs, type="bf16")
    found = minillm.load(tmp_path / "m.gguf", dtype="bfloat16")[0].layers[0].mlp.up_proj.weight
    assert found.equal(model.layers[0].mlp.up_proj.weight.to(torch.bfloat16))


def test_a_tokenizer_larger_than_the_embedding(tmp_path, sentence):
    with pytest.raises(ValueError, match="the tokenizer has 500 ids, the model's embedding has 24"):
        minillm.save(small(), tmp_path / "m", tokenizer=sentence)
    minillm.save(small(), tmp_path / "m")
    sentence.save(tmp_path / "m")
    with pytest.raises(ValueError, match="500 ids, the model's embedding has 24 rows"):
        minillm.load(tmp_path / "m")

    class Outside(SentencePiece):
        vocab_size = 20

    odd = Outside(sentence.proto)
    odd.bos = 24
    with pytest.raises(ValueError,
                       match="the tokenizer's bos is 24, but the model's embedding has 24"):
        minillm.save(small(), tmp_path / "n", tokenizer=odd)


def test_everything_is_checked_for_a_model_that_is_yet_to_be_made(tmp_path, sentence):
    (tmp_path / "mine.txt").write_text("mine")
    config = minillm.Config(500, 16, 1, 2)
    assert checkpoints.check_save(config, tmp_path / "m", sentence) == set()
    for path, options, message in [(tmp_path, {}, "mine.txt"),
                                   (tmp_path / "m", dict(type="q4"), "type='q4'"),
                                   (tmp_path / "m.gguf", {}, "this is none"),
                                   (tmp_path / "mine.txt" / "m", {},
                                    "mine.txt is not a directory")]:
        with pytest.raises((ValueError, OSError), match=message):
            checkpoints.check_save(config, path, **options)
    with pytest.raises(ValueError, match="no architecture of transformers"):
        checkpoints.check_save(minillm.Config(24, 16, 1, 2, norm="layer"), tmp_path / "m")
    with pytest.raises(ValueError, match="has biases or norms of q and k with window=3"):
        checkpoints.check_save(minillm.Config(24, 16, 1, 2, qk_norm=True, window=3), tmp_path / "m")
    with pytest.raises(ValueError, match="no architecture of transformers"):
        checkpoints.check_save(minillm.Config.gpt2(24, 16, 1, 2, window=3), tmp_path / "m")


# --- loading ------------------------------------------------------------------------------------


def test_a_loaded_model_says_where_it_came_from(tmp_path):
    assert small().source == ""
    minillm.save(small(), tmp_path / "m")
    assert minillm.load(tmp_path / "m")[0].source == str(tmp_path / "m")


def test_a_dtype_that_is_none_is_refused(tmp_path):
    minillm.save(small(), tmp_path / "m")
    for dtype in (
        "float",
        "int8",
        "bfloat61",
        torch.int32,
        "float8_e4m3fn",
        torch.float8_e5m2,
        "complex64",
        3,
    ):
        if dtype == "float":  # torch.float is float32
            assert minillm.load(tmp_path / "m", dtype=dtype)[0].norm.weight.dtype == torch.float32
            continue
        with pytest.raises(
            ValueError,
            match="is unknown; a model computes in one of: float32, float64, bfloat16, float16",
        ):
            minillm.load(tmp_path / "m", dtype=dtype)


SHARDED = """
import sys, torch
import torch.distributed as dist
from models import build
import minillm
from minillm import distributed
store = "file://" + sys.argv[2] + "/store"
dist.init_process_group("gloo", init_method=store, rank=int(sys.argv[3]), world_size=2)
for kind in ("llama", "gpt2"):
    model = minillm.train.shard(build(kind))
    minillm.save(model, sys.argv[1] + kind, shard_bytes=9000)
    minillm.save(model, sys.argv[1] + kind)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_model_is_saved_whole(tmp_path):
    here = os.path.dirname(__file__)
    env = {**os.environ, "PYTHONPATH": f"{here}:{os.path.dirname(here)}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "m"), str(tmp_path)]
    both = [subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE, text=True)
            for rank in range(2)]
    for process in both:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said[-2000:]
    for kind in ("llama", "gpt2"):
        assert minillm.load(tmp_path / f"m{kind}")[0](IDS).equal(build(kind)(IDS))


def test_only_the_first_of_several_processes_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(minillm.distributed, "place", lambda: (1, 2))
    minillm.save(small(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_the_record_names_every_file(tmp_path, sentence):
    minillm.save(minillm.Transformer(minillm.Config(500, 16, 1, 2)), tmp_path / "m", sentence,
                 shard_bytes=9000)
    assert huggingface.written(tmp_path / "m") == set(os.listdir(tmp_path / "m"))
    assert set(json.loads((tmp_path / "m" / "minillm.json").read_text())["sha256"]) == set(
        os.listdir(tmp_path / "m")
    ) - {"minillm.json"}
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    held = {name: safetensors.torch.load_file(p) for p in (tmp_path / "m").glob("*.safetensors")
            for name in [p.name]}
    assert index["weight_map"] == {key: name for name, ts in held.items() for key in ts}
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for ts in held.values()
                                                  for t in ts.values())


@pytest.mark.parametrize("device", ["gpu", "foo", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_one_line_before_any_work(device, monkeypatch):
    monkeypatch.setattr(zoo, "tiny", lambda: pytest.fail("a model was trained"))
    for load in (lambda: zoo.load("tiny", device=device),
                 lambda: minillm.checkpoints.load("nowhere", device=device)):
        with pytest.raises(ValueError) as error:
            load()
        assert str(error.value).startswith(
            f"device={device!r} is not possible here; possible: cpu")
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
