"""Model internals for the page of `eval_llm.py --serve`: the attention weights of every head, and
the token that each layer would predict.

Attention is computed as in `plain_attention`, because the optimized versions don't materialize its
weights.

Shapes: T tokens, n last tokens that are returned, L layers, H heads, K key/value heads, d head
size, D hidden, V vocabulary.
"""

from dataclasses import dataclass

import torch

from model.attention import causal_mask
from model.causal_lm import rotary_table, rotate

GUESSES = 5  # most probable tokens per layer


@dataclass
class Trace:
    """The result of `trace`, on the CPU, in fp32."""

    logits: torch.Tensor  # (n, V), next-token logits
    attention: torch.Tensor  # (L, H, n, n), attention weight of query i on key j
    guesses: torch.Tensor  # (L + 1, n, 5) ids, after the embedding and after each layer
    probabilities: torch.Tensor  # (L + 1, n, 5), of the guesses


@torch.inference_mode()
def trace(model, ids, last=256, document_ids=None):
    """Run the model on T ids, a list. Returns a Trace of the last n = min(T, last) tokens.

    document_ids, T integers, splits the ids into samples that don't attend to each other; as in a
    packed row, positions start at 0 in each.
    """
    decoder, device, T = model.model, model.lm_head.weight.device, len(ids)
    documents = torch.tensor([document_ids or [0] * T], device=device)  # (1, T)
    mask = causal_mask(0, T, documents, device)  # (1, 1, T, T)
    positions = mask.sum(dim=-1)[0] - 1  # (1, T): earlier tokens in the document
    rotary = rotary_table(positions, model.config)
    x = decoder.embed_tokens(torch.tensor([ids], device=device))  # (1, T, D)
    attention, guesses = [], [most_probable(model, x[:, -last:])]
    for layer in decoder.layers:
        attended, weights = attend(layer.self_attn, layer.input_layernorm(x), rotary, mask)
        x = x + attended
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        attention.append(weights[:, -last:, -last:].cpu().clone())  # (H, T, T) -> (H, n, n)
        guesses.append(most_probable(model, x[:, -last:]))
    logits = model.lm_head(decoder.norm(x[:, -last:]))[0].float().cpu()
    probabilities, tokens = zip(*guesses, strict=True)
    return Trace(logits, torch.stack(attention), torch.stack(tokens), torch.stack(probabilities))


def attend(attention, x, rotary, mask):
    """Return an attention layer's output (1, T, D) and weights (H, T, T) for x (1, T, D)."""
    B, T, d = *x.shape[:2], attention.config.head_dim
    q, k, v = (
        project(x).view(B, T, -1, d)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (1, T, D) -> (1, T, H, d), and (1, T, K, d) twice
    if attention.config.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = rotate(q, *rotary), rotate(k, *rotary)
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))  # (1, T, H, d) -> (1, H, T, d)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))  # (1, H, T, d)
    scores = q @ k.transpose(-2, -1) / d**0.5  # (1, H, T, d) @ (1, H, d, T) -> (1, H, T, T)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    output = weights @ v  # (1, H, T, T) @ (1, H, T, d) -> (1, H, T, d)
    output = output.transpose(1, 2).reshape(B, T, -1).type_as(x)  # -> (1, T, H * d)
    return attention.o_proj(output), weights[0]


def most_probable(model, x):
    """Return (probabilities, ids), (n, 5) each, of the most probable next tokens if x (1, n, D)
    were the last layer's output (the "logit lens", nostalgebraist, 2020).
    """
    logits = model.lm_head(model.model.norm(x))[0].float()  # (n, V)
    return [t.cpu() for t in logits.softmax(dim=-1).topk(min(GUESSES, logits.shape[-1]))]
