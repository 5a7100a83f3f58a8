"""A tokenizer.model of others: what stands beside it in JSON counts, as in transformers."""

import functools
import io
import json

import pytest
import sentencepiece
from conftest import hugging_face
from test_tokenizer import MORE, ODD

from minillm import data
from minillm.model import tokenizer as tokenizers
from minillm.model.tokenizer import SentencePiece

TEXTS = [*ODD, *MORE, "a <s> b</s>c", "<|im_start|>user\nhi hello<|im_end|>  \n x hellos  hello",
         "<|im_start|>a<|im_start|>b", "a<|im_end|>", data.topics()[100_000:101_000]]


@functools.cache
def llama_style(**options):
    """A small model in the way of Llama 2: a space in front; unk 0, bos 1, eos 2."""
    out = io.BytesIO()
    told = dict(vocab_size=600, model_type="bpe", byte_fallback=True, num_threads=1,
                normalization_rule_name="identity", remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, minloglevel=3, max_sentence_length=1 << 20)
    lines = [line for line in data.topics()[:60000].splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out,
                                             **{**told, **options})
    return out.getvalue()


def directory(path, config, **files):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(llama_style())
    for name, content in {"tokenizer_config": config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def added(content, **flags):
    off = dict(special=True, lstrip=False, rstrip=False, normalized=False, single_word=False)
    return {"content": content, **off, **flags}


CHAT = {"600": added("<|im_start|>"), "601": added("<|im_end|>", rstrip=True),
        "602": added("hello", special=False, lstrip=True, single_word=True)}
CONFIGS = [
    dict(tokenizer_class="LlamaTokenizer"),
    dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False),
    dict(tokenizer_class="LlamaTokenizer", add_bos_token=False, add_eos_token=True, legacy=False),
    dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=True),
    dict(tokenizer_class="LlamaTokenizerFast", add_bos_token=True, add_prefix_space=False),
    dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, added_tokens_decoder=CHAT,
         eos_token="<|im_end|>", pad_token=added("</s>")),
    dict(tokenizer_class="LlamaTokenizer", add_bos_token=True, added_tokens_decoder=CHAT,
         legacy=True),
]


def transformers_own(proto, config):
    """transformers' LlamaTokenizer of the same pieces, without its way of reading files."""
    transformers = hugging_face()
    from transformers.tokenization_utils_base import generate_merges

    model = SentencePiece(proto)
    vocabulary = {text: i for i, (text, _, _) in enumerate(model.parsed.pieces)}
    told = {k: v for k, v in config.items() if k not in ("tokenizer_class", "pad_token")}
    token = transformers.AddedToken
    told["additional_special_tokens"] = [token(text, special=True, normalized=False) for
                                         text, _, kind in model.parsed.pieces if kind == 3]
    told["added_tokens_decoder"] = {int(i): token(**told_) for i, told_ in
                                    config.get("added_tokens_decoder", {}).items()}
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary), **told)


@pytest.mark.parity
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_ids_are_those_of_transformers(tmp_path, config):
    ours = tokenizers.load(directory(tmp_path / "in", config))
    theirs = transformers_own(llama_style(), config)
    assert [ours.bos, ours.eos] == [theirs.bos_token_id, theirs.eos_token_id]
    ours.save(tmp_path / "out")
    again = tokenizers.load(tmp_path / "out")
    saved = hugging_face().AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == again.encode(text) == saved(text)["input_ids"], text
        plain = ours.encode(text, special=False)
        assert plain == saved(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids) == saved.decode(ids, skip_special_tokens=True), text
        if same_in_transformers_5(config, text):
            assert ids == theirs(text)["input_ids"], text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def same_in_transformers_5(config, text):
    """Whether no part begins with a space: there transformers 5 leaves out the space in front."""
    spaces = (" ", "▁")
    parts = text.replace("<|im_end|>", "</s>").split("</s>") if config.get("legacy") else [text]
    return not config.get("add_prefix_space", True) or not any(
        p.startswith(spaces) for part in parts for p in (part, part.partition(">")[2]))


def test_the_pieces_are_those_of_sentencepiece(tmp_path):
    ours = tokenizers.load(directory(tmp_path, dict(add_bos_token=True)))
    model = sentencepiece.SentencePieceProcessor(model_proto=llama_style())
    for text in [*ODD, " a", "  a", "▁a", data.topics()[:1000]]:
        assert ours.encode(text) == [1, *model.encode(text)]
        ids, offsets = ours.spans(text)
        assert offsets[0] == (0, 0) and len(ids) == len(offsets)
        assert "".join(text[start:end] for start, end in offsets) == text
        assert ours.decode(ids) == text.replace("▁", " ")


def test_added_tokens_json_and_special_tokens_map_count(tmp_path):
    files = dict(added_tokens={"<|im_start|>": 600, "<|im_end|>": 601},
                 special_tokens_map={"eos_token": "<|im_end|>", "pad_token": {"content": "<unk>"}})
    ours = tokenizers.load(directory(tmp_path, dict(add_eos_token=True), **files))
    assert (ours.vocab_size, ours.eos, ours.pad, ours.bos) == (602, 601, 0, 1)
    assert ours.encode("<|im_start|>")[0] == 600 and ours.encode("<|im_start|>")[-1] == 601
    assert ours.decode([600, 601]) == "<|im_start|>"  # the eos alone is special


