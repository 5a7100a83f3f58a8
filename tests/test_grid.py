"""The grid of integers: against its formula, against torchao and GGUF where they define
the same grid, and packed."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from models import two
from torch import nn

import minillm
from minillm import ops
from minillm.measure import report
from minillm.quant.grid import Grid, codes_a_byte, pack, unpack
from minillm.registry.store import read

GRIDS = [Grid(*options) for options in itertools.product((2, 3, 4, 8), (None, 8), (False, True))]


def by_hand(row, bits, zero_point):
    """(codes, numbers) of one group, number by number, in float64."""
    least, most = min(0.0, min(row)), max(0.0, max(row))
    low, high = (0, 2**bits - 1) if zero_point else (-(2 ** (bits - 1)) + (bits == 8),
                                                     2 ** (bits - 1) - 1)
    s = (most - least) / high if zero_point else max(most / high, least / low)
    z = round(-least / s) if zero_point else 0
    codes = [min(high, max(low, round(w / s) + z)) for w in row]
    return codes, [s * (q - z) for q in codes]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_grid_is_its_formula(grid):
    W = torch.randn(5, 24) * torch.tensor([[1.0], [1e-6], [1e4], [0.1], [2.0]]) + 0.3
    scale, zero = grid.fit(W)
    q, size = grid.round(W, scale, zero), grid.group or 24
    back = grid.dense(q, scale, zero)
    for row, codes, numbers in zip(W, q, back):
        for i in range(0, 24, size):
            wanted, values = by_hand(row[i : i + size].tolist(), grid.bits, grid.zero_point)
            assert codes[i : i + size].tolist() == wanted
            torch.testing.assert_close(numbers[i : i + size], torch.tensor(values), rtol=1e-5,
                                       atol=0)
    steps = ((back - W).abs() / scale.repeat_interleave(size, 1)).max()
    assert steps <= 0.5001, "no weight moves by more than half a step"
    assert scale.shape == (5, 24 // size) and (zero is None) != grid.zero_point


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_stays_zero_and_what_is_on_the_grid_stays(grid):
    W = torch.randn(4, 16)
    W[W.abs() < 0.5] = 0
    W[2] = 0
    numbers = [grid.fit(W)]
    back = grid.dense(grid.round(W, *numbers[0]), *numbers[0])
    assert (back[W == 0] == 0).all() and (numbers[0][0][2] == 1).all()
    again = grid.fit(back)
    torch.testing.assert_close(grid.dense(grid.round(back, *again), *again), back, rtol=1e-5,
                               atol=1e-6)


@pytest.mark.parametrize("wrong, message", [
    (dict(bits=1), "bits=1 is not a whole number from 2 to 8"), (dict(bits=9), "bits=9"),
    (dict(bits=4.0), "bits=4.0"),
    (dict(group=1), "group=1 is not a whole number of at least 2"),
    (dict(zero_point=1), "zero_point=1 is neither"),
])
def test_a_grid_that_makes_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        Grid(**wrong)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_codes_share_bytes(bits, rows):
    """Code by code: where each bit of each code lies, by a plain loop."""
    planes = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    fewest = {1: 8, 2: 4, 4: 2, 8: 1}[planes[-1]]
    assert codes_a_byte(bits) == fewest and fewest * bits % 8 == 0
    for m in (fewest, 3 * fewest, 40):
        codes = torch.randint(2**bits, (rows, m), dtype=torch.uint8)
        codes[0, 0], codes[-1, -1] = 2**bits - 1, 0
        packed = pack(codes.float(), bits)
        assert packed.dtype == torch.uint8 and packed.shape == (rows, m * bits // 8), "no waste"
        assert unpack(packed, bits).equal(codes)
        for row, stored in zip(codes.tolist(), packed.tolist()):
            wanted, low = [0] * (m * bits // 8), 0
            start = 0
            for width in planes:
                k = m * width // 8  # the bytes of this plane
                for i, code in enumerate(row):  # the first part of the row is in the lowest bits
                    wanted[start + i % k] |= (code >> low) % 2**width << (width * (i // k))
                low, start = low + width, start + k
            assert stored == wanted


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_codes_are_those_of_torchao(bits, zero_point):
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    W, grid = (
        torch.randn(64, 128) * torch.logspace(-3, 1, 64)[:, None] + 0.01,
        Grid(bits, 32, zero_point),
    )
    kind = ao.MappingType.ASYMMETRIC if zero_point else ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR
    low, high = grid.ends
    options = dict(quant_min=low, quant_max=high)
    dtype = torch.uint8 if zero_point else torch.int8
    scale, zero = ao.choose_qparams_affine(W, kind, (1, 32), dtype, eps=1e-12,
                                           scale_dtype=torch.float32,
                                           zero_point_dtype=torch.int32, **options)
    theirs = ao.quantize_affine(W, (1, 32), scale, zero, dtype, **options)
    ours = grid.fit(W)
    torch.testing.assert_close(ours[0], scale.view(64, 4), rtol=1e-6, atol=0)
    if zero_point:
        assert ours[1].equal(zero.view(64, 4).float())
    off = (grid.round(W, *ours) != theirs.float()).float().mean()
    assert off < 1e-3, (
        "one divides by the scale, the other multiplies by its inverse: a tie may fall otherwise")


def test_the_codes_are_those_of_ggufs_q8_0():
    gguf = pytest.importorskip("gguf")
    W, grid = torch.randn(16, 64), Grid(8, 32)
    raw = torch.from_numpy(gguf.quants.quantize(W.numpy(), gguf.GGMLQuantizationType.Q8_0)).view(
        16, 2, 34
    )
    # before them the scale, in float16
    theirs = raw[..., 2:].contiguous().view(torch.int8).flatten(1)
    ours = grid.round(W, *grid.fit(W))
    assert (ours != theirs).float().mean() < 2e-3 and (ours - theirs).abs().max() <= 1


@pytest.mark.parametrize("bits, zero_point", [(4, False), (5, False), (4, True), (5, True)])
def test_the_codes_are_those_of_gguf_where_it_has_the_same_grid(bits, zero_point):
    """Q4_0 and Q5_0: where the largest magnitude of a block is negative. Q4_1 and Q5_1:
    where the least weight is 0."""
    gguf = pytest.importorskip("gguf")
    kind, grid = gguf.GGMLQuantizationType[f"Q{bits}_{int(zero_point)}"], Grid(bits, 32, zero_point)
    W = torch.rand(16, 64) if zero_point else torch.randn(16, 64).clamp(-4, 4)
    W[:, ::32] = 0.0 if zero_point else -5.0
    raw = gguf.quants.quantize(W.numpy(), kind)
    back = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    size = raw.shape[1] // 2
    # (16, 2, 1)
    d = (
        torch.from_numpy(raw.copy())
        .view(16, 2, size)[..., :2]
        .contiguous()
        .view(torch.float16)
        .float()
    )
    scale, zero = grid.fit(W)
    torch.testing.assert_close(scale, d[..., 0], rtol=1e-3, atol=0)  # theirs is rounded to float16
    assert not zero_point or (zero == 0).all()
    theirs = (back.view(16, 2, 32) / d).round().flatten(1)
    ours = grid.round(W, scale, zero)
    assert (ours != theirs).float().mean() < 2e-3 and (ours - theirs).abs().max() <= 1


# --- stored -------------------------------------------------------------------------------------

OPTIONS = [dict(bits=4), dict(bits=4, group=8), dict(bits=3, group=8),
           dict(bits=2, zero_point=True), dict(bits=8, group=8),
           dict(bits=4, group=16, zero_point=True), dict(bits=5, zero_point=True),
           dict(bits=3), dict(bits=2, group=16), dict(bits=3, group=16, zero_point=True),
           dict(bits=8, group="tensor"), dict(bits=3, group="tensor", zero_point=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_leaf_computes_with_what_is_stored(options, dtype):
    leaf, x = nn.Linear(32, 6), torch.randn(3, 5, 32)
    grid = Grid(options.get("bits"), options.get("group"), options.get("zero_point", False))
    W = leaf.weight.detach().clone()
    numbers = grid.fit(W)
    expected = grid.dense(grid.round(W, *numbers), *numbers)
    form = minillm.quant.wrap(nn.Sequential(leaf), **options)[0]
    assert form.dense().equal(expected)
    form = form.to(dtype)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.03, atol=0.03)
    y = form(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), F.linear(x, expected, form.bias.float()), **close)
    x = x.clone().requires_grad_()
    (form.float()(x) ** 2).sum().backward()
    z = x.detach().clone().requires_grad_()
    (F.linear(z, expected, form.bias) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_embedding_gives_rows_of_what_is_stored(options):
    model = minillm.quant.wrap(nn.Sequential(nn.Embedding(10, 16)), ["0"], **options)
    W, ids = model[0].dense().T, torch.tensor([[3, 1, 4], [1, 5, 9]])
    torch.testing.assert_close(model(ids), W[ids], rtol=0, atol=0)
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            model(torch.tensor([[wrong]]))
    half = (model[0].scale / 2).repeat_interleave(16 // model[0].scale.shape[1], 1).T
    torch.testing.assert_close(model[0].rounding().expand(16, 10), half.expand(16, 10))


def test_bytes_are_those_of_the_codes():
    for options, bits in ((dict(bits=4, group=32), 5), (dict(bits=3), 3 + 32 / 256),
                          (dict(bits=3, group=64), 3.5), (dict(bits=2, group=64), 2.5),
                          (dict(bits=2, group=32, zero_point=True), 3.25),
                          (dict(bits=3, group="tensor"), 3 + 32 / (64 * 256)),
                          (dict(bits=5), 5.125), (dict(), 8.125)):
        model = minillm.quant.wrap(nn.Sequential(nn.Linear(256, 64, bias=False)), **options)
        assert report.total_bytes(model) * 8 == 64 * 256 * bits, options


def test_smaller_groups_are_nearer():
    W = torch.randn(32, 256)
    errors = [(minillm.quant.wrap(nn.Sequential(nn.Linear(256, 32)), **options)[0], options)
              for options in (
        dict(bits=2), dict(bits=3, group="tensor"), dict(bits=3), dict(bits=3, group=64),
        dict(bits=4), dict(bits=4, group=64), dict(bits=4, group=32), dict(bits=8))]
    found = []
    for form, options in errors:
        form.pack(W)
        found.append((form.dense() - W).norm().item())
    assert found == sorted(found, reverse=True) and found[-1] < found[4] / 10


@pytest.mark.parametrize("options", [dict(group=3), dict(bits=4, group=4), dict(bits=2)])
def test_a_row_that_fills_no_whole_number_is_named(options):
    model = two()  # rows of 6 and of 5
    with pytest.raises(ValueError,
                       match=r"group=.* at '2': a row has 5 weights.*: group=5 would fit"
                       if options.get("group") == 3 else "at '0': a row has 6"):
        minillm.quant.wrap(model, **options)
    assert type(model[0]) is nn.Linear


def test_files_hold_their_options_and_are_checked(tmp_path):
    import safetensors.torch

    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    plain = [p.clone() for p in model.parameters()]

    def base():
        again = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        with torch.no_grad():
            for p, q in zip(again.parameters(), plain):
                p.copy_(q)
        return again

    minillm.quant.save(minillm.quant.wrap(model, bits=3, group=8, zero_point=True), tmp_path / "a")
    again = minillm.quant.load(base(), tmp_path / "a")
    assert (again[0].config() == dict(bits=3, group=8, zero_point=True)
            and again[0].dense().equal(model[0].dense()))
    minillm.quant.save(minillm.quant.wrap(base()), tmp_path / "c")
    for path, key, value, ends in (("a", "0.zero", 9, "0 to 7"), ("c", "0.q", -128, "-127 to 127")):
        tensors, metadata = read(tmp_path / path)
        tensors[key] = torch.full_like(tensors[key], value)
        safetensors.torch.save_file(tensors, tmp_path / "b", metadata)
        with pytest.raises(ValueError, match=f"'0': a code is not from {ends}"):
            minillm.quant.load(base(), tmp_path / "b")


def test_an_adapter_over_int4_does_not_belong_to_another_grid(tmp_path):
    W = nn.Linear(64, 64).weight.detach()

    def over(**options):
        model = nn.Sequential(nn.Linear(64, 64))
        with torch.no_grad():
            model[0].weight.copy_(W)
            model[0].bias.zero_()
        return minillm.lora.wrap(minillm.quant.wrap(model, **options), r=2)

    minillm.lora.save(over(bits=4, group=32), tmp_path / "a")
    for options in (dict(bits=4, group=32), dict()):  # int8 is within the rounding of int4
        minillm.lora.load(minillm.lora.unwrap(over(**options)), tmp_path / "a")
    minillm.lora.save(over(), tmp_path / "b")
    with pytest.raises(ValueError, match="another model"):
        other = over(bits=4, group=32)
        other[0].base.pack(W + 0.1)
        minillm.lora.load(minillm.lora.unwrap(other), tmp_path / "b")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [dict(bits=4, group=16), dict(), dict(bits=4),
                                     dict(bits=3, zero_point=True)], ids=str)
def test_a_single_row_compiles(options):
    form = minillm.quant.wrap(nn.Sequential(nn.Linear(64, 32)), **options)
    x = torch.randn(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(form, fullgraph=True)(x), form(x), rtol=1e-4,
                                   atol=1e-5)


@pytest.mark.parametrize("options",
                         [dict(), dict(bits=8, zero_point=True), dict(group="tensor"),
                          dict(bits=4), dict(bits=2),
                          dict(bits=2, group="tensor", zero_point=True)], ids=str)
@pytest.mark.parametrize("into", [16, 48])
def test_a_row_of_codes_is_the_product_with_the_codes(options, into):
    """Read a word at a time: every byte and every part of a byte meets its own x."""
    form = minillm.quant.wrap(nn.Sequential(nn.Linear(into, 5, bias=False)), **options)[0]
    zero = (
        form.zero.int() if form.zero_point else -form.grid.ends[0] * (form.q.dtype == torch.uint8)
    )
    for i in range(into):
        x = F.one_hot(torch.tensor([[i]]), into).float()
        assert (ops.row_of_codes(x, form.q, form.width, zero) * form.scale[:, 0]).equal(
            form.dense()[:, i]
        )
    x = torch.randn(1, 1, into)
    ours = ops.row_of_codes(x, form.q, form.width, zero) * form.scale[:, 0]
    torch.testing.assert_close(ours, F.linear(x, form.dense())[0, 0], rtol=1e-4, atol=1e-5)


def test_a_row_of_codes_is_for_one_row_in_compiled_code():
    q, x = torch.zeros(5, 16, dtype=torch.uint8), torch.randn(1, 16)
    assert not ops.words_fit(x, q)
    compiled = torch.compile(lambda x, q: torch.tensor(ops.words_fit(x, q)), backend="eager")
    assert compiled(x, q)
    assert compiled(x, q.to(torch.int8)) != ops.AVX512
    assert compiled(x.bfloat16(), q.to(torch.int8))
    for x, q in ((torch.randn(2, 16), q), (x.double(), q), (x.clone().requires_grad_(), q),
                 (x, q[:, :14]), (x, q.T)):
        assert not compiled(x, q)


@pytest.mark.parametrize("W, options", [(torch.full((4, 8), 1e40, dtype=torch.float64), {}),
                                        (torch.tensor([[-3e38, 3e38] * 4]), dict(zero_point=True))])
def test_weights_beyond_float32_are_an_error(W, options):
    model = nn.Sequential(nn.Linear(8, len(W), dtype=W.dtype))
    model[0].weight.data = W
    with pytest.raises(ValueError, match="beyond float32, in which quant keeps its scales"):
        minillm.quant.wrap(model, **options)
    assert isinstance(model[0], nn.Linear)


def test_the_group_that_would_fit_is_named():
    rows = nn.Sequential(nn.Linear(96, 8))
    for wrap, options, hint in ((minillm.quant.nf4.wrap, {}, "group=64.*: group=48 or 96 would"),
                                (minillm.quant.wrap, dict(group=100), "group=96 would fit$"),
                                (minillm.quant.wrap, dict(group=20), "group=16 or 24 would fit$")):
        with pytest.raises(ValueError, match=hint):
            wrap(rows, **options)
    minillm.quant.nf4.wrap(rows, group=48)
    with pytest.raises(ValueError, match="12 weights.*: no fewer than 8 codes of 3 bits fill"):
        minillm.quant.wrap(nn.Sequential(nn.Linear(12, 4)), bits=3)
    with pytest.raises(ValueError, match="a row has 1 weights.* of groups and of bytes$"):
        minillm.quant.wrap(nn.Sequential(nn.Linear(1, 4)), group=2)


@pytest.mark.parametrize("zero_point", [False, True])
def test_one_scale_for_the_tensor(zero_point):
    W = torch.randn(5, 24) + 0.3
    whole, row = Grid(3, "tensor", zero_point), Grid(3, None, zero_point)
    (scale, zero), flat = whole.fit(W), W.reshape(1, -1)
    assert scale.shape == (1, 1) and scale.equal(row.fit(flat)[0])
    codes = whole.round(W, scale, zero)
    assert codes.reshape(1, -1).equal(row.round(flat, *row.fit(flat)))
    back = row.dense(codes.view(1, -1), scale, zero).view(5, 24)
    assert whole.dense(codes, scale, zero).equal(back)
    assert whole.fit(torch.zeros(2, 8))[0].item() == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_codes_of_3_bits_never_go_to_the_row_of_codes(monkeypatch):
    monkeypatch.setattr(ops, "row_of_codes", lambda *_: pytest.fail("3 does not divide 8"))
    monkeypatch.setattr(ops, "words_fit", lambda *_: True)
    form = minillm.quant.wrap(nn.Sequential(nn.Linear(32, 4)), bits=3)[0]
    x = torch.randn(1, 32)
    torch.testing.assert_close(form(x), F.linear(x, form.dense(), form.bias))
