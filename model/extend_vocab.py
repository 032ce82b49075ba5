"""New tokens for a trained model: a row for each in the embeddings and, with `freeze_base`,
nothing else that learns. The recipe of recommenders whose items are a few tokens (semantic ids).
"""

import torch
import torch.nn as nn
from tokenizers import AddedToken


@torch.no_grad()
def extend_vocab(model, tokenizer, tokens):
    """Gives those tokens that the tokenizer does not have an id and a row each; returns how many.

    tokens: {token: description}. A new row is the mean of its description's rows, or without one
    of all old rows: as likely as an average token, and unlike none. Text that holds a new token
    becomes that token; it is no control token.
    """
    old = tokenizer.get_vocab_size()
    new = [token for token in tokens if tokenizer.token_to_id(token) is None]
    if not new:
        return 0
    described = {old + n: tokenizer.encode(tokens[token]).ids for n, token in enumerate(new)}
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new])
    size = max(model.config.vocab_size, tokenizer.get_vocab_size())
    tied = model.config.tie_word_embeddings
    for layer in (model.model.embed_tokens, model.lm_head)[: 1 if tied else 2]:
        rows = layer.weight[:old]
        added = rows.mean(dim=0, keepdim=True).repeat(size - old, 1)
        for row, ids in described.items():
            if ids:
                added[row - old] = rows[ids].mean(dim=0)
        layer.weight = nn.Parameter(torch.cat([rows, added]))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = size
    model.config.vocab_size = size
    model.first_new_token = old
    return len(new)


def freeze_base(model):
    """From now on only the rows of new tokens learn, in the output layer, too.

    All rows of a matrix have one optimizer state. With a gradient of zero AdamW leaves a row as it
    is to the bit, if no weight decay pulls on it: `make_optimizer` gives these matrices none.
    Raises ValueError if the model has no new tokens.
    """
    first = getattr(model, "first_new_token", None)
    if first is None:
        raise ValueError("the model has no new tokens")

    def of_new_rows(gradient):
        gradient = gradient.clone()
        gradient[:first] = 0  # not a product with a mask: a gradient that is not finite stays out
        return gradient

    model.requires_grad_(False)
    for weight in {model.model.embed_tokens.weight, model.lm_head.weight}:
        weight.requires_grad_(True)
        weight.register_hook(of_new_rows)
        weight.first_row = first
