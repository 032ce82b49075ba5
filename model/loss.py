"""Next-token cross-entropy: a readable reference implementation, and a memory-efficient one that
tests compare with it.

Shapes: B batch, T time, D hidden, V vocabulary, N supervised tokens, n supervised tokens of a
chunk.
"""

import torch
import torch.nn.functional as F

from common import IGNORE

CHUNK = 512  # supervised tokens per chunk on a CPU


def plain_cross_entropy(hidden, weight, labels):
    """Return the sum of -log p(token) over the supervised tokens, a scalar. Each token is predicted
    from the position before it.

    hidden (B, T, D), the last layer's hidden states; weight (V, D) of the LM head; labels (B, T),
    not shifted, -100 = no loss.
    """
    logits = hidden @ weight.T  # (B, T, D) @ (D, V) -> (B, T, V)
    logits, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # (B * (T - 1), ...)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def summed_cross_entropy(hidden, weight, labels):
    """Compute `plain_cross_entropy` in fp32 with less memory. The sum isn't divided here: a step's
    total over all micro-batches and processes is divided once, by its number of supervised tokens.

    The logits (B, T, V) would be the largest tensor of a training step. Here only the supervised
    tokens' logits are computed, in chunks, and none are saved for the backward pass.
    """
    positions, targets = supervised_positions(labels, hidden.device)  # (N,) each
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        hidden = hidden.flatten(0, 1)  # (B, T, D) -> (B * T, D)
        with_gradients = torch.is_grad_enabled()
        return ChunkedCrossEntropy.apply(hidden, weight, positions, targets, dtype, with_gradients)


def supervised_positions(labels, device):
    """Return (positions, targets) on a device, (N,) each: the indices into B * T from which a
    supervised token is predicted, and these tokens. Keep labels (B, T) on the CPU: finding the
    positions there avoids a GPU sync.
    """
    positions = F.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero()[:, 0]  # (N,)
    targets = labels.flatten()[positions + 1]  # (N,)
    # On MPS, a non-blocking copy may read the memory after it was reused.
    non_blocking = device.type == "cuda"
    return (
        positions.to(device, non_blocking=non_blocking),
        targets.to(device, non_blocking=non_blocking),
    )


def chunk_size(tensor):
    """Return the number of tokens per chunk. Large chunks on a GPU: small matmuls underuse it."""
    return 8 * CHUNK if tensor.is_cuda else CHUNK


class ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, while a chunk's logits are in memory. The
    gradient of a logit is its probability, minus 1 for the target. Matmuls use dtype.
    """

    @staticmethod
    def forward(ctx, hidden, weight, positions, targets, dtype, with_gradients):
        total = torch.zeros((), device=hidden.device)
        matrix = weight.to(dtype)
        hidden_grad = torch.zeros_like(hidden) if with_gradients else None
        weight_grad = None  # stays None for a frozen LM head, e.g. with LoRA
        if with_gradients and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        # oneDNN caches code per matmul size; multiples of 64 keep the number of sizes small. The
        # padding is position 0, whose loss and gradient are left out below.
        num_supervised = len(positions)
        padding = (0, -num_supervised % 64)
        positions, targets = F.pad(positions, padding), F.pad(targets, padding)
        size = chunk_size(hidden)
        for start in range(0, num_supervised, size):
            chunk = positions[start : start + size]
            num_real = min(size, num_supervised - start)  # the others are padding
            target = targets[start : start + size, None]  # (n, 1)
            x = hidden[chunk].to(dtype)  # (B * T, D) -> (n, D)
            logits = (x @ matrix.T).float()  # (n, D) @ (D, V) -> (n, V)
            log_sum = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1)
            total += (log_sum - logits.gather(1, target))[:num_real].sum()
            if with_gradients:
                grad = logits.sub_(log_sum).exp_()  # (n, V), the probabilities
                grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                grad[num_real:] = 0
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


def count_supervised(labels):
    """Count the supervised tokens of labels (B, T). A row's first token is never predicted."""
    return int((labels[:, 1:] != IGNORE).sum())
