"""A head of classes: its formula, its pooling, its training, transformers' class, the refusals."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import hugging_face
from models import IDS, MODELS, build
from small_model import model as small  # noqa: F401
from torch import nn

import minillm
from minillm import classify, data, measure
from minillm.data import NOT_LEARNT, Example
from minillm.measure.intervals import score

HEADS = {"Linear": "head", "Conv1D": "head", "gpt2": "lm_head", "llama": "lm_head",
         "hf_gpt2": "lm_head", "hf_llama": "lm_head"}


def patch_of(model):
    (layer,) = minillm.layers(model).values()
    return next(iter(layer.patches.values()))


@torch.no_grad()
def headed(kind, seed=0, **options):
    """The model with a random head of 3 classes, whose b is not 0."""
    torch.manual_seed(seed)
    model = classify.wrap(build(kind), **dict(dict(classes=3), **options))
    patch_of(model).b.normal_()
    return model


def rows(n=12):
    """Examples of 2 to 7 ids; the class is the first id modulo 3."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for i in range(n):
        ids = torch.randint(1, 24, (2 + i % 6,), generator=draw).tolist()
        found.append(Example(ids, [NOT_LEARNT] * (len(ids) - 1) + [ids[0] % 3]))
    return found


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_it_is_a_linear_map_of_the_input_of_the_head(kind, pool):
    model = headed(kind, pool=pool)
    (name, layer), = minillm.layers(model).items()
    assert name == HEADS[kind]
    seen = []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = classify.logits(model, IDS)
    (h,) = seen
    h = h[:, -1] if pool == "last" else h.mean(1)
    patch = patch_of(model)
    torch.testing.assert_close(found, h @ patch.W.T + patch.b)
    assert found.shape == (2, 3)
    learns = [n for n, p in model.named_parameters() if p.requires_grad]
    assert learns == [f"{name}.patches.classify.{key}" for key in "Wb"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "hf_gpt2", "hf_llama"])
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_pooled(kind, pool, side):
    model, pad = headed(kind, pool=pool), 7
    texts = [[3, 1, 4, 1, 5], [9, 2]]
    alone = torch.cat([classify.logits(model, torch.tensor([ids])) for ids in texts])
    fill = [[pad] * (5 - len(ids)) for ids in texts]
    ids = [f + one if side == "left" else one + f for one, f in zip(texts, fill)]
    mask = [[False] * len(f) + [True] * len(one) if side == "left"
            else [True] * len(one) + [False] * len(f) for one, f in zip(texts, fill)]
    found = classify.logits(model, torch.tensor(ids), torch.tensor(mask))
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    number = torch.tensor(mask).long()  # as the tokenizers of transformers give it
    assert torch.equal(classify.logits(model, torch.tensor(ids), number), found)


@pytest.mark.parity
def test_it_equals_transformers_class():
    transformers = hugging_face()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=32,
                                      num_hidden_layers=2, num_attention_heads=4, num_labels=3,
                                      num_key_value_heads=2, pad_token_id=0)
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    ours = transformers.LlamaForCausalLM(config).eval()
    ours.model.load_state_dict(theirs.model.state_dict())
    classify.wrap(ours, classes=3)
    with torch.no_grad():
        patch_of(ours).W.copy_(theirs.score.weight)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
    mask, y = ids != 0, torch.tensor([2, 1])
    expected = theirs(ids, attention_mask=mask.long(), labels=y)
    torch.testing.assert_close(classify.logits(ours, ids, mask), expected.logits)
    labels = torch.tensor([[-100] * 4 + [2], [-100, -100, 1, -100, -100]])
    torch.testing.assert_close(classify.loss(ours, ids, labels, mask) / 2, expected.loss)


# --- training -------------------------------------------------------------------------------------


def test_training_equals_a_plain_loop():
    model, plain = headed("llama"), headed("llama")
    log = minillm.train.train(model, rows(), steps=6, lr=0.01, batch_size=4, schedule="constant",
                              loss=classify.loss, progress=False)
    W, b = (nn.Parameter(p.detach().clone()) for p in (patch_of(plain).W, patch_of(plain).b))
    optimizer = torch.optim.AdamW([W, b], lr=0.01, weight_decay=0.0)
    lm = minillm.classify.unwrap(plain)
    batches = data.batches(rows(), 4)
    for record in log:
        chosen = batches.draw()
        h = torch.stack([lm.hidden(torch.tensor([e.ids]))[0, -1] for e in chosen]).detach()
        loss = F.cross_entropy(h @ W.T + b, torch.tensor([e.labels[-1] for e in chosen]))
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["learnt"] == 4
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([W, b], 1.0)
        optimizer.step()
    torch.testing.assert_close(patch_of(model).W, W, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ["lora", "classify"])
