"""Step planning: the validation split, the mixture of files, and the samples of each step.

The plan is a pure function of data, flags and seed: all processes compute the same plan, and a
resumed run continues with the samples it hasn't seen.
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
from dataset.lm_dataset import FILE, RECORD
from dataset.packing import ROW_MULTIPLE, best_fit_decreasing, collate, row_length
from model.loss import count_supervised


class Source(NamedTuple):
    """A file of --data_path: a.jsonl, or a.jsonl:0.7 with a mixture weight."""

    path: Path
    weight: float | None = None

    @classmethod
    def read(cls, text):
        """Parse PATH or PATH:WEIGHT. Raises UserError or ValueError if it is invalid."""
        path, weight = re.fullmatch(r"(.*?)(?::([0-9.]+))?", text, re.DOTALL).groups()
        if os.path.isfile(text):  # noqa: PTH113  Path.is_file raises OSError for a long name
            path, weight = text, None
        open_file(path).close()
        weight = float(weight) if weight else None
        if weight == 0:
            raise ValueError(f"{text:.200}: give a weight above 0, e.g. :0.7")
        # Absolute: the run may be resumed from another folder.
        return cls(Path(path).resolve(), weight)


def split_samples(dataset, val_split, seed):
    """Return the indices of (training samples, validation samples).

    The i-th random number of the seed (seed, f) decides about record i of file f, so the split
    stays the same when records are appended to a file, and a record's samples are all on one side.
    Only in a dataset so small that a side would be empty, one sample is moved to it.
    """
    held_out = np.zeros(len(dataset), bool)
    for index, file in enumerate(dataset.files):
        is_drawn = np.random.default_rng([seed, index]).random(len(file.supervised)) < val_split
        in_file = dataset.samples[:, FILE] == index
        held_out[in_file] = is_drawn[dataset.samples[in_file, RECORD]]
    if held_out.all() or (val_split > 0 and not held_out.any()):  # tiny datasets: move one sample
        held_out[0] = len(dataset) > 1 and not held_out[0]
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


def mix(samples, dataset, sources, seed):
    """Mix samples in proportion to the sources' weights; without weights, return them unchanged.

    The number of samples stays about the same: samples of small sources are repeated, and each
    source has at least one. Raises UserError for a source without training samples.
    """
    total = sum(source.weight or 0 for source in sources)
    if not total:
        return list(samples)
    samples = np.asarray(samples)
    file_of_sample = dataset.samples[samples, FILE]
    mixed = []
    for index, source in enumerate(sources):
        candidates = samples[file_of_sample == index]
        if not len(candidates):
            raise UserError(
                f"{source.path}:{source.weight:g} has no training sample: all were held out for "
                "validation or dropped; add records, or use --val_split 0 or --val_data_path"
            )
        num_samples = max(1, round(source.weight / total * len(samples)))
        copies, remainder = divmod(num_samples, len(candidates))
        extra = np.random.default_rng([seed, index]).permutation(candidates)[:remainder]
        mixed += candidates.tolist() * copies + extra.tolist()
    return mixed


class StepPlan:
    """The samples and batches of each optimizer step; len(plan) is the number of steps.

    step_samples  the samples of the latest step
    row_length    length of packed rows in tokens, or None
    """

    def __init__(self, dataset, train_samples, args, runtime):
        self.dataset, self.args, self.runtime = dataset, args, runtime
        self.train_samples = train_samples
        self.row_length = None
        if args.packing:
            self.row_length = row_length(dataset.lengths, args.max_seq_len)
        self.rows_per_step = args.batch_size * args.accumulation_steps * runtime.world_size
        self.step_samples = []
        self.epoch = 0
        self.epoch_steps = self.plan_epoch(0)
        self.steps_per_epoch = len(self.epoch_steps)

    def __len__(self):
        return self.steps_per_epoch * self.args.epochs

    def plan_epoch(self, epoch):
        """Return this rank's steps of an epoch; see `epoch_plan`."""
        rank, world_size = self.runtime.rank, self.runtime.world_size
        return epoch_plan(self.dataset, self.train_samples, self.args, epoch, rank, world_size)

    def steps_after(self, step):
        """Yield the micro-batches, as `collate` returns them, of each step after the first `step`
        steps.
        """
        while step < len(self):
            epoch, first = divmod(step, self.steps_per_epoch)
            if epoch != self.epoch:
                self.epoch = epoch
                self.epoch_steps = self.plan_epoch(epoch)
            steps = self.epoch_steps[first:]
            loaded = batches(self.dataset, flatten(steps), self.args, self.runtime.device)
            for micro_batches in steps:
                self.step_samples = flatten(flatten(micro_batches))
                yield [next(loaded) for _ in micro_batches]
            step += len(steps)


