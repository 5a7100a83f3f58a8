"""Files that are broken by chance: each is an error that names the file, or is read as
what it says; and nothing else is touched.

Over 1,000 of them, the same in every run.
"""

import json
import os
import shutil
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from models import build, two
from test_tokenizer import tables
from test_train import examples

import minillm
from minillm import data, zoo
from minillm.model.tokenizer import BytePair, SentencePiece

checks = {"files": 0, "refused": 0}


def many(n):
    return settings(max_examples=n, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


# An edit of a file: what to do, where (often in the first bytes, which say what the rest
# is), and with which bytes.
bytes_of_lies = some.one_of(some.binary(min_size=1, max_size=12),
                            some.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little")),
                            some.sampled_from([b"0", b"9", b"-", b"}", b'"', b"\n", b",",
                                               b"[" * 5000, b"\xff", b"\0" * 8, b"\\ud800"]))
edit = some.tuples(some.sampled_from(["put", "insert", "delete", "cut", "swap"]),
                   some.one_of(some.integers(0, 3000), some.floats(0, 1)),
                   bytes_of_lies)
edits = some.lists(edit, min_size=1, max_size=3)


def damaged(raw, edits):
    raw = bytearray(raw)
    for kind, place, lie in edits:
        at = int(place * len(raw)) if isinstance(place, float) else min(place, len(raw))
        if kind == "put":
            raw[at : at + len(lie)] = lie
        elif kind == "insert":
            raw[at:at] = lie
        elif kind == "delete":
            del raw[at : at + len(lie)]
        elif kind == "cut":
            del raw[at:]
        else:
            raw[at : at + 16] = raw[at : at + 16][::-1]
    return bytes(raw)


def refused(call, path):
    """Whether it fails as it should: one of our errors, that names the file."""
    checks["files"] += 1
    try:
        return False, call()
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error), f"the error does not name {path}: {error}"
        checks["refused"] += 1
        return True, None


def same(a, b):
    """Bit for bit, nan included."""
    return (a.shape == b.shape and a.dtype == b.dtype
            and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("broken") / "m"
    minillm.save(minillm.Transformer(minillm.Config(500, 16, 2, 4, kv_heads=2, ffn=32,
                                                    positions=32)), path,
                 tokenizer=SentencePiece.train([data.topics()[:30000]], 500))
    return path


def is_what_its_files_say(model, path):
    told = json.loads((path / "config.json").read_text())
    held = safetensors.torch.load_file(path / "model.safetensors")
    c = model.config
    names = dict(vocab_size="vocab_size", width="hidden_size", layers="num_hidden_layers",
                 ffn="intermediate_size", eps="rms_norm_eps",
                 heads="num_attention_heads", positions="max_position_embeddings")
    for ours, theirs in names.items():
        if theirs in told:
            assert getattr(c, ours) == told[theirs], theirs
    for name, p in model.named_parameters():
        assert same(p.data, held[f"model.{name}"].to(p.dtype)), name


@many(260)
@given(edits)
def test_broken_tensors(checkpoint, edits):
    path = checkpoint.with_name("tensors")
    shutil.copytree(checkpoint, path, dirs_exist_ok=True)
    (path / "model.safetensors").write_bytes(
        damaged((checkpoint / "model.safetensors").read_bytes(), edits)
    )
    failed, loaded = refused(lambda: zoo.load(path), path)
    if not failed:
        is_what_its_files_say(loaded[0], path)


anything = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-9, 10**12)
    | some.floats()
    | some.text(max_size=5),
    lambda inner: (
        some.lists(inner, max_size=2) | some.dictionaries(some.text(max_size=3), inner, max_size=2)
    ),
)


