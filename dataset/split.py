"""The split of a data file into train, valid and test files, with a manifest that says how."""

import argparse
import hashlib
import json
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from common import UserError, replacing
from dataset import formats


def ratios(text):
    """An argparse type: two or three numbers, as 8:1:1."""
    try:
        found = [float(ratio) for ratio in text.split(":")]
    except ValueError:
        found = []
    if len(found) not in (2, 3) or min(found) < 0 or not 0 < sum(found) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give two or three numbers, as 8:1:1")
    return found


def split(args):
    """Writes train, valid and test files and a manifest; returns 0."""
    names = ["train", "valid", "test"] if len(args.ratios) == 3 else ["train", "test"]
    groups = []
    for number, record in formats.read_records(args.file):
        if isinstance(record, ValueError):
            raise UserError(f"{args.file}, line {number}: {record}. Mend it, and split again")
        if args.stratify and args.stratify not in record:
            raise UserError(f"{args.file}, line {number}: there is no {args.stratify!r} in it")
        groups.append(str(record.get(args.stratify)) if args.stratify else "")
    if not groups:
        raise UserError(f"{args.file} is empty; give a JSONL file")
    part_of = shares(groups, args.ratios, args.seed)

    def records(part):
        for index, (_, record) in enumerate(formats.read_records(args.file)):
            if part_of[index] == part:
                yield record

    ratios = ":".join(f"{ratio:g}" for ratio in args.ratios)
    how = {"source": str(args.file), "ratios": ratios, "stratify": args.stratify}
    parts = {f"{name}.jsonl": records(part) for part, name in enumerate(names)}
    write_parts(args.out, parts, how | {"seed": args.seed}, [args.file])
    return 0


def shares(groups, ratios, seed):
    """For each record the number of the part that it is drawn into. Records of the same group are
    spread over the parts as the ratios say.
    """
    members = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    part_of, rng = [0] * len(groups), np.random.default_rng(seed)
    for _, indices in sorted(members.items()):
        ends = np.round(np.cumsum(ratios) / sum(ratios) * len(indices)).astype(int)
        for place, index in enumerate(rng.permutation(indices).tolist()):
            part_of[index] = int(np.searchsorted(ends, place, side="right"))
    return part_of


def write_parts(folder, parts, manifest, sources=(), texts=None):
    """Writes {file name: records} as JSONL, {file name: text} as it is, and manifest.json with the
    counts and hashes of the parts. All appear when all are written.

    Raises UserError if one of them would replace one of the sources, which are read meanwhile.
    """
    for name in [*parts, *(texts or {}), "manifest.json"]:
        target = folder / name
        if target.exists() and any(target.samefile(path) for path in map(Path, sources)):
            raise UserError(f"{folder / name} is read, and would be replaced; give another --out")
    manifest = manifest | {"files": {}}
    with ExitStack() as complete:  # moves the first last, so the manifest tells of what is there
        about = complete.enter_context(replacing(folder / "manifest.json"))
        for name, records in parts.items():
            count, digest = 0, hashlib.sha256()
            file = complete.enter_context(replacing(folder / name))
            for record in records:
                line = json.dumps(record, ensure_ascii=False)
                line = line.encode("utf-8", "backslashreplace") + b"\n"
                file.write(line)
                digest.update(line)
                count += 1
            manifest["files"][name] = {"records": count, "sha256": digest.hexdigest()}
        for name, text in (texts or {}).items():
            complete.enter_context(replacing(folder / name)).write(text.encode("utf-8"))
        about.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8"))
    for name, file in manifest["files"].items():
        print(f"{folder / name}: {file['records']} records")
