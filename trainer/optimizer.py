"""From gradients to steps: the optimizer, its learning rate, and torch.compile."""

import math

import torch

from model.device import require_compiler


def make_optimizer(model, args):
    """Muon for the matrices of the layers, AdamW (arXiv:1711.05101) for all other weights and for
    adapters; with args.optimizer "adamw", AdamW for everything. Scales of norms do not decay.
    """
    matrices, scales, muon = [], [], []
    of_layers = {id(weight) for weight in model.model.layers.parameters()}
    use_muon = args.optimizer == "muon" and not getattr(model, "lora", None)
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        # Rows that must stay as they are must not decay either: see model/extend_vocab.py.
        if weight.dim() < 2 or hasattr(weight, "first_row"):
            scales.append(weight)
        elif use_muon and id(weight) in of_layers:
            muon.append(weight)
        else:
            matrices.append(weight)
    groups = [{"params": matrices, "weight_decay": args.weight_decay}]
    groups += [{"params": scales, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.95), fused=True)
    if not muon:
        return adamw
    return Optimizers(Muon(muon, args.learning_rate, args.weight_decay), adamw)


class Muon(torch.optim.Optimizer):
    """Steps that are orthogonal matrices (Keller Jordan, 2024), with the weight decay of AdamW.

    The gradient of a matrix is dominated by few directions. An orthogonal step is equally large in
    all of them, so what is rarely needed is learned as fast as what is needed all the time. Steps
    are scaled to the size of AdamW's (arXiv:2502.16982), so one learning rate fits both.
    """

    def __init__(self, weights, lr, weight_decay, momentum=0.95):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):  # torch passes one when it loads a state
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                step = weight.grad.lerp(average, momentum)  # Nesterov's momentum
                if hasattr(step, "full_tensor"):  # a slice of fsdp's: the whole matrix is needed
                    from torch.distributed.tensor import distribute_tensor

                    whole = orthogonal(step.full_tensor())
                    step = distribute_tensor(whole, step.device_mesh, step.placements)
                else:
                    step = orthogonal(step)
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(step, alpha=-lr * 0.2 * max(weight.shape) ** 0.5)


def orthogonal(matrix, iterations=3):
    """Roughly the orthogonal matrix U V^T of a matrix U S V^T: its singular values are brought near
    1, those below a fiftieth of their norm not all the way.

    Each iteration replaces every singular value s by a s + b s^3 + c s^5. The three numbers raise
    small values fast; they are those of Muon's author, who takes five iterations. Three take less
    time and train as well: see docs/18_what_was_tried.md.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T  # the products below have the size of the smaller side
    x = x / (x.norm() + 1e-7)  # no singular value is above 1
    for _ in range(iterations):
        square = x @ x.T
        square = 2.0315 * square @ square - 4.7750 * square
        x = 3.4445 * x + square @ x
    return (x if wide else x.T).to(matrix.dtype)


class Optimizers:
    """Several optimizers, each with weights of its own, used as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def learning_rate(step, total_steps, args):
    """The learning rate of a step, counted from 0: a linear rise to --learning_rate over
    --warmup_steps, then half a cosine down to --min_lr_ratio of it at the last step.
    """
    highest, warmup_steps = args.learning_rate, min(args.warmup_steps, total_steps - 1)
    if step < warmup_steps:
        return highest * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    floor = highest * args.min_lr_ratio
    return floor + (highest - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer, step, total_steps, args):
    """The learning rate of a step, which the optimizer now has."""
    lr = learning_rate(step, total_steps, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def clip_and_step(model, optimizer, scaler, grad_clip):
    """Scales the gradient to a norm of at most grad_clip (0: any), and updates the weights unless
    it is not finite; returns its norm before. The gradient is cleared afterwards.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # fsdp shards it
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def full_state(model, optimizer=None):
    """The model's state dict with whole tensors on the CPU; with an optimizer, both state dicts.
    They are empty but on the first process. Every process must call this.
    """
    # Here: it takes a second to load, and a chat needs none of it.
    from torch.distributed.checkpoint import state_dict

    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = state_dict.get_model_state_dict(model, options=options)
    if optimizer is None:
        return weights
    parts = getattr(optimizer, "parts", optimizer)
    return weights, state_dict.get_optimizer_state_dict(model, parts, options=options)


def load_full_state(model, optimizer, state):
    """Loads an optimizer's state of `full_state`, of which each process takes what it shards.

    Raises ValueError if it is the state of other weights or of another kind of optimizer.
    """
    from torch.distributed.checkpoint import state_dict

    parts = getattr(optimizer, "parts", (optimizer,))
    name_of = {weight: name for name, weight in model.named_parameters()}
    names = [name_of[p] for group in optimizer.param_groups for p in group["params"]]
    if set(state.get("state", ())) != set(names):
        raise ValueError("it is that of other weights")
    state["param_groups"] = [group for group in state["param_groups"] if group["params"]]
    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_optimizer_state_dict(model, parts, state, options=options)


def compile_layers(model):
    """Compiles each layer: torch fuses its small operations. The layers are alike, so the code of
    the first one serves all, and the first step waits for one compilation only.
    """
    require_compiler(model.lm_head.weight.device)
    print("compiling: the first step takes up to a minute")
    torch._dynamo.config.optimize_ddp = False  # else it cuts each layer in pieces
    for layer in model.model.layers:
        layer.compile()
