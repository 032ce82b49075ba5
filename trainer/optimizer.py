"""What turns gradients into steps."""

import os
import shutil

import torch

from common import UserError


def make_optimizer(model, args):
    """AdamW (arXiv:1711.05101); the decay pulls on matrices only, not on the scales of norms.

    With args.optimizer "muon", the matrices of the layers get Muon (arXiv:2502.16982), which makes
    all directions of a step equally long. Its steps are scaled to the size of AdamW's, so that one
    learning rate serves both.
    """
    inside = {id(weight) for weight in model.model.layers.parameters() if weight.dim() > 1}
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    # Rows that must stay as they are must not decay either: see model/extend_vocab.py.
    decays = [weight.dim() > 1 and not hasattr(weight, "first_row") for weight in learning]
    matrices = [weight for weight, decay in zip(learning, decays, strict=True) if decay]
    scales = [weight for weight, decay in zip(learning, decays, strict=True) if not decay]
    muon = []
    if args.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"--optimizer muon needs torch 2.9 or newer; this is {torch.__version__}"
            )
        if args.parallel == "fsdp":
            raise UserError("--optimizer muon needs whole matrices; use --parallel ddp")
        muon = [weight for weight in matrices if id(weight) in inside]
        matrices = [weight for weight in matrices if id(weight) not in inside]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}]
    groups += [{"params": scales, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    if not muon:
        return adamw
    how = {"weight_decay": args.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return Together(muon=torch.optim.Muon(muon, lr=args.learning_rate, **how), adamw=adamw)


class Together:
    """Several optimizers, each with weights of its own, used as one."""

    def __init__(self, **parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self):
        for part in self.parts.values():
            part.step()

    def zero_grad(self):
        for part in self.parts.values():
            part.zero_grad()

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}


def require_compiler(device):
    """Raises UserError where torch.compile has nothing to compile with."""
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            "--use_compile 1 needs a C++ compiler, and none is on the PATH: install g++ (Linux), "
            "the command line tools (macOS) or Visual Studio's (Windows), or leave the flag out"
        )


def compile_layers(model):
    """Has torch fuse each layer's small operations. The layers are alike, so the first one's code
    serves all: the wait at the first step is that of one layer.
    """
    require_compiler(model.lm_head.weight.device)
    for layer in model.model.layers:
        layer.compile()
