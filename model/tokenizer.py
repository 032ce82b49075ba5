"""The tokenizer: byte-level BPE, trained by `trainer/train_tokenizer.py`.

Control tokens mark the structure of a conversation and have fixed ids. Text never becomes a control
token: a user's `<|im_start|>` is encoded as the ordinary tokens of these twelve characters.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from common import UserError, is_folder, open_file, read_json

SHIPPED_TOKENIZER = Path(__file__).resolve().with_name("tokenizer.json")

CONTROL_TOKENS = [
    "<|endoftext|>",  # ends a pretraining document; also the padding token
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
] + [f"<|spare_{number}|>" for number in range(7)]
NAMED_CONTROL_TOKENS = 9  # the others are reserved


def load_tokenizer(path=SHIPPED_TOKENIZER, json_text=None):
    """Load a tokenizer from a file, from the folder of a published model, or from the JSON text
    inside a weights file.

    Always load tokenizers with this function. It sets `encode_special_tokens`, so that text never
    becomes a control token; neither the file nor a pickle preserves that setting.

    Raises UserError if the file isn't a tokenizer, or if its control tokens differ.
    """
    source = str(path) if json_text is None else "the tokenizer inside the weights"
    try:
        if json_text is None and is_folder(path):
            config = read_json(Path(path) / "config.json")
            json_text, *_ = renumber_control_tokens(Path(path), config.get("eos_token_id"))
        if json_text is None:
            with open_file(path) as file:
                json_text = file.read().decode("utf-8-sig")
        tokenizer = Tokenizer.from_str(json_text)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises only plain Exceptions
        raise UserError(
            f"{source} cannot be read as a tokenizer ({error}); "
            "train one with: python trainer/train_tokenizer.py"
        ) from error
    for index, token in enumerate(CONTROL_TOKENS[:NAMED_CONTROL_TOKENS]):
        if tokenizer.token_to_id(token) != index:
            raise UserError(
                f"{source}: {token} has id {tokenizer.token_to_id(token)} instead of {index}; "
                "train a tokenizer with: python trainer/train_tokenizer.py"
            )
    tokenizer.encode_special_tokens = True
    return tokenizer


def renumber_control_tokens(folder, eos):
    """Renumber the tokenizer of a published model so that the control tokens have our ids. Each
    swaps ids with the token at that id.

    Returns (its JSON text; order: row i of the new embeddings is row order[i] of the old ones; the
    control tokens that were added). If there's no <|endoftext|>, the token with id eos (or the
    first of a list) is renamed to it. Raises UserError if the tokenizer is missing or not
    supported.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json; a tokenizer of another kind, such as SentencePiece's "
            "tokenizer.model, is not supported"
        )
    if isinstance(eos, list):
        eos = eos[0]
    tokenizer_json = read_json(folder / "tokenizer.json")
    byte_level = "ByteLevel" in json.dumps(tokenizer_json.get("pre_tokenizer"))
    if not byte_level or tokenizer_json["model"]["type"] != "BPE":
        raise UserError(f"{folder / 'tokenizer.json'} isn't a byte-level BPE: not supported")
    vocab = tokenizer_json["model"]["vocab"]
    added = {}
    for token in tokenizer_json.get("added_tokens") or []:
        added[token["content"]] = token
        vocab[token["content"]] = token["id"]
    token_at = {index: token for token, index in vocab.items()}
    if len(token_at) != len(vocab) or set(token_at) != set(range(len(vocab))):
        raise UserError(f"{folder / 'tokenizer.json'} has ids that are missing or used twice")
    if CONTROL_TOKENS[0] not in vocab and token_at.get(eos) in added:
        token = added.pop(token_at[eos])
        del vocab[token["content"]]
        token["content"] = CONTROL_TOKENS[0]
        added[CONTROL_TOKENS[0]] = token
        vocab[CONTROL_TOKENS[0]] = eos
        token_at[eos] = CONTROL_TOKENS[0]
    new, order = [], list(range(len(vocab)))
    for index, token in enumerate(CONTROL_TOKENS[:NAMED_CONTROL_TOKENS]):
        if token not in vocab:
            new.append(token)
            vocab[token] = len(order)
            order.append(len(order))
        options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added[token] = options | {"content": token, "special": True}
        displaced, old_id = token_at[index], vocab[token]  # swap their ids
        vocab[displaced], vocab[token] = old_id, index
        token_at[old_id], token_at[index] = displaced, token
        order[index], order[old_id] = order[old_id], order[index]
    for token, entry in added.items():
        entry["id"] = vocab[token]
    tokenizer_json["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    for name in ("truncation", "padding", "post_processor"):  # these refer to the old ids
        tokenizer_json[name] = None
    return json.dumps(tokenizer_json, ensure_ascii=False), order, new
