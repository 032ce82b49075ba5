"""The teacher of a distillation run, in memory or recorded."""

import torch

from common import UserError
from model.lora import weights_hash
from model.tokenizer import load_tokenizer
from model.weights import build_model, find_weights, load
from trainer.distillation import Distillation, Teacher, add_projections
from trainer.recorded_teacher import OfflineTeacher, read_manifest


def with_teacher(model, tokenizer, args):
    """Return the Distillation of a model by the teacher of --teacher_weight or --offline_dir.

    Raises UserError if the two have different tokenizers, or if flags do not fit the recording.
    """
    path, device = args.offline_dir, model.lm_head.weight.device
    if path:
        manifest = read_manifest(path)
        require_fitting(manifest, args)
        teacher_tokenizer = load_tokenizer(path / "tokenizer.json")
        teacher_hash = manifest["teacher"]
        teacher = OfflineTeacher(path, device, with_layers=args.hidden_weight > 0)
    else:
        path = find_weights(args.save_dir, args.teacher_weight)
        weights, teacher_tokenizer = build_model(load(path), path)
        teacher_hash = weights_hash(weights)
        teacher = Teacher(weights.to(device), parse_layers(args.aux_layers, weights, path))
    if teacher_tokenizer.to_str() != tokenizer.to_str():
        raise UserError(
            f"the teacher {path} has another tokenizer than the student, so their probabilities "
            "cannot be compared; start the student with its --tokenizer_path"
        )
    if args.hidden_weight:
        if not hasattr(model, "projections"):
            torch.manual_seed(args.seed)
            add_projections(model, teacher.config.hidden_size, 1 + len(teacher.layers))
        # --freeze_base 1 froze those of a resumed run with all other weights.
        model.projections.requires_grad_(True)
    print(f"distilling from {path} (weight of the data's own loss: {args.distill_alpha})")
    loss_weights = args.distill_alpha, args.distill_temperature, args.hidden_weight
    distillation = Distillation(model, teacher, *loss_weights)
    distillation.teacher_hash = teacher_hash
    return distillation


def parse_layers(text, model, path):
    """The numbers in --aux_layers. Raises UserError if the model has no such layers."""
    depth, words = model.config.num_hidden_layers, text.split(",") if text else []
    if not all(word.isdecimal() and 1 <= int(word) <= depth for word in words):
        raise UserError(f"--aux_layers {text}: {path} has the layers 1 to {depth}; give 1,2")
    return [int(word) for word in words]


def require_fitting(manifest, args):
    """Raises UserError where flags differ from those of a recording."""
    wrong = []
    if args.max_seq_len < manifest["max_seq_len"]:
        wrong.append(f"--max_seq_len {args.max_seq_len} is below its {manifest['max_seq_len']}")
    if args.aux_layers:
        wrong.append(f"--aux_layers is that of the recording, {manifest['aux_layers']}")
    if wrong:
        raise UserError(
            f"--offline_dir {args.offline_dir}: {'; '.join(wrong)}. Give what fits, or record anew"
        )
