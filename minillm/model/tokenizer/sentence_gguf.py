"""A sentencepiece model in a GGUF's fields, and back: llama.cpp's tokenizer "llama".

llama.cpp keeps the pieces, their scores and their types, and merges as sentencepiece's
BPE does. It has no normalization, and finds special and user-defined tokens before it
splits a text. With add_space_prefix it puts a space in front of every part between them
("legacy"). So after a special token, llama.cpp gives other ids for a model that is not
legacy. A GGUF has no field for this.
"""

from minillm.model.tokenizer import base, gguf_names, proto

ADDED_SCORE = -1000.0  # llama.cpp never merges to an added token, so its score has no effect


def fields(tokenizer, size):
    """A SentencePiece -> the fields of a GGUF for a model of `size` tokens.

    ValueError for a model that llama.cpp runs in another way: a unigram model, or one
    that changes the text before it is split.
    """
    model, pieces = tokenizer.parsed, list(tokenizer.parsed.pieces)
    if model.kind != proto.BPE:
        raise ValueError("llama.cpp runs sentencepiece models of the kind BPE; this is unigram or "
                         "another: train the tokenizer with kind='bpe'")
    if model.charsmap or model.remove_extra or not model.escape or model.whitespace_as_suffix:
        raise ValueError("this sentencepiece model changes a text before it is split "
                         "(normalization or white space), which llama.cpp does not do")
    tokenizer.check_size(size, "GGUF")
    pieces += [(f"[unused {i}]", ADDED_SCORE, proto.UNUSED) for i in range(len(pieces), size)]
    for i, token in tokenizer.added.items():
        if token.lstrip or token.rstrip or token.single_word:
            raise ValueError(f"the added token {token.content!r} takes white space or whole words "
                             "alone (lstrip, rstrip, single_word), which a GGUF cannot say")
        if i >= len(model.pieces):
            kind = proto.CONTROL if token.special else proto.USER_DEFINED
            pieces[i] = (token.content, ADDED_SCORE, kind)
        elif not token.special:
            pieces[i] = (*pieces[i][:2], proto.USER_DEFINED)
    texts, scores, kinds = map(list, zip(*pieces))
    own = {"model": "llama", "pre": "default", "tokens": texts, "scores": scores,
           "token_type": kinds, "add_bos_token": tokenizer.add_bos,
           "add_eos_token": tokenizer.add_eos, "add_space_prefix": tokenizer.prefix}
    return gguf_names.written(tokenizer, own)


def parts(fields):
    """The fields of a GGUF -> ([(text, score, type)], [base.Added], {flag: value}).

    The added tokens are those that llama.cpp finds before it splits a text.
    """
    def field(name, default=None):
        return fields.get(f"tokenizer.ggml.{name}", default)

    tokens, scores = field("tokens"), field("scores")
    kinds = field("token_type") or []
    if not len(tokens) == len(scores or []) == len(kinds):
        raise ValueError(f"the GGUF's tokenizer has {len(tokens)} tokens, {len(scores or [])} "
                         f"scores and {len(kinds)} types: each token has one of both")
    pieces = list(zip(tokens, scores, kinds))
    added = [base.Added(i, text, special=False) for i, (text, _, kind) in enumerate(pieces)
             if kind == proto.USER_DEFINED]
    flags = {"add_bos": True, "add_eos": False, "prefix": True}  # llama.cpp's defaults
    names = {"add_bos": "add_bos_token", "add_eos": "add_eos_token", "prefix": "add_space_prefix"}
    return pieces, added, {flag: bool(field(name, flags[flag])) for flag, name in names.items()}
