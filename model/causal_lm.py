"""A decoder-only transformer, written out in full: RMSNorm, rotary positions, grouped-query
attention, SwiGLU. With the same weights it computes what transformers' `Qwen3ForCausalLM`
(`qk_norm=True`), `LlamaForCausalLM` (`qk_norm=False`), `Qwen2ForCausalLM` (and `qkv_bias=True`) and
`Qwen3MoeForCausalLM` (`use_moe=True`) compute, and its `state_dict()` keys match their published
checkpoints.

Shapes: B batch, T time (tokens of this call), S cached tokens + T, D hidden, H heads, K key/value
heads, d head size, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import attention
from model.loss import summed_cross_entropy
from model.moe import MoE


@dataclass
class ModelConfig:
    """Model configuration, with Qwen3's names. Fields that are None are derived from other fields
    (see the comments). Raises ValueError for contradictory values.
    """

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int | None = None  # hidden_size / 64
    num_key_value_heads: int | None = None  # num_attention_heads / 2
    head_dim: int | None = None  # hidden_size / num_attention_heads
    intermediate_size: int | None = None  # 3 * hidden_size, the ratio of Qwen3-0.6B
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # Llama 3's RoPE scaling, `scale_rope_frequencies`; 1: off
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    dropout: float = 0.0
    use_moe: bool = False
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None  # intermediate_size / num_experts_per_tok
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01

    def __post_init__(self):
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 64)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = max(1, self.num_attention_heads // 2)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 3 * self.hidden_size
        if self.moe_intermediate_size is None:
            share = self.intermediate_size // self.num_experts_per_tok
            self.moe_intermediate_size = max(1, share)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        if self.use_moe and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed "
                f"num_experts ({self.num_experts})"
            )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        weight = self.weight.float()  # bf16 if the model was cast for generation
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)


def rotary_table(position_ids, config):
    """Return (cos, sin) of the rotation angles, (B, T) -> (B, T, 1, d) each, in fp32.

    RoPE (arXiv:2104.09864) rotates pair i of a head's dimensions by position * theta^(-2i/d), so
    the product of a query and a key depends only on their content and their distance.
    """
    d = config.head_dim
    exponent = torch.arange(0, d, 2, device=position_ids.device).float() / d  # (d/2,)
    inv_freq = config.rope_theta**-exponent  # (d/2,), radians per position
    if config.rope_factor != 1:
        inv_freq = scale_rope_frequencies(inv_freq, config)
    angle = position_ids[:, :, None, None].float() * inv_freq  # (B, T, 1, d/2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, T, 1, d)
    return angle.cos(), angle.sin()


def scale_rope_frequencies(inv_freq, config):
    """Apply Llama 3's RoPE scaling (arXiv:2407.21783), (d/2,) -> (d/2,). Pairs with fewer than
    low_freq_factor rotations within the original length rotate rope_factor times more slowly, pairs
    with more than high_freq_factor are unchanged, and the pairs between are interpolated.
    """
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    rotations = config.rope_original_length * inv_freq / (2 * torch.pi)
    unscaled = ((rotations - low) / (high - low)).clamp(0, 1)
    return inv_freq * (unscaled + (1 - unscaled) / config.rope_factor)


def rotate(x, cos, sin):
    """Rotate x (B, T, H, d); a pair is (i, i + d/2), as in Llama's and Qwen's checkpoints."""
    left, right = x.chunk(2, dim=-1)  # (B, T, H, d/2) each
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    """Causal self-attention; H / K query heads share one key/value head (grouped-query)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # in the KV cache
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, H * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, K * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, K * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * d, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(d, config.rms_norm_eps)
            self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, x, rotary, mask, kv_cache):
        B, T, _ = x.shape
        d = self.config.head_dim
        q = self.q_proj(x).view(B, T, -1, d)  # (B, T, D) -> (B, T, H * d) -> (B, T, H, d)
        k = self.k_proj(x).view(B, T, -1, d)  # (B, T, D) -> (B, T, K * d) -> (B, T, K, d)
        v = self.v_proj(x).view(B, T, -1, d)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        # (B, T, H, d) -> (B, H, T, d), and (B, T, K, d) -> (B, K, T, d) twice
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer_idx, k, v)  # (B, K, T, d) -> (B, K, S, d)
        x = attention.attend(q, k, v, mask)  # (B, H, T, d), see attention.plain_attention
        x = x.transpose(1, 2).reshape(B, T, -1)  # (B, H, T, d) -> (B, T, H, d) -> (B, T, H * d)
        return self.o_proj(x)  # (B, T, H * d) -> (B, T, D)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)), (B, T, D) -> (B, T, D)."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm transformer block: attention, then an MLP, each added to the residual stream x
    (B, T, D).
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        D = config.hidden_size
        self.self_attn = Attention(config, layer_idx)
        if config.use_moe:
            experts = range(config.num_experts)
            self.mlp = MoE(config, [MLP(D, config.moe_intermediate_size) for _ in experts])
        else:
            self.mlp = MLP(D, config.intermediate_size)
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, mask, kv_cache):
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, kv_cache)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """The transformer without the LM head. A separate module, so that parameter names match
    published checkpoints ("model.").
    """

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.grad_checkpoint = False

    def forward(self, input_ids, rotary, mask, kv_cache):
        x = self.dropout(self.embed_tokens(input_ids))  # (B, T) -> (B, T, D)
        for layer in self.layers:
            if self.grad_checkpoint and self.training:  # saves only x for the backward pass
                x = checkpoint(layer, x, rotary, mask, kv_cache, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, kv_cache)
        return self.norm(x)