@many(260)
@given(some.data())
def test_broken_configurations(checkpoint, draw):
    path = checkpoint.with_name("config")
    shutil.copytree(checkpoint, path, dirs_exist_ok=True)
    name = draw.draw(some.sampled_from(["config.json", "config.json", "tokenizer_config.json",
                                        "tokenizer.model"]))
    raw = (checkpoint / name).read_bytes()
    if name.endswith(".json") and draw.draw(some.booleans()):
        told = json.loads(raw)
        told[draw.draw(some.sampled_from(sorted(told)))] = draw.draw(anything)
        raw = json.dumps(told).encode()
    else:
        raw = damaged(raw, draw.draw(edits))
    (path / name).write_bytes(raw)
    failed, loaded = refused(lambda: zoo.load(path), path)
    if not failed:
        is_what_its_files_say(loaded[0], path)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    tokenizer = BytePair.from_gguf(tables("smollm"))
    path = tmp_path_factory.mktemp("broken") / "whole.gguf"
    config = minillm.Config(tokenizer.vocab_size, 32, 2, 4, kv_heads=2, ffn=32, positions=32)
    minillm.save(minillm.Transformer(config), path, tokenizer=tokenizer)
    return path


@many(260)
@given(edits)
def test_broken_ggufs(gguf_file, edits):
    import gguf

    path = gguf_file.with_name("broken.gguf")
    path.write_bytes(damaged(gguf_file.read_bytes(), edits))
    failed, loaded = refused(lambda: zoo.load(path), path)
    if not failed:
        held = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
                for t in gguf.GGUFReader(path).tensors}
        model = loaded[0]
        assert (same(model.embed_tokens.weight.data, held["token_embd.weight"])
                and same(model.norm.weight.data, held["output_norm.weight"]))
        for i, block in enumerate(model.layers):
            assert same(block.mlp.down_proj.weight.data, held[f"blk.{i}.ffn_down.weight"])


def after(raw, text):
    """Where what follows this text begins."""
    return raw.index(text) + len(text)


GGUF_LIES = {  # where a number stands, its format, what to write there
    "tensors": lambda raw: (8, "<Q", 1 << 62),
    "fields": lambda raw: (16, "<Q", 1 << 62),
    "a long key": lambda raw: (24, "<Q", 1 << 40),
    "a long text": lambda raw: (after(raw, b"general.architecture") + 4, "<Q", (1 << 64) - 1),
    "a long array of texts": lambda raw: (after(raw, b"tokenizer.ggml.tokens") + 8, "<Q", 1 << 40),
    "a long array of numbers": lambda raw: (after(raw, b"tokenizer.ggml.token_type") + 4, "<IQ", 0,
                                            1 << 62),
    "an unknown type of value": lambda raw: (after(raw, b"general.architecture"), "<I", 77),
    "dimensions": lambda raw: (after(raw, b"blk.0.ffn_up.weight"), "<I", 1 << 30),
    "a size": lambda raw: (after(raw, b"blk.0.ffn_up.weight") + 4, "<Q", 1 << 50),
    "an offset beyond the end": lambda raw: (after(raw, b"blk.0.ffn_up.weight") + 24, "<Q",
                                             1 << 50),
    "an offset in another tensor": lambda raw: (after(raw, b"blk.0.ffn_up.weight") + 24, "<Q", 32),
}


@pytest.mark.parametrize("lie", GGUF_LIES)
def test_a_gguf_whose_counts_or_offsets_lie(gguf_file, lie):
    raw, path = bytearray(gguf_file.read_bytes()), gguf_file.with_name("lies.gguf")
    at, form, *numbers = GGUF_LIES[lie](raw)
    struct.pack_into(form, raw, at, *numbers)
    path.write_bytes(raw)
    with pytest.raises(ValueError,
                       match="overlap" if "another" in lie
                       else "lies.gguf is not a whole GGUF file"):
        zoo.load(path)


def test_whole_numbers_are_no_weights(checkpoint):
    path = checkpoint.with_name("integers")
    shutil.copytree(checkpoint, path)
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ValueError, match="is .* of torch.int32, should be"):
        zoo.load(path)


