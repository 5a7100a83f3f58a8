"""A user's `torch.set_default_device` does not move what the library makes for itself.

With "meta" as the default device a tensor that is made there has no numbers, so each
test here fails where it has to have them.
"""

import pytest
import torch
from models import IDS, build, logits

from minillm import prune
from minillm.data import Batches, Example

EXAMPLES = [Example(row.tolist(), row.tolist()) for row in IDS]


@pytest.fixture(autouse=True)
def elsewhere():
    model = build("llama")
    torch.set_default_device("meta")
    yield model
    torch.set_default_device(None)


@pytest.mark.parametrize("options", [
    dict(), dict(pattern=prune.model), dict(pattern=prune.n_m(2, 4)), dict(score=prune.Random(3)),
], ids=str)
def test_pruning(options, elsewhere):
    before = logits(elsewhere, IDS)
    prune.wrap(elsewhere, **options)
    assert not torch.equal(logits(elsewhere, IDS), before)
    assert all(p.device.type == "cpu" for p in elsewhere.state_dict().values())


def test_the_order_of_the_examples():
    batches = Batches(EXAMPLES * 4, 2, seed=5)
    assert sorted(batches.order()) == list(range(8))
