"""A file of a technique belongs to one model: its weights, its configuration, its parameters."""

import json

import pytest
import safetensors.torch
import torch
from models import build, logits, two
from test_store import OPTIONS, learn
from torch import nn

import minillm
from minillm.registry import fingerprint


def other(kind="llama"):
    model = build(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("name", minillm.techniques())
def test_a_file_belongs_to_one_model(name, tmp_path):
    technique = minillm.techniques()[name]
    alone = {} if name == "freeze" else dict(learned=False)
    technique.save(technique.wrap(build("llama"), **OPTIONS.get(name, {})), tmp_path / "a", **alone)
    model = other()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"belongs to another model: it was made for 'Transformer' \(fingerprint \w{8}\), "
              r"this model is "
        r"'Transformer' \(fingerprint \w{8}\).*first '.*any_base=True",
    ):
        technique.load(model, tmp_path / "a")
    assert (all(t.equal(before[key]) for key, t in model.state_dict().items())
            and not minillm.layers(model))
    technique.load(model, tmp_path / "a", any_base=True)
    technique.load(build("llama"), tmp_path / "a")


def test_casts_and_formats_keep_the_model(tmp_path):
    model = minillm.lora.wrap(build("llama"), r=2)
    minillm.lora.save(model, tmp_path / "a")
    for base in (build("llama").bfloat16(), build("llama").half(), build("llama").double(),
                 minillm.quant.wrap(build("llama")),
                 minillm.prune.wrap(build("llama")), minillm.freeze.wrap(build("llama"), last=1)):
        minillm.lora.load(base, tmp_path / "a")
    minillm.lora.save(minillm.lora.wrap(minillm.quant.wrap(build("llama").bfloat16()), r=2),
                      tmp_path / "b")
    minillm.lora.load(build("llama"), tmp_path / "b")
    with pytest.raises(ValueError, match="another model"):
        minillm.lora.load(other().bfloat16(), tmp_path / "a")


def test_a_merged_model_is_another_model(tmp_path):
    model = minillm.lora.wrap(build("llama"), r=2)
    for layer in minillm.layers(model).values():
        nn.init.normal_(layer.patches["lora"].B)
    minillm.prune.save(minillm.prune.wrap(minillm.lora.merge(model)), tmp_path / "a", learned=False)
    with pytest.raises(ValueError, match="another model.*first 'layers.0.self_attn.q_proj.weight'"):
        minillm.prune.load(build("llama"), tmp_path / "a")


def test_the_fingerprint_samples_every_parameter():
    model = build("llama")
    then = fingerprint.of(model, without=())
    assert (len(then["samples"]) == len(list(model.parameters()))
            and fingerprint.differs(model, then) is None)
    assert json.loads(json.dumps(then)) == then
    for name, p in model.named_parameters():
        changed = build("llama")
        with torch.no_grad():
            dict(changed.named_parameters())[name].add_(1e-3)
        assert (
            f"1 of {len(then['samples'])} parameters differ, first {name!r}"
            in fingerprint.differs(changed, then)
        )
    model.source = "tiny"
    assert "this model is 'tiny'" in fingerprint.differs(other(), then).replace(
        "'Transformer' (fingerprint", "'tiny' (fingerprint"
    )


@pytest.mark.parametrize("base", ["", "[]", "{}", '{"model": "x", "samples": {"a": 1}}',
                                  '{"model": "x", "samples": {"a": ["int8", [1], [1]]}}'])
def test_a_broken_fingerprint_is_an_error(base, tmp_path):
    minillm.lora.save(minillm.lora.wrap(build("llama"), r=2), tmp_path / "a")
    tensors, metadata = minillm.registry.store.read(tmp_path / "a")
    safetensors.torch.save_file(tensors, tmp_path / "b", dict(metadata, base=base))
    with pytest.raises(ValueError, match="any_base=True"):
        minillm.lora.load(build("llama"), tmp_path / "b")