def test_lora_learns_beside_it(first, tmp_path):
    def both(model):
        torch.manual_seed(0)
        wraps = [lambda: minillm.lora.wrap(model, r=2), lambda: classify.wrap(model, classes=3)]
        for wrap in wraps if first == "lora" else wraps[::-1]:
            wrap()
        return model

    model = both(build("llama"))
    every = rows(24)
    before = classify.mean_loss(model, every)
    minillm.train.train(model, every, steps=60, lr=0.03, batch_size=8, loss=classify.loss,
                        evaluate=functools.partial(classify.mean_loss, examples=every), every=30,
                        progress=False)
    learns = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {"A", "B", "W", "b"}
    assert classify.mean_loss(model, every) < 0.5 * before
    minillm.save_all(model, tmp_path / "all")
    again = minillm.load_all(build("llama"), tmp_path / "all")
    assert torch.equal(classify.logits(again, IDS), classify.logits(model, IDS))
    tokens = minillm.use(again, "lora")(IDS)
    assert torch.equal(tokens, minillm.lora.wrap(build("llama"), r=2)(IDS)) is False
    assert tokens.shape[-1] == 24
    minillm.use(again, "lora", "classify")
    assert torch.equal(classify.logits(again, IDS), classify.logits(model, IDS))


def test_a_soft_prompt_is_a_part_of_the_text():
    model = headed("llama")
    minillm.prompts.wrap(model, length=3)
    ids, _, mask = minillm.prepare(model, IDS, None, None)
    patch = patch_of_head(model)
    every = model(ids)
    torch.testing.assert_close(classify.logits(model, IDS), every[:, -1])
    assert every.shape == (2, 9, 3) and patch.names == [0, 1, 2]


def patch_of_head(model):
    return minillm.layers(model)["lm_head"].patches["classify"]


def test_its_file_keeps_the_names_and_the_pool(tmp_path):
    model = headed("llama", classes=["no", "yes"], pool="mean", name="spam")
    classify.save(model, tmp_path / "c")
    again = classify.load(build("llama"), tmp_path / "c")
    patch = minillm.layers(again)["lm_head"].patches["spam"]
    assert patch.names == ["no", "yes"] and patch.pool == "mean"
    assert torch.equal(classify.logits(again, IDS), classify.logits(model, IDS))
    classify.unwrap(again)
    assert torch.equal(again(IDS), build("llama")(IDS))


# --- texts ----------------------------------------------------------------------------------------


def test_texts_become_examples_and_predictions(small):  # noqa: F811
    model, tokenizer = minillm.load(small)
    torch.manual_seed(0)
    classify.wrap(model, classes=["short", "long"])
    texts = ["one two", "one two three four five six seven eight nine ten", "three", "a " * 400]
    labels = ["short", "long", "short", "long"]
    found = classify.examples(model, tokenizer, texts, labels, length=20)
    for one, text, label in zip(found, texts, labels):
        assert one.ids == tokenizer.encode(text)[:19] + [tokenizer.eos]
        assert one.labels == [-100] * (len(one.ids) - 1) + [int(label == "long")]
    by_hand = [classify.logits(model, torch.tensor([one.ids])).argmax().item() for one in found]
    for batch in (1, 3):
        chosen = classify.predict(model, tokenizer, texts, length=20, batch_size=batch)
        assert chosen == [["short", "long"][k] for k in by_hand]
    loss = [F.cross_entropy(classify.logits(model, torch.tensor([one.ids])),
                            torch.tensor([one.labels[-1]])) for one in found]
    for batch in (1, 3):
        assert classify.mean_loss(model, found, batch) == pytest.approx(
            torch.stack(loss).mean().item(), rel=1e-5)


