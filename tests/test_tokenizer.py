"""Tokenizers: nothing is lost, spans are true, and the ids are transformers' own."""

import json

import pytest
from conftest import hugging_face
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import data
from minillm import tokenizer as tokenizers
from minillm.tokenizer import BytePair, SentencePiece

ODD = ["", " ", "  two  spaces ", "tab\tand\nnewline\r\n\n", "é漢字🙂👩‍👩‍👧 x", "‮rtl", "0123456789 3.14", "don't WE'LL", "a" * 300,
       "\x00\x01", "<|im_start|>user\nhi<|im_end|>", "    def f(x):\n        return x", "ﬁ ＡＢＣ Å"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    return SentencePiece.train([data.topics()[:60000]], 600, kind=request.param)


def test_a_trained_tokenizer_loses_nothing(trained):
    for text in [*ODD, data.topics()[100_000:103_000]]:
        assert trained.decode(trained.encode(text)) == text
    assert trained.vocab_size == 600 and trained.eos == trained.pad == 1 and trained.bos is None


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="▁\x00", exclude_categories=["Cs"])))
def test_it_loses_nothing_of_any_text(text):
    tokenizer = any_trained()
    ids, offsets = tokenizer.spans(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert "".join(text[start:end] for start, end in offsets) == text


def any_trained(made=[]):  # noqa: B006  (one for all examples)
    made.append(made[0] if made else SentencePiece.train([data.topics()[:30000]], 500))
    return made[0]


def test_training_is_the_same_every_time(trained):
    kind = "bpe" if trained.encode(data.topics()[:2000]) == SentencePiece.train([data.topics()[:60000]], 600, "bpe").encode(
        data.topics()[:2000]) else "unigram"
    assert SentencePiece.train([data.topics()[:60000]], 600, kind).proto == trained.proto


def test_sentencepiece_saves_and_loads(tmp_path, trained):
    trained.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.encode(data.topics()[:3000]) == trained.encode(data.topics()[:3000])
    (tmp_path / "tokenizer.model").write_bytes(trained.proto[:200])
    with pytest.raises(ValueError, match="tokenizer.model: this is no sentencepiece model"):
        tokenizers.load(tmp_path)


def test_wrong_calls_name_the_culprit(tmp_path, trained):
    for call, message in [
        (lambda: trained.decode([3, 600]), "the id 600 is outside the vocabulary of 600"),
        (lambda: trained.chat([{"role": "user", "content": "hi"}]), "no chat template"),
        (lambda: SentencePiece.train(["abc"], 600, "wordpiece"), "kind='wordpiece'.*unigram"),
        (lambda: SentencePiece.train([""], 600), "no text"),
        (lambda: SentencePiece.train(["abc def"], 100_000), "vocab_size=100000"),
        (lambda: tokenizers.load(tmp_path), "neither tokenizer.json nor tokenizer.model"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="tokenizer.json is no whole"):
        tokenizers.load(tmp_path)


# --- byte-level BPE ------------------------------------------------------------------------------------------------------------

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}\n"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def tables(pre):
    """A small GGUF's tokenizer tables, its merges learnt from real text."""
    library = pytest.importorskip("tokenizers")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = library.trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False,
                                          initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([data.topics()[:50000]], trainer)
    model = json.loads(inner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3), "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": TEMPLATE}


@pytest.mark.parity
@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_what_we_save_transformers_reads_with_the_same_ids_and_chat(tmp_path, pre):
    ours = BytePair.from_gguf(tables(pre))
    ours.save(tmp_path)
    theirs = hugging_face().AutoTokenizer.from_pretrained(tmp_path)
    again = tokenizers.load(tmp_path)
    for text in [*ODD, data.topics()[100_000:103_000]]:
        assert ours.encode(text) == theirs(text)["input_ids"] == again.encode(text)
        if pre != "qwen2":  # which normalises
            assert ours.decode([i for i in ours.encode(text)]) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert (again.eos, again.bos, again.pad, again.vocab_size) == (2, 1, 2, len(theirs))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi <|im_end|>"}]
    for generate in (False, True):
        assert ours.chat(messages, generate) == again.chat(messages, generate) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate)


def test_unknown_tables_are_an_error():
    known = tables("smollm")
    with pytest.raises(ValueError, match="pre-tokenizer is 'falcon'; known: gpt-2, smollm"):
        BytePair.from_gguf({**known, "tokenizer.ggml.pre": "falcon"})
    with pytest.raises(ValueError, match="tokenizer is 'llama'; known: 'gpt2'"):
        BytePair.from_gguf({**known, "tokenizer.ggml.model": "llama"})


def test_a_template_can_refuse():
    tokenizer = BytePair.from_gguf({**tables("smollm"), "tokenizer.chat_template": "{{ raise_exception('no system') }}"})
    with pytest.raises(ValueError, match="refuses these messages: no system"):
        tokenizer.chat([{"role": "system", "content": "x"}])
