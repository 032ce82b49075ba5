"""Tokenised files: each is tokenised once, in batches, and then read where it lies on disk.

    out/cache/{key}/    ids.bin  mask.bin  offsets.npy  supervised.npy  lines.npy  report.json

The key is a hash of all that decides the tokens: the file's content, the tokenizer, the code
between them, the options. A folder appears under its key when it is complete, and is made anew
when the hash of one of its files is another than report.json says.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import UserError
from dataset import formats, offline
from dataset.chat_template import render_batch

# A change of these makes it anew.
CODE = ("tokenizer", "formats", "chat_template", "lm_dataset", "cache")
ARRAYS = ("offsets", "supervised", "lines")
CHARACTERS = 1_000_000  # are tokenised at once
REASONS = 1000  # bad records that are kept with their reason; all are counted


@dataclass
class Tokens:
    """A file's R records as N tokens, one record after the other.

    ids         (N,) uint16 or uint32
    mask        (N,) uint8, 1 where the token is to be learned
    offsets     (R + 1,) int64; record r is ids[offsets[r] : offsets[r + 1]]
    supervised  (R,) int64, how many of a record's tokens are learned; its first never is
    lines       (R,) int64, the line of the file (or its place in a JSON array) of each record
    report      {"format", "records", "bad", "bad_lines": [[line, reason]], "characters", "notes"}
    content     the hash of the file
    """

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    supervised: np.ndarray
    lines: np.ndarray
    report: dict
    path: Path
    content: str


def tokenised(path, tokenizer, to_pieces, options, strict=False, cache_dir=None, rebuild=False):
    """The Tokens of a file, from the cache if it is there; without a cache_dir, in memory.

    to_pieces(record, report) gives the record's [(piece, learn)], or raises ValueError if it is a
    bad one. options is a list of whatever else decides what to_pieces gives.
    Raises UserError for a missing file, a full disk, and with strict at the first bad record.
    """
    if formats.is_folder(path):  # tokens already, with what a teacher says of them
        return Tokens(**offline.tokens_of(path))
    path, content = Path(path), content_hash(path)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    if cache_dir is None:
        ids, mask = io.BytesIO(), io.BytesIO()
        rest = write_tokens(path, tokenizer, to_pieces, strict, dtype, ids, mask)
        arrays = np.frombuffer(ids.getbuffer(), dtype), np.frombuffer(mask.getbuffer(), "u1")
        return Tokens(*arrays, *rest, path, content)
    folder = Path(cache_dir) / cache_key(content, tokenizer, options)
    try:
        if rebuild:
            shutil.rmtree(folder, ignore_errors=True)
        if folder.is_dir() and not is_whole(folder):
            print(f"the cache {folder} is damaged: tokenising {path} anew")
            shutil.rmtree(folder)
        if not folder.is_dir():
            build(folder, path, tokenizer, to_pieces, strict, dtype)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))[1]["report"]
        if strict and report["bad"]:
            raise bad_record(path, *report["bad_lines"][0])
        offsets, *more = (np.load(folder / f"{name}.npy") for name in ARRAYS)
        ids, mask = (
            np.memmap(folder / name, kind, "r") if offsets[-1] else np.empty(0, kind)
            for name, kind in (("ids.bin", dtype), ("mask.bin", "u1"))
        )
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be used: {error.strerror or error}. Make room, or choose "
            "another --cache_dir"
        ) from None
    return Tokens(ids, mask, offsets, *more, report, path, content)


def content_hash(path):
    with formats.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_key(content, tokenizer, options):
    """A name for what comes out: the same for the same input, whatever the file is called."""
    modules = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    code = [module.read_text(encoding="utf-8") for module in modules]
    return hash_of_values([content, tokenizer.to_str(), code, options])[:32]


def hash_of_values(values):
    return hashlib.sha256(json.dumps(values).encode("utf-8")).hexdigest()


def is_whole(folder):
    """Whether each file of a cache is as `build` wrote it."""
    try:
        digest, said = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return (
            digest == hash_of_values(said)
            and said["key"] == folder.name
            and all(content_hash(folder / name) == was for name, was in said["sha256"].items())
        )
    except (OSError, ValueError, TypeError):
        return False


def build(folder, path, tokenizer, to_pieces, strict, dtype):
    """Writes the folder beside its place and moves it there; an interrupted build leaves none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name[:8]}.", dir=folder.parent))
    try:
        with (part / "ids.bin").open("wb") as ids, (part / "mask.bin").open("wb") as mask:
            *arrays, report = write_tokens(path, tokenizer, to_pieces, strict, dtype, ids, mask)
        for name, array in zip(ARRAYS, arrays, strict=True):
            np.save(part / f"{name}.npy", array)
        hashes = {file.name: hash_on_disk(file) for file in part.iterdir()}
        said = {"key": folder.name, "sha256": hashes, "report": report}
        text = json.dumps([hash_of_values(said), said])
        (part / "report.json").write_text(text, encoding="utf-8")
        hash_on_disk(part / "report.json")
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, and wrote the same
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def hash_on_disk(path):
    """The hash of a file whose content has reached the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tokens(path, tokenizer, to_pieces, strict, dtype, ids_file, mask_file):
    """Tokenises a file into two open ones; returns the rest of its Tokens."""
    lengths, supervised, lines, waiting, size = [], [], [], [], 0
    report = {"format": None, "records": 0, "bad": 0, "bad_lines": [], "characters": 0}
    report["notes"] = Counter()

    def write_waiting():
        for ids, mask in render_batch(waiting, tokenizer):
            ids_file.write(np.array(ids, dtype).tobytes())
            mask_file.write(bytes(mask))
            lengths.append(len(ids))
            supervised.append(sum(mask[1:]))
        waiting.clear()

    records = formats.read_records(path)
    for number, record in tqdm(records, f"tokenising {path.name}", leave=False, disable=None):
        try:
            if isinstance(record, ValueError):
                raise record
            pieces = to_pieces(record, report)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if strict:
                raise bad_record(path, number, error) from None
            report["bad"] += 1
            if report["bad"] <= REASONS:
                report["bad_lines"].append([number, str(error)])
            continue
        report["records"] += 1
        lines.append(number)
        waiting.append(pieces)
        characters = sum(len(piece) for piece, _ in pieces if isinstance(piece, str))
        report["characters"] += characters
        size += characters
        if size > CHARACTERS:
            write_waiting()
            size = 0
    write_waiting()
    counts = (np.array(numbers, np.int64) for numbers in (supervised, lines))
    return np.cumsum([0, *lengths], dtype=np.int64), *counts, report


def bad_record(path, number, reason):
    return UserError(f"{path}, line {number}: {reason}")
