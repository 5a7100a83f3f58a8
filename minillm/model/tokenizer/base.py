"""The interface of all tokenizers, and the readers for a checkpoint's directory."""

import dataclasses
import json
import pathlib

from minillm import files
from minillm.model.tokenizer import chat


@dataclasses.dataclass
class Added:
    """A token that is found in a text before the text is split into pieces.

    special: the token is left out when ids are decoded. lstrip, rstrip: the token
    includes the white space to its left or right. single_word: a word character beside
    the token means that it is not found.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Tokenizer:
    """The interface. `eos`, `bos`, `unk`, `pad` are ids or None; `pad` falls back to eos."""

    eos = bos = unk = None
    chat_template = None  # a Jinja text, or {name: text} where there are several and no default
    _pad = None
    _ends = ()

    @property
    def pad(self):
        return self.eos if self._pad is None else self._pad

    @property
    def stops(self):
        """The ids that end a generation: eos, and others from the checkpoint; a tuple."""
        eos = () if self.eos is None else (self.eos,)
        return tuple(dict.fromkeys(eos + tuple(self._ends)))

    @property
    def vocab_size(self):
        raise NotImplementedError

    def encode(self, text, special=True):
        """text -> list of ids.

        special: add BOS in front and EOS at the end where the model's tokenizer does
        so. Pass False for the text of a chat template, which writes these tokens
        itself. Special tokens in the text become their ids in both cases. ValueError
        for half a surrogate pair, such as "\\ud800".
        """
        return self.spans(text, special)[0]

    def spans(self, text, special=True):
        """text -> (ids, offsets): for each id the (start, end) of its part of the text.

        Offsets count characters. Where several ids are the bytes of one character, all but the last
        may be empty spans at its start. An added BOS or EOS has an empty span. See `encode`.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise ValueError(f"character {error.start} of the text is {half}, half of a surrogate "
                             "pair: such a text has no UTF-8 form, so it has no ids") from error
        return self._spans(text, special)

    def decode(self, ids):
        """list of ids -> text, special tokens left out. ValueError for an unknown id."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"the id {i} is outside the vocabulary of {self.vocab_size}")
        return self._decode(ids)

    def chat(self, messages, generate=False):
        """[{"role":, "content":}] -> text by the model's chat template.

        generate: end the text where the assistant speaks next. ValueError without a template, and
        for messages that the template refuses. Encode the text by `encode(text, special=False)`.
        """
        return chat.render(self.chat_template, messages, generate, self.special_texts())

    def chat_spans(self, messages, generate=False):
        """messages -> (text, ids, offsets): `chat`, then `spans` without a second BOS."""
        text = self.chat(messages, generate)
        return text, *self.spans(text, special=False)

    def special_texts(self):
        """{"eos_token": "</s>", ...}, as templates and configurations name them."""
        ids = dict(bos_token=self.bos, eos_token=self.eos, unk_token=self.unk, pad_token=self._pad)
        return {name: self.text_of(i) for name, i in ids.items() if i is not None}

    def text_of(self, i):
        """The token's own text in the vocabulary."""
        raise NotImplementedError

    def check_size(self, rows, where):
        """ValueError for ids beyond the `rows` of the model's embedding."""
        if self.vocab_size > rows:
            raise ValueError(f"{where}: the tokenizer has {self.vocab_size} ids, the model's "
                             f"embedding has {rows} rows: this is another model's tokenizer, or "
                             "the embedding has to grow first")


def settings(directory, name):
    """A JSON file of the directory, {} where there is none."""
    path = pathlib.Path(directory) / name
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object of fields")
    return found


NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unk", "pad_token": "_pad"}


def special_names(directory):
    """{"eos_token": "</s>", ...} of tokenizer_config.json, then of special_tokens_map.json."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for name in NAMES:
            token = settings(directory, file).get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                found[name] = token
    return found


def more_special(directory):
    """The texts of the special tokens without a role, from tokenizer_config.json."""
    config, found = settings(directory, "tokenizer_config.json"), []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(name) or []
        listed = list(listed.values()) if isinstance(listed, dict) else listed
        if not isinstance(listed, list):
            raise ValueError(f"{name} is {listed!r}, not a list of tokens")
        found += [token.get("content") if isinstance(token, dict) else token for token in listed]
    if not all(isinstance(token, str) for token in found):
        raise ValueError(f"the special tokens are {found!r}, not texts")
    return found


def set_special(tokenizer, names, find):
    """Set eos, bos, unk and pad from {"eos_token": text}; find(text) gives an id or None."""
    for name, text in names.items():
        i = find(text) if isinstance(text, str) else None
        if i is None:
            raise ValueError(f"{name} is {text!r}, which the vocabulary lacks")
        setattr(tokenizer, NAMES[name], i)


def added_tokens(directory):
    """The Added tokens of added_tokens.json and of tokenizer_config.json, by id."""
    listed = settings(directory, "tokenizer_config.json").get("added_tokens_decoder") or {}
    plain = settings(directory, "added_tokens.json")
    try:
        found = {i: Added(i, content, special=False) for content, i in plain.items()}
        for i, told in listed.items():
            flags = ("special", "lstrip", "rstrip", "single_word")
            flags = {flag: bool(told.get(flag, False)) for flag in flags}
            found[int(i)] = Added(int(i), told["content"], **flags)
        if not all(type(token.id) is int and token.id >= 0 and token.content + ""
                   for token in found.values()):
            raise ValueError("an id is no number, or a text is empty")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError("tokenizer_config.json or added_tokens.json has an added token without a "
                         f"number and a text ({type(error).__name__}: {error})") from error
    return [found[i] for i in sorted(found)]


def chat_template(directory):
    """The directory's chat template: chat_template.jinja, else that of tokenizer_config.json.

    A list of named templates -> the one called "default", else all of them as {name: text}.
    """
    path = pathlib.Path(directory) / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = settings(directory, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        if not all(isinstance(one, dict) and {"name", "template"} <= set(one) for one in found):
            raise ValueError("chat_template is a list of other things than names and templates")
        found = {one["name"]: one["template"] for one in found}
    if isinstance(found, dict):
        found = found.get("default", found)
    return found


def read_ends(tokenizer, directory):
    """Complete eos, bos, stops from generation_config.json, else from config.json."""
    ends = {}
    for file in ("config.json", "generation_config.json"):
        for name in ("bos_token_id", "eos_token_id"):
            found = settings(directory, file).get(name)
            found = found if isinstance(found, list) else [found]
            if any(i is not None and (type(i) is not int or i < 0) for i in found):
                raise ValueError(f"{directory}/{file}: {name} is {found!r}, not an id or ids")
            if found and found[0] is not None:
                ends[name] = found, file
    for attribute in ("bos", "eos"):
        ids, file = ends.get(f"{attribute}_token_id", ((), None))
        if getattr(tokenizer, attribute) is None and ids:
            if ids[0] >= tokenizer.vocab_size:
                raise ValueError(f"{directory}/{file}: {attribute}_token_id is {ids[0]}, outside "
                                 f"the tokenizer's vocabulary of {tokenizer.vocab_size}")
            setattr(tokenizer, attribute, ids[0])
    tokenizer._ends = tuple(ends.get("eos_token_id", ((), None))[0])


def listed(template):
    """A chat template as tokenizer_config.json keeps it: a text, or a list of named ones."""
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def write_config(directory, config):
    """Write tokenizer_config.json."""
    with files.atomic(pathlib.Path(directory) / "tokenizer_config.json") as new:
        new.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
