"""Text to ids and back: sentencepiece, trained here or loaded, and the byte-level BPE of real checkpoints.

    BPE       merge the most frequent pair of neighbours, again and again      Sennrich et al. 2016, arXiv 1508.07909
    unigram   the likeliest split under a unigram model of pieces              Kudo 2018, arXiv 1804.10959

Both kinds of file are read and run by the libraries that made them, `sentencepiece` and `tokenizers`; here is the one interface
above them. Ids are those of transformers: special tokens that stand in a text are recognised as such. Where a user's text
must not be able to do that (a chat message that holds "<|im_end|>"), the loss mask still comes from the conversation's
structure (see `data.py`), never from a search for such a string.
"""

import io
import json
import pathlib

from minillm import files


class Tokenizer:
    """The interface. `eos`, `bos`, `pad` are ids or None; `pad` falls back to eos."""

    eos = bos = None
    chat_template = None
    _pad = None

    @property
    def pad(self):
        return self.eos if self._pad is None else self._pad

    @property
    def vocab_size(self):
        raise NotImplementedError

    def encode(self, text):
        """text -> list of ids."""
        return self.spans(text)[0]

    def spans(self, text):
        """text -> (ids, offsets): the (start, end) in characters of the part of the text that each id stands for.

        Where several ids stand for the bytes of one character, all but the last may be empty spans at its start.
        """
        raise NotImplementedError

    def decode(self, ids):
        """list of ids -> text, special tokens left out. ValueError for an id outside the vocabulary."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"the id {i} is outside the vocabulary of {self.vocab_size}")
        return self._decode(list(map(int, ids)))

    def chat(self, messages, generate=False):
        """[{"role":, "content":}] -> text by the model's chat template; `generate` ends it where the assistant is to speak."""
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template: its model was not tuned for conversations")
        return template(self.chat_template).render(messages=messages, add_generation_prompt=generate, **self.special_texts())

    def special_texts(self):
        """{"eos_token": "</s>", ...}, as templates and configurations name them."""
        ids = dict(bos_token=self.bos, eos_token=self.eos, pad_token=self._pad)
        return {name: self.text_of(i) for name, i in ids.items() if i is not None}

    def text_of(self, i):
        raise NotImplementedError


def template(text):
    """A compiled Jinja template, with what transformers offers to its chat templates."""
    import datetime

    jinja2 = files.need("jinja2", "hub")
    sandbox = files.need("jinja2.sandbox", "hub")

    def raise_exception(message):
        raise ValueError(f"the chat template refuses these messages: {message}")

    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    env.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.datetime.now().strftime(form))
    try:
        return env.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no valid Jinja: {error}") from error


def load(directory):
    """The Tokenizer of a checkpoint's directory: tokenizer.json, or sentencepiece's tokenizer.model."""
    directory = pathlib.Path(directory)
    if (directory / "tokenizer.json").exists():
        return BytePair.load(directory)
    if (directory / "tokenizer.model").exists():
        return SentencePiece.load(directory)
    raise FileNotFoundError(f"{directory} holds neither tokenizer.json nor tokenizer.model")


def settings(directory, name):
    """A JSON file of the directory, {} where there is none."""
    path = pathlib.Path(directory) / name
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds {type(told).__name__}, not an object of fields")
    return told


