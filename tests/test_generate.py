"""Generation: how it stops, pads, streams, in which state the model is, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch
from models import build

import minillm
from minillm.model.generate import left_pad, ring

ROWS = [[3, 1, 4], [1, 5, 9]]


# --- stopping, padding, streaming ----------------------------------------------------------------


def test_generation_stops_streams_and_pads():
    model = build("llama")
    free = model.generate(ROWS, 8)
    assert free.shape == (2, 11) and free[:, :3].tolist() == ROWS
    stop = int(free[0, 5])
    seen = []
    ended = model.generate(
        ROWS, 8, stop=stop, pad=0, stream=lambda tokens: seen.append(tokens.tolist())
    )
    first = (free[0, 3:] == stop).nonzero()[0, 0] + 4
    assert ended[0, :first].tolist() == free[0, :first].tolist() and not ended[0, first:].any()
    assert [list(row) for row in zip(*seen)] == ended[:, 3:].tolist()


def scripted(model, monkeypatch, *rows):
    """The model, made to choose these tokens: a row of tokens for each row of the batch."""
    steps = iter(zip(*rows))
    monkeypatch.setattr("minillm.model.generate.sample", lambda logits,
                        *_: torch.tensor(next(steps)))
    return model


def test_a_row_ends_after_any_stop_id_and_is_filled_up(monkeypatch):
    model, rows = build("llama"), ([5, 7, 2, 2, 2], [4, 3, 6, 8, 2])

    def new(**options):
        return scripted(model, monkeypatch, *rows).generate(ROWS, 5, **options)[:, 3:].tolist()

    assert new() == [[5, 7, 2, 2, 2], [4, 3, 6, 8, 2]]
    assert new(stop=7) == [[5, 7, 7, 7, 7], [4, 3, 6, 8, 2]]  # pad is the stop id
    assert new(stop=[8, 7], pad=11) == [
        [5, 7, 11, 11],
        [4, 3, 6, 8],
    ]  # all have ended: no fifth step
    assert new(stop=[8, 7]) == [[5, 7, 8, 8], [4, 3, 6, 8]] and new(
        stop=torch.tensor([8, 7]), pad=0
    ) == [[5, 7, 0, 0], [4, 3, 6, 8]]
    assert new(stop=(4, 5), pad=7) == [[5], [4]]
    assert new(stop=23) == [[5, 7, 2, 2, 2], [4, 3, 6, 8, 2]]
    assert new(stop=3, pad=3) == [[5, 7, 2, 2, 2], [4, 3, 3, 3, 3]]


def test_no_new_tokens_is_the_prompt():
    model, ids = build("llama"), torch.tensor(ROWS)
    assert model.generate(ids, 0).tolist() == ROWS and model.generate(
        [[1, 2], [3]], 0, pad=9
    ).tolist() == [[1, 2], [9, 3]]


def test_ids_and_mask_may_be_any_whole_numbers_and_the_prompt_may_be_all_that_fits():
    model = build("gpt2")
    expected = model.generate([[3, 1, 4], [5]], 4, pad=7).tolist()
    ids, mask = left_pad([[3, 1, 4], [5]], 7)
    for m in (mask, mask.long(), mask.int(), mask.float()):
        assert model.generate(ids, 4, mask=m).tolist() == expected
    assert model.generate(ids.int(), 4, mask=mask).tolist() == expected
    assert model.generate(torch.zeros(1, 30, dtype=torch.long), 2).shape == (1, 32)


def test_a_soft_prompt_alone_can_be_continued():
    model = minillm.prompts.wrap(build("llama"), length=3)
    new = model.generate([[]], 4)
    placeholders = torch.tensor([[24, 25, 26]])
    for i in range(4):
        assert new[0, i] == model(torch.cat([placeholders, new[:, :i]], 1))[0, -1].argmax()


@pytest.mark.parametrize("t", [5, 6, 9])
def test_a_prompt_longer_than_the_windows_ring(t):
    """The prompt goes in pieces of a window, each beside the keys that its first token sees."""
    model, prompt = build("llama"), torch.randint(24, (2, t))
    model.config.window = 3
    ids = prompt
    for _ in range(4):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert ring(prompt, None, t + 4, 3) == (5, 3) and model.generate(prompt, 4).equal(ids)


def test_a_seed_decides_the_draws():
    model = build("llama")

    def drawn(seed):
        return model.generate(
            ROWS, 8, temperature=2.0, top_p=0.9, generator=torch.Generator().manual_seed(seed)
        ).tolist()

    assert drawn(1) == drawn(1) != drawn(2)


# --- the model's state ---------------------------------------------------------------------------


def test_a_placeholder_is_no_id_of_a_text():
    model = minillm.prompts.wrap(build("llama"), length=3)
    with pytest.raises(IndexError, match="the ids run from 3 to 24, but the vocabulary has 24"):
        model.generate([[3, 24]], 2)


def test_it_computes_in_eval_mode_and_leaves_every_module_as_it_was():
    model = minillm.lora.wrap(build("llama"), r=2, dropout=0.9)
    for layer in minillm.layers(model).values():
        torch.nn.init.normal_(layer.patches["lora"].B)
    expected = model.eval().generate(ROWS, 8).tolist()
    model.train()
    model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    assert model.generate(ROWS, 8).tolist() == expected
    assert [m.training for m in model.modules()] == modes and len(set(modes)) == 2

    def fail(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(ROWS, 8, stream=fail)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, lambda m: minillm.quant.wrap(minillm.lora.wrap(m, r=2))],
    ids=["plain", "int8 and LoRA"],
)
def test_under_autocast_it_continues_as_without_a_cache(kind, wrap):
    model = wrap(build(kind))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        new = model.generate(ROWS, 6)
        for i in range(6):
            logits = model(new[:, : 3 + i])[:, -1].float()
            chosen = logits.gather(1, new[:, 3 + i, None])[:, 0]
            assert (
                logits.amax(-1) - chosen < 0.1
            ).all()  # the likeliest, up to bfloat16's rounding
        cache = minillm.Cache(model.config, 2, 4)  # a float32 cache takes what autocast makes
        assert (model(new[:, :4], cache=cache)[:, -1] - model(new[:, :4])[:, -1]).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_runs_in_the_models_dtype(dtype):
    model = build("llama").to(dtype)
    new = model.generate(ROWS, 4)
    logits = model(new[:, :-1])[:, -1].float()
    assert (
        new.shape == (2, 7) and (logits.amax(-1) - logits.gather(1, new[:, -1:])[:, 0] < 0.2).all()
    )


@pytest.mark.parametrize("options", [{}, dict(temperature=1.0)])
def test_broken_logits_are_no_token(options):
    model = build("llama")
    model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="logits are nan or inf"):
        model.generate(ROWS, 4, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own import
@pytest.mark.parametrize("backend", ["aot_eager",
                                     pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_generation_gives_the_same_tokens(backend):
    model, rows = build("llama"), [[3, 1, 4, 1, 5], [9, 2]]
    minillm.lora.wrap(model, r=2)
    expected = [model.generate(rows, 6).tolist(), model.generate(rows[:1], 6).tolist()]
    minillm.compile(model)
    for module in (*model.layers, model.lm_head):
        module.compile(backend=backend)
    assert [model.generate(rows, 6).tolist(), model.generate(rows[:1], 6).tolist()] == expected
    with pytest.raises(TypeError, match="not Linear: torch.compile"):
        minillm.compile(torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_copy_of_a_compiled_model_is_a_plain_one():
    """torch leaves the compiled code out of a copy, so the copy must not go compiled code's way."""
    model = minillm.compile(build("llama"))  # nothing compiles before the first call
    expected = build("llama").generate(ROWS, 6).tolist()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert model.compiled and not other.compiled
        assert other.generate(ROWS, 6).tolist() == expected
        assert all(module._compiled_call_impl is None for module in other.modules())
    assert (
        model.to(torch.float64).compiled
        and model.state_dict().keys() == build("llama").state_dict().keys()
    )


