"""Tokenizers: nothing is lost, spans are true, and the ids are transformers' own."""

import json
import sys

import pytest
from conftest import hugging_face
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm
from minillm import data
from minillm.model import tokenizer as tokenizers
from minillm.model.tokenizer import BytePair, SentencePiece, proto

ODD = ["", " ", "  two  spaces ", "tab\tand\nnewline\r\n\n", "é漢字🙂👩‍👩‍👧 x", "\u202ertl",
       "0123456789 3.14", "don't WE'LL", "a" * 300, "\x00\x01", "<|im_start|>user\nhi<|im_end|>",
       "    def f(x):\n        return x", "ﬁ ＡＢＣ Å"]
MORE = ["</s>", "a</s> b</s>", " </s>", "<unk>", "<0x41> is no byte", "<0x4", "\n", "\n\n\n", "\t",
        "a\nb", " \n ", " leading", "trailing ", "▁", "▁a ▁", "- " * 40, "-" * 33, "=" * 64,
        " " * 50, "aab" * 20, "\u0301e", "نص عربي", "हिन्दी", "𝔘𝔫𝔦", "\u200b\u00a0", "C:\\x\\y",
        "https://a.b/c?d=e&f", "x = {'a': [1, 2]}"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
    return SentencePiece.train([data.topics()[:60000]], 600, kind=request.param)


def test_a_trained_tokenizer_loses_nothing(trained):
    for text in [*ODD, data.topics()[100_000:103_000]]:
        assert trained.decode(trained.encode(text)) == text
    assert trained.vocab_size == 600 and trained.eos == trained.pad == 1 and trained.bos is None
    assert trained.stops == (1,)


ANY = st.text(alphabet=st.characters(exclude_characters="▁\x00", exclude_categories=["Cs"]))


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_it_loses_nothing_of_any_text(text):
    tokenizer = any_trained()[0]
    ids, offsets = tokenizer.spans(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert "".join(text[start:end] for start, end in offsets) == text


def any_trained(made=[]):  # noqa: B006  (one for all examples)
    if not made:
        made += [SentencePiece.train([data.topics()[:30000]], 500, kind)
                 for kind in ("bpe", "unigram")]
    return made


def test_training_is_the_same_every_time(trained):
    kind = "bpe" if trained.parsed.kind == 2 else "unigram"
    assert SentencePiece.train([data.topics()[:60000]], 600, kind).proto == trained.proto


def test_a_rounded_score_is_the_nearest_multiple():
    pieces = [("a", -3.14159, 1), ("b", 2.0, 2), ("c", -1 / 128 - 1e-3, 3)]
    made = b"".join(proto.packed_piece(*piece) for piece in pieces)
    found = [proto.read_piece(value) for _, value in proto.fields(proto.rounded(made))]
    assert found == [("a", -201 / 64, 1), ("b", 2.0, 2), ("c", -1 / 64, 3)]
    found = [proto.read_piece(value) for _, value in proto.fields(proto.rounded(made, step=0.5))]
    assert [score for _, score, _ in found] == [-3.0, 2.0, 0.0]


def test_sentencepiece_saves_and_loads(tmp_path, trained):
    trained.chat_template = TEMPLATE
    trained.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert type(again) is SentencePiece and again.chat_template == TEMPLATE
    trained.chat_template = None
    for text in [*ODD, *MORE, data.topics()[:3000]]:
        assert again.spans(text) == trained.spans(text)
    (tmp_path / "tokenizer.model").write_bytes(trained.proto[:200])
    with pytest.raises(ValueError, match="tokenizer.model: this is no sentencepiece model"):
        tokenizers.load(tmp_path)


def test_wrong_calls_name_the_culprit(tmp_path, trained):
    for call, message in [
        (lambda: trained.decode([3, 600]), "the id 600 is outside the vocabulary of 600"),
        (lambda: trained.decode([-1]), "the id -1 is outside the vocabulary of 600"),
        (lambda: trained.chat([{"role": "user", "content": "hi"}]), "no chat template"),
        (lambda: trained.encode("a\ud800b"), r"^character 1 of the text is '\\ud800', half of"),
        (lambda: trained.check_size(599, "x"), "x: the tokenizer has 600 ids, the model's embed"),
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


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, trained):
    model = minillm.Transformer(minillm.Config(599, 16, 1, 2, ffn=32, positions=32))
    with pytest.raises(ValueError, match="has 600 ids, the model's embedding has 599 rows"):
        minillm.save(model, tmp_path / "out", tokenizer=trained)
    assert not (tmp_path / "out").exists()
    minillm.save(model, tmp_path / "out")
    trained.save(tmp_path / "out")
    with pytest.raises(ValueError, match="out: the tokenizer has 600 ids.*599 rows"):
        minillm.load(tmp_path / "out")


# --- what transformers makes of a sentencepiece model that we save ------------------------------


@pytest.mark.parity
def test_the_saved_sentencepiece_model_has_the_same_ids_in_transformers(tmp_path, trained):
    model = minillm.Transformer(minillm.Config(600, 16, 1, 2, ffn=32, positions=32))
    minillm.save(model, tmp_path / "out", tokenizer=trained)  # as a whole checkpoint
    theirs = hugging_face().AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.unk_token_id, theirs.bos_token_id) == (1, 0, None)
    assert len(theirs) == 600
    for text in [*ODD, *MORE, data.topics()[100_000:130_000]]:
        ids = trained.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert trained.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parity
@settings(max_examples=100, deadline=None)
@given(st.one_of(ANY, st.lists(st.sampled_from(
    [" ", "  ", "\n", "a", "aa", "-", "the", "</s>", "<unk>", "é", "🙂"])).map("".join)))
def test_the_saved_tokenizer_json_has_the_same_ids_for_any_text(text):
    for tokenizer, theirs in zip(any_trained(), any_read()):
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def any_read(made=[]):  # noqa: B006
    library = pytest.importorskip("tokenizers")
    for tokenizer in any_trained()[len(made) :]:
        tokens = [tokenizer.added[i] for i in sorted(tokenizer.added)]
        made.append(BytePair(library.Tokenizer.from_str(tokenizer.tokenizer_json(tokens).decode())))
    return made


def test_what_we_save_is_read_without_the_library_tokenizers(tmp_path, trained, monkeypatch):
    trained.save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert tokenizers.load(tmp_path).encode("a b") == trained.encode("a b")
    (tmp_path / "tokenizer.json").write_text("{}")  # not what we wrote: only tokenizers reads it
    with pytest.raises(ImportError, match=r"'tokenizers': .*minillm\[hub\]"):
        tokenizers.load(tmp_path)


@pytest.mark.parity
def test_stops_and_missing_tokens_reach_transformers(tmp_path, trained):
    config = minillm.Config(600, 16, 1, 2, ffn=32, positions=32)
    trained._ends = (7, 8)
    minillm.save(minillm.Transformer(config), tmp_path / "out", tokenizer=trained)
    trained._ends = ()
    read = hugging_face().AutoConfig.from_pretrained(tmp_path / "out")
    assert read.eos_token_id == [1, 7, 8] and read.bos_token_id is None and read.pad_token_id == 1
    assert minillm.load(tmp_path / "out")[1].stops == (1, 7, 8)


@pytest.mark.parity
def test_a_changed_tokenizer_json_is_read_instead_of_the_model(tmp_path):
    tokenizer = any_trained()[0]
    tokenizer.save(tmp_path)
    assert type(tokenizers.load(tmp_path)) is SentencePiece
    hugging_face().AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert tokenizers.load(tmp_path).encode("a b</s>") == tokenizer.encode("a b</s>")
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["added_tokens"].append({**file["added_tokens"][0], "id": 500, "content": "<new>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    again = tokenizers.load(tmp_path)
    assert type(again) is BytePair and again.encode("<new>") == [500] and again.vocab_size == 501


# --- byte-level BPE -----------------------------------------------------------------------------

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
            "+ '<|im_end|>' + '\n' }}{% endfor %}\n"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def tables(pre):
    """A small GGUF's tokenizer tables, its merges learnt from real text."""
    library = pytest.importorskip("tokenizers")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = library.trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([data.topics()[:50000]], trainer)
    model = json.loads(inner.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges,
              "token_type": [3] * 3 + [1] * (len(tokens) - 3), "bos_token_id": 1,
              "eos_token_id": 2, "padding_token_id": 2, "add_bos_token": False}
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return {**named, "tokenizer.chat_template": TEMPLATE}


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
            left = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
            assert ours.decode(ours.encode(text)) == left
    assert (again.eos, again.bos, again.pad, again.vocab_size) == (2, 1, 2, len(theirs))
    messages = [{"role": "system", "content": "be brief"},
                {"role": "user", "content": "hi <|im_end|>"}]
    for generate in (False, True):
        assert ours.chat(messages, generate) == again.chat(messages, generate) == (
            theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))


def test_unknown_tables_are_an_error():
    known = tables("smollm")
    with pytest.raises(ValueError, match="pre-tokenizer is 'falcon'; known: gpt-2, smollm"):
        BytePair.from_gguf({**known, "tokenizer.ggml.pre": "falcon"})
    with pytest.raises(ValueError, match=r"tokenizer is 't5'; known: 'gpt2' \(byte-level BPE\), "):
        tokenizers.from_gguf({**known, "tokenizer.ggml.model": "t5"})
    with pytest.raises(ValueError, match="eos_token is 800, outside its vocabulary"):
        tokenizers.from_gguf({**known, "tokenizer.ggml.eos_token_id": 800})


def test_truncation_and_padding_of_a_tokenizer_json_are_off(tmp_path):
    ours = BytePair.from_gguf(tables("smollm"))
    ours.save(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["truncation"] = dict(max_length=3, strategy="LongestFirst", stride=0, direction="Right")
    file["padding"] = dict(strategy={"Fixed": 16}, direction="Right", pad_to_multiple_of=None,
                           pad_id=2, pad_type_id=0, pad_token="<|im_end|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    again = tokenizers.load(tmp_path)
    for text in ("a", "The language reference says more than three tokens."):
        assert again.encode(text) == ours.encode(text)
