"""BytePair: a tokenizer.json, run by the library `tokenizers`.

This is the byte-level BPE of GPT-2, Llama 3, Qwen2, Qwen3 and SmolLM2: a text becomes
bytes, and the bytes merge within words. A "pre-tokenizer" splits the text into words.
"""

import json
import pathlib

from minillm import files
from minillm.model.tokenizer import base, gguf_names


class BytePair(base.Tokenizer):
    """Any tokenizer.json.

    inner: a tokenizers.Tokenizer. special: {"eos_token": text, ...} for eos, bos and pad.
    ValueError for a special token that the vocabulary lacks.
    """

    def __init__(self, inner, special=None, chat_template=None):
        self.inner, self.chat_template = inner, chat_template
        # A tokenizer.json may cut or pad every text, for its author's batches.
        inner.no_truncation()
        inner.no_padding()
        self._size = 1 + max(inner.get_vocab().values(), default=-1)
        if not isinstance(chat_template, str | dict | None):
            raise ValueError(f"the chat template is {chat_template!r}, not a text")
        base.set_special(self, {k: v for k, v in (special or {}).items() if v is not None},
                         inner.token_to_id)

    @classmethod
    def load(cls, directory):
        """From tokenizer.json and the JSON files beside it.

        tokenizer.json itself says whether BOS and EOS are added. As in transformers,
        add_bos_token of the configuration has no effect then.
        """
        directory = pathlib.Path(directory)
        tokenizers = files.need("tokenizers", "hub")
        path = directory / "tokenizer.json"
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path} is no whole tokenizer.json: {error}") from error
        try:
            add_missing(inner, base.added_tokens(directory))
            names = base.special_names(directory)
            names.pop("unk_token", None)  # byte-level BPE knows every byte
            tokenizer = cls(inner, names, base.chat_template(directory))
            mark_special(inner, [*names.values(), *base.more_special(directory)])
        except ValueError as error:
            if str(directory) in str(error):  # an error of a file beside it, with its own path
                raise
            raise ValueError(f"{directory}: {error}") from error
        return tokenizer

    @classmethod
    def from_gguf(cls, fields):
        """From a GGUF's own fields: {"tokenizer.ggml.tokens": ..., ...}."""
        def field(name, default=None):
            return fields.get(f"tokenizer.ggml.{name}", default)

        if field("model") != "gpt2":
            raise ValueError(f"the GGUF's tokenizer is {field('model')!r}, not 'gpt2'")
        inner = byte_level(field("tokens"), field("merges"), field("token_type"), field("pre"))
        special = gguf_names.special(fields)
        texts = {name: inner.id_to_token(i) for name, i in special.items()}
        texts.pop("unk_token", None)
        tokenizer = cls(inner, texts, gguf_names.chat_template(fields))
        tokenizer._ends = gguf_names.ends(fields)
        by_default = field("pre") == "llama-bpe" and tokenizer.bos is not None  # as in llama.cpp
        front = [tokenizer.bos] if field("add_bos_token", by_default) else []
        behind = [tokenizer.eos] if field("add_eos_token", False) else []
        if None in front + behind:
            raise ValueError("the GGUF adds BOS or EOS to every text, and has no id for it")
        if front or behind:
            inner.post_processor = ends_added(inner, front, behind)
        return tokenizer

    def to_gguf(self, size):
        """The fields of a GGUF for a model of `size` tokens.

        ValueError for a tokenizer that llama.cpp has no name for.
        """
        found = json.loads(self.inner.to_str())
        if found["model"]["type"] != "BPE" or found["model"].get("byte_fallback"):
            kind = "BPE of characters" if found["model"].get("byte_fallback") else (
                found["model"]["type"])
            raise ValueError(f"a GGUF's tokenizer has to be byte-level BPE or a tokenizer.model; "
                             f"this tokenizer.json is {kind}")
        self.check_size(size, "GGUF")
        added = {token["id"]: token for token in found["added_tokens"]}
        tokens = [self.inner.id_to_token(i) for i in range(size)]
        kinds = [5 if t is None else 1 if i not in added else 3 if added[i]["special"] else 4
                 for i, t in enumerate(tokens)]
        ids = self.inner.encode("a").ids
        own = {"model": "gpt2", "pre": pre_tokenizer_name(found["pre_tokenizer"]),
               "token_type": kinds,
               "tokens": [f"[unused {i}]" if t is None else t for i, t in enumerate(tokens)],
               "merges": [m if isinstance(m, str) else " ".join(m)
                          for m in found["model"]["merges"]],
               "add_bos_token": self.bos is not None and ids[0] == self.bos,
               "add_eos_token": self.eos is not None and ids[-1] == self.eos,
               "add_space_prefix": False}
        return gguf_names.written(self, own)

    def save(self, directory):
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        directory = pathlib.Path(directory)
        config = dict(tokenizer_class="PreTrainedTokenizerFast",
                      clean_up_tokenization_spaces=False, **self.special_texts())
        if self.chat_template:
            config["chat_template"] = base.listed(self.chat_template)
        with files.atomic(directory / "tokenizer.json") as new:
            self.inner.save(str(new))
        base.write_config(directory, config)

    @property
    def vocab_size(self):
        return self._size

    def _spans(self, text, special):
        encoding = self.inner.encode(text, add_special_tokens=special)
        return encoding.ids, encoding.offsets

    def _decode(self, ids):
        return self.inner.decode(ids)

    def text_of(self, i):
        return self.inner.id_to_token(i)


