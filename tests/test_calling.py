"""The logits of any model: padding, masks, and models that only look like minillm's."""

import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face
from models import IDS, build
from torch import nn

import minillm
from minillm import measure
from minillm.calling import limit, logits, native
from minillm.train import loss_sum
from minillm.train.loop import check_compiled

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3]]


def padded(left):
    t = max(map(len, ROWS))
    pads = [t - len(row) if left else 0 for row in ROWS]
    ids, mask = torch.zeros(3, t, dtype=torch.long), torch.zeros(3, t, dtype=torch.bool)
    for i, (row, pad) in enumerate(zip(ROWS, pads)):
        ids[i, pad : pad + len(row)], mask[i, pad : pad + len(row)] = torch.tensor(row), True
    labels = ids.masked_fill(~mask, -100)
    labels[torch.arange(3), torch.tensor(pads)] = -100  # nothing precedes the first token
    return ids, labels, mask


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["hf_gpt2", "hf_llama"])
@pytest.mark.parametrize("left", [True, False])
def test_a_batch_learns_what_its_rows_learn_alone(kind, left):
    hugging_face()
    model = build(kind)
    alone = sum(loss_sum(model, torch.tensor([row]), torch.tensor([row])) for row in ROWS)
    together = loss_sum(model, *padded(left))
    torch.testing.assert_close(together, alone)
    assert together.requires_grad
    torch.testing.assert_close(measure.nll(model, *padded(left))[0].sum(), alone.detach())


class Lookalike(nn.Module):
    """A user's model, whose loss, middle layer and head have the names of minillm's Transformer."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.lm_head = (
            nn.Embedding(24, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 24),
        )
        self.loss, self.layers = nn.CrossEntropyLoss(), nn.ModuleList()

    def forward(self, ids, **options):
        return self.lm_head(self.hidden(self.embed(ids)))


def test_a_model_that_names_its_parts_as_minillm_does_is_no_transformer():
    model = Lookalike()
    expected = F.cross_entropy(
        model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss_sum(model, IDS, IDS), expected)
    torch.testing.assert_close(measure.nll(model, IDS, IDS)[0].sum(), expected.detach())
    assert minillm.report.report(model, length=4).activations > 0
    check_compiled(torch.compile(model, backend="eager"))  # its forward is what train calls
    with pytest.raises(TypeError, match="compiles the model's forward"):
        check_compiled(torch.compile(build("llama"), backend="eager"))
    assert (
        native(build("llama"))
        and native(torch.compile(build("llama"), backend="eager"))
        and not native(model)
    )


class Sums(nn.Module):
    """Each token adds to all later ones, so padding in front is felt; no mask is read."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 24)

    def forward(self, ids, **options):
        return self.embed(ids).cumsum(1)


def test_a_model_that_swallows_any_keyword_sees_its_padded_rows_one_by_one():
    model = Sums()
    alone = sum(measure.nll(model, torch.tensor([r]), torch.tensor([r]))[0].sum() for r in ROWS)
    torch.testing.assert_close(measure.nll(model, *padded(left=True))[0].sum(), alone)


def test_a_packed_mask_is_for_minillm_alone():
    packed = torch.tensor([[1, 1, 1, 2, 2, 2]] * 2)
    for call in (logits, loss_sum):
        with pytest.raises(ValueError, match="Lookalike has no mask for packed examples"):
            call(Lookalike(), IDS, *([IDS] if call is loss_sum else []), packed)
    torch.testing.assert_close(
        logits(Lookalike().eval(), IDS, torch.ones_like(IDS)).shape, torch.Size([2, 6, 24])
    )


def test_the_likelihood_of_half_precision_logits_is_summed_in_float32():
    model = build("Linear").bfloat16()
    exact = F.cross_entropy(
        model(IDS)[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten(), reduction="sum"
    )
    own = build("llama").bfloat16()
    whole = F.cross_entropy(
        own(IDS)[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten(), reduction="sum"
    )
    for m, expected in ((model, exact), (own, whole)):
        total, _ = measure.nll(m, IDS, IDS)
        assert total.dtype == torch.float32
        torch.testing.assert_close(total.sum().double(), expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrap, given", [
    (lambda logits: (logits, None), "tuple"),
    (lambda logits: dict(logits=logits), "dict"),
    (lambda logits: logits.mean(), r"a tensor of shape \(\)"),
    (lambda logits: logits[0], r"a tensor of shape \(6, 24\)"),
])
def test_a_forward_that_returns_no_logits_is_one_line(wrap, given):
    class Odd(Lookalike):
        def forward(self, ids):
            return wrap(super().forward(ids))

    for call in (loss_sum, measure.nll):
        with pytest.raises(TypeError, match=f"^the model's forward returned {given}: .*logits$"):
            call(Odd(), IDS, IDS)


SIZES = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=32, max_position_embeddings=40)
LIKE_OPT = dict(vocab_size=24, max_position_embeddings=40, ffn_dim=32)
FIRST_POSITIONS = {  # {class: options of its configuration}; those before OPT have a padding_idx
    "RobertaForMaskedLM": SIZES,
    "RobertaForCausalLM": SIZES | dict(is_decoder=True),
    "XLMRobertaForMaskedLM": SIZES,
    "EsmForMaskedLM": SIZES | dict(pad_token_id=1, mask_token_id=23),
    "MPNetForMaskedLM": SIZES,
    "OPTForCausalLM": LIKE_OPT | dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                                      word_embed_proj_dim=16),
    "XGLMForCausalLM": LIKE_OPT | dict(d_model=16, num_layers=2, attention_heads=4),
    "BertForMaskedLM": SIZES,
}


@torch.no_grad()
def made(name):
    torch.manual_seed(0)
    cls = getattr(hugging_face(), name)
    model = cls(cls.config_class(**FIRST_POSITIONS[name])).eval()
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parity
@pytest.mark.parametrize("name", FIRST_POSITIONS)
@torch.no_grad()
def test_the_longest_text_fits_and_one_more_token_does_not(name):
    model = made(name)
    room = limit(model)
    assert (room is None) == (name == "XGLMForCausalLM")  # its positions are computed
    if room:
        assert model(torch.full((1, room), 5)).logits.shape[1] == room
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, room + 1), 5))


@pytest.mark.parity
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name, family", [
    *((name, None) for name in FIRST_POSITIONS),
    ("RobertaForMaskedLM", minillm.lora),
    ("RobertaForMaskedLM", minillm.quant),
])
@torch.no_grad()
def test_padded_rows_have_the_positions_that_they_have_alone(name, family, left):
    """Also the row with the id 1, which some of these models take for padding."""
    model = made(name)
    if family:
        family.wrap(model, ["position_embeddings"])
    ids, _, mask = padded(left)
    found = logits(model, ids, mask)
    for row, y, real in zip(ROWS, found, mask):
        torch.testing.assert_close(y[real], logits(model, torch.tensor([row]))[0])
