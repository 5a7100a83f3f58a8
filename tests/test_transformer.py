"""The transformer against its definitions: causality, cache, padding, the loss, and how tokens are chosen."""

import pytest
import torch
import torch.nn.functional as F
from models import build

import minillm
from minillm import data, rope
from minillm.train import loss_sum
from minillm.transformer import Cache, cross_entropy_sum, left_pad, rope_table, rotate, sample

families = pytest.mark.parametrize("kind", ["gpt2", "llama"])


@families
def test_a_token_sees_only_those_before_it(kind):
    model, ids = build(kind), torch.randint(24, (1, 8))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 24
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


@families
def test_the_cache_gives_what_the_whole_sequence_gives(kind):
    model, ids = build(kind), torch.randint(24, (2, 12))
    whole = model(ids)
    for parts in ([1] * 12, [5, 1, 6], [12]):
        cache, pieces, at = Cache(model.config, 2, 12), [], 0
        for t in parts:
            pieces.append(model(ids[:, at : at + t], cache=cache))
            at += t
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)


@families
def test_padding_changes_nothing(kind):
    model = build(kind)
    rows = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    ids, mask = left_pad(rows, pad=7)
    batch = model(ids, mask)
    for row, logits in zip(rows, batch):
        torch.testing.assert_close(logits[-len(row):], model(torch.tensor([row]))[0], rtol=1e-5, atol=1e-5)
    together = model.generate(rows, 6)
    for row, new in zip(rows, together):
        assert model.generate([row], 6)[0].tolist() == row + new[-6:].tolist()
    right = torch.tensor([[9, 2, 7, 7]])
    torch.testing.assert_close(model(right, right != 7)[:, :2], model(right[:, :2]), rtol=1e-5, atol=1e-5)


@families
def test_soft_prompts_are_right_in_cached_generation_with_padding(kind):
    model = minillm.prompts.wrap(build(kind), length=3)
    rows = [[3, 1, 4, 1, 5], [9, 2]]
    for row, new in zip(rows, model.generate(rows, 4)):
        ids = torch.tensor([row])
        for _ in range(4):
            longer, _, _ = minillm.prepare(model, ids)
            ids = torch.cat([ids, model(longer)[:, -1:].argmax(-1)], 1)
        assert new[-4:].tolist() == ids[0, -4:].tolist()


