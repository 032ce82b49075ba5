"""The recorded hidden states of a teacher. recipes/export_hidden_states.py writes them, and
distillation reads them instead of running the teacher.

    DIR/manifest.json      how it was made
    DIR/tokenizer.json     the teacher's
    DIR/output.pt          the teacher's output layer, (V, D), which makes logits of hidden states
    DIR/train/00000.pt     shards, and as many as it takes; valid/ and test/ likewise

A shard holds the n tokens of its samples, one sample after the other: input_ids (n,), loss_mask
(n,), lengths of the samples, and the hidden states of each token as `model.distillation.Teacher`
gives them; belongs, a hash that ties it to its place, the manifest and the tokenizer.
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
        manifest["shards"], manifest["config"], manifest["aux_layers"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder} is no folder of recipes/export_hidden_states.py: {error!r}; {ANEW}"
        ) from None
    if manifest.get("top_k"):
        raise UserError(
            f"{folder} holds top-k probabilities of an earlier version instead of hidden states; "
            "export anew, into another folder"
        )
    return manifest


def read_tensors(path, verify=True):
    """The content of a .pt file, memory-mapped. Raises UserError if it is damaged; without verify,
    its checksums are not compared, which takes reading all of it.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = verify and file.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, mmap=True, weights_only=True)
    except Exception as error:  # the readers of zip and pickle raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); {ANEW}") from None


def belongs(folder, path):
    """The hash that ties a file to its place in a recording and to its manifest, (32,)."""
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
    expected = belongs(path.parents[1], path)
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
    """DIR/train or another part as `cache.tokenised` returns a file, as a dict."""
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


def read_output(folder):
    """The teacher's output layer, (V, D). Raises UserError if it is that of another recording."""
    path = folder / "output.pt"
    content = read_tensors(path)
    if not isinstance(content, dict):  # earlier versions wrote the matrix alone
        return content
    if not torch.equal(content["belongs"], belongs(folder, path)):
        raise UserError(f"{path} does not belong to the manifest.json of its folder; {ANEW}")
    return content["output"]


class OfflineTeacher:
    """A recorded Teacher: returns the states of DIR/train, those of the chosen layers only
    with_layers. A sample is found by its tokens.
    """

    def __init__(self, folder, device, with_layers=True):
        manifest = read_manifest(folder)
        self.layers = manifest["aux_layers"] if with_layers else []
        self.config = SimpleNamespace(**manifest["config"])
        self.output, self.samples = read_output(folder).to(device), {}
        names = ["hidden_states", *["aux_hidden_states"] * bool(self.layers)]
        for shard in shards(folder / "train", verify=False):  # verified when they were read as data
            states = {name: shard[name] for name in names}
            ids, start = shard["input_ids"].numpy(), 0
            for length in shard["lengths"].tolist():
                end = start + length
                self.samples[ids[start:end].tobytes()] = states, start
                start = end
        self.like = states

    def __call__(self, input_ids, position_ids, document_ids):
        B, T = input_ids.shape
        rows, numbers = input_ids.cpu().numpy().astype(np.int32), document_ids.cpu().numpy()
        found = {
            name: torch.zeros(B, T, *part.shape[1:], dtype=part.dtype)
            for name, part in self.like.items()
        }
        for row in range(B):
            begins = np.flatnonzero(np.diff(numbers[row], prepend=-2))
            for start, end in pairwise([*begins, T]):
                if numbers[row, start] < 0:  # padding
                    continue
                states, at = self.samples[rows[row, start:end].tobytes()]
                for name, part in states.items():
                    found[name][row, start:end] = part[at : at + end - start]
        return {name: part.to(input_ids.device) for name, part in found.items()}
