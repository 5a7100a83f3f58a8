"""What a GGUF says of positions and norms, read as llama.cpp reads it, and written as
it wants it."""

import pytest
import torch
from conftest import hugging_face
from test_hub import LLAMA3
from test_tokenizer import tables

import minillm
from minillm import checkpoints, zoo
from minillm.checkpoints import gguf as ours
from minillm.model.tokenizer import BytePair

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tokenizer():
    return BytePair.from_gguf(tables("smollm"))


def saved(tokenizer, path, **options):
    shape = dict(kv_heads=2, ffn=32, positions=256, rope_base=500.0)
    model = minillm.Transformer(minillm.Config(tokenizer.vocab_size, 64, 1, 2,
                                               **{**shape, **options})).eval()
    checkpoints.save(model, path, tokenizer=tokenizer)
    return model


def with_fields(path, arch="llama", tensors=None, **fields):
    """The same file again, with more metadata (`_` is a dot) and tensors."""
    old, new = gguf.GGUFReader(path), path.with_name("more.gguf")
    writer = gguf.GGUFWriter(new, arch)
    for name, field in old.fields.items():
        if name.startswith(("tokenizer", arch)):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind,
                                 field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None)
    for name, value in fields.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32
        writer.add_key_value(f"{arch}.{name}", value, kind)
    for t in old.tensors:
        writer.add_tensor(t.name, t.data)
    for name, t in (tensors or {}).items():
        writer.add_tensor(name, t.numpy())
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    return new


@pytest.mark.parametrize("fields, scaling", [
    ({"rope.scaling.factor": 4.0}, 4.0), ({"rope.scale_linear": 2.5}, 2.5),
    ({"rope.scaling.factor": 1.0}, None),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, 4.0),
    ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ({"rope.scaling.factor": 0.0}, None),
])
def test_a_factor_without_a_type_is_linear(tmp_path, tokenizer, fields, scaling):
    saved(tokenizer, tmp_path / "m.gguf")
    model, _ = zoo.load(with_fields(tmp_path / "m.gguf", **fields))
    assert model.config.rope_scaling == (scaling and dict(rope_type="linear", factor=scaling))


@pytest.mark.parametrize("fields, message", [
    ({"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5},
     "yarn_ext_factor is not 1"),
    ({"rope.scaling.type": "yarn"}, "lacks .*rope.scaling.factor"),
    ({"rope.scaling.attn_factor": 0.5}, "attn_factor is not 1"),
    ({"attention.sliding_window": 8.0}, "a sliding window or experts"),
    ({"rope.scaling.factor": -4.0}, "numbers above 0")])
def test_another_scaling_is_refused(tmp_path, tokenizer, fields, message):
    saved(tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=message) as error:
        zoo.load(with_fields(tmp_path / "m.gguf", **fields))
    assert str(error.value).count("more.gguf") == 1


def llama3_factors():
    """What llama.cpp's converter writes: a factor for each pair, by its wavelength."""
    import math

    found = []
    for i in range(16):
        wavelength = 2 * math.pi * 500.0 ** (2 * i / 32)
        low, high = 8192 / 1.0, 8192 / 4.0
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        found.append(1.0 if wavelength < high else 8.0 if wavelength > low
                     else 1 / ((1 - smooth) / 8.0 + smooth))
    return torch.tensor(found)


def test_llama3s_factors_are_known_again_and_others_are_kept(tmp_path, tokenizer):
    saved(tokenizer, tmp_path / "m.gguf", rope_base=5e7)
    known = minillm.Config(24, 64, 1, 2, rope_base=5e7,
                           rope_scaling=dict(LLAMA3, original_max_position_embeddings=8192))
    from minillm.checkpoints.gguf import factors_of

    for factors, expected in ((factors_of(known), known.rope_scaling), (torch.ones(16), None),
                              (torch.arange(1.0, 17),
                               dict(rope_type="factors",
                                    factors=[float(i) for i in range(1, 17)]))):
        path = with_fields(tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
        model, _ = zoo.load(path)
        assert model.config.rope_scaling == expected
        checkpoints.save(model, tmp_path / "back.gguf", tokenizer=tokenizer, force=True)
        again, _ = zoo.load(tmp_path / "back.gguf")
        ids = torch.randint(24, (1, 200))
        assert again.config == model.config and again(ids).equal(model(ids))
    with pytest.raises(ValueError,
                       match="transformers has no name for the rope_scaling of this model"):
        checkpoints.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="scales its positions twice"):
        zoo.load(with_fields(tmp_path / "m.gguf",
                             tensors={"rope_freqs.weight": torch.arange(1.0, 17)},
                             **{"rope.scaling.factor": 2.0}))
    with pytest.raises(ValueError,
                       match="rope_scaling has 3 factors, and heads of 32 have 16 pairs"):
        zoo.load(with_fields(tmp_path / "m.gguf",
                             tensors={"rope_freqs.weight": torch.arange(1.0, 4)}))


def test_our_factors_are_those_of_the_converter_of_llama_cpp():
    from minillm.checkpoints.gguf import factors_of

    config = minillm.Config(24, 64, 1, 2, rope_base=500.0,
                            rope_scaling=dict(LLAMA3, original_max_position_embeddings=8192))
    torch.testing.assert_close(factors_of(config), llama3_factors())


@pytest.mark.parametrize("options, arch", [
    (dict(qk_norm=True, head_size=16), "qwen3"), (dict(qkv_bias=True), "qwen2"),
    (dict(qkv_bias=True, rope_scaling=LLAMA3), "llama"),
    (dict(qkv_bias=True, head_size=16), "llama"), (dict(rope_scaling=LLAMA3), "llama"),
    (dict(tied=False), "llama")])
def test_the_names_are_those_that_the_architecture_has(tmp_path, tokenizer, options, arch):
    saved(tokenizer, tmp_path / "m.gguf", **options)
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    assert file.fields["general.architecture"].contents() == arch
    (number,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    known = {gguf.TENSOR_NAMES[t].format(bid=0) for t in gguf.MODEL_TENSORS[number]}
    assert {t.name.rsplit(".", 1)[0] for t in file.tensors} <= known


def test_llama3_is_no_scaling_of_llama_cpps_qwen3(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="Qwen3 has no place for the rope_scaling 'llama3'"):
        saved(tokenizer, tmp_path / "m.gguf", qk_norm=True, rope_scaling=LLAMA3)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_our_qwen3(tmp_path, tokenizer):
    # it reads no other size
    model = saved(tokenizer, tmp_path / "m.gguf", qk_norm=True, head_size=128, tied=False)
    theirs = (
        hugging_face()
        .AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        .eval()
    )
    ids = torch.randint(24, (2, 9))
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)


def test_values_of_every_type_are_skipped(tmp_path, tokenizer):
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for kind in kinds:
        value = {kinds.STRING: "x", kinds.BOOL: True}.get(kind, 1)
        if kind is not kinds.ARRAY:
            writer.add_key_value(f"one.{kind.name}", value, kind)
            writer.add_key_value(f"some.{kind.name}", [value] * 3, kinds.ARRAY, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours.check(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="lacks|has no|missing") as error:
        zoo.load(tmp_path / "m.gguf")
    assert "not a whole GGUF file" not in str(error.value)
