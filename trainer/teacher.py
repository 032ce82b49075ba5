"""A teacher beside the model that learns, see model/distillation.py."""

from dataset.errors import UserError
from model.distillation import Distillation
from trainer import checkpoint


def with_teacher(model, tokenizer, args):
    """The model, or what gives its loss where --teacher_weight names a teacher.

    Raises UserError if the two do not share a tokenizer.
    """
    if not args.teacher_weight:
        return model
    if args.parallel == "fsdp":
        raise UserError("--teacher_weight needs whole models; use --parallel ddp")
    path = checkpoint.find(args.save_dir, args.teacher_weight)
    teacher, its_tokenizer = checkpoint.build(checkpoint.load(path), path)
    if its_tokenizer.to_str() != tokenizer.to_str():
        raise UserError(
            f"--teacher_weight {args.teacher_weight} has another tokenizer than the student, so "
            "their probabilities cannot be compared; start the student with its --tokenizer_path"
        )
    print(f"taught by {path}: {args.distill_alpha} of the loss is that of the data")
    teacher.to(model.lm_head.weight.device)
    return Distillation(model, teacher, args.distill_alpha, args.distill_temperature)
