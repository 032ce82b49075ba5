"""The loss of next-token prediction, without ever holding a score for every token and every entry
of the vocabulary at once.

Shapes: B batch, T time, D hidden, V vocabulary, N labelled tokens, n those of a chunk.
"""

import torch
import torch.nn.functional as F

from common import IGNORE

CHUNK = 512  # tokens whose scores are held at once


def summed_cross_entropy(x, weight, labels):
    """The sum of -log p(token) over the labelled tokens, each predicted by the position before it.

    x (B, T, D), what the decoder says of each position; weight (V, D) of the output layer; labels
    (B, T), -100 = no loss. Returns an fp32 scalar, not divided: a step's sum over all micro-batches
    and processes is divided once, by its number of labelled tokens.
    """
    places = F.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero()[:, 0]  # (N,)
    targets = labels.flatten()[places + 1]
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        x, gradients = x.flatten(0, 1), torch.is_grad_enabled()  # (B, T, D) -> (B * T, D)
        return ChunkedCrossEntropy.apply(x, weight, places, targets, dtype, gradients)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made together with the loss, while a chunk's scores are at hand: that of a
    score is its probability, less 1 for the token that came. Products are made in dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, places, targets, dtype, with_gradients):
        total, matrix = torch.zeros((), device=x.device), weight.to(dtype)
        if with_gradients:
            x_grad, weight_grad = torch.zeros_like(x), torch.zeros_like(weight)
        # A CPU keeps compiled code for each size of product that it meets: only a few are used.
        count, padding = len(places), (0, -len(places) % 64)
        places, targets = F.pad(places, padding), F.pad(targets, padding)
        for start in range(0, count, CHUNK):
            chunk, real = places[start : start + CHUNK], min(CHUNK, count - start)
            part, target = (
                x[chunk].to(dtype),
                targets[start : start + CHUNK, None],
            )  # (n, D), (n, 1)
            scores = (part @ matrix.T).float()  # (n, D) @ (D, V) -> (n, V)
            log_sum = scores.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - scores.gather(1, target))[:real].sum()
            if with_gradients:
                grad = scores.sub_(log_sum).exp_()
                grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                grad[real:] = 0
                grad = grad.to(dtype)
                x_grad.index_add_(0, chunk, (grad @ matrix).type_as(x))  # (n, V) @ (V, D) -> (n, D)
                weight_grad += grad.T @ part  # (V, n) @ (n, D) -> (V, D)
        ctx.save_for_backward(*((x_grad, weight_grad) if with_gradients else ()))
        return total

    @staticmethod
    def backward(ctx, grad_output):
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * grad_output, weight_grad * grad_output, None, None, None, None


def supervised_tokens(labels):
    """How many terms the sum above has."""
    return int((labels[:, 1:] != IGNORE).sum())
