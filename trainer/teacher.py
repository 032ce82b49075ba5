"""Open the teacher of a distillation run, in memory or recorded."""

import torch

from common import UserError
from model.lora import weights_hash
from model.tokenizer import load_tokenizer
from model.weights import build_model, find_weights, load
from trainer.distillation import Distillation, Teacher, add_projections
from trainer.recorded_teacher import OfflineTeacher, read_manifest


def build_distillation(model, tokenizer, args):
    """Return a Distillation of the model from the teacher of --teacher_weight or --offline_dir.

    Raises UserError if their tokenizers differ, or if flags don't match the recording.
    """
    path, device = args.offline_dir, model.lm_head.weight.device
    if path:
        manifest = read_manifest(path)
        require_same_flags(manifest, args)
        teacher_tokenizer = load_tokenizer(path / "tokenizer.json")
        teacher_hash = manifest["teacher"]
        teacher = OfflineTeacher(path, device, with_layers=args.hidden_weight > 0)
    else:
        path = find_weights(args.save_dir, args.teacher_weight or "full_sft")
        teacher_model, teacher_tokenizer = build_model(load(path), path)
        teacher_hash = weights_hash(teacher_model)
        layers = parse_layers(args.aux_layers, teacher_model, path)
        teacher = Teacher(teacher_model.to(device), layers)
    if teacher_tokenizer.to_str() != tokenizer.to_str():
        raise UserError(
            f"the teacher {path} and the student have different tokenizers, so their probabilities "
            "can't be compared; train the student with the teacher's --tokenizer_path"
        )
    if args.hidden_weight:
        if not hasattr(model, "projections"):
            torch.manual_seed(args.seed)
            add_projections(model, teacher.config.hidden_size, 1 + len(teacher.layers))
        # In a resumed run, --freeze_base 1 has frozen them.
        model.projections.requires_grad_(True)
    print(f"distilling from {path} (data loss weight {args.distill_alpha})")
    loss_weights = args.distill_alpha, args.distill_temperature, args.hidden_weight
    return Distillation(model, teacher, *loss_weights, teacher_hash=teacher_hash)


def parse_layers(text, model, path):
    """Parse --aux_layers. Raises UserError if the model has no such layer."""
    depth, words = model.config.num_hidden_layers, text.split(",") if text else []
    if not all(word.isdecimal() and 1 <= int(word) <= depth for word in words):
        raise UserError(f"--aux_layers {text}: {path} has the layers 1 to {depth}; give 1,2")
    return [int(word) for word in words]


def require_same_flags(manifest, args):
    """Raise UserError if flags conflict with a recording."""
    wrong = []
    if args.max_seq_len < manifest["max_seq_len"]:
        wrong.append(f"--max_seq_len {args.max_seq_len} is below its {manifest['max_seq_len']}")
    if args.aux_layers:
        wrong.append(f"--aux_layers: the recording has {manifest['aux_layers']}; omit the flag")
    if wrong:
        raise UserError(
            f"--offline_dir {args.offline_dir}: {'; '.join(wrong)}. Change the flags, or rerecord"
        )