@pytest.mark.parametrize("technique", ["lora", "prompts", "quant", "sparse"])
def test_broken_files_of_techniques(tmp_path, technique):
    torch.manual_seed(0)
    page = minillm.techniques()[technique]
    options = dict(anyway=True) if technique == "sparse" else {}
    page.save(page.wrap(build("llama"), **options), tmp_path / "whole")
    raw, path = (tmp_path / "whole").read_bytes(), tmp_path / "broken"
    model = build("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}

    @many(60)
    @given(edits)
    def broken(edits):
        path.write_bytes(damaged(raw, edits))
        failed, _ = refused(lambda: page.load(model, path), path)
        if not failed:
            held = safetensors.torch.load_file(path)
            state = model.state_dict()
            assert all(any(same(t, s) for s in state.values() if s.shape == t.shape)
                       for t in held.values() if t.is_floating_point())
            page.unwrap(model)
            if technique in ("quant", "sparse"):  # the file's weights, not the model's
                model.load_state_dict(before)
        assert (list(model.state_dict()) == list(before)
                and all(same(t, before[name]) for name, t in model.state_dict().items()))

    broken()


def test_a_size_in_the_settings_that_the_tensors_do_not_have(tmp_path):
    """It is refused before any memory is taken: it might be all that there is."""
    minillm.lora.save(minillm.lora.wrap(two(), r=2), tmp_path / "a")
    tensors, metadata = minillm.registry.store.read(tmp_path / "a")
    lie = metadata["sites"].replace('"r": 2', f'"r": {1 << 17}')
    safetensors.torch.save_file(tensors, tmp_path / "a", metadata | {"sites": lie})
    with pytest.raises(ValueError, match="'0': the settings do not fit the tensors: .*131072"):
        minillm.lora.load(two(), tmp_path / "a")


def test_broken_training_checkpoints(tmp_path):
    def run(**options):
        torch.manual_seed(0)
        model = minillm.lora.wrap(build("llama"), r=2)
        return minillm.train.train(model, examples(), steps=2, lr=1e-2, batch_size=4,
                                   progress=False, checkpoints=tmp_path, keep=1,
                                   **options)

    run()
    (path,) = tmp_path.glob("step-*")
    raw = path.read_bytes()

    @many(60)
    @given(edits)
    def broken(edits):
        path.write_bytes(damaged(raw, edits))
        refused(lambda: run(resume=True), path)
        assert path.exists()

    broken()


FILES = {
    "a.txt": "Some text.\n" * 30,
    "a.jsonl": '{"text": "one two three"}\n{"prompt": "1+1=", "completion": "2"}\n{"messages": '
               '[{"role": "user", "content": "hi"}, '
               '{"role": "assistant", "content": "hello"}]}\n' * 3,
    "a.csv": 'prompt,completion\n"say ""hi"",\nplease",hi\n1,2\n' * 2,
}


@pytest.mark.parametrize("name", FILES)
def test_broken_data(tmp_path, name):
    tokenizer = SentencePiece.train([data.topics()[:30000]], 500)
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")
    path = tmp_path / name

    @many(120)
    @given(edits)
    def broken(edits):
        path.write_bytes(damaged(FILES[name].encode(), edits))
        failed, found = refused(lambda: data.read(path, tokenizer, length=64), path)
        if not failed:
            for example in found:
                assert (len(example.ids) == len(example.labels) <= 64
                        and any(label != -100 for label in example.labels[1:]))
                assert all(label in (-100, i) for i, label in zip(example.ids, example.labels))
            if name == "a.txt":
                ids = [found[0].ids[0], *(i for example in found for i in example.labels[1:])]
                assert ids.pop() == tokenizer.eos
                written = path.read_bytes().decode("utf-8-sig")
                assert tokenizer.decode(ids) == written.replace("\r\n", "\n").replace("\r", "\n")

    broken()


def test_that_there_were_a_thousand():
    if "PYTEST_XDIST_WORKER" in os.environ and checks["files"] < 1000:
        pytest.skip("another process ran some of this file's tests, and counted them")
    assert checks["files"] >= 1000 and 300 < checks["refused"] < checks["files"] - 100, checks