@families
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_cross_entropy_over_the_labels_and_so_is_its_gradient(kind, tied):
    make = {"gpt2": minillm.Config.gpt2, "llama": minillm.Config}[kind]
    model = minillm.Transformer(make(24, 16, 2, 2, positions=32, tied=tied))
    ids = torch.randint(24, (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.4, -100)
    plain = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = torch.autograd.grad(plain, list(model.parameters()))
    loss = model.loss(ids, labels)
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(torch.autograd.grad(loss * 2, list(model.parameters())), expected):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(ids, labels), plain)
        count = (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(model.loss(ids, labels, reduction="sum"), plain * count)


def test_the_loss_is_the_same_in_any_chunks():
    head, h, y = torch.nn.Linear(6, 11), torch.randn(10, 6, requires_grad=True), torch.randint(11, (10,))
    whole = torch.autograd.grad(F.cross_entropy(head(h), y, reduction="sum"), [h, *head.parameters()])
    for chunk in (1, 3, 10, 100):
        for ours, theirs in zip(torch.autograd.grad(cross_entropy_sum(h, y, head, chunk), [h, *head.parameters()]), whole):
            torch.testing.assert_close(ours, theirs)


def test_rotation_keeps_lengths_and_depends_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(i, j):
        turn = [rotate(x, *rope_table(torch.tensor([[p]]), 8, 10000.0)) for x, p in ((q, i), (k, j))]
        return (turn[0] * turn[1]).sum()

    torch.testing.assert_close(product(3, 1), product(13, 11), rtol=1e-4, atol=1e-5)
    assert (product(3, 1) - product(4, 1)).abs() > 1e-3
    x = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(rotate(x, *rope_table(torch.arange(5)[None], 8, 10000.0)).norm(dim=-1), x.norm(dim=-1))


def test_sampling_keeps_what_each_filter_says():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log().expand(4000, -1)

    def kept(**options):
        return set(sample(logits, 1.0, generator=torch.Generator().manual_seed(0), **options).tolist())

    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {0, 1}
    assert kept(top_p=0.6) == {0, 1} and kept(top_p=0.5) == {0} and kept(top_p=0.0001) == {0}
    assert kept(min_p=0.25) == {0, 1, 2} and kept(min_p=0.5) == {0}
    assert set(sample(logits, 0).tolist()) == {0}
    counts = torch.bincount(sample(logits, 2.0, generator=torch.Generator().manual_seed(0)), minlength=5) / 4000
    expected = (logits[0] / 2).softmax(0)
    assert (counts - expected).abs().max() < 0.03


def test_generation_stops_streams_and_pads():
    model = build("llama")
    free = model.generate([[3, 1, 4], [1, 5, 9]], 8)
    assert free.shape == (2, 11)
    stop = int(free[0, 5])
    seen = []
    ended = model.generate([[3, 1, 4], [1, 5, 9]], 8, stop=stop, pad=0, stream=lambda tokens: seen.append(tokens.tolist()))
    first = (free[0, 3:] == stop).nonzero()[0, 0] + 4
    assert ended[0, :first].tolist() == free[0, :first].tolist() and not ended[0, first:].any()
    assert [list(row) for row in zip(*seen)] == ended[:, 3:].tolist()


@pytest.mark.parametrize("call, message", [
    (lambda m: m(torch.tensor([[3, 24]])), "ids run from 3 to 24.*24 entries"),
    (lambda m: m(torch.tensor([[-1, 2]])), "ids run from -1 to 2"),
    (lambda m: m(torch.zeros(1, 33, dtype=torch.long)), "33 tokens is beyond this model's 32 positions"),
    (lambda m: m.generate([[1, 2]], 31), "max_new_tokens=31.*32 positions"),
    (lambda m: m.generate([[]], 3), "prompt is empty"),
    (lambda m: m.loss(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), -100)), "no label is left"),
    (lambda m: m.loss(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)), "differ in shape"),
    (lambda m: minillm.Config(24, 16, 2, 3, kv_heads=2), "heads=3"),
    (lambda m: minillm.Config(24, 16, 2, 2, activation="swish"), "activation='swish'.*silu"),
    (lambda m: minillm.Config(24, 18, 2, 6), "head_size=3 is odd"),
])
@families
def test_errors_name_the_culprit(kind, call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call(build(kind))


def test_the_prompts_placeholders_stay_valid_and_other_ids_do_not():
    model = minillm.prompts.wrap(build("llama"), length=2)
    model(torch.tensor([[24, 25, 3]]))
    with pytest.raises(IndexError, match="26"):
        model(torch.tensor([[26, 3]]))


@families
def test_a_packed_batch_has_the_loss_and_the_gradient_of_its_documents_one_by_one(kind):
    model, draw = build(kind), torch.Generator().manual_seed(5)
    rows = [torch.randint(24, (n,), generator=draw).tolist() for n in (9, 2, 7, 5, 3, 6)]
    examples = [data.Example(row, [-100, *row[1:]] if i % 2 else list(row)) for i, row in enumerate(rows)]
    packed = data.pack(examples, 12)
    assert len(packed) < len(examples) and all(len(e.ids) <= 12 for e in packed)
    alone, together = [], []
    for batches, found in (([data.collate([e]) for e in examples], alone), ([data.collate(packed)], together)):
        model.zero_grad()
        total = sum(loss_sum(model, *batch) for batch in batches)
        total.backward()
        learnt = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in batches)
        found += [total.item(), learnt, *(p.grad.clone() for p in model.parameters())]
    assert alone[1] == together[1] and alone[0] == pytest.approx(together[0], rel=1e-5)
    for a, b in zip(alone[2:], together[2:]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="several: give prompts the examples unpacked"):
        loss_sum(minillm.prompts.wrap(model), *data.collate(packed))
    with pytest.raises(ValueError, match="9 ids, more than a row's length=8"):
        data.pack(examples, 8)