def add_missing(inner, added):
    """Add the tokens that tokenizer.json lacks; ValueError where one gets another id."""
    from tokenizers import AddedToken

    for token in added:
        found = inner.token_to_id(token.content)
        if found is None:
            flags = dict(lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word)
            new = AddedToken(token.content, normalized=False, **flags)
            (inner.add_special_tokens if token.special else inner.add_tokens)([new])
            found = inner.token_to_id(token.content)
        if found != token.id:
            raise ValueError(f"the added token {token.content!r} has the id {token.id}, but in "
                             f"tokenizer.json it has {found}")


def mark_special(inner, texts):
    """Find these tokens in a text, and leave them out when ids are decoded."""
    from tokenizers import AddedToken

    special = {token.content for token in inner.get_added_tokens_decoder().values()
               if token.special}
    for text in texts:
        if inner.token_to_id(text) is None:
            raise ValueError(f"the special token {text!r} is not in the vocabulary")
        if text not in special:
            inner.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def ends_added(inner, front, behind):
    """The post-processor that adds the ids `front` and `behind`."""
    from tokenizers import processors

    texts = {inner.id_to_token(i): i for i in front + behind}
    single = [*map(inner.id_to_token, front), "$A", *map(inner.id_to_token, behind)]
    return processors.TemplateProcessing(single=single, special_tokens=list(texts.items()))


def byte_level(tokens, merges, kinds, pre):
    """The tokenizers.Tokenizer of a GGUF's tables; pre: llama.cpp's name of the pre-tokenizer."""
    tokenizers = files.need("tokenizers", "hub")
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"the GGUF's pre-tokenizer is {pre!r}; known: {', '.join(PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges,
                                            ignore_merges=pre == "llama-bpe"))
    digits, words = PRE_TOKENIZERS[pre]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(words), behavior="isolated")] if words else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    kinds = kinds or [1] * len(tokens)
    for kind, special in ((3, True), (4, False)):  # control tokens, user-defined tokens
        found = [AddedToken(token, special=special, normalized=False)
                 for token, k in zip(tokens, kinds) if k == kind]
        (inner.add_special_tokens if special else inner.add_tokens)(found)
    return inner


# The splits into words before BPE, from these models' own tokenizer.json. Qwen3 uses
# Qwen2's.
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = {  # llama.cpp's name: (each digit a word, the words; None: GPT-2's, built in)
    "gpt-2": (False, None),
    "smollm": (True, None),
    "llama-bpe": (False, LLAMA3_WORDS),
    "qwen2": (False, QWEN2_WORDS),
}


def pre_tokenizer_name(found):
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json."""
    steps = found.get("pretokenizers", [found]) if found else []
    digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps)
    words = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    for name, known in PRE_TOKENIZERS.items():
        if known == (digits, words) and steps and steps[-1]["type"] == "ByteLevel":
            return name
    raise ValueError("llama.cpp has no name for this tokenizer's splits; known: "
                     f"{', '.join(PRE_TOKENIZERS)}")
