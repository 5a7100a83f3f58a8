"""FP8: every float of the two formats, the rounding of torch's cast, and what is stored."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minillm
from minillm.measure import report
from minillm.quant import fp8
from minillm.quant.grid import Floats
from minillm.registry import store, verbs

FORMATS = {4: (torch.float8_e4m3fn, 448.0, 7), 5: (torch.float8_e5m2, 57344.0, 15)}
exponents = pytest.mark.parametrize("exponent", FORMATS)
OPTIONS = [{}, dict(exponent=5), dict(group=8), dict(exponent=5, group="tensor")]


def stored(W, **options):
    """The FP8 of the matrix W (n, m)."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W.clone()
    return fp8.wrap(nn.Sequential(linear), **options)[0]


def each(form, n, m):
    """The scale of each weight (n, m)."""
    groups = form.scale.shape[1]
    return form.scale.expand(n, groups).repeat_interleave(m // groups, 1)


def number(code, exponent):
    """The float of a byte, by the definition: sign, exponent, mantissa; nan for no number."""
    _, most, bias = FORMATS[exponent]
    mantissa = 7 - exponent
    sign = -1 if code >> 7 else 1
    e, m = (code & 127) >> mantissa, (code & (1 << mantissa) - 1) / (1 << mantissa)
    value = m * 2.0 ** (1 - bias) if e == 0 else (1 + m) * 2.0 ** (e - bias)
    return sign * value if value <= most else math.nan


@exponents
def test_each_code_is_its_float(exponent):
    grid, codes = Floats(exponent), torch.arange(256.0).view(16, 16)
    wanted = torch.tensor([number(code, exponent) for code in range(256)]).view(16, 16)
    found = grid.dense(codes, torch.ones(16, 1))
    good = wanted.isfinite()
    assert found[good].equal(wanted[good]) and not found[~good].isfinite().any()
    assert grid.ends == (0, 255) and good.sum() == (254 if exponent == 4 else 248)
    whole = wanted[good].view(2, -1)
    assert grid.round(whole, torch.ones(2, 1)).equal(codes[good].view(2, -1)), "signs of 0 too"


@exponents
def test_it_rounds_to_the_nearest_and_to_even_as_torch_does(exponent):
    dtype, most, _ = FORMATS[exponent]
    values = [(number(code, exponent), code) for code in range(128)]
    values = [(v, code) for v, code in values if v == v]
    middles = [(a + b) / 2 for (a, _), (b, _) in zip(values, values[1:])]
    near = torch.tensor([x * f for x in middles for f in (1, 1 - 1e-6, 1 + 1e-6)] + [most])
    draws = torch.randn(400).abs() * most / 4
    W = torch.cat([near, draws.clamp(max=most)])[None]
    codes = Floats(exponent).round(W, torch.ones(1, 1))
    for w, code in zip(W[0].tolist(), codes[0].tolist()):
        best = min(values, key=lambda pair: (abs(pair[0] - w), pair[1] % 2))
        assert code == best[1], w
    assert W.to(dtype).view(torch.uint8).equal(codes.to(torch.uint8))
    assert Floats(exponent).round(-W, torch.ones(1, 1)).equal(codes + 128)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_scale_puts_the_largest_weight_on_the_largest_float(options):
    W = torch.randn(6, 32) * torch.logspace(-3, 1, 6)[:, None]
    W[2] = 0
    dtype, most, _ = FORMATS[options.get("exponent", 4)]
    form, group = stored(W, **options), options.get("group")
    parts = [W] if group == "tensor" else [
        part[None] for row in W for part in row.split(group or 32)]
    for part, s in zip(parts, form.scale.flatten().tolist()):
        assert s == pytest.approx(part.abs().max().item() / most or 1.0, rel=1e-6)
    scale = each(form, 6, 32)
    wanted = (W / scale).clamp(-most, most).to(dtype)
    assert form.q.dtype == torch.uint8 and form.q.equal(wanted.view(torch.uint8))
    assert form.dense().equal(wanted.float() * scale) and (form.dense()[2] == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_rounding_is_a_bound_and_no_wider_than_it_has_to_be(options):
    W = torch.randn(8, 64) * torch.logspace(-4, 0, 8)[:, None]
    form = stored(W, **options)
    off, bound = (form.dense() - W).abs(), form.rounding()
    assert (off <= bound * 1.0001).all() and (off > bound * 0.9).any()
    values = sorted({v for v in (number(code, form.exponent) for code in range(256)) if v == v})
    scale = each(form, 8, 64)
    for v, s, b in zip(form.numbers().float().flatten().tolist(), scale.flatten().tolist(),
                       bound.flatten().tolist()):
        i = values.index(v)
        gaps = [values[i + 1] - v] if i + 1 < len(values) else []
        gaps += [v - values[i - 1]] if i else []
        # beyond the largest float there is no weight: its gap is that below it
        assert b == pytest.approx(max(gaps) / 2 * s, rel=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_leaf_computes_with_what_is_stored_after_a_cast(options, dtype):
    form, x = stored(torch.randn(6, 64), **options), torch.randn(3, 5, 64)
    W, before = form.dense(), {name: t.clone() for name, t in form.named_buffers()}
    form = form.to(dtype)
    for name, t in form.named_buffers():
        assert t.dtype == before[name].dtype and t.equal(before[name]), "no cast reaches the codes"
    assert form.dense().equal(W.to(dtype))
    y, near = form(x.to(dtype)), 1e-4 if dtype == torch.float32 else 0.2
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), F.linear(x, W), rtol=near, atol=near)
    x = x.to(dtype).requires_grad_()
    form(x).float().square().sum().backward()
    z = x.detach().float().requires_grad_()
    F.linear(z, W).square().sum().backward()
    off = (x.grad.float() - z.grad).norm() / z.grad.norm()
    assert off < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("group", [None, "tensor", 8])
def test_an_embedding_gives_rows_of_what_is_stored(group):
    model = fp8.wrap(nn.Sequential(nn.Embedding(10, 16)), ["0"], group=group)
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    assert model(ids).equal(model[0].dense().T[ids]) and model[0].rounding().shape == (16, 10)


def test_bytes_and_the_error_beside_int8():
    W = torch.randn(64, 256)
    form, int8 = stored(W), minillm.quant.wrap(nn.Sequential(nn.Linear(256, 64, bias=False)))[0]
    assert report.total_bytes(form) * 8 == 64 * 256 * (8 + 32 / 256)
    assert report.total_bytes(stored(W, group="tensor")) * 8 == 64 * 256 * 8 + 32

    def errors(W):
        forms = [stored(W), int8, stored(W, exponent=5)]
        int8.pack(W)
        return [((form.dense() - W).norm() / W.norm()).item() for form in forms]

    e4m3, equal, e5m2 = errors(W)
    assert equal < e4m3 < 0.04 and 1.8 < e5m2 / e4m3 < 2.2
    W[:, 0] *= 100  # one weight of each row is far larger than the others
    small = (stored(W).dense() - W)[:, 1:].norm(), (int8.pack(W), int8.dense() - W)[1][:, 1:].norm()
    assert small[0] < 0.2 * small[1]


def test_copies_state_and_files_bit_for_bit(tmp_path):
    import safetensors.torch

    plain, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 16)
    model = fp8.wrap(copy.deepcopy(plain), exponent=5, group=4)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).equal(y)
    other = fp8.wrap(copy.deepcopy(plain), exponent=5, group=4)
    other.load_state_dict(model.state_dict())
    assert other(x).equal(y)
    store.save("quant", model, tmp_path / "a")
    again = store.load("quant", copy.deepcopy(plain), tmp_path / "a")
    assert again(x).equal(y) and again[0].config() == dict(exponent=5, group=4)
    ours, theirs = dict(model.named_buffers()), dict(again.named_buffers())
    assert ours.keys() == theirs.keys() and all(t.equal(theirs[name]) for name, t in ours.items())
    tensors, metadata = store.read(tmp_path / "a")
    tensors["0.q"] = torch.full_like(tensors["0.q"], 0x7C)  # infinity
    safetensors.torch.save_file(tensors, tmp_path / "b", metadata)
    with pytest.raises(ValueError, match="'0': a code is nan or infinity"):
        store.load("quant", copy.deepcopy(plain), tmp_path / "b")
    dense = model[0].dense()
    verbs.unwrap("quant", model, "fp8")
    assert type(model[0]) is nn.Linear and model[0].weight.equal(dense)


