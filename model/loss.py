"""The loss of next-token prediction: the formula in three lines, then a version of it that needs
less memory. Tests compare the second with the first.

Shapes: B batch, T time, D hidden, V vocabulary, N supervised tokens, n those of a chunk.
"""

import torch
import torch.nn.functional as F

from common import IGNORE

CHUNK = 512  # supervised tokens of a chunk on a CPU


def plain_cross_entropy(hidden, weight, labels):
    """The sum of -log p(token) over the supervised tokens, each predicted by the position before.

    hidden (B, T, D), the hidden states of the last layer; weight (V, D) of the output layer; labels
    (B, T), not shifted, -100 = no loss. Returns a scalar.
    """
    logits = hidden @ weight.T  # (B, T, D) @ (D, V) -> (B, T, V)
    logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # (B * (T - 1), ...)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def summed_cross_entropy(hidden, weight, labels):
    """What `plain_cross_entropy` returns, in fp32. It is not divided: a step's sum over all
    micro-batches and processes is divided once, by its number of supervised tokens.

    At (B, T, V) the logits are the largest tensor of a training step. Here only those of supervised
    tokens are computed, in chunks, and none is kept for the backward pass.
    """
    positions, targets = supervised_positions(labels, hidden.device)  # (N,) each
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        hidden, gradients = hidden.flatten(0, 1), torch.is_grad_enabled()  # -> (B * T, D)
        return ChunkedCrossEntropy.apply(hidden, weight, positions, targets, dtype, gradients)


def supervised_positions(labels, device):
    """(the places in B * T from which a supervised token is predicted, these tokens), (N,) each, on
    a device. Labels (B, T) may be on the CPU: looking for them there waits for no GPU.
    """
    positions = F.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero()[:, 0]  # (N,)
    targets = labels.flatten()[positions + 1]  # (N,)
    # Apple's GPUs read the memory later, when it may hold something else.
    at_once = device.type == "cuda"
    return tuple(t.to(device, non_blocking=at_once) for t in (positions, targets))


def chunk_size(tensor):
    """Tokens whose logits are in memory at once. A GPU is fast at large products alone."""
    return 8 * CHUNK if tensor.is_cuda else CHUNK


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, while the logits of a chunk are in memory: the
    gradient of a logit is its probability, minus 1 for the target. Products are computed in dtype.
    """

    @staticmethod
    def forward(ctx, hidden, weight, positions, targets, dtype, with_gradients):
        total, matrix = torch.zeros((), device=hidden.device), weight.to(dtype)
        hidden_grad = torch.zeros_like(hidden) if with_gradients else None
        weight_grad = None  # a frozen output layer, as under LoRA, needs none
        if with_gradients and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        # oneDNN caches code for each size of product; with multiples of 64 there are few sizes.
        count, padding = len(positions), (0, -len(positions) % 64)
        positions, targets = F.pad(positions, padding), F.pad(targets, padding)
        size = chunk_size(hidden)
        for start in range(0, count, size):
            chunk, real = positions[start : start + size], min(size, count - start)
            target = targets[start : start + size, None]  # (n, 1)
            x = hidden[chunk].to(dtype)  # (B * T, D) -> (n, D)
            logits = (x @ matrix.T).float()  # (n, D) @ (D, V) -> (n, V)
            log_sum = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1)
            total += (log_sum - logits.gather(1, target))[:real].sum()
            if with_gradients:
                grad = logits.sub_(log_sum).exp_()  # (n, V), the probabilities
                grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                grad[real:] = 0
                grad = grad.to(dtype)
                x_grad = (grad @ matrix).type_as(hidden)  # (n, V) @ (V, D) -> (n, D)
                hidden_grad.index_add_(0, chunk, x_grad)
                if weight_grad is not None:
                    weight_grad += grad.T @ x  # (V, n) @ (n, D) -> (V, D)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        hidden_grad, weight_grad = ctx.saved_tensors
        if weight_grad is not None:
            weight_grad = weight_grad * grad_output
        return hidden_grad * grad_output, weight_grad, None, None, None, None


def supervised_tokens(labels):
    """The number of terms in the sum: labels (B, T) that are not -100, except each row's first."""
    return int((labels[:, 1:] != IGNORE).sum())
