"""Mixture of experts: a router sends each token to a few of many small MLPs.

The `state_dict()` keys match published Qwen3-MoE checkpoints:
`mlp.gate.weight`, `mlp.experts.0.gate_proj.weight` ...
Shapes: B batch, T time, N = B * T tokens, D hidden, E experts, k experts per token.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class MoE(nn.Module):
    """A token's output is the weighted sum of its k most probable experts' outputs.

    `load_balance_loss`, set by each training forward, is E * sum over experts e of (fraction of
    tokens routed to e * mean probability of e), as in the Switch Transformer (arXiv:2101.03961, eq.
    4), summed over the k choices as in Qwen3-MoE: k for a balanced load, up to E when one expert
    gets every token. It is a mean over a micro-batch, padding included, so it is the only part of a
    step's loss that depends on how the step is split into micro-batches.
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
        probs = F.softmax(self.gate(tokens).float(), dim=-1)  # (N, E)
        weights, expert_ids = probs.topk(self.top_k, dim=-1)  # (N, E) -> (N, k) each
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        # Choice c of token t has index t * k + c. Sort so that each expert's are contiguous.
        order = expert_ids.flatten().argsort(stable=True)  # (N * k,)
        counts = expert_ids.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros_like(tokens)
        for expert, choices in zip(self.experts, order.split(counts), strict=True):
            # An expert without tokens still runs, on zero rows: its gradient is zero instead of
            # missing, for which DistributedDataParallel would wait forever.
            token_ids = choices // self.top_k  # (n,)
            result = expert(tokens[token_ids]) * weights.flatten()[choices, None]  # (n, D)
            out = out.index_add(0, token_ids, result.type_as(out))  # (N, D)
        if self.training:
            share = F.one_hot(expert_ids, len(self.experts)).float().mean(dim=0)  # (k, E)
            self.load_balance_loss = len(self.experts) * (share * probs.mean(dim=0)).sum()
        return out.view(x.shape)  # (N, D) -> (B, T, D)


def router_loss(model, num_micro_batches):
    """Return the load-balancing loss of the last training forward: the mean over MoE layers, times
    config.router_aux_loss_coef, divided by the step's micro-batches. 0.0 for a dense model.
    """
    losses = [layer.load_balance_loss for layer in model.modules() if isinstance(layer, MoE)]
    mean = torch.stack(losses).mean() if losses else 0.0
    return model.config.router_aux_loss_coef * (mean / num_micro_batches)
