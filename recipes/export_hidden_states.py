"""Record a teacher's hidden states for each token of the data, to train students without the
teacher in memory.

    python recipes/export_hidden_states.py --teacher_weight full_sft
    python trainer/train_distillation.py --offline_dir out/offline --from_weight pretrain_small

The data is read like in train_full_sft.py: the same flags give the same samples and split. Running
the same command again continues an interrupted recording.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, report_user_errors  # first: Ctrl-C while torch loads

# isort: split
import torch
from tqdm import tqdm

from cli import Parser, choose_from, number
from common import IGNORE, ROOT, atomic_write
from dataset.lm_dataset import SFTDataset
from dataset.packing import pad
from dataset.step_plan import batched
from dataset.tiny_world import SFT
from model.device import DTYPES, pick_device, pick_dtype
from model.lora import weights_hash
from model.weights import build_model, find_weights, load, save_tensors
from trainer import recorded_teacher
from trainer.distillation import Teacher
from trainer.flags import conversation_flags, parse_source
from trainer.runtime import autocast_to
from trainer.teacher import parse_layers
from trainer.trainer_utils import conversation_options, open_data, replay


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    # auto may differ on another machine
    args.dtype = next(name for name in DTYPES if DTYPES[name] == dtype)
    path = find_weights(args.save_dir, args.teacher_weight)
    model, tokenizer = build_model(load(path), path)
    layers = parse_layers(args.aux_layers, model, path)
    dataset, parts = read_data(args, tokenizer)

    names = ("max_seq_len", "dtype", "shard_size", "seed")
    manifest = {name: getattr(args, name) for name in names}
    manifest |= {"aux_layers": layers, "teacher": weights_hash(model)}
    manifest["config"] = dataclasses.asdict(model.config)
    order = dataset.samples[sum(parts.values(), [])]
    manifest["data"] = [*dataset.file_hashes, hashlib.sha256(order.tobytes()).hexdigest()]
    shards = {part: batched(samples, args.shard_size) for part, samples in parts.items()}
    manifest["shards"] = {part: len(part_shards) for part, part_shards in shards.items()}
    begin(args.offline_dir, manifest, model, tokenizer)

    teacher = Teacher(model.to(device), layers)
    autocast = autocast_to(dtype, device)
    bar = tqdm(total=len(order), unit="sample", disable=None)
    for part, part_shards in shards.items():
        for index, samples in enumerate(part_shards):
            shard_path = args.offline_dir / part / f"{index:05d}.pt"
            if not is_complete(shard_path):
                shard = record(teacher, dataset, samples, args.batch_size, device, autocast, dtype)
                save(shard_path, shard)
            bar.update(len(samples))
    bar.close()
    print(f"written: {args.offline_dir}, {len(order)} samples")


def parse(argv):
    parser = Parser(__doc__)
    add, count = parser.group("recording"), number(int, 1)
    add("teacher_weight", "full_sft", "a name in --save_dir, or a path", metavar="NAME")
    add("offline_dir", ROOT / "out" / "offline", "folder for the recording", Path, metavar="DIR")
    add("save_dir", ROOT / "out", "folder for weights and cache", Path)
    add("data_path", None, "default: Tiny World", parse_source, nargs="+", metavar="FILE")
    add("max_seq_len", 256, "maximum length of a sample, in tokens", number(int, 2))
    add("val_split", 0.01, "fraction held out as valid/", number(float, 0, 0.5))
    add("aux_layers", "", "also record the output of these layers, e.g. 1,2", metavar="LAYERS")
    add("shard_size", 256, "samples per file", count)
    add("batch_size", 16, "samples per forward pass", count)
    add("dtype", "auto", "auto, fp32, bf16 or fp16", choose_from("auto", "fp32", "bf16", "fp16"))
    add("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("seed", 1, "seed of the split", number(int, 0))
    conversation_flags(parser, training=False)
    parser.set_defaults(val_data_path=None, strict_data=False, cache_dir=None)
    return parser.parse_args(argv)


def read_data(args, tokenizer):
    """Return (dataset, {"train": samples, "valid": samples}), without an empty part."""
    options = conversation_options(args)
    dataset, train, _, valid = open_data(SFTDataset, args, tokenizer, SFT, **options)
    train += replay(dataset, train, args, tokenizer)
    parts = {"train": train, "valid": valid}
    return dataset, {part: samples for part, samples in parts.items() if samples}


def begin(folder, manifest, model, tokenizer):
    """Write manifest, tokenizer and LM head. Raises UserError if another recording is there."""
    path, stored = folder / "manifest.json", None
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            print(f"{path} is damaged: it is written again")
    if stored:
        matches = isinstance(stored, dict) and all(stored.get(n) == manifest[n] for n in manifest)
        if not matches:
            raise UserError(
                f"{folder} was written from other data, flags or weights; give another "
                "--offline_dir, or delete it"
            )
    else:
        with atomic_write(path) as file:
            file.write(json.dumps(manifest, indent=1).encode("utf-8"))
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode("utf-8"))
    save(folder / "output.pt", {"output": model.lm_head.weight.detach().clone()})


def save(path, content):
    """Write a .pt file with its fingerprint."""
    save_tensors(path, content | {"belongs": recorded_teacher.fingerprint(path)})


def is_complete(path):
    """Return whether a shard exists and is from this recording; print a line if it is damaged."""
    if not path.exists():
        return False
    try:
        recorded_teacher.read(path)
    except UserError:
        tqdm.write(f"{path} is damaged, or from another recording: it is written again")
        return False
    return True


def record(teacher, dataset, samples, batch_size, device, autocast, dtype):
    """Return a shard: the samples, and the teacher's states for each of their tokens."""
    tokens = [dataset[sample] for sample in samples]
    lengths = [len(input_ids) for input_ids, _ in tokens]
    states = [None] * len(samples)
    by_length = sorted(range(len(samples)), key=lengths.__getitem__)  # less padding
    for batch in batched(by_length, batch_size):
        input_ids = pad([tokens[i] for i in batch])[0].to(device)  # padding comes last
        with autocast:
            batch_states = torch.stack(teacher(input_ids), dim=2)  # (B, T, 1 + L, D)
        batch_states = batch_states.to("cpu", dtype)
        for row, i in enumerate(batch):
            states[i] = batch_states[row, : lengths[i]]
    states = torch.cat(states)  # (n, 1 + L, D)
    input_ids, labels = (torch.cat(parts) for parts in zip(*tokens, strict=True))
    shard = {
        "lengths": torch.tensor(lengths),
        "input_ids": input_ids.to(torch.int32),
        "loss_mask": (labels != IGNORE).to(torch.uint8),
        "hidden_states": states[:, 0].contiguous(),
    }
    if teacher.layers:
        shard["aux_hidden_states"] = states[:, 1:].contiguous()
    return shard


if __name__ == "__main__":
    with report_user_errors():
        main()
