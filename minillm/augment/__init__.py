"""Augmentation: more training data from the data that is there, and noise on what is read.

    words       eda(records)             four small changes of a record's words
    synonyms    read(path), Nearest(...) what `eda` takes its synonyms from
    tokens      drop(examples), mask(examples, token)     on the ids of Examples
    sampling    paraphrase(records, model, tokenizer)     the model itself writes a variant
    neftune     NEFTune(loss, alpha)     noise on the embedding's output, in training only

The first four return a new list, an `Augmented`: the originals first, then the copies, and a
`report` of what changed. What is to be learnt (a completion, a label) stays as it is.

    more = augment.eda(records, thesaurus="words.txt", copies=4, alpha=0.1, seed=0)
    print(more.report)

The same seed gives the same result. Random numbers come from a generator for each record and
copy, made of the seed and the record's own content. So torch's and Python's global generators
take no part, and a record's copies do not depend on the other records. Whether augmentation
helps depends on the task, so compare a training with it and one without it.
"""

from minillm.augment.neftune import NEFTune
from minillm.augment.result import Augmented, Report
from minillm.augment.sampling import paraphrase
from minillm.augment.synonyms import Nearest, read
from minillm.augment.tokens import drop, mask
from minillm.augment.words import delete, eda, insert, replace, swap

__all__ = ["Augmented", "NEFTune", "Nearest", "Report", "delete", "drop", "eda", "insert", "mask",
           "paraphrase", "read", "replace", "swap"]
