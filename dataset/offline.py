"""What a teacher says of each token, on disk. recipes/export_hidden_states.py writes it, and
distillation reads it in the teacher's place.

    DIR/manifest.json      how it was made
    DIR/tokenizer.json     the teacher's
    DIR/output.pt          the teacher's output layer, (V, D), which makes scores of hidden states
    DIR/train/00000.pt     shards, and as many as it takes; valid/ and test/ likewise

A shard holds the n tokens of its samples, one sample after the other: input_ids (n,), loss_mask
(n,), lengths of the samples, and of each token what `model.distillation.Teacher` gives of it;
belongs, a hash that ties it to its place, the manifest and the tokenizer.
"""

import hashlib
import json
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import UserError

ANEW = "give the command of recipes/export_hidden_states.py that wrote it again: it goes on"


def read_manifest(folder):
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["shards"], manifest["config"], manifest["top_k"], manifest["aux_layers"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder} is no folder of recipes/export_hidden_states.py: {error!r}; {ANEW}"
        ) from None
    return manifest


def read_tensors(path, verify=True):
    """What a .pt file holds, in memory only where it is read. Raises UserError if it is damaged;
    without verify, its checksums are not compared, which reads all of it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = verify and file.testzip()
        if damaged:
            raise ValueError(f"{damaged} in it is not as it was written")
        return torch.load(path, mmap=True, weights_only=True)
    except Exception as error:  # the readers of zip and pickle raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); {ANEW}") from None


def belongs(path):
    """The hash of a shard's place and of what its folder says of all shards, (32,)."""
    folder = path.parents[1]
    content = path.relative_to(folder).as_posix().encode()
    for name in ("manifest.json", "tokenizer.json"):
        try:
            content += hashlib.sha256((folder / name).read_bytes()).digest()
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}; {ANEW}") from None
    return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)


def read_shard(path, verify=True):
    """A shard. Raises UserError if it is not there yet, damaged, or of another recording."""
    shard = read_tensors(path, verify)
    expected = belongs(path)
    if not torch.equal(shard.get("belongs", expected), expected):  # earlier versions wrote none
        raise UserError(
            f"{path} does not belong to the manifest.json and tokenizer.json of its folder; {ANEW}"
        )
    return shard


def shards(part, verify=True):
    """The shards of DIR/train or another part. Raises UserError as `read_shard` does."""
    for number in range(read_manifest(part.parent)["shards"].get(part.name, 0)):
        yield read_shard(part / f"{number:05d}.pt", verify)


def tokens_of(part):
    """What `cache.tokenised` gives of a file, as a dict: DIR/train as data to learn from."""
    part = Path(part)
    found = list(shards(part))
    if not found:
        raise UserError(f"{part} holds no shard; give a file, or {ANEW}")
    ids, mask, lengths = (
        np.concatenate([shard[name].numpy() for shard in found])
        for name in ("input_ids", "loss_mask", "lengths")
    )
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    supervised = [int(mask[start + 1 : end].sum()) for start, end in pairwise(offsets)]
    report = {"format": "offline", "records": len(lengths), "bad": 0, "bad_lines": [], "notes": {}}
    manifest = (part.parent / "manifest.json").read_bytes()
    return {
        "ids": ids,
        "mask": mask,
        "offsets": offsets,
        "supervised": np.array(supervised, np.int64),
        "lines": np.arange(len(lengths)),
        "report": report | {"characters": 0},
        "path": part,
        "content": hashlib.sha256(manifest + part.name.encode()).hexdigest(),
    }


class OfflineTeacher:
    """Gives of DIR/train what the teacher gave, that of its chosen layers with_layers; a sample is
    found by its tokens.
    """

    def __init__(self, folder, device, with_layers=True):
        manifest = read_manifest(folder)
        self.layers = manifest["aux_layers"] if with_layers else []
        self.config = SimpleNamespace(**manifest["config"])
        self.output, self.samples = None, {}
        if not manifest["top_k"]:
            self.output = read_tensors(folder / "output.pt").to(device)
        wanted = ["hidden_states", "top_ids", "top_log_p", *["aux_hidden_states"] * with_layers]
        for shard in shards(folder / "train", verify=False):  # done when they were read as data
            said = {name: part for name, part in shard.items() if name in wanted}
            ids, start = shard["input_ids"].numpy(), 0
            for length in shard["lengths"].tolist():
                end = start + length
                self.samples[ids[start:end].tobytes()] = said, start
                start = end
        self.said = said

    def __call__(self, input_ids, position_ids, document_ids):
        B, T = input_ids.shape
        rows, numbers = input_ids.cpu().numpy().astype(np.int32), document_ids.cpu().numpy()
        found = {
            name: torch.zeros(B, T, *part.shape[1:], dtype=part.dtype)
            for name, part in self.said.items()
        }
        for row in range(B):
            begins = np.flatnonzero(np.diff(numbers[row], prepend=-2))
            for start, end in pairwise([*begins, T]):
                if numbers[row, start] < 0:  # padding
                    continue
                said, at = self.samples[rows[row, start:end].tobytes()]
                for name, part in said.items():
                    found[name][row, start:end] = part[at : at + end - start]
        return {name: part.to(input_ids.device) for name, part in found.items()}
