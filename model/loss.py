"""The loss of next-token prediction: as it is defined, and the same in chunks, which never hold the
logits of all tokens at once.

Shapes: B batch, T time, D hidden, V vocabulary, N supervised tokens, n those of a chunk.
"""

import torch
import torch.nn.functional as F

from common import IGNORE

CHUNK = 512  # tokens whose logits are held at once


def plain_cross_entropy(x, weight, labels):
    """The sum of -log p(token) over the supervised tokens; arguments as below."""
    logits = (x @ weight.T)[:, :-1]  # (B, T, D) @ (D, V) -> (B, T - 1, V), all but the last
    logits, targets = logits.flatten(0, 1), labels[:, 1:].flatten()  # each predicts the next token
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def summed_cross_entropy(x, weight, labels):
    """`plain_cross_entropy`, without holding all logits: at V = 150,000 they would take more memory
    than the model.

    x (B, T, D), the hidden states; weight (V, D) of the output layer; labels (B, T), -100 = no
    loss. Returns an fp32 scalar, not divided: a step's sum over all micro-batches and processes is
    divided once, by its number of supervised tokens.
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
    """Computes the gradients together with the loss, while a chunk's logits exist: the gradient of
    a logit is its probability, minus 1 for the target. Products are computed in dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, places, targets, dtype, with_gradients):
        total, matrix = torch.zeros((), device=x.device), weight.to(dtype)
        if with_gradients:
            x_grad, weight_grad = torch.zeros_like(x), torch.zeros_like(weight)
        # A CPU keeps compiled code for each size of product that occurs: only a few are used.
        count, padding = len(places), (0, -len(places) % 64)
        places, targets = F.pad(places, padding), F.pad(targets, padding)
        for start in range(0, count, CHUNK):
            chunk, real = places[start : start + CHUNK], min(CHUNK, count - start)
            part, target = (
                x[chunk].to(dtype),
                targets[start : start + CHUNK, None],
            )  # (n, D), (n, 1)
            logits = (part @ matrix.T).float()  # (n, D) @ (D, V) -> (n, V)
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, target))[:real].sum()
            if with_gradients:
                grad = logits.sub_(log_sum).exp_()
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
    """The number of terms in the sum above."""
    return int((labels[:, 1:] != IGNORE).sum())
