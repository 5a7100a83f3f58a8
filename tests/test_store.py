"""What a technique's file holds, and that nothing of the user's is lost."""

import os

import pytest
import safetensors
import safetensors.torch
import torch
from models import IDS, TOKENS, build, logits
from torch import nn

import minillm
from minillm import data
from minillm.train import train


def learn(model, steps=4):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(24, (8,), generator=draw).tolist() for _ in range(8)]
    train(model, [data.Example(row, list(row)) for row in rows], steps=steps, lr=0.05, batch_size=4,
          progress=False)
    return model


def keys(path):
    with safetensors.safe_open(path, "pt") as file:
        return set(file.keys())


OPTIONS = {"freeze": dict(last=1), "lora": dict(r=2), "adapters": dict(size=2),
           "prompts": dict(length=2), "sparse": dict(anyway=True)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_llama"])
def test_what_training_changed_is_in_the_file(kind, tmp_path):
    """For each technique: wrap, train, save; the file on a fresh model gives the trained model."""
    for name in TOKENS:
        technique = minillm.techniques()[name]
        model = learn(technique.wrap(build(kind), **OPTIONS.get(name, {}))).eval()
        technique.save(model, tmp_path / name)
        again = technique.load(build(kind), tmp_path / name)
        assert torch.equal(logits(again), logits(model)), name
        assert [p.requires_grad for p in again.parameters()] == [
            p.requires_grad for p in model.parameters()
        ], name


def test_below_lora_nothing_of_the_model_is_in_the_file_unless_it_learns(tmp_path):
    model = minillm.lora.wrap(build("llama"), ["q_proj"], r=2)
    minillm.lora.save(model, tmp_path / "a")
    assert keys(tmp_path / "a") == {f"layers.{i}.self_attn.q_proj.{key}" for i in range(3)
                                    for key in "AB"}
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
    frozen = {name for name, p in minillm.quant.unwrap(model).named_parameters()
              if not p.requires_grad}
    assert "layers.0.mlp.up_proj.weight" in frozen and "layers.2.mlp.up_proj.weight" not in frozen


def test_freeze_of_a_tied_model_is_saved_once_and_read_under_both_names(tmp_path):
    model = learn(minillm.freeze.wrap(build("gpt2"), ["layers"]))
    minillm.freeze.save(model, tmp_path / "a")
    assert ("learned:embed_tokens.weight" in keys(tmp_path / "a")
            and "learned:lm_head.weight" not in keys(tmp_path / "a"))
    for other in (build("gpt2"), minillm.untie(build("gpt2"))):
        assert torch.equal(logits(minillm.freeze.load(other, tmp_path / "a")), logits(model))


def test_freeze_of_a_file_takes_the_place_of_what_was_frozen(tmp_path):
    minillm.freeze.save(minillm.freeze.wrap(build("llama"), last=2), tmp_path / "a")
    model = minillm.freeze.wrap(build("llama"), ["layers.2"])
    with pytest.raises(ValueError, match="has freeze already.*replace=True"):
        minillm.freeze.load(model, tmp_path / "a")
    minillm.freeze.load(model, tmp_path / "a", replace=True)
    wanted = minillm.freeze.wrap(build("llama"), last=2)
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in wanted.parameters()
    ]


# --- files of others ------------------------------------------------------------------------------


def test_a_file_that_is_not_ours_is_never_replaced(tmp_path):
    model, path = minillm.lora.wrap(build("llama"), r=2), tmp_path / "a"
    path.write_text("my diary")
    for technique, m in ((minillm.lora, model),
                         (minillm.freeze, minillm.freeze.wrap(build("llama"), last=1))):
        with pytest.raises(FileExistsError,
                           match="a exists, and no technique of minillm wrote it; force=True"):
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
    assert (type(model.layers[0].self_attn.q_proj).__name__ == "Linear"
            and logits(model, IDS).isnan().any())


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


