"""Every technique in nn.TransformerEncoder, whose layers in eval read their modules'
weights instead of calling them."""

import copy

import pytest
import torch
from conftest import hugging_face
from models import learnt
from torch import nn

import minillm

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
        if name == "adapters around layers" and padding is not None:
            with torch.no_grad(), pytest.raises(ValueError, match="use_nested_tensor = False"):
                model(x, src_key_padding_mask=padding)
            model.use_nested_tensor = False
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                y = model(x, src_key_padding_mask=padding)
            torch.testing.assert_close(y[seen], right[seen], rtol=1e-4, atol=1e-4)


def test_a_weight_with_an_adapter_may_be_asked_what_it_is_and_not_be_used():
    layer = minillm.adapters.wrap(encoder(), ["linear1"], size=2).layers[0].linear1
    W, base = layer.weight, layer.base.weight
    assert isinstance(W, torch.Tensor) and (W.dtype, W.device) == (base.dtype, base.device)
    assert W.shape == base.shape and W.size(0) == 32 and W.dim() == 2 and W.numel() == 512
    x = torch.randn(3, 16)
    for use in (lambda: x @ W.T, lambda: nn.functional.linear(x, W), lambda: W + 0,
                lambda: torch.cat([base, W]), lambda: W.float(), lambda: W.tolist()):
        with pytest.raises(ValueError, match="computes with the weight of a leaf and does not call "
                                             "it, and adapters cannot be merged"):
            use()


def test_t5_asks_the_dtype_of_a_weight_and_calls_the_leaf():
    transformers = hugging_face()
    config = transformers.T5Config(vocab_size=24, d_model=16, d_kv=4, d_ff=32, num_layers=2,
                                   num_heads=4, dropout_rate=0, decoder_start_token_id=0)
    ids = torch.randint(24, (2, 5))

    def loss(model, rows=slice(None)):
        return model(input_ids=ids[rows], labels=ids[rows]).loss

    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).train()
    minillm.lora.wrap(model, r=2, dropout=0.5)
    loss(model).backward()
    patches = [layer.patches["lora"] for layer in minillm.layers(model).values()]
    assert any(".wo" in name for name in minillm.layers(model))
    assert all(patch.B.grad.any() for patch in patches)
    minillm.lora.unwrap(model)
    for name in ("a", "b"):
        learnt(minillm.lora.wrap(model, name=name, r=2))
    alone = [loss(minillm.use(model, name), slice(i, i + 1)) for i, name in enumerate("ab")]
    minillm.use(model, "a", "b")
    with minillm.rows(model, ["a", "b"]):
        torch.testing.assert_close(loss(model), sum(alone) / 2)
    minillm.lora.unwrap(model)
    loss(minillm.adapters.wrap(model, ["wo"], size=2)).backward()


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
