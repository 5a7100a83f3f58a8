"""What is no leaf and no sublayer, and integers that are no int8."""

import pytest
import safetensors.torch
import torch
from models import build, two
from torch import nn

import minillm


def reparametrized():
    from torch.nn.utils import prune
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    pruned = nn.Linear(6, 6)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    return nn.Sequential(
        nn.Linear(6, 6), weight_norm(nn.Linear(6, 6)), spectral_norm(nn.Linear(6, 6)), pruned
    )


@pytest.mark.parametrize(
    "name, options",
    [("lora", dict(r=2)), ("quant", {}), ("prune", {}), ("sparse", dict(anyway=True))],
)
def test_a_weight_that_is_computed_is_no_leaf(name, options, tmp_path):
    wrap, x = minillm.techniques()[name].wrap, torch.randn(2, 6)
    for place in ("1", "2", "3"):
        model = reparametrized().eval()
        before = model(x)
        with pytest.raises(
            ValueError,
            match=f"'{place}' is a .*no leaf that can be wrapped: its weight is computed from .*"
            "remove_parametrizations.*; what would have matched: '0'",
        ):
            wrap(model, [place], **options)
        assert model(x).equal(before)
    model = wrap(reparametrized(), **options)  # by default the leaves alone
    assert {site.name for site in minillm.registry.walk(model) if site.leaf} == {"0"}
    minillm.techniques()[name].save(
        wrap(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), ["1"], **options), tmp_path / "a"
    )
    with pytest.raises(ValueError, match="for '1', which this model lacks: its weight is computed"):
        minillm.techniques()[name].load(reparametrized(), tmp_path / "a")


def test_a_weight_that_is_a_parameter_again_is_a_leaf():
    from torch.nn.utils import prune
    from torch.nn.utils.parametrize import remove_parametrizations

    model = reparametrized()
    remove_parametrizations(model[1], "weight"), prune.remove(model[3], "weight")
    assert set(minillm.layers(minillm.lora.wrap(model, r=2))) == {"0", "1", "3"}


def test_the_emptied_leaf_of_a_format_is_a_leaf():
    model = minillm.quant.wrap(two())
    assert minillm.registry.leaf(model[0].shell.kept[0]) is model[0].leaf


@pytest.mark.parametrize("target", ["layers", "blocks"])
def test_a_container_is_no_sublayer(target):
    model = build("llama")
    model.blocks = nn.ModuleDict({"a": nn.Linear(16, 16)})
    with pytest.raises(
        ValueError, match=f"'{target}' is a Module(List|Dict), no sublayer that can be wrapped"
    ):
        minillm.adapters.wrap(model, [target], width=16)
    assert not minillm.layers(model)
    minillm.adapters.wrap(
        nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4))}), size=2
    )  # a Sequential is called


def test_integers_of_another_type_are_refused(tmp_path):
    minillm.quant.save(minillm.quant.wrap(two()), tmp_path / "a")
    tensors, metadata = minillm.registry.store.read(tmp_path / "a")
    for dtype in (torch.int64, torch.uint8, torch.float32):
        wrong = {key: t.to(dtype) if key == "0.q" else t for key, t in tensors.items()}
        safetensors.torch.save_file(wrong, tmp_path / "b", metadata)
        model = two()
        with pytest.raises(
            ValueError, match=rf"'0': q should be torch.int8 \(5, 6\), the file has {dtype}"
        ):
            minillm.quant.load(model, tmp_path / "b", any_base=True)
        assert type(model[0]) is nn.Linear


def test_a_leaf_without_a_weight_yet_is_named():
    with pytest.raises(
        ValueError,
        match="'0' is a LazyLinear.*it has no weight yet; run a batch through the model first",
    ):
        minillm.lora.wrap(nn.Sequential(nn.LazyLinear(4)), ["0"])


@pytest.mark.parametrize("model, hint",
                         [((nn.Linear(2, 2), None),
                           "tuple, no nn.Module: .*model, tokenizer = minillm.load"),
                          ("tiny", "str, no nn.Module$")])
def test_what_is_no_model_is_named(model, hint):
    with pytest.raises(TypeError, match=hint):
        minillm.lora.wrap(model)


class Named(nn.Module):
    """A model that gives its leaves their input by name."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(24, 32), nn.Linear(32, 32)

    def forward(self, ids):
        return self.linear(input=self.embed(input=ids))


@pytest.mark.parametrize("call", [lambda model: model, lambda model: torch.compile(
    model, backend="eager", fullgraph=True)])
@pytest.mark.parametrize("wrap, targets", [
    (minillm.lora.wrap, ["embed", "linear"]), (minillm.lora.dora.wrap, ["linear"]),
    (minillm.quant.wrap, ["embed", "linear"]), (minillm.quant.qat.wrap, ["embed", "linear"]),
    (minillm.prune.wrap, ["linear"]), (minillm.adapters.wrap, ["linear"]),
    (lambda model, targets: minillm.sparse.wrap(model, targets, anyway=True), ["linear"]),
])
def test_a_leaf_may_be_called_by_keyword(wrap, targets, call):
    torch.manual_seed(0)
    model, ids = wrap(Named(), targets), torch.tensor([[3, 1, 4]])
    y = call(model)(ids)
    torch.testing.assert_close(y, model.linear(model.embed(ids)))
    for unknown in (dict(other=ids), dict(input=ids, other=ids)):
        with pytest.raises(TypeError):
            model.linear(**unknown)