@pytest.mark.parametrize("options, message", [
    (dict(exponent=3), "exponent=3 is not a whole number from 4 to 5"),
    (dict(group=1), "group=1 is not a whole number"),
    (dict(group=20), "group=20 at '0': a row has 96 weights.*: group=16 or 24 would fit"),
])
def test_what_cannot_be_stored_is_named(options, message):
    rows = nn.Sequential(nn.Linear(96, 8))
    with pytest.raises(ValueError, match=message):
        fp8.wrap(rows, **options)
    assert type(rows[0]) is nn.Linear


def test_nan_and_a_second_format_are_named():
    rows = nn.Sequential(nn.Linear(96, 8))
    rows[0].weight.data[1, 2] = torch.inf
    with pytest.raises(ValueError, match="the weight of '0' holds nan or infinity"):
        fp8.wrap(rows)
    rows[0].weight.data[1, 2] = 1.0
    fp8.wrap(rows)
    with pytest.raises(ValueError, match="'0' is already stored as fp8: minillm.quant.unwrap"):
        minillm.quant.wrap(rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles():
    form, x = stored(torch.randn(32, 64)), torch.randn(1, 64)
    with torch.no_grad():
        compiled = torch.compile(form, fullgraph=True)(x)
        torch.testing.assert_close(compiled, form(x), rtol=1e-4, atol=1e-4)
