"""On-disk cache of tokenized files.

    out/cache/{key}/    ids.bin  mask.bin  offsets.npy  supervised.npy  lines.npy  report.json
                        sizes.json

The key is a hash of everything the tokens depend on: the file's content, the tokenizer, the version
of the code, the options. A folder appears under its key once it is complete. It is rebuilt if the
size of a file differs from sizes.json.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import UserError, open_file
from dataset.jsonl import read_records
from model.chat_template import render_batch

VERSION = 3  # increase it when the code changes a file's tokens; a test notices
ARRAYS = ("offsets", "supervised", "lines")
BATCH_CHARACTERS = 1_000_000  # tokenized per batch
MAX_REPORTED_ERRORS = 1000  # bad records stored with a reason; all are counted


@dataclass
class Tokens:
    """The R records of a file as N concatenated tokens.

    ids         (N,) uint16 or uint32
    mask        (N,) uint8, 1 where the token is supervised (2: see `PairDataset`)
    offsets     (R + 1,) int64; record r is ids[offsets[r] : offsets[r + 1]]
    supervised  (R,) int64, number of supervised tokens per record, except its first token, which
                is never predicted
    lines       (R,) int64, line number (or index in a JSON array) of each record
    report      {"format", "records", "bad", "bad_lines": [[line, reason]], "characters", "notes"}
    path        the file
    sha256      of the file
    """

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    supervised: np.ndarray
    lines: np.ndarray
    report: dict
    path: Path
    sha256: str

    def __getstate__(self):
        """Pickle support for DataLoader workers, which reopen the memory maps."""
        state, files = dict(vars(self)), {}
        for name in ("ids", "mask"):
            if isinstance(state[name], np.memmap):
                files[name] = state[name].filename, state.pop(name).dtype
        return state | {"files": files}

    def __setstate__(self, state):
        files = state.pop("files")
        vars(self).update(state | {name: memory_map(*file) for name, file in files.items()})


def tokenize(path, tokenizer, to_pieces, options, strict=False, cache_dir=None):
    """Tokenize a file, or load its tokens from the cache; without a cache_dir, in memory. Returns
    Tokens.

    to_pieces(record, report) returns the record's [(piece, supervised)], or raises ValueError for a
    bad record; options is a list of everything else that its result depends on. Raises UserError
    for a missing file, a full disk, and, with strict, for the first bad record.
    """
    path = Path(path)
    sha256 = content_hash(path)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    write = partial(write_tokens, path, tokenizer, to_pieces, strict, dtype)
    if cache_dir is None:
        ids, mask = io.BytesIO(), io.BytesIO()
        counts = write(ids, mask)
        arrays = np.frombuffer(ids.getbuffer(), dtype), np.frombuffer(mask.getbuffer(), "u1")
        return Tokens(*arrays, *counts, path, sha256)
    folder = Path(cache_dir) / cache_key(sha256, tokenizer, options)
    try:
        if folder.is_dir() and not is_intact(folder):
            print(f"the cache {folder} is damaged: tokenizing {path} again")
            shutil.rmtree(folder)
        if not folder.is_dir():
            build(folder, write)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if strict and report["bad"]:
            raise bad_record(path, *report["bad_lines"][0])
        ids, mask = memory_map(folder / "ids.bin", dtype), memory_map(folder / "mask.bin", "u1")
        arrays = [np.load(folder / f"{name}.npy") for name in ARRAYS]
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be used: {error.strerror or error}. Free some space, or "
            "choose another --save_dir or --cache_dir"
        ) from None
    return Tokens(ids, mask, *arrays, report, path, sha256)


def memory_map(path, dtype):
    """Memory-map a file as an array; an empty file can't be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def content_hash(path):
    """Return the sha256 of a file."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_key(sha256, tokenizer, options):
    """Return the name of a cache folder; it doesn't depend on the file's name."""
    text = json.dumps([VERSION, sha256, tokenizer.to_str(), options])
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def is_intact(folder):
    """Return whether all files of a cache have the sizes in sizes.json."""
    try:
        sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # the last: not a JSON object
        return False


def build(folder, write):
    """Build a cache in a temporary folder and rename it; an interrupted build leaves nothing.
    write(ids_file, mask_file) is `write_tokens` of a file.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name[:8]}.", dir=folder.parent))
    try:
        with (part / "ids.bin").open("wb") as ids, (part / "mask.bin").open("wb") as mask:
            *arrays, report = write(ids, mask)
        for name, array in zip(ARRAYS, arrays, strict=True):
            np.save(part / f"{name}.npy", array)
        (part / "report.json").write_text(json.dumps(report), encoding="utf-8")
        sizes = {file.name: file.stat().st_size for file in part.iterdir()}
        (part / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
        for file in part.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process won the race with identical files
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_tokens(path, tokenizer, to_pieces, strict, dtype, ids_file, mask_file):
    """Tokenize a file, writing ids and mask to open files. Returns (offsets, supervised, lines,
    report).
    """
    report = {"format": None, "records": 0, "bad": 0, "bad_lines": [], "characters": 0}
    report["notes"] = Counter()
    lengths, supervised, lines = [0], [], []
    for batch in good_records(path, to_pieces, strict, report):
        lines += [number for number, _ in batch]
        for ids, mask in render_batch([pieces for _, pieces in batch], tokenizer):
            ids_file.write(np.array(ids, dtype).tobytes())
            mask_file.write(bytes(mask))
            lengths.append(len(ids))
            supervised.append(mask[1:].count(1))
    counts = [np.array(values, np.int64) for values in (lengths, supervised, lines)]
    return np.cumsum(counts[0]), *counts[1:], report


def good_records(path, to_pieces, strict, report):
    """Yield batches [(line, pieces)] of a file's usable records, of about BATCH_CHARACTERS each.
    The report counts usable and bad records.
    """
    records = read_records(path, report["notes"])
    batch, limit = [], BATCH_CHARACTERS
    for number, record in tqdm(records, f"tokenizing {path.name}", leave=False, disable=None):
        try:
            if isinstance(record, ValueError):
                raise record
            pieces = to_pieces(record, report)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if strict:
                raise bad_record(path, number, error) from None
            report["bad"] += 1
            if report["bad"] <= MAX_REPORTED_ERRORS:
                report["bad_lines"].append([number, str(error)])
            continue
        report["records"] += 1
        report["characters"] += sum(len(piece) for piece, _ in pieces if isinstance(piece, str))
        batch.append((number, pieces))
        if report["characters"] > limit:
            yield batch
            batch, limit = [], report["characters"] + BATCH_CHARACTERS
    yield batch


def bad_record(path, number, reason):
    return UserError(f"{path}, line {number}: {reason}")
