"""EDA: four small changes of a text's words.

    replace    n words that are no stop words become a synonym of theirs
    insert     n times: a synonym of a random word that is no stop word, at a random place
    swap       n times: two random words change places
    delete     each word goes with the probability p = alpha; one always stays

               n = max(1, alpha l), rounded down           l: the number of words
               Wei & Zou 2019, "EDA", arXiv 1901.11196

    code       paper      meaning
    alpha      alpha      the share of the words; the paper advises 0.05 to 0.1
    copies     n_aug      copies of each record; the paper advises 4 to 16, fewer for more data

Copy k of a record has operation k of the four, and then the first again. The paper's experiments
are on classification with 500 sentences and more, and gain most (3 points) at 500. A label
survives a change of a few words more easily than an answer does, which may depend on each word.

The authors' program removes punctuation and capitals first. Here all that is not a word stays,
and a synonym gets the capital of the word whose place it takes. A copy that is equal to its
original (a text of one word, no synonym known) is left out and counted; the program keeps it.

>>> from minillm import augment
>>> records = [{"text": "A quick answer saves a long letter.", "label": "advice"}]
>>> more = augment.eda(records, thesaurus={"quick": ["fast"], "long": ["lengthy"]}, alpha=0.2)
>>> more[0] == records[0], {record["label"] for record in more}
(True, {'advice'})
>>> "fast" in more[1]["text"] or "lengthy" in more[1]["text"]         # one synonym in seven words
True
"""

import re

from minillm import options
from minillm.augment.fields import changed, check_fields
from minillm.augment.result import Augmented, check, generator
from minillm.augment.synonyms import lookup

WORD = re.compile(r"(\w+(?:['’-]\w+)*)")
STOP_WORDS = frozenset("""
    a an the this that these those i me my we us our you your he him his she her it its they them
    their who whom which what and or but nor so if then than as of at by for with about against
    between into through during before after above below to from up down in out on off over under
    again there here when where why how all any both each few more most other some such no not only
    own same too very can could will would shall should may might must do does did done have has had
    having be am is are was were been being just now
""".split())


def replace(words, n, draw, synonyms, stop_words=STOP_WORDS):
    """Up to n of the words become a synonym; returns (words, how many changed)."""
    words, count = list(words), 0
    places = [i for i, word in enumerate(words) if word.lower() not in stop_words]
    draw.shuffle(places)
    for i in places:
        found = [one for one in synonyms(words[i].lower()) if one != words[i].lower()]
        if found and count < n:
            words[i] = like(words[i], draw.choice(found))
            count += 1
    return words, count


def insert(words, n, draw, synonyms, stop_words=STOP_WORDS):
    """n times, a synonym of a random word comes to a random place; returns (words, how many)."""
    known = [found for word in words if word.lower() not in stop_words
             if (found := [one for one in synonyms(word.lower()) if one != word.lower()])]
    words = list(words)
    if not known:
        return words, 0
    for _ in range(n):
        words.insert(draw.randint(0, len(words)), draw.choice(draw.choice(known)))
    return words, n


def swap(words, n, draw, synonyms=None, stop_words=STOP_WORDS):
    """n times, two random words change places; returns (words, n)."""
    words = list(words)
    if len(words) < 2:
        return words, 0
    for _ in range(n):
        i, j = draw.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return words, n


def delete(words, p, draw, synonyms=None, stop_words=STOP_WORDS):
    """Each word becomes None with the probability p; one stays. Returns (words, how many)."""
    if len(words) < 2:
        return list(words), 0
    kept = [None if draw.random() < p else word for word in words]
    if not any(kept):
        i = draw.randrange(len(words))
        kept[i] = words[i]
    return kept, kept.count(None)


OPERATIONS = (replace, insert, swap, delete)


def eda(records, thesaurus=None, *, copies=4, alpha=0.1, operations=OPERATIONS, fields=None,
        seed=0, stop_words=STOP_WORDS):
    """Records -> Augmented, a list of the records and of up to `copies` changed copies of each.

    records      a list of dicts, as `data.parse` takes them; they are not changed
    thesaurus    {word: [synonym, ...]}, the path of a file (see `synonyms.read`), or a function
                 from a word to its synonyms, such as `Nearest`; `replace` and `insert` need it
    alpha        the share of the words that an operation changes, above 0 and up to 1
    operations   functions of this page, in turn: (swap, delete) needs no thesaurus
    fields       the names of the fields to change; by default never what is learnt: see `fields`
    stop_words   words, in small letters, that get no synonym

    ValueError for a number out of range, a field that no record has, a bad thesaurus, or none
    where one is needed; TypeError for what are no records.
    """
    check(records, copies, seed)
    options.real("alpha", alpha, lambda x: 0 < x <= 1, "a share of the words, above 0 and up to 1")
    operations, fields = tuple(operations), check_fields(records, fields)
    if not operations or not set(operations) <= set(OPERATIONS):
        raise ValueError(f"operations={operations!r}: give one or more of augment.replace, "
                         "augment.insert, augment.swap and augment.delete")
    if thesaurus is None and {replace, insert} & set(operations):
        raise ValueError("thesaurus=None: replace and insert need synonyms. Give thesaurus=, or "
                         "operations=(augment.swap, augment.delete)")
    synonyms, found = lookup(thesaurus), Augmented(records)
    for i, record in enumerate(records):
        for k in range(copies):
            operation, count = operations[k % len(operations)], []
            draw = generator(seed, k, record)

            def change(text):
                new, units = apply(operation, text, alpha, draw, synonyms, stop_words)
                count.append(units)
                return new

            new = changed(record, fields, change, f"record {i}")
            found.keep(operation.__name__, record, new, sum(count))
    return found


def apply(operation, text, alpha, draw, synonyms, stop_words=STOP_WORDS):
    """(The text after one operation, how many words changed)."""
    gaps, words = WORD.split(text)[::2], WORD.split(text)[1::2]
    if not words:
        return text, 0
    n = alpha if operation is delete else max(1, int(alpha * len(words)))
    new, count = operation(words, n, draw, synonyms, stop_words)
    return joined(gaps, new), count


def joined(gaps, words):
    """The words between the gaps of the original text: gap, word, gap, ..., word, gap.

    A deleted word (None) takes one of the spaces around it along. Words beyond those of the
    original come before the last gap, each after a space.
    """
    text = gaps[0]
    for i, word in enumerate(words):
        after = gaps[i + 1] if i < len(gaps) - 2 else " " if i < len(words) - 1 else gaps[-1]
        if word is not None:
            text += word + after
        elif not after or after[0].isspace():
            text = text.rstrip(" ") + (after if text.strip() else after.lstrip())
        else:
            text += after
    return text


def like(word, synonym):
    """The synonym, with a capital where the word has one."""
    return synonym[:1].upper() + synonym[1:] if word[:1].isupper() else synonym
