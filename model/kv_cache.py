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

    def extend(self, shape, document_ids):
        """Make room for shape = (B, T) new tokens. Returns all document ids so far, (B, S), or
        None. Raises ValueError if the cache is full.
        """
        start, self.length = self.length, self.length + shape[1]
        if self.length > self.max_length:
            raise ValueError(f"{self.length} tokens don't fit into a KV cache of {self.max_length}")
        self.has_documents = self.has_documents or document_ids is not None
        if not self.has_documents:
            return None
        self.document_ids[:, start : self.length] = document_ids
        return self.document_ids[:, : self.length]

    def append(self, layer, keys, values):
        """Store a layer's new keys and values, (B, K, T, d). Returns all so far, (B, K, S, d)."""
        start = self.length - keys.shape[2]
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store[:, :, start : self.length] = new
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
