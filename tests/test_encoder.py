"""Every technique in nn.TransformerEncoder, whose layers in eval read their modules'
weights instead of calling them."""

import copy

import pytest
import torch
from models import learnt
from torch import nn

import minillm
from minillm.registry import CannotMerge

LINEARS = ["linear1", "linear2", "out_proj"]
WRAPS = {
    "lora": lambda m: minillm.lora.wrap(m, LINEARS, r=2),
    "prune": lambda m: minillm.prune.wrap(m, LINEARS),
    "quant": lambda m: minillm.quant.wrap(m, LINEARS),
    "sparse": lambda m: minillm.sparse.wrap(m, LINEARS, anyway=True),
    "adapters": lambda m: minillm.adapters.wrap(m, size=2),
    "adapters around leaves": lambda m: minillm.adapters.wrap(m, ["linear1", "linear2"], size=2),
    "adapters around layers": lambda m: minillm.adapters.wrap(m, ["layers.0", "layers.1"], size=2),
    "lora and prune": lambda m: minillm.prune.wrap(minillm.lora.wrap(m, LINEARS, r=2), LINEARS),
    "quant and adapters": lambda m: minillm.adapters.wrap(minillm.quant.wrap(m, LINEARS),
                                                          ["linear2"], size=2),
}
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()


def encoder(nested=True):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", WRAPS)
def test_eval_computes_what_training_does(name):
    model, x = encoder(), torch.randn(2, 5, 16)
    plain = copy.deepcopy(model)(x).detach()
    learnt(WRAPS[name](model), std=0.5)
    for padding in (None, PADDING):
        model.train()
        right = model(x, src_key_padding_mask=padding).detach()
        seen = torch.ones(2, 5, dtype=torch.bool) if padding is None else ~padding
        assert (padding is not None or name == "sparse"
                or (right - plain).norm() > 1e-4 * plain.norm())
        model.eval()
        if "adapters" in name:  # not in the nested tensor that padded rows become
            model.use_nested_tensor = False
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                y = model(x, src_key_padding_mask=padding)
            torch.testing.assert_close(y[seen], right[seen], rtol=1e-4, atol=1e-4)


def test_padded_rows_and_adapters_are_an_error_that_says_what_to_do():
    model = minillm.adapters.wrap(encoder(), ["linear1"], size=2).eval()
    with (
        torch.no_grad(),
        pytest.raises(CannotMerge, match="adapters cannot be merged.*use_nested_tensor = False"),
    ):
        model(torch.randn(2, 5, 16), src_key_padding_mask=PADDING)


def test_an_adapter_around_what_is_never_called_is_refused():
    with pytest.raises(ValueError, match="'out_proj' matches no sublayer"):
        minillm.adapters.wrap(encoder(), ["out_proj"], size=2)


def test_dropout_that_attention_would_pass_by_is_an_error():
    model = learnt(minillm.lora.wrap(encoder(), LINEARS, r=2, dropout=0.5))
    with pytest.raises(ValueError, match="lora has a dropout.*nn.MultiheadAttention.*dropout=0"):
        model(torch.randn(2, 5, 16))
    model.eval()(torch.randn(2, 5, 16))


def test_a_wrapped_encoder_is_copied_and_compiled():
    model, x = learnt(minillm.adapters.wrap(encoder(), size=2)).eval(), torch.randn(2, 5, 16)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