# --- what is refused -----------------------------------------------------------------------------

IDS = torch.tensor([[3, 1, 4], [0, 5, 9]])


@pytest.mark.parametrize(
    "ids, options, message",
    [
        (ROWS, dict(temperature=-1), "temperature=-1 is not a number from 0"),
        (ROWS, dict(temperature=math.nan), "temperature=nan is not"),
        (ROWS, dict(temperature=math.inf), "temperature=inf is not"),
        (ROWS, dict(temperature="0.7"), "temperature='0.7' is not"),
        (ROWS, dict(temperature=None), "temperature=None is not"),
        (ROWS, dict(temperature=True), "temperature=True is not"),
        (
            ROWS,
            dict(top_p=0.9),
            "top_p=0.9 has no effect at temperature=0, which is greedy: give a temperature above 0",
        ),
        (ROWS, dict(top_k=5), "top_k=5 has no effect at temperature=0"),
        (ROWS, dict(min_p=0.1), "min_p=0.1 has no effect at temperature=0"),
        (ROWS, dict(temperature=1, top_p=0), "top_p=0 is not a number above 0 and at most 1"),
        (ROWS, dict(temperature=1, top_p=1.01), "top_p=1.01 is not"),
        (ROWS, dict(temperature=1, top_p=math.nan), "top_p=nan is not"),
        (ROWS, dict(temperature=1, min_p=2), "min_p=2 is not a number from 0 to 1"),
        (ROWS, dict(temperature=1, min_p=-0.1), "min_p=-0.1 is not"),
        (ROWS, dict(temperature=1, min_p="0.1"), "min_p='0.1' is not"),
        (ROWS, dict(temperature=1, top_k=0), "top_k=0 is not a whole number from 1"),
        (ROWS, dict(temperature=1, top_k=-1), "top_k=-1 is not"),
        (ROWS, dict(temperature=1, top_k=2.5), "top_k=2.5 is not"),
        (ROWS, dict(max_new_tokens=-1), "max_new_tokens=-1 is not a whole number from 0"),
        (ROWS, dict(max_new_tokens=1.5), "max_new_tokens=1.5 is not"),
        (ROWS, dict(max_new_tokens=30), "a prompt of 3 tokens and max_new_tokens=30.*32 positions"),
        (ROWS, dict(stop=24), "stop=24 is no id of the vocabulary, 0 to 23"),
        (ROWS, dict(stop=[1, -1]), "stop=-1 is no id"),
        (ROWS, dict(stop="eos"), "stop='eos' is no id"),
        (ROWS, dict(stop=1.0), "stop=1.0 is no id"),
        (ROWS, dict(pad=-1), "pad=-1 is no id of the vocabulary, 0 to 23"),
        (ROWS, dict(pad=24), "pad=24 is no id"),
        (ROWS, dict(mask=torch.ones(2, 3) > 0), "a list of rows is padded here: leave mask out"),
        ([], {}, "at least one row"),
        ([1, 2, 3], {}, r"ids=\[1, 2, 3\] is no list of rows"),
        (["The", "a"], {}, r"ids=\['The', 'a'\] is no list of rows"),
        ([[3, 1], "a"], {}, r"ids=\[\[3, 1\], 'a'\] is no list of rows"),
        ("The", {}, "ids='The' is no list of rows"),
        ([[1.5, 2]], {}, "the rows hold torch.float32: ids are whole numbers"),
        ([[]], {}, "nothing to continue: the prompt is empty"),
        ([[], [1, 2]], {}, "row 0 ends in padding, or is empty"),
        ([[3, 24]], {}, "ids run from 3 to 24.*24 entries"),
        ([[-1, 2]], {}, "ids run from -1 to 2"),
        (IDS[0], {}, r"ids are torch.int64 \(3,\): give whole numbers \(b, t\)"),
        (IDS[:0], {}, r"ids are torch.int64 \(0, 3\)"),
        (IDS.float(), {}, "ids are torch.float32"),
        (IDS + 20, {}, "ids run from 20 to 29"),
        (IDS, dict(mask=IDS[:, :2] > 0), r"mask \(2, 2\) and ids \(2, 3\) differ in shape"),
        (IDS, dict(mask=IDS[0] > 0), r"mask \(3,\) and ids \(2, 3\) differ in shape"),
        (
            IDS,
            dict(mask=torch.tensor([[1, 1, 1], [1, 1, 0]])),
            "row 1 ends in padding, or is empty.*pad on the left",
        ),
        (
            IDS,
            dict(mask=torch.tensor([[1, 1, 2], [1, 1, 1]])),
            "mask runs from 1 to 2.*a packed row cannot be continued",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused_before_any_work(ids, options, message, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(
        minillm.model.transformer.Block, "forward", lambda *_: pytest.fail("it has started")
    )
    with pytest.raises((ValueError, IndexError), match=message):
        model.generate(ids, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    "options", [dict(top_p=1), dict(min_p=0), dict(min_p=1), dict(top_k=1), dict(top_k=99), {}]
)
def test_the_ends_of_the_ranges_are_possible(options):
    assert build("llama").generate(ROWS, 1, temperature=1, stop=[0, 23], **options).shape == (2, 4)


def test_rows_are_padded_on_the_left():
    ids, mask = left_pad([[3, 1], [4, 1, 5], [9]], pad=7)
    assert ids.tolist() == [[7, 3, 1], [4, 1, 5], [7, 7, 9]] and mask.tolist() == [
        [False, True, True],
        [True] * 3,
        [False, False, True],
    ]
    assert left_pad([[]])[0].shape == left_pad([[]])[1].shape == (1, 0)
    assert left_pad([[3, 1], [4]])[0].tolist() == [[3, 1], [0, 4]]
    with pytest.raises(ValueError, match="no row of ids"):
        left_pad([])
