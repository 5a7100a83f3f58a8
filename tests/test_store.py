"""What a technique's file holds, which model it belongs to, and that nothing of the user's is lost."""

import json
import os

import pytest
import safetensors
import safetensors.torch
import torch
from models import IDS, build, logits, two
from torch import nn

import minillm
from minillm import data, fingerprint
from minillm.train import train


def learn(model, steps=4):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(24, (8,), generator=draw).tolist() for _ in range(8)]
    train(model, [data.Example(row, list(row)) for row in rows], steps=steps, lr=0.05, batch_size=4, progress=False)
    return model


def keys(path):
    with safetensors.safe_open(path, "pt") as file:
        return set(file.keys())


OPTIONS = {"freeze": dict(last=1), "lora": dict(r=2), "adapters": dict(size=2), "prompts": dict(length=2), "sparse": dict(anyway=True)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_llama"])
def test_what_training_changed_is_in_the_file(kind, tmp_path):
    """For each technique: wrap, train, save; the file on a fresh model gives the trained model."""
    for name, technique in minillm.techniques().items():
        model = learn(technique.wrap(build(kind), **OPTIONS.get(name, {}))).eval()
        technique.save(model, tmp_path / name)
        again = technique.load(build(kind), tmp_path / name)
        assert torch.equal(logits(again), logits(model)), name
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()], name


def test_below_lora_nothing_of_the_model_is_in_the_file_unless_it_learns(tmp_path):
    model = minillm.lora.wrap(build("llama"), ["q_proj"], r=2)
    minillm.lora.save(model, tmp_path / "a")
    assert keys(tmp_path / "a") == {f"layers.{i}.self_attn.q_proj.{key}" for i in range(3) for key in "AB"}
    model.lm_head.weight.requires_grad_(True)  # peft calls this modules_to_save
    learn(model).eval()
    minillm.lora.save(model, tmp_path / "a")
    assert "learned:lm_head.weight" in keys(tmp_path / "a") and len(keys(tmp_path / "a")) == 7
    again = minillm.lora.load(build("llama"), tmp_path / "a")
    assert logits(again).equal(logits(model)) and again.lm_head.weight.requires_grad
    minillm.lora.save(model, tmp_path / "b", learned=False)
    with pytest.raises(ValueError, match="differ, first 'lm_head.weight'"):
        minillm.lora.load(build("llama"), tmp_path / "b")


def test_freeze_saves_what_a_format_stored_since(tmp_path):
    model = learn(minillm.freeze.wrap(build("llama"), last=1))
    minillm.quant.wrap(model)
    minillm.freeze.save(model, tmp_path / "freeze"), minillm.quant.save(model, tmp_path / "quant")
    assert "learned:layers.2.mlp.up_proj.weight" in keys(tmp_path / "freeze")
    for order in (("freeze", "quant"), ("quant", "freeze")):
        again = build("llama")
        for name in order:
            minillm.techniques()[name].load(again, tmp_path / name)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)
    frozen = {name for name, p in minillm.quant.unwrap(model).named_parameters() if not p.requires_grad}
    assert "layers.0.mlp.up_proj.weight" in frozen and "layers.2.mlp.up_proj.weight" not in frozen


def test_freeze_of_a_tied_model_is_saved_once_and_read_under_both_names(tmp_path):
    model = learn(minillm.freeze.wrap(build("gpt2"), ["layers"]))
    minillm.freeze.save(model, tmp_path / "a")
    assert "learned:embed_tokens.weight" in keys(tmp_path / "a") and "learned:lm_head.weight" not in keys(tmp_path / "a")
    for other in (build("gpt2"), minillm.untie(build("gpt2"))):
        assert torch.equal(logits(minillm.freeze.load(other, tmp_path / "a")), logits(model))


def test_freeze_of_a_file_takes_the_place_of_what_was_frozen(tmp_path):
    minillm.freeze.save(minillm.freeze.wrap(build("llama"), last=2), tmp_path / "a")
    model = minillm.freeze.wrap(build("llama"), ["layers.2"])
    with pytest.raises(ValueError, match="has freeze already.*replace=True"):
        minillm.freeze.load(model, tmp_path / "a")
    minillm.freeze.load(model, tmp_path / "a", replace=True)
    wanted = minillm.freeze.wrap(build("llama"), last=2)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in wanted.parameters()]


