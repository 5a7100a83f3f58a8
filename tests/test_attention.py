"""Who sees whom: windows, padding, packing and the cache give what each text gives alone."""

import sys
import types

import pytest
import torch
from models import build

import minillm
from minillm import data
from minillm.model.attention import attend, attend_once, count, fused, visible
from minillm.model.cache import Cache
from minillm.model.generate import left_pad
from minillm.train import loss_sum

families = pytest.mark.parametrize("kind", ["gpt2", "llama"])
windows = pytest.mark.parametrize("window", [None, 1, 3])
ROWS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9]]


def windowed(kind, window):
    model = build(kind)
    model.config.window = window
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "t, s, grouped, masked", [(5, 5, 1, False), (5, 5, 2, True), (1, 6, 2, False), (3, 7, 4, True)]
)
def test_the_fused_kernel_computes_what_is_written_out(t, s, grouped, masked):
    q = torch.randn(2, 4, t, 8)
    k, v = (torch.randn(2, 4 // grouped, s, 8) for _ in range(2))
    mask = torch.rand(2, 1, t, s) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True
    close(attend(q, k, v, mask), fused(q, k, v, mask))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_token_in_compiled_code_is_the_same_attention(groups):
    q, mask = torch.randn(1, 4, 1, 8), torch.rand(1, 1, 1, 9) < 0.6
    k, v = (torch.randn(1, groups, 9, 8) for _ in range(2))
    mask[..., 0] = True
    close(attend_once(q, k, v, mask), attend(q, k, v, mask))
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager", fullgraph=True, dynamic=False)
    assert compiled(q, k, v, mask).equal(attend_once(q, k, v, mask))
    assert compiled(q, k, v, None).equal(fused(q, k, v, None)), "not without a mask"
    two = (torch.cat([t, t]) for t in (q, k, v))
    close(compiled(*two, mask)[:1], attend(q, k, v, mask))
    q, mask = torch.randn(1, 4, 3, 8), torch.rand(1, 1, 3, 9) < 0.6
    mask[..., 0] = True
    close(compiled(q, k, v, mask), attend(q, k, v, mask))  # a row of three tokens: a prompt


def test_each_token_sees_what_the_rule_says():
    """Against the rule in two loops, for documents in any order."""
    documents = torch.randint(4, (6, 9))
    positions = count(documents)
    for window in (None, 1, 3):
        sees = visible(documents, positions, documents, positions, window)
        for row, own in enumerate(documents.tolist()):
            for i, mine in enumerate(own):
                before = [j for j in range(i + 1) if own[j] == mine]
                if mine:  # nobody reads what padding computes
                    assert positions[row, i] == len(before) - 1
                    expected = before if window is None else before[-window:]
                    assert sees[row, i].nonzero()[:, 0].tolist() == expected
                assert sees[row, i].any()
    for start in (4, 8):
        before = types.SimpleNamespace(documents=documents[:, :start],
                                       positions=positions[:, :start])
        assert count(documents[:, start:], before).equal(positions[:, start:])


@families
@windows
def test_a_row_in_a_padded_batch_is_the_row_alone(kind, window):
    model = windowed(kind, window)
    ids, mask = left_pad(ROWS, pad=7)
    batch = model(ids, mask)
    for row, logits in zip(ROWS, batch):
        close(logits[-len(row):], model(torch.tensor([row]))[0])
    right = torch.tensor([[9, 2, 7, 7, 7]])
    close(model(right, right != 7)[:, :2], model(right[:, :2]))


@families
@windows
def test_padding_between_a_soft_prompt_and_the_text_does_not_count(kind, window):
    model = minillm.prompts.wrap(windowed(kind, window), length=3)
    torch.nn.init.normal_(model.embed_tokens.patches["prompts"].P)
    ids, mask = left_pad(ROWS, pad=7)
    batch, _, mask = minillm.prepare(model, ids, None, mask)
    logits = model(batch, mask)
    for i, row in enumerate(ROWS):
        alone = model(minillm.prepare(model, torch.tensor([row]))[0])[0]
        close(torch.cat([logits[i, :3], logits[i, -len(row):]]), alone)


@families
@windows
def test_generation_with_a_cache_and_padding_is_that_of_each_row_without(kind, window):
    model = windowed(kind, window)
    soft = minillm.prompts.wrap(windowed(kind, window), length=2)
    for m in (model, soft):
        together = m.generate(ROWS, 6)
        for row, new in zip(ROWS, together):
            ids = torch.tensor([row])
            for _ in range(6):
                ids = torch.cat([ids, m(minillm.prepare(m, ids)[0])[:, -1:].argmax(-1)], 1)
            assert new[-6:].tolist() == ids[0, -6:].tolist()


@families
@windows
@pytest.mark.parametrize("static", [False, True])
def test_the_cache_in_any_pieces_gives_the_logits_of_the_whole(kind, window, static):
    """Padding, packed texts, whole rows; `static`: as compiled code does it, but not compiled."""
    model = windowed(kind, window)
    ids = torch.randint(24, (3, 9))
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [1, 0, 0, 0, 1, 1, 1, 1, 1]])
    packed = torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3, 3], [1] * 4 + [2] * 5, [2] * 9])
    for mask in (None, padded, packed):
        whole = model(ids, mask)
        real = torch.ones_like(ids) > 0 if mask is None else mask > 0
        for parts in ([1] * 9, [5, 1, 3], [4, 1, 1, 1, 1, 1], [9]):
            cache, pieces, at = Cache(model.config, 3, 11), [], 0
            model.compiled = static
            for t in parts:
                piece = slice(at, at + t)
                pieces.append(model(ids[:, piece], mask if mask is None else mask[:, piece], cache))
                at += t
            model.compiled = False
            assert cache.filled == 9
            close(torch.cat(pieces, 1)[real], whole[real])


