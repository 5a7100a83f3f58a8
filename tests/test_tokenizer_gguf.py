"""Tokenizers in GGUF files, both ways, and llama.cpp's own ids of them."""

import pytest
from test_tokenizer import MORE, ODD, TEMPLATE, tables
from test_tokenizer_model import added, directory, llama_style

import minillm
from minillm import data
from minillm.model import tokenizer as tokenizers
from minillm.model.tokenizer import SentencePiece

TEXTS = [*ODD, *MORE, "a <s> b</s>c", " <s> b", "<|im_start|>user\nhi<|im_end|>\n hello", "\n\na",
         data.topics()[100_000:110_000]]


def ours():
    return SentencePiece.train([data.topics()[:60000]], 600)


def in_llama_style(tmp_path, **config):
    chat = {"600": added("<|im_start|>"), "601": added("<|im_end|>"),
            "602": added("hello", special=False)}
    config = dict(add_bos_token=True, legacy=True, added_tokens_decoder=chat, **config)
    return tokenizers.load(directory(tmp_path / "model", config))


def written(tmp_path, tokenizer, size):
    """The tokenizer of a .gguf file that a small model and this tokenizer were saved to."""
    model = minillm.Transformer(minillm.Config(size, 32, 1, 2, ffn=32, positions=32))
    minillm.save(model, tmp_path / "m.gguf", tokenizer=tokenizer, force=True)
    return minillm.load(tmp_path / "m.gguf")[1]


def same(a, b):
    assert type(a) is type(b)
    for text in TEXTS:
        assert a.encode(text) == b.encode(text), text
        assert a.encode(text, special=False) == b.encode(text, special=False), text
        assert a.decode(a.encode(text)) == b.decode(a.encode(text)), text
    assert (a.eos, a.bos, a.unk, a.pad, a.stops) == (b.eos, b.bos, b.unk, b.pad, b.stops)
    assert a.chat_template == b.chat_template


def test_a_sentencepiece_model_goes_to_gguf_and_back(tmp_path):
    pytest.importorskip("gguf")
    tokenizer = ours()
    tokenizer.chat_template = TEMPLATE
    back = written(tmp_path, tokenizer, 607)  # 7 rows of the embedding are unused
    same(tokenizer, back)
    assert back.vocab_size == 607
    same(back, written(tmp_path, back, 607))
    back.save(tmp_path / "directory")
    same(back, tokenizers.load(tmp_path / "directory"))


def test_one_in_the_way_of_llama_goes_to_gguf_and_back(tmp_path):
    pytest.importorskip("gguf")
    tokenizer = in_llama_style(tmp_path, eos_token="<|im_end|>", pad_token="<unk>")
    tokenizer._ends = (2,)
    tokenizer.chat_template = {"rag": "r", "tool": "t"}
    back = written(tmp_path, tokenizer, 603)
    same(tokenizer, back)
    assert back.stops == (601, 2) and back.encode("a")[0] == 1


def test_byte_level_bpe_goes_to_gguf_and_back(tmp_path):
    pytest.importorskip("gguf")
    fields = {**tables("smollm"), "tokenizer.ggml.add_bos_token": True,
              "tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eot_token_id": 0}
    tokenizer = tokenizers.from_gguf(fields)
    back = written(tmp_path, tokenizer, 800)
    same(tokenizer, back)
    assert back.encode("a") == [1, *back.encode("a", special=False), 2] and back.stops == (2, 0)
    again = back.to_gguf(800)
    assert again == {**fields, "tokenizer.ggml.add_space_prefix": False}
    assert back.to_gguf(802)["tokenizer.ggml.token_type"][798:] == [1, 1, 5, 5]
    assert back.to_gguf(802)["tokenizer.ggml.tokens"][800:] == ["[unused 800]", "[unused 801]"]


def test_the_fields_of_a_sentencepiece_model(tmp_path):
    fields = in_llama_style(tmp_path).to_gguf(604)
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    kinds = fields["token_type"]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[258:260] == [6, 1] and kinds[599:] == [
        1, 3, 3, 4, 5]
    assert fields["tokens"][1] == "<s>" and fields["tokens"][600:] == [
        "<|im_start|>", "<|im_end|>", "hello", "[unused 603]"]
    scores = fields["scores"]
    assert scores[259:262] == [0, -1, -2] and scores[600:] == [-1000] * 4
    flags = [fields[name] for name in ("add_bos_token", "add_eos_token", "add_space_prefix")]
    assert flags == [True, False, True] and fields["model"] == "llama"
    bare = {f"tokenizer.ggml.{name}": value for name, value in fields.items()
            if not name.startswith("add_")}
    same(tokenizers.from_gguf(bare), tokenizers.from_gguf(in_llama_style(tmp_path).to_gguf(604)))


def test_what_a_gguf_cannot_say_is_refused(tmp_path):
    for tokenizer, size, message in [
        (SentencePiece.train([data.topics()[:60000]], 600, "unigram"), 600, "kind BPE; this is"),
        (SentencePiece(llama_style(normalization_rule_name="nmt_nfkc")), 600, "changes a text"),
        (SentencePiece(llama_style(remove_extra_whitespaces=True)), 600, "changes a text"),
        (ours(), 599, "GGUF: the tokenizer has 600 ids, the model's embedding has 599 rows"),
        (tokenizers.load(directory(tmp_path, {"added_tokens_decoder": {
            "600": added("<x>", rstrip=True)}})), 601, "'<x>' takes white space"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizer.to_gguf(size)
    endless = ours()
    endless._ends = (2, 3, 4, 5)
    with pytest.raises(ValueError, match="the ids 1, 2, 3, 4, 5 end a generation; a GGUF names 3"):
        endless.to_gguf(600)
    for lost in ("scores", "token_type"):
        fields = ours().to_gguf(600)
        del fields[f"tokenizer.ggml.{lost}"]
        with pytest.raises(ValueError, match="600 tokens, .* each token has one of both"):
            tokenizers.from_gguf(fields)
    with pytest.raises(ValueError, match="a GGUF carries its tokenizer, and this is none"):
        written(tmp_path, None, 600)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained here", "llama style", "smollm", "qwen2", "llama-bpe"])
def test_llama_cpp_has_the_same_ids(tmp_path, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = (ours() if kind == "trained here" else in_llama_style(tmp_path)
                 if kind == "llama style" else tokenizers.from_gguf(tables(kind)))
    back = written(tmp_path, tokenizer, tokenizer.vocab_size)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        if kind == "qwen2" and text == "ﬁ ＡＢＣ Å":
            continue  # transformers' Qwen2 composes characters (NFC) first, llama.cpp does not
        raw = text.encode()
        assert theirs.tokenize(raw, add_bos=False, special=True) == back.encode(
            text, special=False) == tokenizer.encode(text, special=False), text
        assert theirs.tokenize(raw, add_bos=True, special=True) == tokenizer.encode(text), text
    assert theirs.token_eos() == tokenizer.eos