def test_wrong_files_beside_a_tokenizer_model(tmp_path):
    for config, files, message in [
        ({"eos_token": "<eos>"}, {}, "tokenizer.model: eos_token is '<eos>', which the vocabulary"),
        ({"eos_token": 5}, {}, "eos_token is 5, which the vocabulary lacks"),
        ({"additional_special_tokens": ["<x>"]}, {}, "special token '<x>' is not in the vocab"),
        ({"add_bos_token": "yes"}, {}, "add_bos_token is 'yes', neither true nor false"),
        ({"tokenizer_class": "XLNetTokenizer"}, {}, "the class XLNetTokenizer, which may give"),
        ({"added_tokens_decoder": {"5": added("<x>")}}, {}, "'<x>' has the id 5, which the sent"),
        ({"added_tokens_decoder": {"x": added("<x>")}}, {}, "an added token without a number and"),
        ({}, {"added_tokens": {"<x>": "600"}}, "an added token without a number and a text"),
        ({}, {"added_tokens": {"<x>": 602, "<y>": 602.5}}, "an added token without a number"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            tokenizers.load(directory(tmp_path, config, **files))
        assert "\n" not in str(caught.value) and str(caught.value).count(str(tmp_path)) == 1
        (tmp_path / "added_tokens.json").unlink(missing_ok=True)
    directory(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="^[^:]*tokenizer_config.json is not whole JSON"):
        tokenizers.load(tmp_path)
    gap = tokenizers.load(directory(tmp_path, {"added_tokens_decoder": {"610": added("<x>")}}))
    assert gap.vocab_size == 611 and gap.encode("<x>") == [610]
    with pytest.raises(ValueError, match="the id 605 has no token"):
        gap.decode([605])


def test_a_model_without_an_equal_tokenizer_json_says_so(tmp_path):
    ours = SentencePiece(llama_style(normalization_rule_name="nmt_nfkc"))
    with pytest.warns(UserWarning, match="no tokenizer.json is equal to.*normalizes a text"):
        ours.save(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert tokenizers.load(tmp_path).encode("ﬁ  x") == ours.encode("ﬁ  x")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the tokenizer.json of another tokenizer"):
        ours.save(tmp_path)


# --- the ends of a text -------------------------------------------------------------------------


def test_eos_comes_from_config_json_and_stops_from_all(tmp_path):
    path = directory(tmp_path / "a", {})
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 2, 6]}')
    assert tokenizers.load(path).stops == (2, 5, 6)
    pytest.importorskip("tokenizers")
    from test_tokenizer import tables

    ours = tokenizers.BytePair.from_gguf(tables("gpt-2"))
    ours.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # as GPT-2's, which names no eos_token
    assert tokenizers.load(tmp_path).eos is None and tokenizers.load(tmp_path).stops == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 0, "bos_token_id": 0}')
    assert [(t.eos, t.bos, t.pad, t.stops) for t in [tokenizers.load(tmp_path)]] == [
        (0, 0, 0, (0,))]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 0]}')
    assert tokenizers.load(tmp_path).stops == (7, 0)
    for told, message in [("800", "eos_token_id is 800, outside.*of 800"),
                          ('"x"', "eos_token_id is .*'x'.*, not an id"),
                          ("-1", ".*not an id"), ("[true]", ".*not an id")]:
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": %s}' % told)
        with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
            tokenizers.load(tmp_path)


@pytest.mark.parity
def test_added_tokens_beside_a_tokenizer_json_count(tmp_path):
    from test_tokenizer import tables

    fields = {**tables("smollm"), "tokenizer.ggml.add_bos_token": True,
              "tokenizer.ggml.add_eos_token": True}
    tokenizers.from_gguf(fields).save(tmp_path)
    config = dict(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False,
                  bos_token="<|im_start|>", eos_token="<|im_end|>",
                  added_tokens_decoder={"800": added("<tool>", special=False)})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = tokenizers.load(tmp_path)
    theirs = hugging_face().AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "a b", "a<tool> b<|im_end|>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)[
            "input_ids"]
    assert ours.encode("<tool>") == [1, 800, 2] and ours.vocab_size == 801
    config["added_tokens_decoder"] = {"7": added("<tool>")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'<tool>' has the id 7, but in tokenizer.json it has 800"):
        tokenizers.load(tmp_path)


def test_a_gguf_that_adds_bos_has_one():
    from test_tokenizer import tables

    fields = {**tables("smollm"), "tokenizer.ggml.add_bos_token": True}
    assert tokenizers.from_gguf(fields).encode("a")[0] == 1
    del fields["tokenizer.ggml.bos_token_id"]
    with pytest.raises(ValueError, match="adds BOS or EOS to every text, and has no id for it"):
        tokenizers.from_gguf(fields)
