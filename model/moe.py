"""Mixture of experts: a router sends each token through a few of many small MLPs.

The layout, and so the `state_dict()` keys, is that of published Qwen3-MoE checkpoints:
`mlp.gate.weight`, `mlp.experts.0.gate_proj.weight` ...
Shapes: B batch, T time, N = B * T tokens, D hidden, E experts, k experts per token.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class MoE(nn.Module):
    """The output of a token is the weighted sum of the outputs of its k most probable experts.

    `load_balance_loss` is E * sum over e of (share of the tokens sent to e * mean probability of e)
    of the last training forward, as in the Switch Transformer (arXiv:2101.03961, eq. 4), summed
    over the k choices as in Qwen3-MoE: k when the load is even, up to E when one expert gets every
    token. It is a mean over the tokens of one micro-batch, padding included, so it is the one part
    of a step's loss that depends a little on how the step is divided into micro-batches.
    """

    def __init__(self, config, experts):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(experts)
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.load_balance_loss = None

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (N, D)
        probability = F.softmax(self.gate(tokens).float(), dim=-1)  # (N, E)
        weight, experts = probability.topk(self.top_k, dim=-1)  # (N, E) -> (N, k) each
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        # Choice c of token t is number t * k + c. Sorted by expert, those of each lie together.
        order = experts.flatten().argsort(stable=True)  # (N * k,)
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros_like(tokens)
        for expert, choices in zip(self.experts, order.split(counts), strict=True):
            # An expert without tokens runs on zero rows: its gradient is then zero instead of
            # missing, and DistributedDataParallel does not wait for it forever.
            token = choices // self.top_k  # (n,)
            result = expert(tokens[token]) * weight.flatten()[choices, None]  # (n, D)
            out = out.index_add(0, token, result.type_as(out))  # (N, D)
        if self.training:
            share = F.one_hot(experts, len(self.experts)).float().mean(dim=0)  # (k, E)
            self.load_balance_loss = len(self.experts) * (share * probability.mean(dim=0)).sum()
        return out.view(x.shape)  # (N, D) -> (B, T, D)


def router_loss(model, num_micro_batches):
    """Return the share of one of a step's micro-batches in the loss of its routers: the mean of the
    MoE layers' losses in the last training forward, times config.router_aux_loss_coef. It is 0.0
    for a dense model.
    """
    losses = [layer.load_balance_loss for layer in model.modules() if isinstance(layer, MoE)]
    mean = torch.stack(losses).mean() if losses else 0.0
    return model.config.router_aux_loss_coef * (mean / num_micro_batches)
