"""The bytes of a sentencepiece model: enough of protocol buffers to read and write one.

The format is `sentencepiece_model.proto`. A message is a sequence of fields, and each
field begins with number * 8 + wire type. The numbers below are those of that file. This
code replaces the library `protobuf`. `sentencepiece` itself checks and runs the model.
"""

import dataclasses
import struct

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # a piece's type
UNIGRAM, BPE = 1, 2  # a model's type

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # ModelProto
TEXT, SCORE, TYPE = 1, 2, 3  # SentencePiece
MODEL_TYPE, WHITESPACE_AS_SUFFIX, BYTE_FALLBACK = 3, 24, 35  # TrainerSpec
CHARSMAP, DUMMY_PREFIX, REMOVE_EXTRA, ESCAPE = 2, 3, 4, 5  # NormalizerSpec


@dataclasses.dataclass
class Model:
    """The content of a tokenizer.model, with sentencepiece's defaults."""

    pieces: list  # [(text, score, type)], by id
    kind: int  # UNIGRAM or BPE, or one of the rarer kinds
    byte_fallback: bool
    whitespace_as_suffix: bool
    charsmap: bytes  # the compiled normalization, b"" for none
    prefix: bool  # a space is put in front of every text
    remove_extra: bool  # spaces at the ends and repeated spaces are removed
    escape: bool  # a space becomes U+2581


def read(proto):
    """The bytes of a tokenizer.model -> Model. ValueError for bytes of another format."""
    try:
        return read_model(proto)
    except (AttributeError, IndexError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"this is no sentencepiece model ({type(error).__name__}: {error})"
                         ) from error


def read_model(proto):
    parts = {PIECES: [], TRAINER: [], NORMALIZER: []}
    for number, value in fields(proto):
        if number in parts:
            parts[number].append(value)
    pieces = [read_piece(part) for part in parts[PIECES]]
    trainer = dict(fields(b"".join(parts[TRAINER])))  # messages of one field merge: the last wins
    normalizer = dict(fields(b"".join(parts[NORMALIZER])))
    return Model(pieces, trainer.get(MODEL_TYPE, UNIGRAM), bool(trainer.get(BYTE_FALLBACK, 0)),
                 bool(trainer.get(WHITESPACE_AS_SUFFIX, 0)), normalizer.get(CHARSMAP, b""),
                 bool(normalizer.get(DUMMY_PREFIX, 1)), bool(normalizer.get(REMOVE_EXTRA, 1)),
                 bool(normalizer.get(ESCAPE, 1)))


def read_piece(message):
    """-> (text, score, type)."""
    piece = dict(fields(message))
    score = struct.unpack("<f", piece.get(SCORE, bytes(4)))[0]
    return piece.get(TEXT, b"").decode(), score, piece.get(TYPE, NORMAL)


def fields(message):
    """Yield (number, value): an int for a varint, else bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"this is no sentencepiece model: byte {at} begins a field of type "
                             f"{wire}")
        size = {1: 8, 2: None, 5: 4}[wire] or varint()
        yield number, message[at : at + size]
        at += size


def write(pieces, prefix):
    """A sentencepiece BPE model of [(text, score, type)] that changes nothing in a text.

    prefix: put a space in front of every text.
    """
    kinds = [kind for _, _, kind in pieces]
    parts = [packed_piece(*piece) for piece in pieces]
    trainer = packed(MODEL_TYPE, BPE) + packed(BYTE_FALLBACK, int(BYTE in kinds))
    parts.append(packed(TRAINER, trainer))
    return b"".join(parts) + packed(NORMALIZER, spaces(prefix))


def spaces(prefix):
    """The NormalizerSpec that keeps every space. prefix: whether one is added."""
    return packed(DUMMY_PREFIX, int(prefix)) + packed(REMOVE_EXTRA, 0)


def with_prefix(proto, prefix):
    """The same model, which puts a space in front of a text, or (with False) does not.

    Protocol buffers merge two messages of one field, and the later values win.
    """
    return proto + packed(NORMALIZER, packed(DUMMY_PREFIX, int(prefix)))


def rounded(proto, step=1 / 64):
    """The same model with every score rounded to a multiple of `step`.

    A unigram model adds up scores: sentencepiece in float32, `tokenizers` in float64.
    Multiples of 1/64 add up exactly in both, up to 2 ** 18 (about 100,000 characters).
    So both libraries find the same ties and break them in the same way.
    """
    out = []
    for number, value in fields(proto):
        if number == PIECES:
            text, score, kind = read_piece(value)
            out.append(packed_piece(text, round(score / step) * step, kind))
        else:
            out.append(packed(number, value))
    return b"".join(out)


def packed_piece(text, score, kind):
    return packed(PIECES, packed(TEXT, text.encode()) + packed(SCORE, float(score))
                  + packed(TYPE, int(kind)))


def packed(number, value):
    """One field: an int as varint, a float in 4 bytes, bytes with their length."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def varint(value):
    """7 bits in each byte, the lowest first; the top bit: more bytes follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))
