"""What a model learns from: Python's own documentation, and the user's files.

    example     ids, and the label of each id: which part of a text is learnt
    tasks       three tasks made of the documentation that comes with Python
    records     a record (text, prompt, conversation, Alpaca, ShareGPT) -> examples
    reading     a .txt, .jsonl, .json or .csv file -> records -> examples, or questions
    packing     several examples in one row, so that little is padded
    batching    the order of the batches, the held-out share, the fingerprint
    showing     the learnt and the other text, in colour
"""

from minillm.data.batching import Batches, batches, collate, fingerprint, held_out
from minillm.data.example import Example, NOT_LEARNT, check_examples, completion, learnt, pieces
from minillm.data.packing import pack
from minillm.data.reading import (
    Questions, Reading, check_file, questions, read, reader_of, text, utf8,
)
from minillm.data.records import conversation, parse
from minillm.data.showing import preview, skips, summary
from minillm.data.tasks import (
    Docstring, SPLITS, TASKS, Task, check, docstrings, most_documented, split, task, texts, topics,
)

__all__ = [
    "Batches", "Docstring", "Example", "NOT_LEARNT", "Questions", "Reading", "SPLITS", "TASKS",
    "Task", "batches", "check", "check_examples", "check_file", "collate", "completion",
    "conversation", "docstrings", "fingerprint", "held_out", "learnt", "most_documented", "pack",
    "parse", "pieces", "preview", "questions", "read", "reader_of", "skips", "split", "summary",
    "task", "text", "texts", "topics", "utf8",
]
