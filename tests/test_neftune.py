"""NEFTune against its formula: x + alpha / sqrt(L d) eps, in training and on real tokens only."""

import math

import pytest
import torch
from models import build
from torch import nn

import minillm
from minillm.augment import NEFTune
from minillm.train import loss_sum, train

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 0, 0]])
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


class Seen:
    """A loss that keeps the output of the model's token embedding."""

    def __call__(self, model, ids, labels, mask=None):
        site = minillm.registry.roles.embedding(model)
        handle = (site.layer or site.module).register_forward_hook(
            lambda module, inputs, x: setattr(self, "x", x.detach()))
        loss = loss_sum(model, ids, labels, mask)
        handle.remove()
        return loss


def noise(model, mask=None, ids=IDS, alpha=5.0):
    """(noise, clean embedding) of one call in train mode."""
    seen = Seen()
    seen(model, ids, ids, mask)
    clean = seen.x
    NEFTune(seen, alpha)(model.train(), ids, ids, mask)
    return seen.x - clean, clean


@pytest.mark.parametrize("kind", ["gpt2", "llama", "hf_gpt2", "hf_llama"])
def test_bound_mean_square_and_padding(kind):
    model, d = build(kind).train(), 16
    torch.manual_seed(0)
    every = torch.stack([noise(model, MASK)[0] for _ in range(100)])  # (100, b, t, d)
    for row, L in ((0, 6), (1, 4)):
        bound, real = 5 / math.sqrt(L * d), every[:, row, :L]
        assert real.abs().max() <= bound * 1.0001 and real.abs().max() > 0.99 * bound
        assert abs(real.square().mean() / (bound**2 / 3) - 1) < 0.05
        assert abs(real.mean()) < 0.02 * bound
    assert not every[:, 1, 4:].any(), "padding has no noise"


def test_a_packed_row_has_the_noise_of_its_documents():
    documents = torch.tensor([[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 0]])
    model = build("llama").train()
    torch.manual_seed(0)
    every = torch.stack([noise(model, documents)[0] for _ in range(100)]).abs().amax((0, 3))
    lengths = torch.tensor([[4, 4, 4, 4, 2, 2], [3, 3, 3, 2, 2, 0]])
    bound = torch.where(lengths > 0, 5 / (lengths * 16).sqrt(), 0)
    assert (every <= bound * 1.0001).all() and (every >= 0.98 * bound).all()


def test_no_noise_in_eval_and_nothing_stays():
    model, loss = build("llama").eval(), NEFTune(loss_sum, 5)
    assert torch.equal(loss(model, IDS, IDS), loss_sum(model, IDS, IDS))
    assert not torch.equal(loss(model.train(), IDS, IDS), loss_sum(model, IDS, IDS))
    assert not model.embed_tokens._forward_hooks
    with pytest.raises(IndexError):
        loss(model, IDS + 90, IDS)
    assert not model.embed_tokens._forward_hooks, "after an error either"


def test_a_soft_prompt_has_no_noise_and_the_text_has():
    model = minillm.prompts.wrap(build("llama"), length=3).train()
    change, _ = noise(model, MASK)
    assert change.shape[1] == 9 and not change[:, :3].any() and change[0, 3:].all()
    assert not change[1, 7:].any()


@pytest.mark.parametrize("wrap", [
    lambda model: minillm.lora.wrap(model, ["embed_tokens"], r=2),
    lambda model: minillm.quant.wrap(model, ["embed_tokens", "lm_head"]),
    lambda model: minillm.lora.wrap(minillm.quant.wrap(model, ["embed_tokens"]), ["embed_tokens"]),
])
def test_on_lora_and_int8_embeddings(wrap):
    model = wrap(build("llama")).train()
    change, clean = noise(model, MASK)
    assert change[0].all() and change.abs().max() <= 5 / math.sqrt(4 * 16) * 1.0001
    assert clean.shape == change.shape


EXAMPLES = [minillm.data.Example(row, row) for row in
            ([3, 1, 4, 1, 5], [2, 6, 5], [9, 2, 6, 5, 3], [5, 8, 9], [7, 9, 3, 2])]


def run(tmp_path, steps=6, **given):
    model = minillm.lora.wrap(build("llama"), r=2)
    options = dict(steps=steps, lr=0.01, batch_size=2, progress=False) | given
    return train(model, EXAMPLES, **options), model


class Stop(Exception):
    pass


def stop_at_three(model, step, steps):
    if step == 3 and stop_at_three.on:
        raise Stop


def test_resume_is_bit_for_bit_and_outside_of_it_an_error(tmp_path):
    given = dict(loss=NEFTune(loss_sum, 5), on_step=stop_at_three)
    stop_at_three.on = False
    whole, model = run(tmp_path, **given)
    stop_at_three.on = True
    keep = dict(checkpoints=tmp_path / "run", save_every=1)
    with pytest.raises(Stop):
        run(tmp_path, **given, **keep)
    stop_at_three.on = False
    for other in (dict(given, loss=None), dict(given, loss=NEFTune(loss_sum, 10))):
        with pytest.raises(ValueError, match="NEFTune"):
            run(tmp_path, **other, **keep, resume=True)
    again, resumed = run(tmp_path, **given, **keep, resume=True)
    assert [r["loss"] for r in again] == [r["loss"] for r in whole]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    plain, _ = run(tmp_path)
    assert [r["loss"] for r in plain] != [r["loss"] for r in whole]


def test_wrong_calls():
    for alpha in (0, -1, "5"):
        with pytest.raises(ValueError, match="alpha="):
            NEFTune(loss_sum, alpha)
    with pytest.raises(ValueError, match="is not a loss"):
        NEFTune(5)
    with pytest.raises(ValueError, match="does not call a token embedding"):
        NEFTune(lambda *batch: torch.zeros(()))(build("llama").train(), IDS, IDS)
    with pytest.raises(ValueError, match="does not call a token embedding"):
        NEFTune(lambda *batch: torch.zeros(()))(nn.Linear(2, 2), IDS, IDS)
    with pytest.raises(TypeError, match="uncompiled"):
        NEFTune(loss_sum)(torch.compile(build("llama").train(), backend="eager"), IDS, IDS)
