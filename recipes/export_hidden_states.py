"""Records the hidden states of a teacher for each token of the data. Students are trained from the
recording without the teacher in memory, any number of times.

    python recipes/export_hidden_states.py --teacher_weight full_sft
    python trainer/train_distillation.py --offline_dir out/offline --from_weight pretrain_small

The data is read as by train_full_sft.py: with the same flags, its samples and their split are the
same. A run that was stopped goes on where it was when the same command is given again.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import IGNORE, ROOT, UserError, replacing, report_user_errors, save_tensors

# isort: split
import torch
from tqdm import tqdm

from dataset import offline
from dataset.lm_dataset import SFTDataset
from dataset.loader import cut, pad, split_samples
from dataset.tiny_world.generate import SFT
from model.distillation import Teacher
from model.lora import hash_of
from trainer import checkpoint
from trainer.arguments import (
    Parser,
    conversation_flags,
    number,
    one_of,
    source,
    stop_at,
    wrong_values,
)
from trainer.distributed import DTYPES, pick_device, pick_dtype
from trainer.teacher import layers_of
from trainer.trainer_utils import conversation_options, open_data, replay


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.dtype = next(name for name, kind in DTYPES.items() if kind == dtype)  # not auto
    path = checkpoint.find(args.save_dir, args.teacher_weight)
    model, tokenizer = checkpoint.build_model(checkpoint.load(path), path)
    layers = layers_of(args.aux_layers, model, path)
    data, parts = read_data(args, tokenizer)
    parts = {part: cut(samples, args.shard_size) for part, samples in parts.items() if samples}

    manifest = {
        name: getattr(args, name) for name in ("max_seq_len", "dtype", "shard_size", "seed")
    }
    manifest |= {"aux_layers": layers, "teacher": hash_of(model)}
    manifest["config"] = dataclasses.asdict(model.config)
    order = b"".join(data.samples[shard].tobytes() for part in parts.values() for shard in part)
    manifest["data"] = [*data.content, hashlib.sha256(order).hexdigest()]
    manifest["shards"] = {part: len(shards) for part, shards in parts.items()}
    begin(args.offline_dir, manifest, model, tokenizer)

    teacher = Teacher(model.to(device), layers)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    count = sum(len(samples) for shards in parts.values() for samples in shards)
    bar = tqdm(total=count, unit="sample", disable=None)
    for part, shards in parts.items():
        for index, samples in enumerate(shards):
            place = args.offline_dir / part / f"{index:05d}.pt"
            if not is_whole(place):
                shard = record(teacher, data, samples, args.batch_size, device, autocast, dtype)
                shard["belongs"] = offline.belongs(args.offline_dir, place)
                save_tensors(place, shard)
            bar.update(len(samples))
    bar.close()
    size = sum(file.stat().st_size for file in args.offline_dir.rglob("*.pt"))
    print(f"written: {args.offline_dir}, {count} samples, {size / 2**20:.0f} MiB")


def parse(argv):
    parser = Parser(__doc__)
    add, share = parser.group("the recording"), number(float, 0, 0.5)
    add("teacher_weight", "full_sft", "a name in --save_dir, or a path")
    add("offline_dir", ROOT / "out" / "offline", "folder to write", Path)
    add("save_dir", ROOT / "out", "folder of weights and cache", Path)
    add("data_path", None, "default: Tiny World's conversations", source, nargs="+")
    add("max_seq_len", 256, "maximum length of a sample, in tokens", number(int, 2))
    add("val_split", 0.01, "share of the data in valid/", share)
    add("test_split", 0.0, "share of the data in test/", share)
    add("aux_layers", "", "also the hidden states of these layers, as 1,2")
    add("shard_size", 256, "samples of a file", number(int, 1))
    add("batch_size", 16, "samples of one forward pass", number(int, 1))
    add("dtype", "auto", "auto, fp32, bf16 or fp16", one_of("auto", "fp32", "bf16", "fp16"))
    add("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("seed", 1, "of the split and the replayed text", number(int, 0))
    conversation_flags(parser)
    parser.set_defaults(val_data_path=None, strict_data=False, cache_dir=None, rebuild_cache=False)
    args = parser.parse_args(argv)
    stop_at(wrong_values(args))
    return args


def read_data(args, tokenizer):
    """(a dataset, {"train": samples, "valid": samples, "test": samples}), as train_full_sft.py."""
    options = conversation_options(args)
    data, train, _, valid = open_data(SFTDataset, args, tokenizer, SFT, **options)
    train, test = list(train), []
    if args.test_split:
        drawn = set(split_samples(data, args.test_split, args.seed + 1)[1])
        test = sorted(drawn & set(train))
        train = sorted(set(train) - drawn)
    train += replay(data, train, args, tokenizer)
    return data, {"train": train, "valid": list(valid), "test": test}


def begin(folder, manifest, model, tokenizer):
    """Writes manifest, tokenizer and output layer; raises UserError over another recording."""
    place = folder / "manifest.json"
    text = json.dumps(manifest, indent=1).encode("utf-8")
    if place.exists() and place.read_bytes() != text:
        try:
            offline.read_manifest(folder)
        except UserError:
            print(f"{place} is damaged: it is written anew")
        else:
            raise UserError(
                f"{folder} was written from other data, flags or weights; give another "
                "--offline_dir, or delete it"
            )
    with replacing(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode("utf-8"))
    with replacing(place) as file:
        file.write(text)
    output = {"output": model.lm_head.weight.detach().clone()}
    output["belongs"] = offline.belongs(folder, folder / "output.pt")
    save_tensors(folder / "output.pt", output)


def is_whole(place):
    """Whether a shard is there as this run would write it; says so if it is damaged."""
    if not place.exists():
        return False
    try:
        offline.read_shard(place)
    except UserError:
        tqdm.write(f"{place} is damaged, or of another recording: it is written anew")
        return False
    return True


def record(teacher, data, samples, batch_size, device, autocast, dtype):
    """A shard: samples of the data, and the teacher's hidden states of each of their tokens."""
    samples = [data[sample] for sample in samples]
    states = [None] * len(samples)
    order = sorted(range(len(samples)), key=lambda index: len(samples[index][0]))
    for chosen in cut(order, batch_size):  # of similar length: less padding
        batch = pad([samples[index] for index in chosen])
        input_ids, _, position_ids, document_ids = (part.to(device) for part in batch)
        with autocast:
            parts = teacher(input_ids, position_ids, document_ids)
        for place, index in enumerate(chosen):
            length = len(samples[index][0])
            states[index] = {name: part[place, :length].cpu() for name, part in parts.items()}
    input_ids, labels = (torch.cat(parts) for parts in zip(*samples, strict=True))
    shard = {
        "lengths": torch.tensor([len(ids) for ids, _ in samples]),
        "input_ids": input_ids.to(torch.int32),
        "loss_mask": (labels != IGNORE).to(torch.uint8),
    }
    for name in states[0]:  # in dtype: the output layer reads them in it
        shard[name] = torch.cat([of_sample[name] for of_sample in states]).to(dtype)
    return shard


if __name__ == "__main__":
    with report_user_errors():
        main()