# --- the fingerprint --------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"belongs to another model: it was made for 'Transformer' \(fingerprint \w{8}\), this model is "
                                         r"'Transformer' \(fingerprint \w{8}\).*first '.*any_base=True"):
        technique.load(model, tmp_path / "a")
    assert all(t.equal(before[key]) for key, t in model.state_dict().items()) and not minillm.layers(model)
    technique.load(model, tmp_path / "a", any_base=True)
    technique.load(build("llama"), tmp_path / "a")


def test_casts_and_formats_keep_the_model(tmp_path):
    model = minillm.lora.wrap(build("llama"), r=2)
    minillm.lora.save(model, tmp_path / "a")
    for base in (build("llama").bfloat16(), build("llama").half(), build("llama").double(), minillm.quant.wrap(build("llama")),
                 minillm.prune.wrap(build("llama")), minillm.freeze.wrap(build("llama"), last=1)):
        minillm.lora.load(base, tmp_path / "a")
    minillm.lora.save(minillm.lora.wrap(minillm.quant.wrap(build("llama").bfloat16()), r=2), tmp_path / "b")
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
    assert len(then["samples"]) == len(list(model.parameters())) and fingerprint.differs(model, then) is None
    assert json.loads(json.dumps(then)) == then
    for name, p in model.named_parameters():
        changed = build("llama")
        with torch.no_grad():
            dict(changed.named_parameters())[name].add_(1e-3)
        assert f"1 of {len(then['samples'])} parameters differ, first {name!r}" in fingerprint.differs(changed, then)
    model.source = "tiny"
    assert "this model is 'tiny'" in fingerprint.differs(other(), then).replace("'Transformer' (fingerprint", "'tiny' (fingerprint")


@pytest.mark.parametrize("base", ["", "[]", "{}", '{"model": "x", "samples": {"a": 1}}',
                                  '{"model": "x", "samples": {"a": ["int8", [1], [1]]}}'])
def test_a_broken_fingerprint_is_an_error(base, tmp_path):
    minillm.lora.save(minillm.lora.wrap(build("llama"), r=2), tmp_path / "a")
    tensors, metadata = minillm.verbs.read(tmp_path / "a")
    safetensors.torch.save_file(tensors, tmp_path / "b", dict(metadata, base=base))
    with pytest.raises(ValueError, match="any_base=True"):
        minillm.lora.load(build("llama"), tmp_path / "b")


# --- files of others ----------------------------------------------------------------------------------


def test_a_file_that_is_not_ours_is_never_replaced(tmp_path):
    model, path = minillm.lora.wrap(build("llama"), r=2), tmp_path / "a"
    path.write_text("my diary")
    for technique, m in ((minillm.lora, model), (minillm.freeze, minillm.freeze.wrap(build("llama"), last=1))):
        with pytest.raises(FileExistsError, match="a exists, and no technique of minillm wrote it; force=True"):
            technique.save(m, path)
    assert path.read_text() == "my diary"
    minillm.lora.save(model, path, force=True)
    minillm.lora.save(model, path)  # ours by now
    with pytest.raises(FileExistsError, match="is a directory"):
        minillm.lora.save(model, tmp_path, force=True)
    safetensors.torch.save_file({"x": torch.ones(1)}, path)
    with pytest.raises(FileExistsError):
        minillm.lora.save(model, path)


def test_the_file_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        minillm.lora.save(minillm.lora.wrap(build("llama"), r=2), tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_refused_load_changes_nothing(tmp_path):
    """Also where the last leaf of several cannot be stored."""
    minillm.quant.save(minillm.quant.wrap(build("llama")), tmp_path / "a")
    model = build("llama")
    model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        minillm.quant.load(model, tmp_path / "a", any_base=True)
    assert type(model.layers[0].self_attn.q_proj).__name__ == "Linear" and logits(model, IDS).isnan().any()


# --- buffers ----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A model whose BatchNorm changes in training without a gradient."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.norm, self.head = (
            nn.Embedding(24, 16),
            nn.Linear(16, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 24),
        )
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids):
        x = self.up(self.embed(ids))
        return self.head(self.norm(x.flatten(0, 1)).view(x.shape))


def normed():
    torch.manual_seed(3)
    return Normed().eval()


