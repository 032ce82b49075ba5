"""The key/value cache of generation.

Shapes: B batch, T new tokens, S all tokens so far, K key/value heads, d head dimension.
"""

import torch


class KVCache:
    """Cached keys and values of earlier tokens, so that a new token costs one position of work.

    Memory for `max_length` tokens is preallocated; `length` of them are filled. Document ids are
    cached too once a call passes them; every later call must then pass them.
    """

    def __init__(self, config, batch_size, max_length, device=None, dtype=torch.float32):
        # For each layer (B, K, max_length, d)
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.document_ids = torch.zeros(batch_size, max_length, device=device, dtype=torch.long)
        self.has_documents = False
        self.max_length = max_length
        self.length = 0

    def advance(self, T, document_ids):
        """Make room for T new tokens per row. Returns all document ids so far, (B, S), or None.
        Raises ValueError if the cache is full.
        """
        start = self.length
        self.length += T
        if self.length > self.max_length:
            raise ValueError(f"{self.length} tokens don't fit into a KV cache of {self.max_length}")
        self.has_documents = self.has_documents or document_ids is not None
        if not self.has_documents:
            return None
        self.document_ids[:, start : self.length] = document_ids
        return self.document_ids[:, : self.length]

    def append(self, layer_idx, keys, values):
        """Store a layer's new keys and values, (B, K, T, d). Returns all so far, (B, K, S, d)."""
        start = self.length - keys.shape[2]
        all_keys = self.keys[layer_idx][:, :, : self.length]
        all_values = self.values[layer_idx][:, :, : self.length]
        all_keys[:, :, start:] = keys
        all_values[:, :, start:] = values
        return all_keys, all_values
