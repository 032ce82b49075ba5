"""What a teacher says of each token of the data, written to disk once: students are trained from it
without the teacher in memory, and as often as you like.

    python recipes/export_hidden_states.py --teacher_weight full_sft
    python trainer/train_distillation.py --offline_dir out/offline --student pretrain_small

The data is read as by train_full_sft.py. With the same flags, its rows and their split are the
same. A run that was stopped goes on where it was when the same command is given again.
"""

import argparse
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

from common import IGNORE, ROOT, replacing, save_tensors
from dataset import offline
from dataset.formats import KEYS
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.loader import Source, cut, pad, split_samples
from dataset.tiny_world.generate import PRETRAIN, SFT, write_missing
from model.distillation import Teacher
from model.lora import hash_of
from trainer import checkpoint
from trainer.arguments import Parser, number, one_of, source, stop_at, wrong_values
from trainer.distributed import pick_device, pick_dtype
from trainer.teacher import layers_of


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    path = checkpoint.find(args.save_dir, args.teacher_weight)
    model, tokenizer = checkpoint.build_model(checkpoint.load(path), path)
    layers = layers_of(args.aux_layers, model, path)
    if args.top_k > model.config.vocab_size or args.top_k and layers:
        raise UserError(
            f"--top_k {args.top_k}: up to {model.config.vocab_size}, and without --aux_layers"
        )
    data, parts = read_data(args, tokenizer)
    parts = {part: cut(rows, args.shard_size) for part, rows in parts.items() if rows}

    same = ("max_seq_len", "top_k", "distill_temperature", "dtype", "shard_size", "seed")
    manifest = {name: getattr(args, name) for name in same} | {"aux_layers": layers}
    manifest |= {"teacher": hash_of(model), "config": dataclasses.asdict(model.config)}
    order = b"".join(
        data.samples[row].tobytes() for rows in sum(parts.values(), []) for row in rows
    )
    manifest["data"] = [*data.content, hashlib.sha256(order).hexdigest()]
    manifest["shards"] = {part: len(shards) for part, shards in parts.items()}
    begin(args.offline_dir, manifest, model, tokenizer)

    teacher = Teacher(model.to(device), layers, args.top_k, args.distill_temperature)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    count = sum(len(rows) for shards in parts.values() for rows in shards)
    bar = tqdm(total=count, unit="sample", disable=None)
    for part, shards in parts.items():
        for index, rows in enumerate(shards):
            place = args.offline_dir / part / f"{index:05d}.pt"
            if not is_whole(place):
                shard = record(teacher, data, rows, args.batch_size, device, autocast, dtype)
                save_tensors(place, shard | {"belongs": offline.belongs(place)})
            bar.update(len(rows))
    bar.close()
    size = sum(file.stat().st_size for file in args.offline_dir.rglob("*.pt"))
    print(f"written: {args.offline_dir}, {count} samples, {size / 2**20:.0f} MiB")


def parse(argv):
    parser = Parser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, whole, share = parser.add_argument, number(int, 1), number(float, 0, 0.5)
    add("--teacher_weight", metavar="NAME", default="full_sft", help="a name, or a path")
    add("--offline_dir", type=Path, default=ROOT / "out" / "offline", help="where to write")
    add("--save_dir", type=Path, default=ROOT / "out", help="where the weights are")
    add("--data_path", type=source, nargs="+", metavar="FILE", help="default: Tiny World")
    add("--replay_path", type=Path, metavar="FILE.jsonl", help="pretraining text mixed in")
    add("--replay_share", type=number(float, 0), default=0.8, help="its rows per conversation")
    add("--data_format", type=one_of(*KEYS), help="default: that of a file's first record")
    add("--overlong", type=one_of("truncate", "drop", "split"), default="truncate")
    add("--keep_think", type=one_of("all", "last", "none"), default="all")
    add("--max_seq_len", type=number(int, 2), default=256, help="tokens of a sample at most")
    add("--eval_split", type=share, default=0.01, help="the share of valid/")
    add("--test_split", type=share, default=0.0, help="the share of test/")
    add("--aux_layers", default="", metavar="LAYERS", help="also what these layers give, as 1,2")
    add("--top_k", type=number(int, 0), default=0, help="likeliest tokens, not hidden states")
    add("--distill_temperature", type=number(float, 0.01), default=1.0, help="of --top_k")
    add("--shard_size", type=whole, default=256, help="samples of a file")
    add("--batch_size", type=whole, default=16, help="samples of one forward pass")
    add("--dtype", type=one_of("auto", "fp32", "bf16", "fp16"), default="auto")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=number(int, 0), default=1)
    args = parser.parse_args(argv)
    stop_at(wrong_values(args))
    return args


def read_data(args, tokenizer):
    """(a dataset, {"train": rows, "valid": rows, "test": rows}), as train_full_sft.py reads it."""
    paths = [write_missing(path) for path, *_ in args.data_path or [Source(SFT)]]
    replay_path = args.replay_path or (None if args.data_path else PRETRAIN)
    how = {"max_length": args.max_seq_len, "cache_dir": args.save_dir / "cache"}
    words = {name: getattr(args, name) for name in ("data_format", "overlong", "keep_think")}
    data = SFTDataset(paths, tokenizer, **how, **words)
    train, valid = split_samples(data, args.eval_split, args.seed)
    test = []
    if args.test_split:
        test = sorted(set(split_samples(data, args.test_split, args.seed + 1)[1]) & set(train))
        train = sorted(set(train) - set(test))
    if replay_path and args.replay_share:
        documents = PretrainDataset(write_missing(replay_path), tokenizer, **how)
        train += data.mix_in(documents, args.replay_share, args.seed)
    return data, {"train": train, "valid": valid, "test": test}


def begin(folder, manifest, model, tokenizer):
    """Writes what is not samples; raises UserError if other samples are there."""
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
    if not manifest["top_k"]:
        save_tensors(folder / "output.pt", model.lm_head.weight.detach().clone())
    with replacing(place) as file:
        file.write(text)


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


def record(teacher, data, rows, batch_size, device, autocast, dtype):
    """A shard: these rows of the data, and what the teacher says of each of their tokens."""
    samples = [data[row] for row in rows]
    said = [None] * len(samples)
    order = sorted(range(len(samples)), key=lambda index: len(samples[index][0]))
    for chosen in cut(order, batch_size):  # of similar length: less padding
        ids, _, *where = (part.to(device) for part in pad([samples[index] for index in chosen]))
        with autocast:
            parts = teacher(ids, *where)
        for place, index in enumerate(chosen):
            length = len(samples[index][0])
            said[index] = {name: part[place, :length].cpu() for name, part in parts.items()}
    input_ids, labels = (torch.cat(parts) for parts in zip(*samples, strict=True))
    shard = {
        "lengths": torch.tensor([len(ids) for ids, _ in samples]),
        "input_ids": input_ids.to(torch.int32),
        "loss_mask": (labels != IGNORE).to(torch.uint8),
    }
    for name in said[0]:
        shard[name] = torch.cat([sample[name] for sample in said])
        if "states" in name:  # the output layer reads them in bf16 where the run computes in it
            shard[name] = shard[name].to(dtype)
    return shard


if __name__ == "__main__":
    with report_user_errors():
        main()