@pytest.mark.parametrize(
    "name, options",
    [
        ("lora", {}),
        ("prune", {}),
        ("quant", {}),
        ("prompts", {}),
        ("sparse", dict(anyway=True)),
        ("adapters", dict(targets=["norm"], width=16)),
        ("freeze", dict(targets=["embed"])),
    ],
)
def test_what_training_changed_without_a_gradient_is_in_the_file(name, options, tmp_path):
    technique = minillm.techniques()[name]
    model = learn(technique.wrap(normed(), **options)).eval()
    technique.save(model, tmp_path / "a")
    assert {
        "buffer:norm.running_mean",
        "buffer:norm.running_var",
        "buffer:norm.num_batches_tracked",
    } <= keys(tmp_path / "a")
    assert not any("scratch" in key for key in keys(tmp_path / "a"))
    again = technique.load(normed(), tmp_path / "a").eval()
    assert logits(again, IDS).equal(logits(model, IDS)) and not logits(normed(), IDS).equal(
        logits(model, IDS)
    )


def test_a_buffer_that_does_not_fit_is_refused(tmp_path):
    model = minillm.lora.wrap(normed(), r=2)
    minillm.lora.save(model, tmp_path / "a", learned=False)
    assert not any(key.startswith("buffer:") for key in keys(tmp_path / "a"))
    minillm.lora.save(model, tmp_path / "a")
    wide, none = normed(), normed()
    wide.norm.running_mean = torch.zeros(15)
    none.norm.running_mean = None
    for other, message in (
        (wide, r"'norm.running_mean' is \(16,\) of floats in the file, the model has \(15,\)"),
        (none, "the model lacks it"),
    ):
        with pytest.raises(ValueError, match=message):
            minillm.lora.load(other, tmp_path / "a")
        assert not minillm.layers(other)


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
    assert not model.layers[0].mlp.up_proj.rounding()[3].any()


def test_a_file_without_what_came_later_still_loads(tmp_path):
    minillm.lora.save(minillm.lora.wrap(minillm.quant.wrap(build("llama")), r=2), tmp_path / "a")
    tensors, metadata = minillm.verbs.read(tmp_path / "a")
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


# --- errors -----------------------------------------------------------------------------------


def test_what_is_no_file_is_named_once(tmp_path):
    for read in (
        minillm.verbs.read,
        lambda path: minillm.lora.load(build("llama"), path),
        minillm.store.holds,
    ):
        with pytest.raises(
            IsADirectoryError, match=f"^{tmp_path} is a directory; what a technique saved is a file"
        ):
            read(tmp_path)
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "missing")):
            read(tmp_path / "missing")


def test_a_checkpoint_whose_weights_are_a_directory_is_named(tmp_path):
    minillm.save(build("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors").mkdir()
    with pytest.raises(
        ValueError, match="model.safetensors is a directory, and a safetensors file was expected"
    ):
        minillm.load(tmp_path / "m")


def rewritten(path, **metadata):
    tensors, before = minillm.verbs.read(path)
    safetensors.torch.save_file(tensors, path, {**before, **metadata})
    return path


@pytest.mark.parametrize("base", ["", "{}"])
def test_an_error_names_the_path_once(base, tmp_path):
    minillm.lora.save(minillm.lora.wrap(build("llama"), r=2), tmp_path / "a")
    with pytest.raises(ValueError) as caught:
        minillm.lora.load(build("llama"), rewritten(tmp_path / "a", base=base))
    assert str(caught.value).count(str(tmp_path)) == 1 and "any_base=True" in str(caught.value)


@pytest.mark.parametrize(
    "shared",
    [
        '{"embed_tokens.weight": "lm_head.weight"}',
        '{"embed_tokens.weight": [1]}',
        '{"x": ["lm_head.weight"]}',
        '{"embed_tokens.weight": ["norm.weight"]}',
        '{"embed_tokens.weight": ["missing"]}',
        '{"embed_tokens.weight": ["embed_tokens.weight", "layers.0.mlp.up_proj.weight"]}',
    ],
)
@pytest.mark.parametrize("technique", ["prune", "freeze"])
def test_other_names_of_a_parameter_are_checked_before_the_model_is_touched(
    technique, shared, tmp_path
):
    page, options = minillm.techniques()[technique], dict(freeze=dict(targets=["layers"])).get(
        technique, {}
    )
    page.save(page.wrap(build("gpt2"), **options), tmp_path / "a")
    for model in (build("gpt2"), minillm.untie(build("gpt2"))):
        before = {key: t.clone() for key, t in model.state_dict().items()}
        with pytest.raises(ValueError, match="a says that '.*' is also"):
            page.load(model, rewritten(tmp_path / "a", shared=shared))
        assert all(
            t.equal(before[key]) for key, t in model.state_dict().items()
        ) and not minillm.layers(model)
