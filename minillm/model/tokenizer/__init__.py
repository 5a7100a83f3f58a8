"""Text to ids and back, by the two libraries that tokenize for most language models.

    SentencePiece   a tokenizer.model, trained here or loaded   the library `sentencepiece`
    BytePair        a tokenizer.json, byte-level BPE            the library `tokenizers`

    BPE       merge the most frequent pair of neighbours, again and again    arXiv 1508.07909
    unigram   the likeliest split under a unigram model of pieces            arXiv 1804.10959

The ids are the same as in transformers (sentence.py names the differences): a special
token such as "</s>" in a text becomes its own id. So a user can write such a token into
a chat message. The loss mask comes from the structure of the conversation (see `data`),
never from a search for such a string.

    base.py        the interface, and the readers for a checkpoint's directory
    chat.py        chat templates
    sentence.py    SentencePiece
    proto.py       the bytes of a tokenizer.model
    fast.py        a tokenizer.json with the same ids as a tokenizer.model, for transformers
    byte_pair.py   BytePair

    sentence_gguf.py, gguf_names.py   both kinds as the fields of a GGUF
"""

import hashlib
import pathlib

from minillm.model.tokenizer.base import Tokenizer, read_ends, settings
from minillm.model.tokenizer.byte_pair import BytePair
from minillm.model.tokenizer.sentence import SentencePiece, WRITTEN_FROM_MODEL

__all__ = ["BytePair", "SentencePiece", "Tokenizer", "from_gguf", "load", "settings"]


def load(directory, size=None):
    """The Tokenizer of a checkpoint's directory, from its tokenizer.json or its tokenizer.model.

    Where both files exist, tokenizer.json is read, because it describes everything that
    transformers does. The exception is an unchanged tokenizer.json that
    `SentencePiece.save` wrote. Then tokenizer.model is read, which gives the same ids
    without the library `tokenizers`.

    size: rows of the model's embedding. Without it, the size is not checked.
    ValueError for a file that is damaged or contradicts another, or more ids than `size`.
    """
    directory = pathlib.Path(directory)
    has_json, has_model = ((directory / f"tokenizer.{end}").exists() for end in ("json", "model"))
    if has_model and (not has_json or written_from_model(directory)):
        tokenizer = SentencePiece.load(directory)
    elif has_json:
        tokenizer = BytePair.load(directory)
    else:
        raise FileNotFoundError(f"{directory} holds neither tokenizer.json nor tokenizer.model")
    read_ends(tokenizer, directory)
    if size is not None:
        tokenizer.check_size(size, directory)
    return tokenizer


def written_from_model(directory):
    """Whether SentencePiece.save wrote the directory's tokenizer.json, and it is unchanged."""
    written = settings(directory, "tokenizer_config.json").get(WRITTEN_FROM_MODEL)
    found = hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
    return written == found


def from_gguf(fields):
    """The Tokenizer in a GGUF's fields, {"tokenizer.ggml.model": ..., ...}; ids are llama.cpp's.

    ValueError for a kind of tokenizer that is neither byte-level BPE nor sentencepiece's BPE.
    """
    kinds = {"gpt2": BytePair, "llama": SentencePiece}
    kind = fields.get("tokenizer.ggml.model")
    if kind not in kinds:
        raise ValueError(f"the GGUF's tokenizer is {kind!r}; known: 'gpt2' (byte-level BPE), "
                         "'llama' (sentencepiece BPE)")
    return kinds[kind].from_gguf(fields)