class SentencePiece(Tokenizer):
    """A sentencepiece model. Trained here, it is lossless but for U+2581, its sign for a space."""

    def __init__(self, proto, chat_template=None):
        import sentencepiece

        self.proto, self.chat_template = proto, chat_template
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise ValueError(f"this is no sentencepiece model: {error}") from error
        ids = (self.model.eos_id(), self.model.bos_id(), self.model.pad_id())
        self.eos, self.bos, self._pad = (None if i < 0 else i for i in ids)

    @classmethod
    def train(cls, texts, vocab_size, kind="bpe"):
        """Learn `vocab_size` pieces from an iterable of strings; kind is "bpe" or "unigram". Id 0 is unknown, 1 is eos."""
        import sentencepiece

        if kind not in ("bpe", "unigram"):
            raise ValueError(f"kind={kind!r} is unknown; known: 'bpe', 'unigram'")
        lines = [line for text in texts for line in text.splitlines() if line]
        if not lines:
            raise ValueError("there is no text to train a tokenizer on")
        proto = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=proto, vocab_size=vocab_size, model_type=kind, byte_fallback=True,
                normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True, user_defined_symbols=["\n"], unk_id=0, eos_id=1, bos_id=-1, pad_id=-1,
                max_sentence_length=1 << 20, num_threads=1, minloglevel=3)
        except RuntimeError as error:
            raise ValueError(f"vocab_size={vocab_size} does not fit this text: {error}") from error
        return cls(proto.getvalue())

    @classmethod
    def load(cls, path):
        """From a tokenizer.model, or the directory that holds one."""
        path = pathlib.Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        try:
            return cls(path.read_bytes(), settings(path.parent, "tokenizer_config.json").get("chat_template"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, directory):
        """Write tokenizer.model and tokenizer_config.json."""
        directory = pathlib.Path(directory)
        told = dict(tokenizer_class="LlamaTokenizer", add_bos_token=False, add_eos_token=False, legacy=False, **self.special_texts())
        if self.chat_template:
            told["chat_template"] = self.chat_template
        with files.atomic(directory / "tokenizer.model") as new:
            new.write_bytes(self.proto)
        with files.atomic(directory / "tokenizer_config.json") as new:
            new.write_text(json.dumps(told, indent=2) + "\n")

    @property
    def vocab_size(self):
        return self.model.vocab_size()

    def spans(self, text):
        found = self.model.encode(text, return_type="offset_mapping")
        return found["ids"], found["offsets"]

    def _decode(self, ids):
        return self.model.decode(ids)

    def text_of(self, i):
        return self.model.id_to_piece(i)


class BytePair(Tokenizer):
    """Any tokenizer.json, run by the `tokenizers` library; the byte-level BPE of GPT-2, Llama 3, Qwen2, SmolLM2."""

    def __init__(self, inner, special=None, chat_template=None):
        self.inner, self.chat_template = inner, chat_template
        if not isinstance(chat_template, str | None):
            raise ValueError(f"the chat template is {chat_template!r}, not a text")
        special = {key: value.get("content") if isinstance(value, dict) else value for key, value in (special or {}).items()}
        for name, key in (("eos", "eos_token"), ("bos", "bos_token"), ("_pad", "pad_token")):
            text = special.get(key)
            i = inner.token_to_id(text) if isinstance(text, str) else None
            if text is not None and i is None:
                raise ValueError(f"{key} is {text!r}, which the vocabulary lacks")
            setattr(self, name, i)

    @classmethod
    def load(cls, directory):
        """From tokenizer.json and what stands beside it."""
        directory = pathlib.Path(directory)
        tokenizers = files.need("tokenizers", "hub")
        path = directory / "tokenizer.json"
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path} is no whole tokenizer.json: {error}") from error
        config = settings(directory, "tokenizer_config.json")
        told = {**settings(directory, "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
        chat = config.get("chat_template")
        if isinstance(chat, list):  # several templates by name
            chat = next((one.get("template") for one in chat if isinstance(one, dict) and one.get("name") == "default"), None)
        if (directory / "chat_template.jinja").exists():
            chat = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        try:
            return cls(inner, {key: told.get(key) for key in ("eos_token", "bos_token", "pad_token")}, chat)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error

    @classmethod
    def from_gguf(cls, tables):
        """From a GGUF's own fields: {"tokenizer.ggml.tokens": ..., "tokenizer.ggml.merges": ..., ...}."""
        tokenizers = files.need("tokenizers", "hub")
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

        def field(name, default=None):
            return tables.get(f"tokenizer.ggml.{name}", default)

        if field("model") != "gpt2":
            raise ValueError(f"the GGUF's tokenizer is {field('model')!r}; known: 'gpt2' (byte-level BPE)")
        if field("pre") not in PRE_TOKENIZERS:
            raise ValueError(f"the GGUF's pre-tokenizer is {field('pre')!r}; known: {', '.join(PRE_TOKENIZERS)}")
        tokens, kinds = field("tokens"), field("token_type", [1] * len(field("tokens")))
        merges = [tuple(merge.split(" ")) for merge in field("merges")]
        inner = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges,
                                                ignore_merges=field("pre") == "llama-bpe"))
        digits, words = PRE_TOKENIZERS[field("pre")]
        steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        steps += [pre_tokenizers.Split(Regex(words), behavior="isolated")] if words else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
        inner.decoder = decoders.ByteLevel()
        if field("pre") == "qwen2":
            from tokenizers import normalizers

            inner.normalizer = normalizers.NFC()
        inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == 3])
        inner.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == 4])
        ids = dict(bos_token=field("bos_token_id"), eos_token=field("eos_token_id"), pad_token=field("padding_token_id"))
        special = {name: tokens[i] for name, i in ids.items() if i is not None}
        if field("add_bos_token", False):
            bos = special["bos_token"]
            inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids["bos_token"])])
        return cls(inner, special, tables.get("tokenizer.chat_template"))

    def to_gguf(self, size):
        """The fields of a GGUF for a model of `size` tokens; ValueError for what llama.cpp has no name for."""
        told = json.loads(self.inner.to_str())
        if told["model"]["type"] != "BPE":
            raise ValueError(f"a GGUF's tokenizer has to be byte-level BPE; this is {told['model']['type']}")
        added = {token["id"]: token for token in told["added_tokens"]}
        tokens = [self.inner.id_to_token(i) for i in range(size)]
        kinds = [5 if t is None else 3 if added.get(i, {}).get("special") else 4 if i in added else 1 for i, t in enumerate(tokens)]
        fields = {"model": "gpt2", "pre": pre_tokenizer_name(told["pre_tokenizer"]), "token_type": kinds,
                  "tokens": [f"[unused {i}]" if t is None else t for i, t in enumerate(tokens)],
                  "merges": [m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"]],
                  "add_bos_token": self.bos is not None and self.encode("a")[0] == self.bos, "add_space_prefix": False}
        ids = dict(bos_token_id=self.bos, eos_token_id=self.eos, padding_token_id=self._pad)
        fields |= {name: i for name, i in ids.items() if i is not None}
        named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
        return named | ({"tokenizer.chat_template": self.chat_template} if self.chat_template else {})

    def save(self, directory):
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        directory = pathlib.Path(directory)
        told = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, **self.special_texts())
        if self.chat_template:
            told["chat_template"] = self.chat_template
        with files.atomic(directory / "tokenizer.json") as new:
            self.inner.save(str(new))
        with files.atomic(directory / "tokenizer_config.json") as new:
            new.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @property
    def vocab_size(self):
        return self.inner.get_vocab_size()

    def spans(self, text):
        encoding = self.inner.encode(text)
        return encoding.ids, encoding.offsets

    def _decode(self, ids):
        return self.inner.decode(ids)

    def text_of(self, i):
        return self.inner.id_to_token(i)


# The splits into words before BPE, as these models' own tokenizer.json states them.
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = {  # llama.cpp's name: (whether digits stand alone, the words; None: GPT-2's, which ByteLevel has built in)
    "gpt-2": (False, None),
    "smollm": (True, None),
    "llama-bpe": (False, LLAMA3_WORDS),
    "qwen2": (False, QWEN2_WORDS),
}


def pre_tokenizer_name(told):
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json."""
    steps = told.get("pretokenizers", [told]) if told else []
    digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps)
    words = next((step["pattern"].get("Regex") for step in steps if step["type"] == "Split"), None)
    for name, known in PRE_TOKENIZERS.items():
        if known == (digits, words) and steps and steps[-1]["type"] == "ByteLevel":
            return name
    raise ValueError(f"llama.cpp has no name for this tokenizer's splits; known: {', '.join(PRE_TOKENIZERS)}")