def test_two_buffers_may_share_their_memory(tmp_path):
    model = normed()
    model.register_buffer("alias", model.norm.running_mean)
    minillm.lora.save(minillm.lora.wrap(model, r=2), tmp_path / "a")
    assert {"buffer:alias", "buffer:norm.running_mean"} <= keys(tmp_path / "a")


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


# --- errors -----------------------------------------------------------------------------------


def test_what_is_no_file_is_named_once(tmp_path):
    for read in (
        minillm.registry.store.read,
        lambda path: minillm.lora.load(build("llama"), path),
        minillm.registry.store.holds,
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
        ValueError, match="model.safetensors is a directory, but a safetensors file was expected"
    ):
        minillm.load(tmp_path / "m")


def rewritten(path, **metadata):
    tensors, before = minillm.registry.store.read(path)
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


# --- what an adapter was made over ------------------------------------------------------------


def trained(model, name, seed=0):
    """As training would leave a technique: what it adds is moved."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in minillm.layers(model).values():
            for p in layer.patches[name].parameters() if name in layer.patches else ():
                p.add_(torch.randn_like(p) * 0.1)
    return model


def test_an_adapter_over_another_one_needs_it(tmp_path):
    lora, other = tmp_path / "lora", tmp_path / "other"
    minillm.lora.save(trained(minillm.lora.wrap(build("llama"), r=2), "lora", 1), other)
    model = trained(minillm.lora.wrap(build("llama"), r=2), "lora")
    minillm.lora.save(model, lora)
    trained(minillm.adapters.wrap(model, size=2), "adapters")
    minillm.adapters.save(model, tmp_path / "over")
    minillm.lora.save(model, tmp_path / "again")  # it was here first, and needs nobody
    minillm.lora.load(build("llama"), tmp_path / "again")
    together = minillm.adapters.load(minillm.lora.load(build("llama"), lora), tmp_path / "over")
    assert torch.equal(logits(together), logits(model))
    for base, has in (([], "none"), ([other], r"another one \(\w{8}\)")):
        base = [minillm.lora.load(m, path) for m in [build("llama")]
                for path in base] or [build("llama")]
        with pytest.raises(
            ValueError,
            match=rf"another model: it was made over lora \(\w{{8}}\), and this model has {has}",
        ):
            minillm.adapters.load(base[0], tmp_path / "over")
        assert not any("adapters" in layer.patches for layer in minillm.layers(base[0]).values())
    minillm.adapters.load(build("llama"), tmp_path / "over", any_base=True)


def test_an_adapter_over_another_one_knows_it_after_a_cast(tmp_path):
    model = trained(minillm.lora.wrap(build("llama"), r=2), "lora")
    minillm.lora.save(model, tmp_path / "lora")
    minillm.prompts.save(minillm.prompts.wrap(model, length=2), tmp_path / "over")
    minillm.prompts.load(minillm.lora.load(build("llama"), tmp_path / "lora").bfloat16(),
                         tmp_path / "over")


@pytest.mark.parametrize("over",
                         ['{"lora": 1}', '{"lora": {"x": 1}}',
                          '{"lora": {"layers.0.self_attn.q_proj": {"A": []}}}', "[]"])
def test_a_file_whose_word_of_what_lay_beneath_is_broken(over, tmp_path):
    model = minillm.adapters.wrap(minillm.lora.wrap(build("llama"), r=2), size=2)
    minillm.lora.save(model, tmp_path / "lora"), minillm.adapters.save(model, tmp_path / "a")
    tensors, metadata = minillm.registry.store.read(tmp_path / "a")
    safetensors.torch.save_file(tensors, tmp_path / "b", dict(metadata, over=over))
    with pytest.raises(ValueError, match="any_base=True"):
        minillm.adapters.load(minillm.lora.load(build("llama"), tmp_path / "lora"), tmp_path / "b")


def tune(model):
    """All that learns moves."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def test_an_adapter_over_freeze_needs_what_freeze_trained(tmp_path):
    model = tune(minillm.freeze.wrap(build("llama"), last=1))
    minillm.freeze.save(model, tmp_path / "freeze")
    minillm.lora.save(trained(minillm.lora.wrap(model, r=2), "lora"), tmp_path / "lora")
    with pytest.raises(ValueError,
                       match="another model.*made over freeze: load the file of freeze first"):
        minillm.lora.load(build("llama"), tmp_path / "lora")
    again = minillm.lora.load(minillm.freeze.load(build("llama"), tmp_path / "freeze"),
                              tmp_path / "lora")
    assert torch.equal(logits(again), logits(model))