# --- a base in a format, and the configuration ------------------------------------------------


def over(form, model):
    return {"int8": minillm.quant.wrap, "csr": sparse, "dense": lambda m: m}[form](model)


def sparse(model):
    return minillm.sparse.wrap(
        minillm.prune.merge(minillm.prune.wrap(model, sparsity=0.75), keep=False)
    )


def changed(model):
    """The linear matrices are others; embeddings, norms and the head are the same."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj.weight" in name:
                p.mul_(3)
    return model


FORMS = [
    ("int8", "int8"),
    ("int8", "dense"),
    ("dense", "int8"),
    ("csr", "csr"),
    ("csr", "dense"),
    ("csr", "int8"),
]


@pytest.mark.parametrize("made, used", FORMS)
@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "hf_gpt2"])
def test_an_adapter_that_was_made_over_a_format_belongs_to_one_base(
    kind, made, used, cast, tmp_path
):
    minillm.lora.save(minillm.lora.wrap(over(made, build(kind)), r=2), tmp_path / "a")
    model = build(kind).to(cast) if cast and made != used else build(kind)
    minillm.lora.load(over(used, model), tmp_path / "a")
    if cast and made == used:
        minillm.lora.load(over(used, build(kind)).to(cast), tmp_path / "a")
    elif kind == "llama":
        with pytest.raises(ValueError, match="differ, first 'layers.0.self_attn.q_proj.weight'"):
            minillm.lora.load(over(used, changed(build(kind))), tmp_path / "a")


def test_an_adapter_over_int8_of_a_merged_model_does_not_load_on_the_original(tmp_path):
    model = learn(minillm.lora.wrap(build("llama"), r=2))
    minillm.quant.wrap(minillm.lora.merge(model, keep=False))
    minillm.lora.save(minillm.lora.wrap(model, r=2), tmp_path / "b")
    with pytest.raises(ValueError, match="belongs to another model"):
        minillm.lora.load(minillm.quant.wrap(build("llama")), tmp_path / "b")


def test_a_row_of_zeros_and_an_embedding_are_stored_exactly_enough():
    model = build("llama")
    model.layers[0].mlp.up_proj.weight.data[3] = 0
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    minillm.quant.wrap(minillm.untie(model), ".*_proj|embed_tokens|lm_head")
    for name, form in fingerprint.formats(model):
        off = form.rounding().expand(form.shape)
        off = off.T if form.leaf.transposed else off
        assert ((form.weight - dense[name]).abs() <= off * 1.0001).all() and off.max() < 0.02, name
    form = model.layers[0].mlp.up_proj
    assert not form.rounding()[3].any() and (form.rounding()[4] == form.scale[4] / 2).all()


def test_what_a_format_stores_is_in_its_own_file_and_may_be_trained(tmp_path):
    model = minillm.quant.wrap(changed(build("llama")))
    minillm.quant.save(model, tmp_path / "a")
    assert logits(minillm.quant.load(build("llama"), tmp_path / "a")).equal(logits(model))


def test_a_file_without_what_came_later_still_loads(tmp_path):
    minillm.lora.save(minillm.lora.wrap(minillm.quant.wrap(build("llama")), r=2), tmp_path / "a")
    tensors, metadata = minillm.registry.store.read(tmp_path / "a")
    base = json.loads(metadata["base"])
    old = {key: base[key] for key in ("model", "samples")}
    safetensors.torch.save_file(tensors, tmp_path / "b", dict(metadata, base=json.dumps(old)))
    minillm.lora.load(minillm.quant.wrap(build("llama")), tmp_path / "b")
    with pytest.raises(ValueError, match="another model"):
        minillm.lora.load(other(), tmp_path / "b")


def sized(layers=2, **options):
    torch.manual_seed(1)
    model = minillm.Transformer(minillm.Config(24, 16, 2, 4, **options))
    if layers > 2:
        longer = minillm.Transformer(minillm.Config(24, 16, layers, 4, **options))
        longer.load_state_dict(model.state_dict(), strict=False)
        return longer
    return model


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(rope_base=5e5),
            "with rope_base=10000.0, this model is 'Transformer' with rope_base=500000.0",
        ),
        (
            dict(window=2, eps=1e-6),
            "with eps=1e-05, window=None, this model is 'Transformer' with eps=1e-06, window=2",
        ),
        (
            dict(activation="gelu"),
            "with activation='silu', this model is .* with activation='gelu'",
        ),
        (dict(layers=3), "with layers=2, this model is .* with layers=3"),
        (dict(tied=False), None),
        (dict(positions=64), None),
        (dict(eps=9.999999747378752e-06), None),
    ],
)
def test_a_file_belongs_to_one_configuration(options, message, tmp_path):
    minillm.lora.save(minillm.lora.wrap(sized(), r=2), tmp_path / "a")
    model = sized(**options)
    if message is None:
        minillm.lora.load(model, tmp_path / "a")
        return
    with pytest.raises(ValueError, match=f"it was made for 'Transformer' {message}"):
        minillm.lora.load(model, tmp_path / "a")
    assert not minillm.layers(model)


def test_heads_are_part_of_the_model(tmp_path):
    minillm.lora.save(minillm.lora.wrap(sized(), r=2), tmp_path / "a")
    torch.manual_seed(1)
    model = minillm.Transformer(minillm.Config(24, 16, 2, 2))
    with pytest.raises(
        ValueError,
        match="with heads=4, kv_heads=4, head_size=4, this model is 'Transformer' with heads=2",
    ):
        minillm.lora.load(model, tmp_path / "a")


def test_a_layer_more_or_less_is_another_model(tmp_path):
    short, long = two(), two().append(nn.Linear(4, 4))
    long.load_state_dict(short.state_dict(), strict=False)
    minillm.lora.save(minillm.lora.wrap(long, ["0"], r=2), tmp_path / "long")
    minillm.lora.save(minillm.lora.wrap(short, ["0"], r=2), tmp_path / "short")
    for path, model, message in (
        ("long", short, "lacks the parameter '3.bias' .2 such"),
        ("short", long, "has also the parameter '3.bias' .2"),
    ):
        with pytest.raises(ValueError, match=message):
            minillm.lora.load(minillm.lora.unwrap(model), tmp_path / path)


@pytest.mark.parity
def test_a_file_belongs_to_one_configuration_of_transformers(tmp_path):
    minillm.lora.save(minillm.lora.wrap(build("hf_llama"), r=2), tmp_path / "a")
    model = build("hf_llama")
    model.config.use_cache, model.config.pad_token_id, model.config.attention_dropout = (
        False,
        3,
        0.5,
    )
    minillm.lora.unwrap(minillm.lora.load(model, tmp_path / "a"))
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(
        ValueError, match="with rms_norm_eps=1e-06, this model is .* with rms_norm_eps=0.001"
    ):
        minillm.lora.load(model, tmp_path / "a")


def test_a_number_is_not_nan():
    here, nan = (
        ["float32", [2], [1.0, 2.0], "", [0.0] * 4],
        ["float32", [2], [1.0, float("nan")], "", [0.0] * 4],
    )
    assert fingerprint.agree(here, here) and fingerprint.agree(nan, nan)
    assert not fingerprint.agree(here, nan) and not fingerprint.agree(nan, here)


def test_the_roundings_of_two_formats_add_up():
    """One format moved the weight up and the other one down, each by as much as it may."""
    def moved(form, value, off):
        return ["float32", [1], [value], form, [off]]

    up, down = moved("int8", 1.1, 0.1), moved("nf4", 0.8, 0.2)
    assert fingerprint.agree(up, down) and fingerprint.agree(down, up)
    assert not fingerprint.agree(up, moved("nf4", 0.7, 0.2))
    assert not fingerprint.agree(up, moved("", 0.8, 0.0)), "a dense weight moves by nothing"