@families
def test_a_window_hides_what_lies_further_back(kind):
    model, ids = build(kind), torch.randint(24, (1, 9))
    model.layers = model.layers[:1]  # of one block: with more, what lies further back comes through the tokens between
    model.config.window = 3
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % 24
    changed = ((model(ids) - model(other)).abs().amax(-1) > 1e-6)[0]
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False] * 2
    cache = Cache(model.config, 1, 9)
    pieces = [model(ids[:, i : i + n], cache=cache) for i, n in ((0, 5), (5, 1), (6, 2), (8, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=1e-5, atol=1e-5)


@families
def test_recomputed_activations_give_the_same_gradients(kind):
    """Also where the base is frozen, which a reentrant checkpoint would leave without any."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = minillm.lora.wrap(build(kind), r=2)
        for layer in minillm.layers(model).values():
            torch.nn.init.normal_(layer.patches["lora"].B)
        model.recompute = recompute
        ids = torch.arange(12).view(2, 6)
        model.loss(ids, ids).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert grads[0] and all(g is not None and torch.allclose(f, g, atol=1e-6) for f, g in zip(*grads))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own import
def test_compiled_generation_gives_the_same_tokens():
    model, rows = build("llama"), [[3, 1, 4, 1, 5], [9, 2]]
    minillm.lora.wrap(model, r=2)
    expected = [model.generate(rows, 6).tolist(), model.generate(rows[:1], 6).tolist()]
    minillm.compile(model)
    assert [model.generate(rows, 6).tolist(), model.generate(rows[:1], 6).tolist()] == expected
    with pytest.raises(TypeError, match="not Linear: torch.compile"):
        minillm.compile(torch.nn.Linear(2, 2))


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def test_scaled_positions_turn_as_their_formulas_say():
    plain = rope.frequencies(32, 1000.0)
    assert rope.frequencies(32, 1000.0, dict(rope_type="linear", factor=4.0)).equal(plain / 4)
    factors = [float(i) for i in range(1, 17)]
    assert rope.frequencies(32, 1000.0, dict(rope_type="factors", factors=factors)).equal(plain / torch.tensor(factors))
    turns = 64 * plain / (2 * torch.pi)  # in the original context
    scaled = rope.frequencies(32, 1000.0, LLAMA3)
    assert scaled[turns >= 4].equal(plain[turns >= 4]) and scaled[turns <= 1].equal(plain[turns <= 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.sum() > 2 and bool((scaled < plain)[between].all() and (scaled > plain / 8)[between].all())


@pytest.mark.parametrize("options, message", [
    (dict(rope_scaling=dict(LLAMA3, factor=0)), "numbers above 0"), (dict(rope_scaling=dict(LLAMA3, factor=True)), "numbers above 0"),
    (dict(rope_scaling=dict(LLAMA3, low_freq_factor=4.0)), "not below high_freq_factor"),
    (dict(rope_scaling=dict(rope_type="linear", factor=[4.0])), "numbers above 0"),
    (dict(rope_scaling=dict(rope_type="linear", factor="4")), "numbers above 0"),
    (dict(rope_scaling=dict(rope_type="linear")), "has the fields"),
    (dict(rope_scaling=dict(rope_type="yarn")), "known: linear, llama3, factors"), (dict(rope_scaling=4.0), "no known rope_type"),
    (dict(rope_scaling=dict(rope_type="linear", factor=float("inf"))), "numbers above 0"),
    (dict(rope_scaling=dict(rope_type="factors", factors=[1.0])), "1 factors, and heads of 8 have 4 pairs"),
    (dict(rope_scaling=dict(rope_type="factors", factors=3.0)), "numbers above 0"),
    (dict(rope_scaling=LLAMA3, rope_base=None), "is for RoPE, and rope_base is None"), (dict(qk_norm=1), "qk_norm=1 is neither"),
])
def test_a_scaling_that_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        minillm.Config(24, 16, 1, 2, **options)


@pytest.mark.parametrize("options", [dict(qk_norm=True), dict(rope_scaling=LLAMA3)])
def test_the_cache_holds_what_norms_and_scaling_made(options):
    model = minillm.Transformer(minillm.Config(24, 16, 2, 2, positions=128, **options)).eval()
    ids = torch.randint(24, (1, 100))
    cache = Cache(model.config, 1, 100)
    parts = torch.cat([model(ids[:, :90], cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(90, 100))], 1)
    torch.testing.assert_close(parts, model(ids), rtol=1e-5, atol=1e-5)