@families
@windows
def test_a_packed_batch_has_the_loss_and_the_gradient_of_its_documents_one_by_one(kind, window):
    model, draw = windowed(kind, window), torch.Generator().manual_seed(5)
    rows = [torch.randint(24, (n,), generator=draw).tolist() for n in (9, 2, 7, 5, 3, 6)]
    examples = [
        data.Example(row, [-100, *row[1:]] if i % 2 else list(row)) for i, row in enumerate(rows)
    ]
    packed = data.pack(examples, 12)
    assert len(packed) < len(examples) and all(len(e.ids) <= 12 for e in packed)
    alone, together = [], []
    for batches, found in (
        ([data.collate([e]) for e in examples], alone),
        ([data.collate(packed)], together),
    ):
        model.zero_grad()
        total = sum(loss_sum(model, *batch) for batch in batches)
        total.backward()
        learnt = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in batches)
        found += [total.item(), learnt, *(p.grad.clone() for p in model.parameters())]
    assert alone[1] == together[1] and alone[0] == pytest.approx(together[0], rel=1e-5)
    for a, b in zip(alone[2:], together[2:]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_does_not_pack_says_so():
    packed = data.pack([data.Example([1, 2], [1, 2]), data.Example([3], [3])], 8)
    with pytest.raises(ValueError, match="several: give prompts the examples unpacked"):
        loss_sum(minillm.prompts.wrap(build("llama")), *data.collate(packed))
    with pytest.raises(ValueError, match="9 ids, more than a row's length=8"):
        data.pack([data.Example([1] * 9, [1] * 9)], 8)


@families
def test_a_window_hides_what_lies_further_back(kind):
    model, ids = windowed(kind, 3), torch.randint(24, (1, 9))
    # One block alone: with more, what lies further back comes through the tokens between.
    model.layers = model.layers[:1]
    other = ids.clone()
    other[0, 4] = (ids[0, 4] + 1) % 24
    changed = ((model(ids) - model(other)).abs().amax(-1) > 1e-6)[0]
    assert changed.tolist() == [False] * 4 + [True] * 3 + [False] * 2


@families
def test_only_masks_for_what_the_fused_kernel_cannot_say_itself(kind, monkeypatch):
    """Whole rows get none: the causal kernel is fast. A window as long as they hides nothing."""
    model, ids, given = windowed(kind, 6), torch.randint(24, (2, 6)), []
    monkeypatch.setattr(
        "minillm.model.transformer.fused",
        lambda q, k, v, mask: given.append(mask is None) or fused(q, k, v, mask),
    )

    def plain(*args, **kwargs):
        given.clear()
        model(*args, **kwargs)
        return all(given)

    assert plain(ids) and plain(ids, torch.ones_like(ids)) and plain(ids, torch.ones(2, 6) > 0)
    assert not plain(torch.cat([ids, ids[:, :1]], 1)) and not plain(ids, ids.new_ones(2, 6).tril(3))
    cache = Cache(model.config, 2, 9)
    assert (
        plain(ids[:, :3], cache=cache)
        and plain(ids[:, :1], cache=cache)
        and not plain(ids[:, :2], cache=cache)
    )
    assert not plain(ids[:, :1], cache=cache)  # token 7: the window of 6 hides the first
    model.config.window = None
    assert plain(ids[:, :1], cache=cache)


def test_texts_and_not_rows_are_within_the_positions():
    """A packed or padded row may be longer than the model's positions; no text in it may."""
    model = minillm.Transformer(minillm.Config.gpt2(24, 16, 2, 2, positions=4)).eval()
    ids = torch.randint(24, (1, 8))
    two = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])
    close(model(ids, two)[:, 4:], model(ids[:, 4:]))
    close(model(ids, two == 2)[:, 4:], model(ids[:, 4:]))
    with pytest.raises(
        ValueError, match="a sequence of 5 tokens is beyond this model's 4 positions"
    ):
        model(ids, torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]]))
    with pytest.raises(ValueError, match="a sequence of 8 tokens is beyond"):
        model(ids)
    assert model.generate([[1], [2, 3]], 2).shape == (2, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m, ids: m(ids, torch.ones(2, 4) > 0),
            r"mask \(2, 4\) and ids \(2, 5\) differ in shape",
        ),
        (lambda m, ids: m(ids, torch.ones(2, 5)), "mask is torch.float32: give bool"),
        (lambda m, ids: m(ids, cache=Cache(m.config, 1, 9)), "for a batch of 1 rows, ids have 2"),
        (
            lambda m, ids: m(ids, cache=Cache(m.config, 2, 4)),
            "holds 0 of at most 4 tokens, and 5 more do not fit",
        ),
        (
            lambda m, ids: m(ids, cache=Cache(minillm.Config(24, 16, 1, 2), 2, 9)),
            "the cache is for layers=1.*the model has layers=3",
        ),
        (
            lambda m, ids: m(ids, cache=Cache(m.config, 2, 9, torch.float64)),
            "cache is torch.float64, the model torch.float32",
        ),
        (lambda m, ids: Cache(m.config, 0, 9), "batch=0 of a Cache is not a whole number from 1"),
        (lambda m, ids: Cache(m.config, 2, -1), "length=-1 of a Cache"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(build("llama"), torch.randint(24, (2, 5)))


def test_a_refused_call_leaves_the_cache_as_it_was():
    model, ids = build("llama"), torch.randint(24, (1, 6))
    cache = Cache(model.config, 1, 8)
    start = model(ids[:, :4], cache=cache)
    for call in (
        lambda: model(ids[:, :5], cache=cache),
        lambda: model(ids[:, :1] + 24, cache=cache),
    ):
        with pytest.raises((ValueError, IndexError)):
            call()
    close(torch.cat([start, model(ids[:, 4:], cache=cache)], 1), model(ids))


@pytest.mark.parametrize("other", ["labels", "mask"])
def test_a_batch_of_two_shapes_is_refused_for_every_model(other):
    with pytest.raises(ValueError, match=rf"{other} \(1, 3\) and ids \(1, 2\) differ in shape"):
        minillm.prepare(
            build("Linear"), torch.zeros(1, 2).long(), **{other: torch.zeros(1, 3).long()}
        )


@families
@pytest.mark.parametrize("static", [False, True])
def test_a_ring_of_a_windows_length_gives_the_logits_of_the_whole(kind, static):
    """New keys overwrite those that the window has left; padding and packed texts too."""
    model = windowed(kind, 3)
    ids = torch.randint(24, (3, 16))
    padded = torch.ones_like(ids)
    padded[0, :4], padded[1, :1] = 0, 0
    packed = torch.tensor([[1] * 5 + [2] * 11, [1] * 10 + [2] * 6, [3] * 16])
    for mask in (None, padded, packed):
        whole, real = model(ids, mask), torch.ones_like(ids) > 0 if mask is None else mask > 0
        for length, parts in ((3, [1] * 16), (6, [4, 4, 1, 1, 1, 4, 1]), (5, [3, 2, 3, 3, 2, 3])):
            cache, pieces = Cache(model.config, 3, length), []
            model.compiled = static
            for piece, m in zip(ids.split(parts, 1),
                                [None] * len(parts) if mask is None else mask.split(parts, 1)):
                pieces.append(model(piece, m, cache))
            model.compiled = False
            assert cache.filled == 16 and cache.k.shape[3] == length
            close(torch.cat(pieces, 1)[real], whole[real])


def test_a_ring_that_is_too_short_is_refused():
    model = windowed("llama", 3)
    ids = torch.randint(24, (1, 8))
    with pytest.raises(ValueError, match="greater length, of at least 5 for a window of 3"):
        cache = Cache(model.config, 1, 4)
        model(ids[:, :4], cache=cache)
        model(ids[:, :3], cache=cache)
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 1]])  # token 5 still sees token 1
    cache = Cache(model.config, 1, 4)
    model(ids[:, :4], mask[:, :4], cache)
    model(ids[:, 4:5], mask[:, 4:5], cache)  # padding takes the column of token 0
    with pytest.raises(ValueError, match="padding between its tokens, and a cache of 4 columns"):
        model(ids[:, 5:6], mask[:, 5:6], cache)
    both = torch.cat([torch.ones_like(mask), mask])  # one such row of two is enough
    cache = Cache(model.config, 2, 4)
    model(ids[:, :4].expand(2, -1), both[:, :4], cache)
    model(ids[:, 4:5].expand(2, -1), both[:, 4:5], cache)
    with pytest.raises(ValueError, match="padding between its tokens, and a cache of 4 columns"):
        model(ids[:, 5:6].expand(2, -1), both[:, 5:6], cache)


def test_generating_with_a_window_needs_no_more_memory_for_a_longer_text(monkeypatch):
    """The same tokens as with a cache of all columns, from prompts of one length and of several."""
    made, generation = [], sys.modules["minillm.model.generate"]

    class Noted(Cache):
        def __init__(self, config, batch, length, *others):
            made.append(length)
            super().__init__(config, batch, length, *others)

    prompts = torch.randint(24, (2, 11)), [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 1], [4, 5, 6, 2]]
    for kind, soft in (("llama", 0), ("gpt2", 0), ("llama", 4)):
        model = windowed(kind, 3)
        if soft:
            minillm.prompts.wrap(model, length=soft)
        for prompt, padding in zip(prompts, (0, 7)):
            with monkeypatch.context() as patch:
                patch.setattr(generation, "ring", lambda i, m, total, window: (total, total))
                expected = model.generate(prompt, 9)
            with monkeypatch.context() as patch:
                patch.setattr(generation, "Cache", Noted)
                assert model.generate(prompt, 9).equal(expected)
            assert made.pop() == 5 + padding