class CausalLM(nn.Module):
    """The transformer with its LM head: returns next-token logits, or the loss."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self):
        """Draw the matrices from normal distributions; norms stay 1 and biases as in nn.Linear."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            if name.endswith("down_proj.weight"):
                # As in GPT-2 (section 2.3), scaled down because each layer adds to the residual
                # stream; here only in the MLPs: o_proj isn't scaled.
                std = 0.02 / (2 * self.config.num_hidden_layers) ** 0.5
            elif "mlp" in name:
                std = 0.02
            else:
                # Outputs of a projection then have about the variance of its input, and embeddings
                # a norm of 1. With GPT-2's 0.02, a narrow model learns to copy from its context
                # late or never: see docs/17_symptoms.md.
                std = weight.shape[1] ** -0.5
            nn.init.normal_(weight, std=std)

    def forward(
        self,
        input_ids,
        position_ids=None,
        document_ids=None,
        kv_cache=None,
        labels=None,
        logit_positions=None,
    ):
        """Return next-token logits (B, T, V) in the dtype of the weights or of autocast; with
        labels, the summed cross-entropy of `loss.py`, a scalar; with logit_positions, only the
        logits at these positions, (N, V).

        input_ids     (B, T) int64
        position_ids  (B, T) int64, the position of each token in its document; default: 0, 1, 2 ...
                      from the length of the cache on
        document_ids  (B, T) int64; a token attends only to earlier tokens with the same id. For
                      packed rows and left padding. Default: one document.
        kv_cache      a KVCache, to which this call's keys and values are added
        labels        (B, T) int64, not shifted, -100 = no loss
        logit_positions  (N,) int64, indices into the flattened B * T positions
        """
        x = self.hidden_states(input_ids, position_ids, document_ids, kv_cache)  # (B, T, D)
        if labels is not None:
            return summed_cross_entropy(x, self.lm_head.weight, labels)
        if logit_positions is not None:
            x = x.flatten(0, 1)[logit_positions]  # (B, T, D) -> (B * T, D) -> (N, D)
        return self.lm_head(x)  # (B, T, D) -> (B, T, V), or (N, D) -> (N, V)

    def hidden_states(self, input_ids, position_ids=None, document_ids=None, kv_cache=None):
        """Return the last layer's hidden states, (B, T, D). Arguments as in `forward`."""
        T, device = input_ids.shape[1], input_ids.device
        past = kv_cache.length if kv_cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=device)[None]  # (1, T)
        rotary = rotary_table(position_ids, self.config)
        if kv_cache is None:
            mask = attention.document_mask(document_ids, self.config.head_dim)
        else:
            document_ids = kv_cache.advance(T, document_ids)  # (B, T) -> (B, S)
            mask = attention.cached_mask(past, T, document_ids, device)
        return self.model(input_ids, rotary, mask, kv_cache)
