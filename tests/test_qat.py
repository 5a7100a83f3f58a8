"""Quantization-aware training: against its formula, bit for bit equal to what `convert`
stores, and worth its while."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from models import IDS, MODELS, build, logits, two
from torch import nn

import minillm
from minillm import ops
from minillm.quant import Integer, fp4
from minillm.quant.codebook import Codebook
from minillm.quant.grid import Grid, Levels
from minillm.quant.nf4 import LEVELS
from minillm.quant.qat import FakeQuant
from minillm.registry import CannotMerge, Format, KINDS, leaf, store, verbs, walk

qat = minillm.quant.qat
OPTIONS = [dict(bits=4), dict(bits=4, group=8), dict(bits=3, group=8, zero_point=True),
           dict(bits=2), dict(bits=8),
           dict(bits=8, zero_point=True), dict(group=8, levels=LEVELS), dict(levels=LEVELS),
           dict(group=8, levels=fp4.LEVELS)]
CHEAP = [dict(bits=3, group=8), dict(group=8, levels=LEVELS)]


def called(options):
    plain = ",".join(f"{key}={value}" for key, value in options.items() if key != "levels")
    return plain + ("nf4" if "levels" in options else "")


every_option = pytest.mark.parametrize("options", OPTIONS, ids=called)


def grid_of(bits=4, group=None, zero_point=False, levels=None):
    return Levels(levels, group) if levels else Grid(bits, group, zero_point)


def by_hand(W, options):
    """Q (out, in) of a float32 matrix."""
    grid = grid_of(**options)
    numbers = grid.fit(W)
    return grid.dense(grid.round(W, *numbers), *numbers)


# --- the formula --------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("grad", ["x", "W", "both"])
def test_forward_and_gradients_are_the_formula(options, grad):
    linear, x = nn.Linear(16, 6), torch.randn(3, 5, 16, requires_grad=grad != "W")
    linear.weight.requires_grad_(grad != "x")
    W = linear.weight.detach().clone()
    Q = by_hand(W, options)
    layer, dy = qat.wrap(nn.Sequential(linear), **options)[0], torch.randn(3, 5, 6)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, Q, linear.bias))
    (y * dy).sum().backward()
    rows, dys = x.detach().reshape(15, 16), dy.reshape(15, 6)
    if grad != "W":
        torch.testing.assert_close(x.grad.reshape(15, 16), dys @ Q)
    if grad != "x":
        torch.testing.assert_close(linear.weight.grad, dys.T @ rows)
        torch.testing.assert_close(linear.bias.grad, dys.sum(0))
    assert linear.weight.equal(W) and layer.dense()[0].equal(Q)


def test_the_value_passes_bit_for_bit_and_the_gradient_whole():
    W, new = torch.randn(50, requires_grad=True), torch.randn(50) * 1e-3
    out = ops.straight(W, new)
    assert out.equal(new)
    assert torch.autograd.grad((out * new).sum(), W)[0].equal(new)
    assert not (W + (new - W).detach()).equal(new), "the usual way of writing it is off by an ulp"


def test_it_is_differentiable_twice():
    layer = qat.wrap(nn.Sequential(nn.Linear(8, 4)).double(), bits=3)
    x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    W = layer[0].base.weight

    def second(y):
        dx, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, W))

    naive = F.linear(x, layer[0].dense()[0], layer[0].base.bias)
    for ours, theirs in zip(second(layer(x)), second(naive)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("beneath", [False, True])
def test_no_rounded_matrix_is_kept(beneath):
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    model = qat.wrap(minillm.lora.wrap(model, r=2) if beneath else model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(torch.randn(3, 64, requires_grad=True))
    big = {t.data_ptr() for t in kept if t.numel() == 64 * 48} - {model[0].base.weight.data_ptr()}
    assert not big
    y.sum().backward()


def test_a_tokens_row_that_is_padding_does_not_learn():
    model = qat.wrap(nn.Sequential(nn.Embedding(10, 16, padding_idx=3)), ["0"], group=8)
    W = model[0].base.weight.detach()
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    y = model(ids)
    assert y.equal(by_hand(W, dict(group=8))[ids])
    y.sum().backward()
    used = model[0].base.weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [1, 4, 5, 9]
    with torch.no_grad():
        assert model(ids).equal(y)


# --- convert ------------------------------------------------------------------------------------


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_convert_stores_bit_for_bit_what_training_saw(options, dtype):
    model, x = nn.Sequential(nn.Linear(32, 24), nn.GELU(),
                             nn.Linear(24, 8)).to(dtype), torch.randn(4, 32, dtype=dtype)
    optimizer = torch.optim.SGD(qat.wrap(model, **options).parameters(), lr=0.05)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for _, p in model.named_parameters():
        assert p.requires_grad and p.dtype == dtype
    y, seen = model(x), [model[i].dense()[0].clone() for i in (0, 2)]
    assert qat.convert(model) is model
    kind = Codebook if "levels" in options else Integer
    for i, W in zip((0, 2), seen):
        assert (type(model[i]) is kind and model[i].dense().equal(W)
                and model[i].dense().dtype == dtype)
    near = {torch.float32: 1e-5, torch.float64: 1e-5}.get(dtype, 0.05)
    torch.testing.assert_close(model(x), y, rtol=near, atol=near)
    if kind is Integer:
        assert {k: v for k, v in model[0].config().items() if k in options} == options


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", CHEAP, ids=["three", "nf4"])
def test_convert_on_every_model(kind, options):
    model = qat.wrap(build(kind), **options)
    expected, seen = logits(model), {site.name: site.dense()[0] for site in walk(model)
                                     if site.layer}
    qat.convert(model)
    forms = {site.name: site.module for site in walk(model) if isinstance(site.module, Format)}
    assert forms.keys() == seen.keys() and not minillm.layers(model)
    assert all(form.dense().equal(seen[name]) for name, form in forms.items())
    close("qat convert", logits(model), expected, kind, 1e-5)


def test_convert_of_several_grids_and_of_an_embedding():
    model = build("Linear")
    qat.wrap(model, ["mlp.0"], bits=3)
    qat.wrap(model, ["mlp.2"], group=8, levels=LEVELS)
    qat.wrap(model, ["embed"], bits=8)
    expected = logits(model)
    qat.convert(model)
    assert type(model.layers[0].mlp[0]) is Integer and model.layers[0].mlp[0].bits == 3
    assert (type(model.layers[0].mlp[2]) is Codebook and model.embed.bits == 8
            and type(model.head) is nn.Linear)
    close("qat convert", logits(model), expected, "several grids")


def test_lora_beneath_is_merged_first_and_above_stays():
    x = torch.randn(4, 16)
    model = qat.wrap(minillm.lora.wrap(nn.Sequential(nn.Linear(16, 8)), r=2), bits=3)
    nn.init.normal_(model[0].patches["lora"].B)
    assert [name for name, p in model.named_parameters()
            if p.requires_grad] == ["0.patches.lora.A", "0.patches.lora.B"]
    lora, W = model[0].patches["lora"], model[0].base.weight
    folded = (W + (lora.scale * lora.B @ lora.A)).detach().requires_grad_()
    torch.testing.assert_close(model(x),
                               F.linear(x, by_hand(folded.detach(), dict(bits=3)),
                                        model[0].base.bias))
    model(x).square().sum().backward()
    dW = (2 * model(x)).detach().T @ x
    torch.testing.assert_close(lora.B.grad, lora.scale * dW @ lora.A.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match="'0' has lora beneath the fake-quantization.*merge or unwrap lora first"
    ):
        qat.convert(model)
    assert "qat" in model[0].patches and type(model[0].base) is nn.Linear
    seen = model[0].dense()[0]
    assert qat.convert(minillm.lora.merge(model))[0].dense().equal(seen)

    model = minillm.lora.wrap(qat.wrap(nn.Sequential(nn.Linear(16, 8)), bits=3), r=2)
    nn.init.normal_(model[0].patches["lora"].B)
    y = model(x)
    qat.convert(model)
    assert type(model[0].base) is Integer and list(model[0].patches) == ["lora"]
    torch.testing.assert_close(model(x), y)


def test_what_cannot_be_converted_is_refused_before_anything_changes():
    with pytest.raises(ValueError, match="no fake-quantization in this model to convert"):
        qat.convert(two())
    model = qat.wrap(minillm.quant.wrap(two(), ["0"]), bits=8)
    with pytest.raises(ValueError, match="'0' is already stored as quant"):
        qat.convert(model)
    assert "qat" in model[2].patches and type(model[2].base) is nn.Linear


@pytest.mark.parametrize("options, message", [
    (dict(bits=1), "bits=1 is not"), (dict(group=4), "bits=4, group=4 at '0': a row has 6 weights"),
    (dict(bits=2), "bits=2, group=None at '0'"),
    (dict(levels=(*LEVELS, 2.0)), "bits=4, zero_point=False and 17 levels"),
    (dict(bits=3, levels=LEVELS), "bits=3, zero_point=False and 16 levels"),
    (dict(levels=LEVELS[::-1]), "rising numbers"),
])
def test_a_grid_that_could_not_be_stored_is_refused_at_once(options, message):
    model = two()
    with pytest.raises(ValueError, match=message):
        qat.wrap(model, **options)
    assert type(model[0]) is nn.Linear


# --- it pays ------------------------------------------------------------------------------------


def chain(batch, generator):
    """Texts of a fixed random chain of 24 tokens, (batch, 24)."""
    table = torch.randn(24, 24, generator=torch.Generator().manual_seed(5)).mul(3).softmax(-1)
    ids = [torch.randint(24, (batch,), generator=generator)]
    for _ in range(23):
        ids.append(torch.multinomial(table[ids[-1]], 1, generator=generator)[:, 0])
    return torch.stack(ids, 1)


def train(model, steps, rate):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        loss_of(model, chain(16, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss_of(model, ids):
    return F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("options", [dict(bits=2), dict(bits=2, zero_point=True)], ids=str)
def test_training_with_it_beats_rounding_afterwards(options):
    """The same steps, of which the second half is rounded or is not; then both are stored
    in 2 bits. (With 3 the gap is so small that chance decides.)"""
    test = chain(64, torch.Generator().manual_seed(9))
    start = train(build("llama"), 60, 0.02)
    plain = train(copy.deepcopy(start), 60, 0.005)
    aware = train(qat.wrap(copy.deepcopy(start), **options), 60, 0.005)
    with torch.no_grad():
        full, trained = loss_of(plain, test).item(), loss_of(aware, test).item()
        rounded = loss_of(minillm.quant.wrap(plain, **options), test).item()
        converted = loss_of(qat.convert(aware), test).item()
    assert full < converted < full + (rounded - full) / 2, "it closes more than half of the gap"
    assert abs(converted - trained) < 1e-5, "what is stored is what was trained"


# --- as a patch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_laws_of_a_patch(kind):
    model = build(kind)
    modules, plain = list(map(id, model.modules())), {k: t.clone()
                                                      for k, t in model.state_dict().items()}
    learns = [p.requires_grad for p in model.parameters()]
    qat.wrap(model, bits=4, group=8)
    expected = logits(model)
    assert [p.requires_grad for p in model.parameters()] == learns
    assert not [m for m in model.modules() if isinstance(m, FakeQuant) and m.random]
    expected.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()
    for where, layer in minillm.layers(model).items():
        W, b = layer.dense()
        x = torch.randn(5, W.shape[1])
        close("3 fold", leaf(layer.base).compute(x, W, b), layer(x), f"qat on {kind} at {where}")
    assert logits(copy.deepcopy(model)).equal(expected)
    other = qat.wrap(build(kind), bits=4, group=8)
    other.load_state_dict(model.state_dict())
    assert logits(other).equal(expected)
    assert logits(model.train()).equal(expected) and logits(model.eval()).equal(expected)
    assert logits(copy.deepcopy(model).bfloat16()).dtype == torch.bfloat16
    verbs.merge("quant", model, "qat")
    close("5 merge", logits(model), expected, kind)
    verbs.unmerge("quant", model, "qat")
    assert logits(model).equal(expected)
    verbs.unwrap("quant", model, "qat")
    assert list(map(id, model.modules())) == modules
    assert all(t.equal(plain[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("other",
                         [name for name, cls in KINDS.items()
                          if name not in ("qat", "freeze", "quant", "sparse", "codebook", "fp8")])
def test_beside_other_patches(other):
    """fold equals forward and gradients reach what learns, in both orders."""
    module, options = (
        minillm.techniques().get(KINDS[other].family),
        dict(r=2) if other == "lora" else {},
    )
    for first in (True, False):
        model = build("llama")
        for wrap in (qat.wrap, lambda m, **o: module.wrap(m, **options))[:: 1 if first else -1]:
            wrap(model, **(dict(bits=4, group=8) if wrap is qat.wrap else {}))
        for layer in minillm.layers(model).values():
            for p in layer.patches.parameters():
                nn.init.normal_(p, std=0.1)
            try:
                W, b = layer.dense()
            except (CannotMerge, AttributeError):
                continue
            x = torch.randn(5, W.shape[1])
            close("3 fold", F.linear(x, W, b), layer(x), f"qat and {other}")
        ids = minillm.prepare(model, IDS)[0]
        logits(model, ids).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", CHEAP, ids=["three", "nf4"])
def test_files(options, tmp_path):
    model = qat.wrap(build("llama"), **options)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.base.weight.add_(0.1)
    store.save("quant", model, tmp_path / "a")
    again = store.load("quant", build("llama"), tmp_path / "a")
    assert logits(again).equal(logits(model))
    assert (
        again.layers[0].mlp.up_proj.patches["qat"].config()
        == model.layers[0].mlp.up_proj.patches["qat"].config()
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", CHEAP, ids=["three", "nf4"])
def test_it_compiles_whole_and_learns_the_same(options):
    model, x = qat.wrap(nn.Sequential(nn.Linear(16, 8)), **options), torch.randn(4, 16)
    twin = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for one in (model, twin):
        one(x).square().sum().backward()
    close("7 compile", twin(x), model(x), "qat")
    close("7 compile", twin._orig_mod[0].base.weight.grad, model[0].base.weight.grad,
          "gradient of qat")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x = qat.wrap(nn.Sequential(nn.Linear(16, 8)), bits=3), torch.randn(4, 16)
    y = model(x)
    with torch.autocast("cpu", dtype):
        half = model(x)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), y, rtol=0.05, atol=0.05)
    half.float().square().sum().backward()
    assert model[0].base.weight.grad.dtype == torch.float32
