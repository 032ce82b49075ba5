"""Optimizers, learning rate schedule, and torch.compile."""

import math

import torch

from model.device import require_compiler


def make_optimizer(model, args):
    """Return the optimizer: Muon for the layers' matrices and AdamW (arXiv:1711.05101) for all
    other weights and for adapters; with args.optimizer "adamw", AdamW for everything. Vectors have
    no weight decay.
    """
    decayed, not_decayed, muon = [], [], []
    layer_weights = {id(weight) for weight in model.model.layers.parameters()}
    use_muon = args.optimizer == "muon" and not getattr(model, "lora", None)
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        # Frozen rows must not decay either: see model/extend_vocab.py.
        if weight.dim() < 2 or hasattr(weight, "first_row"):
            not_decayed.append(weight)
        elif use_muon and id(weight) in layer_weights:
            muon.append(weight)
        else:
            decayed.append(weight)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}]
    groups += [{"params": not_decayed, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.95), fused=True)
    if not muon:
        return adamw
    return Optimizers(Muon(muon, args.learning_rate, args.weight_decay), adamw)


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024): orthogonalized momentum updates, with decoupled weight decay.

    A matrix's gradient is dominated by few directions. An orthogonal update has the same size in
    all directions, so rare directions are learned as fast as frequent ones. Updates are scaled to
    the size of AdamW's (arXiv:2502.16982), so both use the same learning rate.
    """

    def __init__(self, weights, lr, weight_decay, momentum=0.95):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):  # torch passes a closure when it loads a state
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(average, momentum)  # Nesterov's momentum
                if hasattr(update, "full_tensor"):  # sharded by FSDP: gather the full matrix
                    from torch.distributed.tensor import distribute_tensor

                    full = orthogonalize(update.full_tensor())
                    update = distribute_tensor(full, update.device_mesh, update.placements)
                else:
                    update = orthogonalize(update)
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-lr * 0.2 * max(weight.shape) ** 0.5)


def orthogonalize(matrix, iterations=3):
    """Approximate U V^T for a matrix U S V^T with a Newton-Schulz iteration: singular values move
    close to 1, except those below 1/50 of their norm.

    Each iteration maps every singular value s to a s + b s^3 + c s^5. The coefficients, from Muon's
    author, raise small values fast. He uses five iterations; three are faster and train as well:
    see docs/18_what_was_tried.md.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    is_wide = x.shape[0] <= x.shape[1]
    x = x if is_wide else x.T  # so that the matmuls below have the smaller size
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm() + 1e-7)  # all singular values are at most 1
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + (c * gram) @ gram) @ x
    return (x if is_wide else x.T).to(matrix.dtype)


class Optimizers:
    """Several optimizers for different weights, with the interface of one."""

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
    """Return the learning rate of a step, counted from 0: linear warm-up to --learning_rate over
    --warmup_steps, then cosine decay to --min_lr_ratio of it at the last step.
    """
    max_lr = args.learning_rate
    warmup_steps = min(args.warmup_steps, total_steps - 1)
    if step < warmup_steps:
        return max_lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    min_lr = max_lr * args.min_lr_ratio
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer, step, total_steps, args):
    """Set the optimizer's learning rate for a step. Returns it."""
    lr = learning_rate(step, total_steps, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def clip_and_step(model, optimizer, scaler, grad_clip):
    """Clip the gradient to norm grad_clip (0: no limit) and update the weights, unless the norm
    isn't finite. Clears the gradient. Returns the norm before clipping.
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
    """Return the model's state dict with full tensors on the CPU; with an optimizer, both state
    dicts. They are empty except on rank 0. Must be called on all ranks.
    """
    # Imported late: it takes a second, and a chat doesn't need it.
    from torch.distributed.checkpoint import state_dict

    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = state_dict.get_model_state_dict(model, options=options)
    if optimizer is None:
        return weights
    parts = getattr(optimizer, "parts", optimizer)
    return weights, state_dict.get_optimizer_state_dict(model, parts, options=options)


def load_full_state(model, optimizer, state):
    """Load an optimizer state from `full_state`; each process takes its shard.

    Raises ValueError if it is the state for other weights or another optimizer.
    """
    from torch.distributed.checkpoint import state_dict

    parts = getattr(optimizer, "parts", (optimizer,))
    name_by_weight = {weight: name for name, weight in model.named_parameters()}
    names = [name_by_weight[p] for group in optimizer.param_groups for p in group["params"]]
    if set(state.get("state", ())) != set(names):
        raise ValueError("it is the state for other weights")
    state["param_groups"] = [group for group in state["param_groups"] if group["params"]]
    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_optimizer_state_dict(model, parts, state, options=options)


def compile_layers(model):
    """Compile each layer with torch.compile. All layers share the code of the first one, so the
    first step waits for a single compilation.
    """
    require_compiler(model.lm_head.weight.device)
    print("compiling: the first step takes up to a minute")
    torch._dynamo.config.optimize_ddp = False  # otherwise DDP splits each layer's graph
    for layer in model.model.layers:
        layer.compile()
