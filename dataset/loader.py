"""Which samples each optimizer step takes, in what order, and how they are packed into rows.

All of it is a pure function of the data, the flags and the seed: it is the same in every process,
and a run that was stopped continues with the samples that it had not seen.

Several short samples share a packed row, because padding costs as much as text. Beside its ids a
row has the place of each token in its sample (position_ids, from 0 in each) and the number of the
sample in the row (document_ids, -1 for padding), so that the model treats each as if it were alone.
"""

import signal
import threading
from bisect import bisect_left, insort
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import IGNORE, PAD

SHORTEST = 128  # tokens of a packed row; longer ones make attention dearer, shorter ones pack worse


class Source(NamedTuple):
    """A file of --data_path: a.jsonl, a.jsonl:0.7 (its share of all rows), a.jsonl*3 (copies)."""

    path: Path
    weight: float | None = None
    copies: int = 1


def split_samples(dataset, part, seed):
    """(rows to train on, rows to validate on), as lists of row numbers; at least one to validate.

    Record i of file f is drawn by the i-th random number of (seed, f): the split stays when a file
    grows at its end, and no record is on both sides.
    """
    held_out = np.zeros(len(dataset), bool)
    for number, file in enumerate(dataset.files):
        drawn = np.random.default_rng([seed, number]).random(len(file.supervised)) < part
        mine = dataset.samples[:, 0] == number
        held_out[mine] = drawn[dataset.samples[mine, 1]]
    if held_out.all() or (part > 0 and not held_out.any()):  # the first row decides tiny cases
        held_out[0] = len(dataset) > 1 and not held_out[0]
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


def mix(rows, dataset, sources, seed):
    """The rows with each source's copies, or in the proportion of the weights.

    With weights there are as many rows as before; a source with too few gives some again.
    """
    rows = np.asarray(rows)
    file_of = dataset.samples[rows, 0]
    total = sum(source.weight or 0 for source in sources)
    mixed = []
    for number, source in enumerate(sources):
        own = rows[file_of == number]
        count = len(own) * source.copies
        if total:
            count = round(source.weight / total * len(rows)) if len(own) else 0
        copies, rest = divmod(count, max(1, len(own)))
        drawn = np.random.default_rng([seed, number]).permutation(own)[:rest]
        mixed += own.tolist() * copies + drawn.tolist()
    return mixed


def epoch_plan(dataset, rows, args, epoch, rank=0, world_size=1):
    """Which of the rows each step of an epoch takes: a list of steps, a step being a list of
    micro-batches of this process, a micro-batch a list of row numbers.

    With args.packing a micro-batch fills batch_size packed rows of max_seq_len tokens, else it is
    batch_size rows. A step takes the same however it is split into micro-batches and processes.
    Every process gets as many micro-batches as the others; one that has none left gets empty ones.
    """
    rng = np.random.default_rng([args.seed, epoch])
    order = rng.permutation(np.asarray(rows, np.int64)).tolist()
    bins = [[row] for row in order]
    if args.packing:
        packed = best_fit_decreasing(dataset.lengths[order].tolist(), args.max_seq_len)
        bins = [[order[item] for item in packed[index]] for index in rng.permutation(len(packed))]
    plan = []
    for bins_of_step in cut(bins, args.batch_size * args.accumulation_steps * world_size):
        micro_batches = [sum(part, []) for part in cut(bins_of_step, args.batch_size)]
        micro_batches += [[]] * (-len(micro_batches) % world_size)
        plan.append(micro_batches[rank::world_size])
    return plan


def cut(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def batches(dataset, micro_batches, args):
    """Yields a batch for each list of row numbers: what `pack` or `pad` returns.

    args.num_workers processes prepare them ahead. When one of those dies, the rest is prepared
    here: slower, and the same.
    """
    collate = partial(pack, row_length=args.max_seq_len) if args.packing else pad
    done = 0
    with own_handler_of_dead_children():
        loader = iter(
            DataLoader(
                dataset,
                batch_sampler=micro_batches,
                collate_fn=collate,
                num_workers=args.num_workers,
                generator=torch.Generator(),  # its own: it draws nothing from the global one
            )
        )
    try:
        for batch in loader:
            yield batch
            done += 1
        return
    except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: died while it sent
        ours = not isinstance(error, RuntimeError) or "worker" in str(error)
        if not args.num_workers or not ours:
            raise
        print(f"warning: {error}. The batches are prepared by the training process from here on")
    for rows in micro_batches[done:]:
        yield collate([dataset[row] for row in rows])


@contextmanager
def own_handler_of_dead_children():
    """A DataLoader has a signal raise an error wherever the program is when a worker dies, maybe
    in the middle of an optimizer step. Without it, the next batch raises it.
    """
    number = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(number) if number else None
    yield
    if number and threading.current_thread() is threading.main_thread():
        signal.signal(number, before or signal.SIG_DFL)


def best_fit_decreasing(lengths, row_length):
    """Which items share a row: a list of rows, each a list of indices into lengths.

    From the longest to the shortest, each goes where it leaves the least space. No length may
    exceed row_length. This is at most 22 % above the fewest rows possible (Johnson, 1973).
    """
    rows, with_space, spaces = [], [[] for _ in range(row_length + 1)], []  # spaces is sorted
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    for item in order:
        at = bisect_left(spaces, lengths[item])
        if at == len(spaces):
            row, space = len(rows), row_length
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                spaces.pop(at)
        rows[row].append(item)
        space -= lengths[item]
        if not with_space[space]:
            insort(spaces, space)
        with_space[space].append(row)
    return rows


def layout(lengths, row_length):
    """(tokens of a row, the rows) for a batch of documents; the rows are lists of indices.

    Rows are about as long as the longest document, where that takes no more tokens than rows of
    row_length: a token attends to its whole row, and what is not its document is masked out.
    About, because a CPU keeps compiled code for each size of product that it meets.
    """
    shortest = min(row_length, -max([SHORTEST, *lengths]) // 64 * -64)
    layouts = [(T, best_fit_decreasing(lengths, T)) for T in (shortest, row_length)]
    return min(layouts, key=lambda layout: layout[0] * len(layout[1]))


def pack(documents, row_length):
    """Documents (input_ids, labels) as one batch of rows that hold several."""
    T, rows = layout([len(input_ids) for input_ids, _ in documents], row_length)
    return batch([[documents[item] for item in row] for row in rows], T)


def pad(documents):
    """Documents as one batch, each in a row of its own, padded to the longest."""
    return batch([[d] for d in documents], max((len(ids) for ids, _ in documents), default=0))


def batch(rows, T):
    """Rows of documents as input_ids, labels, position_ids and document_ids, each (B, T).

    A document's first token has no label: what stands before it is another document. No rows at
    all give one token without loss, the share of a process that has nothing left to do.
    """
    shape = (max(1, len(rows)), max(1, T))
    ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORE)
    positions, documents = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for index, row in enumerate(rows):
        start = 0
        for number, (row_ids, row_labels) in enumerate(row):
            end = start + len(row_ids)
            ids[index, start:end] = row_ids
            labels[index, start + 1 : end] = row_labels[1:]
            positions[index, start:end] = torch.arange(len(row_ids))
            documents[index, start:end] = number
            start = end
    return ids, labels, positions, documents
