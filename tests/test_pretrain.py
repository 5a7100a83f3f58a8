"""The tiny model: what it reads, and that it is worth making small."""

import copy
import itertools

import pytest
import torch

import minillm
from minillm import data, measure
from minillm.zoo import pretrain


def test_the_tiny_model_reads_no_docstring_and_no_module_that_tests():
    text = pretrain.reading()
    assert text.startswith(data.topics()) and len(text) > 2 * len(data.topics())
    held_out = [d.text for which in ("validation", "test") for d in data.texts(which)]
    seen = [t for t in held_out if len(t) >= 60 and t in text]
    assert not seen, seen[:3]
    blocks = list(itertools.islice(pretrain.comments(), 200))
    assert all(len(block) >= 40 for block in blocks) and not any(b.startswith("#") for b in blocks)


@pytest.mark.slow
def test_making_the_tiny_model_small_has_a_price():
    """Half of the weights, 4 bits or half of the rank: each costs more than its interval."""
    model, tokenizer = minillm.load("tiny")
    text = "\n\n".join(d.text for d in data.texts("validation"))

    def perplexity(change):
        changed = copy.deepcopy(model)
        for name, p in changed.named_parameters():
            if p.dim() == 2 and name.startswith("layers."):
                p.data = change(p.data)
        return measure.perplexity(changed, tokenizer, text, length=256, windows=40)

    def int4(W):
        scale = W.abs().amax(1, keepdim=True) / 7
        return (W / scale).round() * scale

    def half_pruned(W):
        return W.where(W.abs() > W.abs().median(1, keepdim=True)[0], 0.0)

    def half_rank(W):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :48] * S[:48] @ Vh[:48]

    before = perplexity(lambda W: W)
    for change in (int4, half_pruned, half_rank):
        price = measure.change(before, perplexity(change))
        assert price.low > 0, (change.__name__, price)


def test_a_directory_in_the_way_is_found_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrain, "pretrain", lambda *args, **kwargs: (None, None))
    monkeypatch.setattr(minillm.checkpoints, "save", lambda model, path, tokenizer: None)
    path = pretrain.tiny()
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    monkeypatch.setattr(pretrain, "pretrain", None)  # calling it would fail
    with pytest.raises(FileExistsError, match=path.name):
        pretrain.tiny()
    assert (path / "mine.txt").read_text() == "mine"
