"""Step planning: the validation split, the mixture of files, and the samples of each step.

All of it is a pure function of the data, the flags and the seed: every process computes the same
plan, and a resumed run continues with the samples that it has not seen.
"""

import math
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import UserError, open_file
from dataset.packing import MULTIPLE, best_fit_decreasing, collate, row_length
from model.loss import supervised_tokens


class Source(NamedTuple):
    """A file of --data_path: a.jsonl, or a.jsonl:0.7 with its share of all rows."""

    path: Path
    weight: float | None = None

    @classmethod
    def read(cls, text):
        """The Source that a user writes so. Raises UserError or ValueError for what is not one."""
        path, weight = re.fullmatch(r"(.*?)(?::([0-9.]+))?", text, re.DOTALL).groups()
        if os.path.isfile(text):  # noqa: PTH113  Path.is_file raises OSError for a long name
            path, weight = text, None
        open_file(path).close()
        weight = float(weight) if weight else None
        if weight == 0:
            raise ValueError(f"{text:.200}: give a share above 0, as :0.7")
        return cls(Path(path).resolve(), weight)  # the same file, wherever the run is resumed


def split_samples(dataset, part, seed):
    """(samples to train on, samples to validate on), as lists of numbers; at least one to validate.

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


def mix(samples, dataset, sources, seed):
    """Return the samples in the proportion of the sources' weights, or as they are without weights.

    There are about as many samples as before; those of a short source come several times, and each
    source at least once. Raises UserError for a source of which nothing is left to train on.
    """
    total = sum(source.weight or 0 for source in sources)
    if not total:
        return list(samples)
    samples = np.asarray(samples)
    file_of = dataset.samples[samples, 0]
    mixed = []
    for number, source in enumerate(sources):
        own = samples[file_of == number]
        if not len(own):
            raise UserError(
                f"{source.path}:{source.weight:g} has no sample to train on: all are held out for "
                "validation or left out; give more records, --val_split 0, or --val_data_path"
            )
        count = max(1, round(source.weight / total * len(samples)))
        copies, rest = divmod(count, len(own))
        drawn = np.random.default_rng([seed, number]).permutation(own)[:rest]
        mixed += own.tolist() * copies + drawn.tolist()
    return mixed


class StepPlan:
    """The samples and batches of each optimizer step of a run; len(plan) steps in all epochs.

    samples      the samples of the latest step
    row_length   tokens of a packed row at most, or None
    """

    def __init__(self, dataset, samples, args, runtime):
        self.dataset, self.args, self.device = dataset, args, runtime.device
        self.row_length = row_length(dataset.lengths, args) if args.packing else None
        self.rows_per_step = args.batch_size * args.accumulation_steps * runtime.world_size
        self.rank, self.world_size = runtime.rank, runtime.world_size
        self.train_samples, self.samples = samples, []
        self.epoch, self.epoch_steps = 0, self.plan_epoch(0)
        self.steps_per_epoch = len(self.epoch_steps)

    def __len__(self):
        return self.steps_per_epoch * self.args.epochs

    def plan_epoch(self, epoch):
        """Return the steps of an epoch, as `epoch_plan` does."""
        ranks = self.rank, self.world_size
        return epoch_plan(self.dataset, self.train_samples, self.args, epoch, *ranks)

    def after(self, step):
        """Yield a list of batches for each step after the first `step` ones, as `collate` returns
        them: micro-batches, whose gradients are summed.
        """
        while step < len(self):
            epoch, done = divmod(step, self.steps_per_epoch)
            if epoch != self.epoch:
                self.epoch, self.epoch_steps = epoch, self.plan_epoch(epoch)
            steps = self.epoch_steps[done:]
            loader = batches(self.dataset, flat(steps), self.args, self.device)
            for of_step in steps:
                self.samples = flat(flat(of_step))
                yield [next(loader) for _ in of_step]
            step += len(steps)


def epoch_plan(dataset, samples, args, epoch, rank=0, world_size=1):
    """Return the samples that each step of an epoch takes: a list of steps, a step being a list of
    micro-batches of this process, a micro-batch a list of rows, a row a list of sample numbers.

    With args.packing a micro-batch is as many packed rows of `row_length` tokens as batch_size rows
    of max_seq_len tokens hold, else batch_size samples. A step takes the same samples however it is
    split into micro-batches and processes. All processes get the same number of micro-batches; some
    may be empty.
    """
    rng = np.random.default_rng([args.seed, epoch])
    order = rng.permutation(np.asarray(samples, np.int64)).tolist()
    rows, rows_at_once = [[sample] for sample in order], args.batch_size
    if args.packing:
        T = row_length(dataset.lengths, args)
        packed = best_fit_decreasing(dataset.lengths[order].tolist(), T)
        rows = [[order[item] for item in packed[index]] for index in rng.permutation(len(packed))]
        rows_at_once *= args.max_seq_len // T
    plan = []
    for rows_of_step in cut(rows, rows_at_once * args.accumulation_steps * world_size):
        micro_batches = cut(rows_of_step, rows_at_once)
        micro_batches += [[] for _ in range(-len(micro_batches) % world_size)]
        plan.append(micro_batches[rank::world_size])
    return plan


def flat(lists):
    """Return the items of several lists as one."""
    return [item for items in lists for item in items]


def token_counts(micro_batches):
    """(supervised tokens, tokens without padding) of a step's batches. The first token of a row is
    not predicted, so its label does not count.
    """
    supervised = sum(supervised_tokens(labels) for _, labels, *_ in micro_batches)
    tokens = sum(int((document_ids >= 0).sum()) for *_, document_ids in micro_batches)
    return supervised, tokens


def cut(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


class Rows(Dataset):
    """The rows of a dataset by the numbers of their samples: a list of (input_ids, labels)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, row):
        return flat(self.dataset.documents(sample) for sample in row)


def batches(dataset, micro_batches, args, device):
    """Return an iterator of what `collate` returns for each list of rows, a row being a list of
    sample numbers.

    On an NVIDIA GPU all have one shape, since its code is compiled for each: all rows of a full
    micro-batch, as long as the longest row can be. args.num_workers processes prepare them in
    advance; None: two for such a GPU, except on Windows, where starting them takes seconds.
    """
    gpu, T, count = device.type == "cuda", row_length(dataset.lengths, args), args.batch_size
    workers = args.num_workers
    if workers is None:
        workers = 2 if gpu and sys.platform != "win32" else 0
    if args.packing:
        count *= args.max_seq_len // T
    elif gpu:  # FlexAttention computes blocks of 128 tokens
        T = min(args.max_seq_len, math.ceil(T / 128) * 128)
    multiple = T if gpu else MULTIPLE if args.packing else 1
    collated = partial(collate, longest=T, multiple=multiple, count=count if gpu else 1)
    return iter(
        DataLoader(
            Rows(dataset),
            batch_sampler=micro_batches,
            collate_fn=collated,
            num_workers=workers,
            pin_memory=gpu,  # copied to the GPU while it computes
            generator=torch.Generator(),  # its own: it draws nothing from the global one
        )
    )


def to_device(batch, device):
    """Return a batch on a device, except its labels: see `model.loss.supervised_positions`."""
    input_ids, labels, *where = batch
    at_once = device.type == "cuda"  # see `model.loss.supervised_positions`
    input_ids, *where = (part.to(device, non_blocking=at_once) for part in (input_ids, *where))
    return input_ids, labels, *where
