"""A decoder-only transformer, written out in full: RMSNorm, rotary positions, grouped-query
attention, SwiGLU. With the same weights it computes what transformers' `Qwen3ForCausalLM`
(`qk_norm=True`), `LlamaForCausalLM` (`qk_norm=False`), `Qwen2ForCausalLM` (and `qkv_bias=True`) and
`Qwen3MoeForCausalLM` (`use_moe=True`) compute, and its `state_dict()` keys are those of their
published checkpoints.

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
    """The shape of a model, with Qwen3's names. None: derived from other fields, as each comment
    says. Raises ValueError for values that contradict each other.
    """

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int | None = None  # hidden_size / 64
    num_key_value_heads: int | None = None  # half the heads share one key and value each
    head_dim: int | None = None  # hidden_size / num_attention_heads
    intermediate_size: int | None = None  # 3 * hidden_size, the ratio of Qwen3-0.6B
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # Llama 3's scaling of RoPE to longer texts, see `stretch`; 1: none
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
        self.num_attention_heads = self.num_attention_heads or max(1, self.hidden_size // 64)
        self.num_key_value_heads = self.num_key_value_heads or max(1, self.num_attention_heads // 2)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 3 * self.hidden_size
        if self.moe_intermediate_size is None:
            share = self.intermediate_size // self.num_experts_per_tok
            self.moe_intermediate_size = max(1, share)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs of values")
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
        weight = self.weight.float()  # not fp32 where the model was cast to bf16 for generation
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)


def rotary_table(position_ids, config):
    """cos and sin of the angles of each position, (B, T) -> two of (B, T, 1, d), in fp32.

    RoPE (arXiv:2104.09864) rotates pair i of a head's values by position * theta^(-2i/d), so that
    the product of a query and a key depends on their content and on their distance alone.
    """
    d = config.head_dim
    exponent = torch.arange(0, d, 2, device=position_ids.device).float() / d  # (d/2,)
    turn = config.rope_theta**-exponent  # (d/2,), radians per position
    if config.rope_factor != 1:
        turn = stretch(turn, config)
    angle = position_ids[:, :, None, None].float() * turn  # (B, T, 1, d/2)
    angle = torch.cat([angle, angle], dim=-1)  # (B, T, 1, d)
    return angle.cos(), angle.sin()


def stretch(turn, config):
    """Llama 3's scaling of RoPE (arXiv:2407.21783): pairs that turn less than low_freq_factor times
    within the original length turn rope_factor times more slowly, those that turn more than
    high_freq_factor times as before, and those between change gradually. (d/2,) -> (d/2,)
    """
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_length * turn / (2 * torch.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return turn * (kept + (1 - kept) / config.rope_factor)


def rotate(x, cos, sin):
    """x (B, T, H, d), rotated; a pair is (i, i + d/2), as in Llama's and Qwen's checkpoints."""
    left, right = x.chunk(2, dim=-1)  # (B, T, H, d/2) each
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    """Causal self-attention in which H / K query heads share one key and value head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, H * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, K * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, K * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * d, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(d, config.rms_norm_eps)
            self.k_norm = RMSNorm(d, config.rms_norm_eps)

    def forward(self, x, rotary, mask, kv_cache, layer):
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
            k, v = kv_cache.append(layer, k, v)  # (B, K, T, d) -> (B, K, S, d)
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
    """Attention, then an MLP. Each reads a normalised copy of the residual stream x (pre-norm) and
    adds its result to it, so the shape stays (B, T, D).
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.self_attn = Attention(config)
        if config.use_moe:
            experts = range(config.num_experts)
            self.mlp = MoE(config, [MLP(D, config.moe_intermediate_size) for _ in experts])
        else:
            self.mlp = MLP(D, config.intermediate_size)
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, mask, kv_cache, layer):
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, kv_cache, layer)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """All layers but the output layer; a module of its own, because published checkpoints name its
    weights `model.`
    """

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.grad_checkpoint = False

    def forward(self, input_ids, rotary, mask, kv_cache):
        x = self.dropout(self.embed_tokens(input_ids))  # (B, T) -> (B, T, D)
        for index, layer in enumerate(self.layers):
            if self.grad_checkpoint and self.training:  # keeps only x for the backward pass
                x = checkpoint(layer, x, rotary, mask, kv_cache, index, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, kv_cache, index)
        return self.norm(x)


class CausalLM(nn.Module):
    """The decoder and the output layer: logits of the next token, or the loss."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            # With this std, embeddings and attention keep the size of their input. With GPT-2's
            # 0.02, a narrow model learns to copy from its context late or never: see
            # docs/17_symptoms.md.
            std = weight.shape[1] ** -0.5
            if "mlp" in name:
                std = 0.02
            if name.endswith("down_proj.weight"):
                # 2L results are added to the residual stream. Scaled down, their sum has the same
                # size at any depth (the GPT-2 paper, section 2.3).
                std = 0.02 / (2 * config.num_hidden_layers) ** 0.5
            nn.init.normal_(weight, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids, position_ids=None, document_ids=None, kv_cache=None, labels=None, at=None
    ):
        """Returns the logits of the token after each position, (B, T, V), in the dtype of the
        weights or of autocast; with labels, the summed cross-entropy of `loss.py`, a scalar; with
        at, only the logits after those places, (N, V).

        input_ids     (B, T) int64
        position_ids  (B, T) int64, the position of each token in its document; default: 0, 1, 2 ...
                      from the length of the cache on
        document_ids  (B, T) int64; a token sees only earlier tokens of the same id. For rows of
                      several documents, and for padding on the left. Default: one document.
        kv_cache      a KVCache, to which this call's keys and values are added
        labels        (B, T) int64, not shifted, -100 = no loss
        at            (N,) int64, places in B * T
        """
        x = self.hidden_states(input_ids, position_ids, document_ids, kv_cache)  # (B, T, D)
        if labels is not None:
            return summed_cross_entropy(x, self.lm_head.weight, labels)
        if at is not None:
            x = x.flatten(0, 1)[at]  # (B, T, D) -> (B * T, D) -> (N, D)
        return self.lm_head(x)  # (B, T, D) -> (B, T, V), or (N, D) -> (N, V)

    def hidden_states(self, input_ids, position_ids=None, document_ids=None, kv_cache=None):
        """The hidden states of the last layer, (B, T, D); the arguments are those of forward."""
        T, device = input_ids.shape[1], input_ids.device
        past = kv_cache.length if kv_cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=device)[None]  # (1, T)
        rotary = rotary_table(position_ids, self.config)
        if kv_cache is not None:
            document_ids = kv_cache.extend(input_ids.shape, document_ids)  # (B, T) -> (B, S)
        mask = None  # causal, over all tokens
        # T is 1 in the batch of a process that has no rows: FlexAttention needs more.
        packed = document_ids is not None and kv_cache is None and T > 1
        if packed and attention.blocks_available(device, self.config.head_dim):
            mask = attention.document_blocks(document_ids)
        elif document_ids is not None or (past > 0 and T > 1):
            mask = attention.visible(past, T, document_ids, device)
        return self.model(input_ids, rotary, mask, kv_cache)