def epoch_plan(dataset, samples, args, epoch, rank=0, world_size=1):
    """Plan an epoch. Returns a list of steps; a step is a list of this process's micro-batches, a
    micro-batch a list of rows, and a row a list of sample indices.

    With args.packing, a micro-batch is packed rows of `row_length` tokens, as many tokens as
    batch_size rows of max_seq_len; otherwise batch_size samples. A step takes the same samples
    however it is split into micro-batches and processes. All processes get the same number of
    micro-batches, of which some may be empty.
    """
    rng = np.random.default_rng([args.seed, epoch])
    order = rng.permutation(np.asarray(samples, np.int64)).tolist()
    rows_per_batch, T = micro_batch_shape(dataset.lengths, args)
    if args.packing:
        packed = best_fit_decreasing(dataset.lengths[order].tolist(), T)
        rows = [[order[item] for item in packed[index]] for index in rng.permutation(len(packed))]
    else:
        rows = [[sample] for sample in order]
    plan = []
    for step_rows in batched(rows, rows_per_batch * args.accumulation_steps * world_size):
        micro_batches = batched(step_rows, rows_per_batch)
        while len(micro_batches) % world_size:
            micro_batches.append([])
        plan.append(micro_batches[rank::world_size])
    return plan


def micro_batch_shape(lengths, args):
    """Return (rows, maximum tokens per row) of a micro-batch of samples with these lengths."""
    if not args.packing:
        return args.batch_size, args.max_seq_len
    T = row_length(lengths, args.max_seq_len)
    return args.batch_size * (args.max_seq_len // T), T


def flatten(lists):
    """Concatenate lists."""
    return [item for items in lists for item in items]


def token_counts(micro_batches):
    """Return (supervised tokens, tokens without padding) of a step's batches. The first token of a
    row is never predicted, so its label doesn't count.
    """
    supervised = sum(count_supervised(labels) for _, labels, *_ in micro_batches)
    tokens = sum(int((document_ids >= 0).sum()) for *_, document_ids in micro_batches)
    return supervised, tokens


def batched(items, size):
    """Split a list into parts of a size; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


class Rows(Dataset):
    """Rows of a dataset, indexed by lists of samples; a row is a list of (input_ids, labels)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, row):
        return flatten(self.dataset.documents(sample) for sample in row)


def batches(dataset, micro_batches, args, device):
    """Return an iterator over the collated micro-batches; a micro-batch is a list of rows, a row a
    list of sample indices.

    On an NVIDIA GPU, all batches have the same shape, because kernels are compiled per shape: all
    rows of a full micro-batch, padded to the maximum row length. args.num_workers processes prepare
    batches in advance; None: two with such a GPU, except on Windows, where starting them is slow.
    """
    on_gpu = device.type == "cuda"
    workers = args.num_workers
    if workers is None:
        workers = 2 if on_gpu and sys.platform != "win32" else 0
    num_rows, T = micro_batch_shape(dataset.lengths, args)
    if on_gpu and not args.packing:  # the longest sample; FlexAttention computes blocks of 128
        T = min(T, math.ceil(int(dataset.lengths.max(initial=1)) / 128) * 128)
    if on_gpu:
        collate_rows = partial(collate, max_length=T, multiple=T, min_rows=num_rows)
    else:
        multiple = ROW_MULTIPLE if args.packing else 1
        collate_rows = partial(collate, max_length=T, multiple=multiple)
    return iter(
        DataLoader(
            Rows(dataset),
            batch_sampler=micro_batches,
            collate_fn=collate_rows,
            num_workers=workers,
            pin_memory=on_gpu,  # allows copies to the GPU to overlap with compute
            generator=torch.Generator(),  # private, so the global RNG state is untouched
        )
    )


def to_device(batch, device):
    """Move a batch to a device. Labels stay on the CPU: see `model.loss.supervised_positions`."""
    input_ids, labels, position_ids, document_ids = batch
    non_blocking = device.type == "cuda"  # see `model.loss.supervised_positions`
    input_ids, position_ids, document_ids = (
        tensor.to(device, non_blocking=non_blocking)
        for tensor in (input_ids, position_ids, document_ids)
    )
    return input_ids, labels, position_ids, document_ids
