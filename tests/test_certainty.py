"""The expected calibration error: worked by hand, over tokens, and between two models."""

import pytest
import torch
from models import build
from test_gguf import tokenizer  # noqa: F401

import minillm
from minillm import measure
from minillm.measure.intervals import jackknife


def test_the_error_is_the_formula_worked_by_hand():
    """Bins of a fifth: (0.4, 0.6] holds three predictions, (0.8, 1] four, (0, 0.2] one."""
    confidences = [0.6, 0.5, 0.41, 0.81, 1.0, 0.9, 0.99, 0.2]
    correct = [1, 0, 0, 1, 1, 1, 0, 1]
    gaps = [abs(1 - (0.6 + 0.5 + 0.41)), abs(3 - (0.81 + 1.0 + 0.9 + 0.99)), abs(1 - 0.2)]
    found = measure.calibration_error(confidences, correct, bins=5)
    assert found == pytest.approx(sum(gaps) / 8) and found.n == 8 and found.low < found < found.high
    rows = measure.reliability(found)
    assert [row[:3] for row in rows] == [(0, 0.2, 1), (0.4, 0.6, 3), (0.8, 1, 4)]
    assert rows[2][3:] == (pytest.approx(3.7 / 4), 0.75)
    one = measure.calibration_error(confidences, correct, bins=1)
    assert one == pytest.approx(abs(5 - sum(confidences)) / 8)
    assert measure.calibration_error([0.0], [False]) == 0


def test_a_calibrated_and_an_overconfident_model():
    torch.manual_seed(0)
    p = torch.rand(4000)
    right = torch.rand(4000) < p
    good = measure.calibration_error(p[:500].tolist(), right[:500].tolist())
    sharp = measure.calibration_error((p[:500] / 2 + 0.5).tolist(), right[:500].tolist())
    assert good < 0.1 < 0.2 < sharp
    change = measure.change(good, sharp)
    assert change == pytest.approx(sharp - good) and change.low > 0.1
    assert measure.metric("calibration error").better == -1


@pytest.mark.parametrize("prompted", [False, True])
def test_of_tokens_it_is_that_of_each_prediction(tokenizer, prompted):  # noqa: F811
    torch.manual_seed(0)
    model = minillm.Transformer(minillm.Config(tokenizer.vocab_size, 16, 1, 2, positions=64))
    model.lm_head.weight.data.mul_(40)
    if prompted:
        minillm.prompts.wrap(model, length=3)
    text = "a model says how sure it is, and it is not always right. " * 20
    ids = torch.tensor(tokenizer.encode(text))
    found = measure.token_calibration_error(model, tokenizer, text, 16, windows=6, bins=7)
    assert found.n == 6
    confidences, correct = [], []
    for i in range(6):
        row = ids[None, 16 * i : 16 * i + 16]
        p = model(minillm.prepare(model, row)[0])[0, -16:-1].softmax(-1)
        confidences += p.max(-1).values.tolist()
        correct += (p.argmax(-1) == row[0, 1:]).tolist()
    assert found == pytest.approx(measure.calibration_error(confidences, correct, bins=7), rel=1e-5)
    assert model.training


def test_hugging_faces_models_are_measured_too(tokenizer):  # noqa: F811
    model = build("hf_llama")
    model.resize_token_embeddings(tokenizer.vocab_size)
    error = measure.token_calibration_error(model, tokenizer, "a text of some words " * 9, 8)
    assert 0 <= error <= 1 and sum(n for _, _, n, *_ in measure.reliability(error)) == 7 * error.n


def test_many_predictions_are_measured_at_once():
    """The interval of sums takes n steps: it is that of leaving each one out."""
    torch.manual_seed(0)
    p = torch.rand(60).tolist()
    found = measure.calibration_error(p, [x > 0.4 for x in p])
    gap = measure.metric("calibration error").measure
    assert jackknife(found.parts, gap, summed=True) == pytest.approx(jackknife(found.parts, gap))
    many = measure.calibration_error(p * 500, [x > 0.4 for x in p] * 500)
    assert many.n == 30_000 and many == pytest.approx(found) and many.low > found.low


@pytest.mark.parametrize("call, message", [
    (lambda t: measure.calibration_error([0.5], [1, 0]), "1 predictions and 2 references"),
    (lambda t: measure.calibration_error([], []), "0 predictions"),
    (lambda t: measure.calibration_error([1.5], [1]), "confidence=1.5 is not a probability"),
    (lambda t: measure.calibration_error([float("nan")], [1]), "confidence=nan is not"),
    (lambda t: measure.calibration_error([0.5], [1], bins=0), "bins=0 is not"),
    (lambda t: measure.token_calibration_error(build("llama"), t, "", 16), "of 0 tokens has noth"),
    (lambda t: measure.token_calibration_error(build("llama"), t, "a", 1), "length=1: the least"),
    (lambda t: measure.token_calibration_error(build("llama"), t, "a", 9, 0), "windows=0: the le"),
    (lambda t: measure.reliability(0.5), "0.5 is no Score of calibration_error")])
def test_what_cannot_be_measured_is_named(tokenizer, call, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        call(tokenizer)