def test_forgetting_compares_with_the_best():
    scores = [measure.accuracy(list(given), list("aaaaaaaaaa"))
              for given in ("aaaaabbbbb", "aaaaaaaabb", "aaaaaabbbb")]
    assert measure.forgetting(scores) == pytest.approx(-0.2)
    assert measure.forgetting(scores[:2]) == pytest.approx(0.3)
    lost = [score("perplexity", [(nll, 10) for _ in range(6)], measure.metric("perplexity"))
            for nll in (20.0, 10.0, 15.0)]  # of 10 tokens each; the second is the best
    assert measure.forgetting(lost) == pytest.approx(math.e**0.5 - 1)
    with pytest.raises(ValueError, match="1 figures"):
        measure.forgetting(scores[:1])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, message", [
    (lambda m: classify.wrap(m, classes=1), "classes=1"),
    (lambda m: classify.wrap(m, classes=["a"]), "two different names"),
    (lambda m: classify.wrap(m, classes=["a", "a"]), "two different names"),
    (lambda m: classify.wrap(m, classes=["a", 2]), "two different names"),
    (lambda m: classify.wrap(m, classes=[["a"], ["b"]]), "two different names"),
    (lambda m: classify.wrap(m, pool="max"), "pool='max' is unknown; known: 'last', 'mean'"),
    (lambda m: classify.wrap(m, ["q_proj"]), "names 3 leaves"),
    (lambda m: classify.wrap(m, ["lm_haed"]), "'lm_haed' matches no head.*'lm_head'"),
    (lambda m: classify.wrap(classify.wrap(m), name="second"), "called 'classify'"),
    (lambda m: classify.logits(m, IDS), "no head of classes that takes part"),
    (lambda m: classify.logits(classify.wrap(m), IDS, IDS), "unpacked"),
    (lambda m: classify.wrap(m).generate(IDS), "generate needs a model that predicts tokens"),
    (lambda m: classify.wrap(m).loss(IDS, IDS), "the loss of the next tokens needs"),
    (lambda m: measure.nll(classify.wrap(m), IDS, IDS), "the likelihood of a text needs"),
    (lambda m: minillm.train.train(classify.wrap(m), rows(), steps=1, lr=0.1),
     "training without loss= needs"),
    (lambda m: minillm.train.train(classify.wrap(m, classes=3), rows(), steps=1, lr=0.1,
                                   loss=classify.loss, held_out=rows(), every=1),
     "the held-out loss .see evaluate=. needs"),
    (lambda m: minillm.train.train(classify.wrap(m), rows(), steps=1, lr=0.1, batch_size=12,
                                   loss=classify.loss), "has the class 2, and the head 2"),
    (lambda m: minillm.train.train(classify.wrap(m), [Example([1, 2, 3], [-100, 2, 3])], steps=1,
                                   lr=0.1, loss=classify.loss), "example 0 has to have one label"),
    (lambda m: classify.mean_loss(classify.wrap(m), [Example([1, 2], [-100, -1])]),
     "example 0 has to have one label"),
    (lambda m: classify.merge(classify.wrap(m)), "cannot be merged"),
    (lambda m: minillm.lora.wrap(classify.wrap(m), ["lm_head", "q_proj"])(IDS),
     "lora is around the head too"),
])
def test_refused(call, message):
    with pytest.raises((ValueError, minillm.CannotMerge), match=message):
        call(build("llama"))


@pytest.mark.parametrize("texts, labels, message", [
    (["a b", ""], ["no", "yes"], "the text '' has no token"),
    (["a b"], ["maybe"], "text 0 has the class 'maybe'; the head has .'no', 'yes'."),
    (["a b"], [], "1 texts, but 0 labels"),
])
def test_wrong_texts(small, texts, labels, message):  # noqa: F811
    model, tokenizer = minillm.load(small)
    classify.wrap(model, classes=["no", "yes"])
    with pytest.raises(ValueError, match=message):
        classify.examples(model, tokenizer, texts, labels)
    with pytest.raises(ValueError, match="length=1"):
        classify.predict(model, tokenizer, ["a b"], length=1)
    tokenizer.eos = None
    with pytest.raises(ValueError, match="no end-of-text id"):
        classify.predict(model, tokenizer, ["a b"])


def test_some_rows_cannot_have_it():
    model = headed("llama")
    with minillm.rows(model, ["classify", None]):
        with pytest.raises(ValueError, match="all rows of a batch or of none"):
            model(IDS)