def test_freeze_over_an_adapter_needs_it(tmp_path):
    model = tune(minillm.freeze.wrap(minillm.lora.wrap(build("llama"), r=2), last=1))
    minillm.lora.save(model, tmp_path / "lora")
    minillm.freeze.save(model, tmp_path / "freeze")
    with pytest.raises(ValueError, match="made over lora"):
        minillm.freeze.load(build("llama"), tmp_path / "freeze")
    again = minillm.freeze.load(minillm.lora.load(build("llama"), tmp_path / "lora"),
                                tmp_path / "freeze")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("first", ["prune", "quant"])
@pytest.mark.parametrize("second", ["lora", "freeze"])
def test_what_learned_before_another_technique_stopped_it_is_in_the_file(first, second, tmp_path):
    one, two = minillm.techniques()[first], minillm.techniques()[second]
    model = tune(one.wrap(build("llama")))
    tune(two.wrap(model, **(dict(r=2) if second == "lora" else dict(last=1))))
    one.save(model, tmp_path / "one"), two.save(model, tmp_path / "two")
    again = two.load(one.load(build("llama"), tmp_path / "one"), tmp_path / "two")
    assert torch.equal(logits(again), logits(model))


def test_what_did_not_change_is_in_no_file(tmp_path):
    model = minillm.lora.wrap(minillm.prune.wrap(build("llama")), r=2)
    minillm.prune.save(tune(model), tmp_path / "a")
    assert not any(key.startswith("learned:")
                   for key in minillm.registry.store.read(tmp_path / "a")[0])
    minillm.prune.load(build("llama"), tmp_path / "a")


def test_what_the_user_lets_learn_beside_freeze_is_in_its_file(tmp_path):
    model = minillm.freeze.wrap(build("llama"), last=1)
    model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    minillm.freeze.save(tune(model), tmp_path / "a")
    again = minillm.freeze.load(build("llama"), tmp_path / "a")
    assert (torch.equal(logits(again), logits(model))
            and again.layers[0].mlp.up_proj.weight.requires_grad)


def test_tensors_in_one_memory_are_saved(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = nn.Parameter(model[0].weight.data)
    minillm.freeze.save(minillm.freeze.wrap(model, ["1"]), tmp_path / "a")
    tensors = minillm.registry.store.read(tmp_path / "a")[0]
    assert tensors["learned:0.weight"].equal(tensors["learned:2.weight"])


@pytest.mark.parametrize("technique, key", [("lora", "A"), ("quant", "scale")])
def test_a_file_with_nan_is_an_error(technique, key, tmp_path):
    verbs = minillm.techniques()[technique]
    verbs.save(verbs.wrap(build("llama")), tmp_path / "a")
    tensors, metadata = minillm.registry.store.read(tmp_path / "a")
    for name, t in tensors.items():
        if name.endswith(f".{key}"):
            t.view(-1)[0] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "b", metadata)
    with pytest.raises(ValueError, match=f"{key} holds nan or infinity"):
        verbs.load(build("llama"), tmp_path / "b")


def test_int8_with_a_scale_of_zero_is_an_error(tmp_path):
    minillm.quant.save(minillm.quant.wrap(build("llama")), tmp_path / "a")
    tensors, metadata = minillm.registry.store.read(tmp_path / "a")
    tensors["layers.0.mlp.up_proj.scale"][0] = 0
    safetensors.torch.save_file(tensors, tmp_path / "b", metadata)
    with pytest.raises(ValueError, match="up_proj': a scale is not a number above 0"):
        minillm.quant.load(build("llama"), tmp_path / "b")
