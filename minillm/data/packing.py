"""Packing: several examples share a row, so that little of a batch is padding.

The method is first-fit decreasing: the longest example first, each into the first row that has
room. It needs at most 11/9 of the fewest rows possible, plus 6/9 of a row (Dosa 2007). A search
through all rows for each example would take n^2 steps. A tree over the rows, whose nodes hold
the most room below them, finds the same row in log n steps.
"""

from minillm.data.example import Example, NOT_LEARNT, check_examples, check_length


def pack(examples, length):
    """Examples -> Examples of at most `length` ids, each holding one or more of the given ones.

    A packed row has the same loss as its documents one by one: each document sees only
    itself, its positions start at 0, and its first token is not learnt. Examples that are
    packed already keep their documents. The order is the same at every call. ValueError for
    an example without ids, or longer than a row.
    """
    check_length(length)
    check_examples(examples)
    for i, example in enumerate(examples):
        size, marks = len(example.ids), example.documents
        if not 0 < size <= length:
            raise ValueError(f"example {i} has {size} ids, more than a row's length={length}"
                             if size else f"example {i} has no ids")
        if len(example.labels) != size or marks and (len(marks) != size or min(marks) < 1):
            raise ValueError(f"example {i} has {size} ids: it needs as many labels, and as many "
                             "document numbers from 1, if it has any")
    examples, rows = sorted(examples, key=lambda e: -len(e.ids)), []
    for example, place in zip(examples, first_fit([len(e.ids) for e in examples], length)):
        if place == len(rows):
            rows.append(Example([], [], []))
        append(rows[place], example)
    return rows


def append(row, example):
    """Add an example, as one or more documents of its own, to a row."""
    marks, size = example.documents, len(example.ids)
    starts = [0] + ([i for i in range(1, size) if marks[i] != marks[i - 1]] if marks else [])
    for start, end in zip(starts, starts[1:] + [size]):
        number = row.documents[-1] + 1 if row.documents else 1
        row.documents += [number] * (end - start)
        row.labels += [NOT_LEARNT, *example.labels[start + 1 : end]]
    row.ids += example.ids
    row.cut += example.cut


def first_fit(sizes, room):
    """For each size in turn, the number of the first row that has room for it.

    >>> list(first_fit([5, 4, 3, 2], 8))
    [0, 1, 0, 1]
    """
    leaves = 1 << max(0, len(sizes) - 1).bit_length()  # there are never more rows than sizes
    most = [room] * (2 * leaves)  # node k has the children 2k and 2k + 1; the leaves are the rows
    for size in sizes:
        node = 1
        while node < leaves:
            node = 2 * node if most[2 * node] >= size else 2 * node + 1
        yield node - leaves
        most[node] -= size
        while node > 1:
            node //= 2
            most[node] = max(most[2 * node], most[2 * node + 1])
