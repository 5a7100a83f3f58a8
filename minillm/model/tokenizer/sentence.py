"""SentencePiece: a tokenizer.model, trained here or loaded.

The library `sentencepiece` splits the text. This class does the same around it as
transformers and llama.cpp: it finds special and added tokens first, adds BOS and EOS,
and puts a space in front.

A model with a "dummy prefix" (Llama 1 and 2, Mistral) puts a space in front of every
text, so that the first word has the same ids as later in a text. In a text with special
tokens, only a part at the very beginning gets the space. With `legacy`, every part
between two special tokens gets it; llama.cpp is legacy.

Where transformers 5 reads a tokenizer.model itself, it differs from sentencepiece in
two ways. It puts no space in front of a text that begins with one, and it merges by ids
instead of scores (Mistral's "▁▁" has an early id and a low score). The models were
trained on sentencepiece's ids, and llama.cpp gives them too, so minillm gives them. The
files of `save` give the same ids in transformers.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import re
import warnings

import sentencepiece

from minillm import files
from minillm.model.tokenizer import base, fast, gguf_names, proto, sentence_gguf

WRITTEN_FROM_MODEL = "minillm_tokenizer_json_sha256"  # the field of tokenizer_config.json
CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer",
           "TokenizersBackend", "SentencePieceBackend")


class SentencePiece(base.Tokenizer):
    """A sentencepiece model.

    A model that was trained here keeps all of a text but U+2581 and the special tokens.

    proto_bytes: the bytes of a tokenizer.model. added: a list of base.Added beside its
    pieces. add_bos, add_eos: whether `encode` adds them. prefix: a space in front of a
    text, None: as in the model. legacy: a space in front of every part between special
    tokens.
    """

    def __init__(self, proto_bytes, chat_template=None, *, added=(), add_bos=False, add_eos=False,
                 prefix=None, legacy=False):
        self.proto, self.chat_template, self.legacy = proto_bytes, chat_template, legacy
        self.model = processor(proto_bytes)
        self.parsed = proto.read(proto_bytes)
        self.prefix = self.parsed.prefix if prefix is None else prefix
        # Three ways to run it: at the start of a text, inside a text, and ids to text.
        own = self.parsed.prefix
        self.front = self.model if self.prefix == own else processor(
            proto.with_prefix(proto_bytes, self.prefix))
        self.inside = self.model if not own else processor(proto.with_prefix(proto_bytes, False))
        self.back = self.model if not own and not self.parsed.remove_extra else processor(
            proto_bytes + proto.packed(proto.NORMALIZER, proto.spaces(False)))
        ids = self.model.eos_id(), self.model.bos_id(), self.model.unk_id(), self.model.pad_id()
        self.eos, self.bos, self.unk, self._pad = (None if i < 0 else i for i in ids)
        self.add_bos, self.add_eos = add_bos, add_eos
        controls = [base.Added(i, text) for i, (text, _, kind) in enumerate(self.parsed.pieces)
                    if kind in (proto.CONTROL, proto.UNKNOWN)]
        self.added = {}
        self.find([*controls, *added])

    def find(self, tokens):
        """Also find these base.Added tokens in a text before it is split."""
        pieces = self.parsed.pieces
        for token in tokens:
            if token.id < len(pieces) and pieces[token.id][0] != token.content:
                raise ValueError(f"the added token {token.content!r} has the id {token.id}, which "
                                 f"the sentencepiece model gives to {pieces[token.id][0]!r}")
            self.added[token.id] = token
        self.by_text = {token.content: i for i, token in self.added.items()}
        if len(self.by_text) < len(self.added):
            raise ValueError("two added tokens have the same text")
        longest = sorted(self.added.values(), key=lambda token: -len(token.content))
        self.pattern = re.compile("|".join(map(pattern, longest)))

    def mark_special(self, texts):
        """Find these tokens in a text, and leave them out when ids are decoded."""
        ids = [self.id_of(text) for text in texts]
        if None in ids:
            raise ValueError(f"the special token {texts[ids.index(None)]!r} is not in the "
                             "vocabulary")
        known = [self.added.get(i, base.Added(i, text)) for i, text in zip(ids, texts)]
        self.find(dataclasses.replace(token, special=True) for token in known)

    @classmethod
    def train(cls, texts, vocab_size, kind="bpe"):
        """Learn `vocab_size` pieces from an iterable of strings.

        kind: "bpe" or "unigram". Id 0 is unknown, 1 is eos. ValueError for an unknown kind, no
        text, or a size that does not fit the text.
        """
        if kind not in ("bpe", "unigram"):
            raise ValueError(f"kind={kind!r} is unknown; known: 'bpe', 'unigram'")
        lines = [line for text in texts for line in text.splitlines() if line]
        if not lines:
            raise ValueError("there is no text to train a tokenizer on")
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=out, vocab_size=vocab_size,
                model_type=kind, byte_fallback=True, normalization_rule_name="identity",
                add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, user_defined_symbols=["\n"], unk_id=0, eos_id=1,
                bos_id=-1, pad_id=-1, max_sentence_length=1 << 20, num_threads=1, minloglevel=3)
        except RuntimeError as error:
            raise ValueError(f"vocab_size={vocab_size} does not fit this text: {error}") from error
        return cls(out.getvalue() if kind == "bpe" else proto.rounded(out.getvalue()))

    # --- text to ids and back -------------------------------------------------------------------

    @property
    def vocab_size(self):
        return max(self.model.vocab_size(), 1 + max(self.added, default=0))

    def _spans(self, text, special):
        ids, offsets = [], []
        if special and self.add_bos:
            ids.append(self.bos)
            offsets.append((0, 0))
        for start, end, i in self.parts(text):
            if i is not None:
                ids.append(i)
                offsets.append((start, end))
                continue
            model = self.front if start == 0 or self.legacy else self.inside
            found = model.encode(text[start:end], return_type="offset_mapping")
            ids += found["ids"]
            offsets += [(start + a, start + b) for a, b in found["offsets"]]
        if special and self.add_eos:
            ids.append(self.eos)
            offsets.append((len(text), len(text)))
        return ids, offsets

    def parts(self, text):
        """Yield (start, end, id) for an added token, (start, end, None) for the text between."""
        at = 0
        for match in self.pattern.finditer(text):
            if at < match.start():
                yield at, match.start(), None
            yield *match.span(), self.by_text[match[match.lastindex]]
            at = match.end()
        if at < len(text):
            yield at, len(text), None

    def _decode(self, ids):
        texts, pieces = [], []
        for i in ids:
            token = self.added.get(i)
            if token is None and i < len(self.parsed.pieces):
                pieces.append(i)
            elif token is None:
                raise ValueError(f"the id {i} has no token: the vocabulary has a gap there")
            elif not token.special:
                texts += [self.back.decode(pieces), token.content]
                pieces = []
        text = "".join([*texts, self.back.decode(pieces)])
        return text[1:] if self.prefix and text.startswith(" ") else text

    def text_of(self, i):
        return self.added[i].content if i in self.added else self.model.id_to_piece(i)

    def id_of(self, text):
        """The id of the token with this text, None where there is none."""
        if text in self.by_text:
            return self.by_text[text]
        i = self.model.piece_to_id(text)
        return i if self.model.id_to_piece(i) == text else None

    # --- files ----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path):
        """From a tokenizer.model with the JSON files beside it, or the directory of them."""
        path = pathlib.Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        directory = path.parent
        try:
            config = base.settings(directory, "tokenizer_config.json")
            kind = config.get("tokenizer_class") or "LlamaTokenizer"
            if str(kind).removesuffix("Fast") not in CLASSES:
                raise ValueError(f"tokenizer_config.json asks for the class {kind}, which may give "
                                 f"pieces other ids; known: {', '.join(CLASSES)}")
            flags = {name: config.get(name)
                     for name in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space")}
            for name, value in flags.items():
                if not isinstance(value, bool | None):
                    raise ValueError(f"{name} is {value!r}, neither true nor false")
            tokenizer = cls(path.read_bytes(), base.chat_template(directory),
                            added=base.added_tokens(directory), prefix=flags["add_prefix_space"],
                            legacy=bool(flags["legacy"]))
            names = base.special_names(directory)
            base.set_special(tokenizer, names, tokenizer.id_of)
            tokenizer.mark_special([*names.values(), *base.more_special(directory)])
            tokenizer.add_ends(flags["add_bos_token"], flags["add_eos_token"])
        except ValueError as error:
            if str(directory) in str(error):  # an error of a file beside it, with its own path
                raise
            raise ValueError(f"{path}: {error}") from error
        return tokenizer

    def add_ends(self, bos, eos):
        """Set what `encode` adds. None: nothing, as in transformers 5 (4 added BOS)."""
        self.add_bos, self.add_eos = bool(bos), bool(eos)
        for add, name in ((self.add_bos, "bos"), (self.add_eos, "eos")):
            if add and getattr(self, name) is None:
                raise ValueError(f"add_{name}_token is true, and there is no {name} token")

    @classmethod
    def from_gguf(cls, fields):
        """From a GGUF's own fields, {"tokenizer.ggml.tokens": ..., ...}; ids are llama.cpp's."""
        pieces, added, flags = sentence_gguf.parts(fields)
        tokenizer = cls(proto.write(pieces, flags["prefix"]), gguf_names.chat_template(fields),
                        added=added, legacy=True)
        for name, i in gguf_names.special(fields).items():
            setattr(tokenizer, base.NAMES[name], i)
        tokenizer._ends = gguf_names.ends(fields)
        tokenizer.add_ends(flags["add_bos"], flags["add_eos"])
        return tokenizer

    def to_gguf(self, size):
        """The fields of a GGUF for a model of `size` tokens (see sentence_gguf.py)."""
        return sentence_gguf.fields(self, size)

    def save(self, directory):
        """Write tokenizer.model, and for transformers an equal tokenizer.json.

        A model from elsewhere may have no equal tokenizer.json (see fast.py). It is
        saved without one, with a warning: minillm gives the same ids, transformers may
        give others.
        """
        directory = pathlib.Path(directory)
        config = dict(tokenizer_class="LlamaTokenizer", clean_up_tokenization_spaces=False,
                      add_bos_token=self.add_bos, add_eos_token=self.add_eos, legacy=self.legacy,
                      add_prefix_space=self.prefix, **self.special_texts())
        tokens = [self.added[i] for i in sorted(self.added)]
        config["added_tokens_decoder"] = {
            str(t.id): {k: v for k, v in fast.added(t).items() if k != "id"} for t in tokens}
        if self.chat_template:
            config["chat_template"] = base.listed(self.chat_template)
        try:
            equal = self.tokenizer_json(tokens)
        except fast.NoEqual as error:
            if (directory / "tokenizer.json").exists():
                raise ValueError(f"{directory} holds the tokenizer.json of another tokenizer, and "
                                 f"this tokenizer.model has no equal one: {error}") from error
            warnings.warn(f"{directory}: no tokenizer.json is equal to this tokenizer.model, so "
                          f"transformers may give other ids: {error}", stacklevel=2)
        else:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config[WRITTEN_FROM_MODEL] = hashlib.sha256(equal).hexdigest()
            with files.atomic(directory / "tokenizer.json") as new:
                new.write_bytes(equal)
        with files.atomic(directory / "tokenizer.model") as new:
            new.write_bytes(self.proto)
        base.write_config(directory, config)

    def tokenizer_json(self, tokens):
        """The bytes of the tokenizer.json that gives the same ids."""
        bos, eos = ((self.text_of(i), i) if add else None
                    for add, i in ((self.add_bos, self.bos), (self.add_eos, self.eos)))
        found = fast.tokenizer_json(self.parsed, tokens, prefix=self.prefix,
                                    every_part=self.legacy, bos=bos, eos=eos)
        return json.dumps(found, ensure_ascii=False, indent=1).encode() + b"\n"


def processor(proto_bytes):
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto_bytes)
    except RuntimeError as error:
        raise ValueError(f"this is no sentencepiece model: {error}") from error


def pattern(token):
    """The regular expression of an added token; its group is the token itself."""
    text = f"({re.escape(token.content)})"
    text = rf"(?<!\w){text}(?!\w)" if token.single_word else text
    return (r"\s*" if token.lstrip else "") + text + (r"\s*" if token.rstrip else "")
