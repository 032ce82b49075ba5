"""Offline distillation: a teacher's hidden states for each token of a dataset, on disk. Written by
recipes/export_hidden_states.py; distillation then needs neither the teacher nor the data.

    DIR/manifest.json      teacher, data and flags of the recording
    DIR/tokenizer.json     the tokenizer of the teacher
    DIR/output.pt          its LM head (V, D), which turns hidden states into logits
    DIR/train/00000.pt     shards; the manifest has their number; valid/ likewise

A shard holds the n concatenated tokens of its samples: lengths of the samples, input_ids (n,),
loss_mask (n,), hidden_states (n, D) of the last layer, and aux_hidden_states (n, L, D) of L further
layers, if any. Each .pt file also has `belongs`, a hash of its name, the manifest and the
tokenizer, to detect files of another recording.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import UserError
from dataset.lm_dataset import SFTDataset
from dataset.token_cache import Tokens
from model.weights import load_tensors

HINT = "rerun the command of recipes/export_hidden_states.py that wrote it: it continues"


def read_manifest(folder):
    """Read the manifest of a recording, a dict. Raises UserError if it is missing or damaged."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        for name in ("shards", "config", "aux_layers", "teacher"):
            manifest[name]  # raises KeyError if it is missing
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder} was not written by recipes/export_hidden_states.py: {error!r}; {HINT}"
        ) from None
    return manifest


def fingerprint(path):
    """Return the hash that ties a .pt file to its recording, (32,) uint8."""
    folder = path.parent if path.name == "output.pt" else path.parents[1]
    content = path.relative_to(folder).as_posix().encode()
    for name in ("manifest.json", "tokenizer.json"):
        try:
            content += hashlib.sha256((folder / name).read_bytes()).digest()
        except OSError as error:
            raise UserError(f"{folder / name}: {error.strerror}; {HINT}") from None
    return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)


def read(path, verify=True):
    """Load a .pt file, memory-mapped; verify as in `load_tensors`. Raises UserError if it is
    missing, damaged, or from another recording.
    """
    content = load_tensors(path, HINT, verify, mmap=True)
    stored = content.get("belongs") if isinstance(content, dict) else None
    if stored is None or not torch.equal(stored, fingerprint(path)):
        raise UserError(f"{path} is from another recording than its manifest.json; {HINT}")
    return content


def shards(part, verify=True):
    """Yield the shards of DIR/train or another part, in order. Raises UserError like `read`."""
    for number in range(read_manifest(part.parent)["shards"].get(part.name, 0)):
        yield read(part / f"{number:05d}.pt", verify)


class RecordedDataset(SFTDataset):
    """The samples of DIR/train or another part of a recording."""

    def read(self, path, tokenizer, strict, cache_dir):
        return recorded_tokens(path)


def recorded_tokens(part):
    """Return the Tokens of DIR/train or another part."""
    part = Path(part)
    part_shards = list(shards(part))
    if not part_shards:
        raise UserError(f"{part} has no shard; give a file, or {HINT}")
    ids, mask, lengths = (
        np.concatenate([shard[name].numpy() for shard in part_shards])
        for name in ("input_ids", "loss_mask", "lengths")
    )
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    supervised = [int(mask[start + 1 : end].sum()) for start, end in pairwise(offsets)]
    report = {"format": "offline", "records": len(lengths), "bad": 0, "bad_lines": [], "notes": {}}
    manifest = (part.parent / "manifest.json").read_bytes()
    return Tokens(
        ids,
        mask,
        offsets,
        supervised=np.array(supervised, np.int64),
        lines=np.arange(len(lengths)),
        report=report | {"characters": 0},
        path=part,
        sha256=hashlib.sha256(manifest + part.name.encode()).hexdigest(),
    )


class OfflineTeacher:
    """The recorded states of DIR/train, with the interface of `Teacher`. Samples are looked up by
    their tokens. with_layers: also read the states of further layers.
    """

    def __init__(self, folder, device, with_layers=True):
        manifest = read_manifest(folder)
        self.layers = manifest["aux_layers"] if with_layers else []
        self.config = SimpleNamespace(**manifest["config"])
        self.lm_head_weight = read(folder / "output.pt")["output"].to(device)
        self.samples = {}  # bytes of a sample's ids: (states of its shard, its start in the shard)
        for shard in shards(folder / "train", verify=False):  # already verified as data
            states, start = [shard["hidden_states"]], 0  # (n, D) each
            if self.layers:
                states += shard["aux_hidden_states"].unbind(1)
            ids = shard["input_ids"].numpy()
            for length in shard["lengths"].tolist():
                self.samples[ids[start : start + length].tobytes()] = states, start
                start += length
        self.widths, self.dtype = [part.shape[1] for part in states], states[0].dtype

    def __call__(self, input_ids, position_ids, document_ids):
        """Return [(B, T, D), ...] like `Teacher`; zeros for padding."""
        B, T = input_ids.shape
        ids, documents = input_ids.cpu().numpy().astype(np.int32), document_ids.cpu().numpy()
        outputs = [torch.zeros(B, T, width, dtype=self.dtype) for width in self.widths]
        for row in range(B):
            starts = np.flatnonzero(np.diff(documents[row], prepend=-2))
            for start, end in pairwise([*starts, T]):
                if documents[row, start] < 0:  # padding
                    continue
                recorded, first = self.samples[ids[row, start:end].tobytes()]
                for states, part in zip(outputs, recorded, strict=True):
                    states[row, start:end] = part[first : first + end - start]
        return [states.to(input_ids.device) for states in outputs]
