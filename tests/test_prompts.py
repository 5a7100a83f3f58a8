"""The starts of a soft prompt, P-tuning's network, and a prompt without a position left."""

import pytest
import torch
from models import IDS, build, learnt, logits
from torch import nn

import minillm
from minillm.prompts import ptuning


def P_of(start, length=4, model=None):
    model = build("llama") if model is None else model
    return minillm.prompts.wrap(model, length=length, start=start).embed_tokens.patches["prompts"].P


def test_random_numbers_are_those_of_the_paper():
    P = P_of("random", length=24)
    assert P.abs().max() <= 0.5 and abs(P.std() - 12**-0.5) < 0.03 and abs(P.mean()) < 0.05
    torch.manual_seed(1)
    one = P_of("random")
    torch.manual_seed(1)
    assert torch.equal(P_of("random"), one)


def test_a_text_is_repeated_or_cut():
    table = build("llama").embed_tokens.weight
    for start, expected in (([7, 8, 9], [7, 8, 9, 7]), ([1, 2, 3, 4, 5], [1, 2, 3, 4]),
                            ((5,), [5, 5, 5, 5]), (torch.tensor([6, 2]), [6, 2, 6, 2])):
        assert torch.equal(P_of(start), table[expected]), start


def test_labels_are_means_and_the_rest_is_from_the_vocabulary():
    table = build("llama").embed_tokens.weight
    P = P_of([[7, 8, 9], [4]])
    assert torch.allclose(P[:2], torch.stack([table[[7, 8, 9]].mean(0), table[4]]))
    assert all((table == row).all(1).any() for row in P[2:])
    assert torch.equal(P_of([[3], [1]], length=2), table[[3, 1]])


def test_a_start_sees_what_is_around_the_embedding():
    model = learnt(minillm.lora.wrap(build("llama"), ["embed_tokens"], r=2))
    expected = model.embed_tokens(torch.tensor([[7, 8]]))[0]
    assert torch.equal(P_of([7, 8], 2, model), expected)


@pytest.mark.parametrize("start, message", [
    ([], r"start=\[\] is empty"),
    ([3, 24], "start has the id 24, and the vocabulary has 0 to 23"),
    ([-1], "start has the id -1"),
    ([[3], []], r"start=\[\] is empty"),
    ([[3], [99]], "start has the id 99"),
    ([[1], [2], [3], [4], [5]], "start has 5 labels, and length=4"),
    ("positive", "start='positive' is none of 'vocabulary', 'random', a list of ids"),
    ([1.5], "is none of"),
    (3, "start=3 is none of"),
    ([[1], 2], "start=2 is none of"),
])
def test_a_start_that_cannot_be(start, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        P_of(start, model=model)
    assert not minillm.layers(model)


@pytest.mark.parametrize("wrap", [minillm.prompts.wrap, ptuning.wrap, minillm.prompts.prefix.wrap])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "hf_gpt2"])
def test_a_prompt_longer_than_the_positions_left(kind, wrap):
    message = "length=32: the model has 32 positions, and the text needs one, so length is at most"
    with pytest.raises(ValueError, match=message):
        wrap(build(kind), length=32)
    model = minillm.prompts.wrap(build(kind), length=20, name="a")
    with pytest.raises(ValueError, match="length=12 and 20 placeholders of other pro.*at most 11"):
        wrap(model, length=12)
    wrap(model, length=11)
    assert logits(model, minillm.prepare(model, IDS[:1, :1])[0]).shape == (1, 32, 24)


def test_ids_that_were_prepared_before_another_wrap_mean_the_same():
    model = learnt(minillm.prompts.wrap(build("llama"), length=3))
    ids = minillm.prepare(model, IDS)[0]
    before = model(ids)
    ptuning.wrap(model, length=2)
    assert torch.equal(model(ids), before)
    assert minillm.prepare(model, IDS)[0][0, :5].tolist() == [27, 28, 24, 25, 26]


# --- P-tuning -------------------------------------------------------------------------------------


def test_the_network_of_p_tuning():
    model = learnt(ptuning.wrap(build("llama"), length=3, hidden=7))
    patch = model.embed_tokens.patches["ptuning"]
    mlp = nn.Sequential(nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 16))
    for i, layer in enumerate((mlp[0], mlp[2], mlp[4]), 1):
        layer.weight.data, layer.bias.data = (getattr(patch, f"{key}{i}").data for key in "Wb")
    P = mlp(patch.E)
    twin = minillm.prompts.wrap(build("llama"), length=3)
    twin.embed_tokens.patches["prompts"].P.data.copy_(P)
    assert torch.allclose(logits(model), logits(twin), atol=1e-6)
    assert not torch.allclose(P[0], P[1], atol=1e-3)


def test_the_start_and_the_file_of_p_tuning(tmp_path):
    config = minillm.Config(50, 64, 1, 2, ffn=64)
    patch = ptuning.wrap(minillm.Transformer(config)).embed_tokens.patches["ptuning"]
    assert (patch.length, patch.hidden) == (20, 64)
    assert 0.9 < patch.E.std() < 1.1
    for key in ("W1", "W2", "W3", "b1", "b2", "b3"):
        p = getattr(patch, key)
        assert p.abs().max() <= 1 / 8 and abs(p.std() - 1 / 8 / 3**0.5) < 0.015, key
    model = learnt(ptuning.wrap(build("llama"), length=3, hidden=7))
    minillm.prompts.save(model, tmp_path / "a")
    again = minillm.prompts.load(build("llama"), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    names = {key for key, _ in again.embed_tokens.patches["ptuning"].named_parameters()}
    assert names == {"E", "W1", "b1", "W2", "b2", "W3", "b3"}, "training can go on"
    with pytest.raises(ValueError, match="hidden=0 is not a whole number"):
        ptuning.wrap(build("llama"), hidden=0)
