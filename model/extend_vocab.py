"""Vocabulary extension: each new token adds a row to the embeddings and the LM head, and
`freeze_base` leaves only these rows trainable. Recommenders add the semantic ids of their items.

Shapes: V vocabulary before, V' vocabulary after, D hidden.
"""

import torch
import torch.nn as nn
from tokenizers import AddedToken


@torch.no_grad()
def extend_vocab(model, tokenizer, tokens):
    """Add the tokens that the tokenizer lacks, and one row for each. Returns their number.

    tokens: {token: description}. A new row is the mean of its description's rows, or, without a
    description, of all old rows. The tokenizer then encodes the token's text as this token; it
    isn't a control token.
    """
    old = tokenizer.get_vocab_size()
    new = [token for token in tokens if tokenizer.token_to_id(token) is None]
    if not new:
        return 0
    descriptions = [tokenizer.encode(tokens[token]).ids for token in new]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new])
    size = max(model.config.vocab_size, tokenizer.get_vocab_size())
    for layer in (model.model.embed_tokens, model.lm_head):
        rows = layer.weight[:old]  # (V, D); the weights may have more rows than the tokenizer
        added = rows.mean(dim=0, keepdim=True).repeat(size - old, 1)  # (V' - V, D)
        for row, ids in enumerate(descriptions):
            if ids:
                added[row] = rows[ids].mean(dim=0)
        layer.weight = nn.Parameter(torch.cat([rows, added]))  # (V', D)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = size
    model.config.vocab_size = size
    model.first_new_token = old
    return len(new)


def freeze_base(model):
    """Freeze everything except the rows of new tokens in the embeddings and the LM head.

    The gradient of the old rows is set to zero. AdamW then leaves them unchanged, bit for bit,
    provided that they have no weight decay: see `make_optimizer`. Raises ValueError if the model
    has no new tokens.
    """
    first = getattr(model, "first_new_token", None)
    if first is None:
        raise ValueError("the model has no new tokens")

    def zero_old_rows(gradient):
        gradient = gradient.clone()
        gradient[:first] = 0  # multiplying by a mask would keep NaN
        return gradient

    model.requires_grad_(False)
    for weight in {model.model.embed_tokens.weight, model.lm_head.weight}:
        weight.requires_grad_(True)
        weight.register_hook(zero_old_rows)
        weight.first_row = first
