"""A tokenizer.json that gives the ids of a sentencepiece model, for transformers.

transformers can read a tokenizer.model, but needs protobuf for it, and its
LlamaTokenizer puts a space in front of every text, even against the model. A
tokenizer.json is exact, and it is plain JSON, so writing it needs no library.

    sentencepiece                            here, in the words of the library `tokenizers`
    BPE: merge the neighbours whose union    merges: every split of a piece into two pieces, the
         has the highest score                       pieces by falling score
    unigram: the likeliest split             the same, on the same scores
    a character that is no piece             byte_fallback: its UTF-8 bytes, as pieces <0x00>...
    a space                                  normalizer: replaced by U+2581
    a space in front of a text               normalizer or pre_tokenizer, see `spaces`
    control pieces                           added_tokens
"""

from minillm.model.tokenizer import proto

SPACE = "\u2581"


class NoEqual(ValueError):
    """For a sentencepiece model, no tokenizer.json gives the same ids."""


def tokenizer_json(model, tokens, *, prefix, every_part, bos=None, eos=None):
    """A proto.Model and the base.Added tokens beside it -> the content of a tokenizer.json, a dict.

    prefix: a space is put in front of a text; every_part: in front of the parts between
    added tokens too. bos, eos: the (text, id) that is added in front and behind, or
    None. NoEqual for a sentencepiece model for which the library `tokenizers` gives
    other ids.
    """
    kinds = {proto.BPE: bpe, proto.UNIGRAM: unigram}
    if model.kind not in kinds or model.whitespace_as_suffix or not model.escape:
        raise NoEqual("it is neither BPE nor unigram, or writes spaces in a way of its own")
    if model.charsmap or model.remove_extra:
        raise NoEqual("it normalizes a text or removes spaces before it splits the text")
    normalizer, pre_tokenizer = spaces(prefix, every_part)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [added(token) for token in tokens], "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": ends(bos, eos),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": kinds[model.kind](model)}


def added(token):
    return {"id": token.id, "content": token.content, "single_word": token.single_word,
            "lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": False,
            "special": token.special}


def spaces(prefix, every_part):
    """(normalizer, pre_tokenizer) for the spaces of a text.

    A normalizer works on each part between added tokens, so it can put a space in front
    of every part. Only Metaspace can do so for the first part alone, but it adds no
    space where the part already begins with one, and sentencepiece does. So the first
    Metaspace works with a blank, which no part contains any more; the second turns the
    blank into U+2581.
    """
    steps = [{"type": "Prepend", "prepend": SPACE}] if prefix and every_part else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    first = None
    if prefix and not every_part:
        first = [metaspace(" ", "first"), metaspace(SPACE, "never")]
        first = {"type": "Sequence", "pretokenizers": first}
    return {"type": "Sequence", "normalizers": steps}, first


def metaspace(replacement, scheme):
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme,
            "split": False}


def ends(bos, eos):
    """The post-processor that adds BOS in front and EOS behind; None for neither."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]}
              for name, i in filter(None, (bos, eos))}
    if not tokens:
        return None
    front, behind = ([{"SpecialToken": {"id": one[0], "type_id": 0}}] if one else []
                     for one in (bos, eos))
    second = {"Sequence": {"id": "B", "type_id": 0}}
    single = [*front, text, *behind]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, second],
            "special_tokens": tokens}


def bpe(model):
    """The BPE model, with sentencepiece's scores turned into an order of merges."""
    vocabulary = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    return {"type": "BPE", "dropout": None, "unk_token": unknown(model)[1],
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": model.byte_fallback, "ignore_merges": False, "vocab": vocabulary,
            "merges": merges(model)}


def merges(model):
    """[[left, right], ...]: every split of a piece into two pieces, the best score first."""
    normal = {text: (-score, i) for i, (text, score, kind) in enumerate(model.pieces)
              if kind == proto.NORMAL}
    found = []
    for text in sorted(normal, key=normal.get):
        splits = [(text[:i], text[i:]) for i in range(1, len(text))]
        splits = [pair for pair in splits if pair[0] in normal and pair[1] in normal]
        found += sorted(splits, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return [list(pair) for pair in found]


def unigram(model):
    """The Unigram model with sentencepiece's own scores.

    The library `tokenizers` would find the pieces of control tokens and bytes, such as
    "<0x0A>", in a text; sentencepiece does not. So these pieces get a score so low that
    any other split of the text is likelier.
    """
    lowest = min(score for _, score, kind in model.pieces if kind == proto.NORMAL)
    never = 100 * (lowest - 10)
    pieces = [[text, score if kind in (proto.NORMAL, proto.USER_DEFINED) else never]
              for text, score, kind in model.pieces]
    return {"type": "Unigram", "unk_id": unknown(model)[0], "vocab": pieces,
            "byte_fallback": model.byte_fallback}


def unknown(model):
    """(id, text) of the piece for unknown text."""
    return next((i, text) for i, (text, _, kind) in enumerate(model.pieces)
                if kind == proto.UNKNOWN)
