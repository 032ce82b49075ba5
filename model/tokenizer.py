"""The tokenizer: byte-level BPE, trained by `trainer/train_tokenizer.py`.

Control tokens mark the structure of a conversation. They have fixed ids. Text never becomes one: a
user's `<|im_start|>` becomes the ordinary tokens of those twelve characters.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

from common import UserError, is_folder, open_file, read_json

SHIPPED_TOKENIZER = Path(__file__).resolve().parents[1] / "model" / "tokenizer.json"

CONTROL_TOKENS = [
    "<|endoftext|>",  # ends a pretraining document, and pads
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
] + [f"<|spare_{number}|>" for number in range(7)]
NAMED_CONTROL_TOKENS = 9  # the spare slots after these have no meaning yet


def load_tokenizer(path=SHIPPED_TOKENIZER, json_text=None):
    """Return the tokenizer of a file, of the folder of a published model, or of the JSON text that
    a weights file carries.

    Always load a tokenizer with this function. It sets `encode_special_tokens`, by which text never
    becomes a control token; neither the file format nor pickling keeps that switch.

    Raises UserError for a file that is not a tokenizer or has other control tokens.
    """
    source = str(path) if json_text is None else "the tokenizer inside the weights"
    try:
        if json_text is None and is_folder(path):
            config = read_json(Path(path) / "config.json")
            json_text, *_ = with_our_ids(Path(path), config.get("eos_token_id"))
        if json_text is None:
            with open_file(path) as file:
                json_text = file.read().decode("utf-8-sig")
        tokenizer = Tokenizer.from_str(json_text)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing more precise than Exception
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


def with_our_ids(folder, eos):
    """Return (JSON text, order, new): the tokenizer.json of a folder in which the control tokens
    have our ids; row i of the weights becomes what was row order[i]; the names of tokens that did
    not exist. Without an <|endoftext|>, the token with the id eos, or the first of a list of ids,
    is renamed. Raises UserError for a tokenizer that is missing or of another kind.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json; a tokenizer of another kind, such as SentencePiece's "
            "tokenizer.model, is not supported"
        )
    written, eos = read_json(folder / "tokenizer.json"), eos[0] if isinstance(eos, list) else eos
    byte_level = "ByteLevel" in json.dumps(written.get("pre_tokenizer"))
    if not byte_level or written["model"]["type"] != "BPE":
        raise UserError(f"{folder / 'tokenizer.json'} isn't a byte-level BPE: not supported")
    vocab, added = written["model"]["vocab"], {}
    for token in written.get("added_tokens") or []:
        added[token["content"]] = token
        vocab[token["content"]] = token["id"]
    name_of = {number: token for token, number in vocab.items()}
    if len(name_of) != len(vocab) or set(name_of) != set(range(len(vocab))):
        raise UserError(f"{folder / 'tokenizer.json'} has ids that are missing or used twice")
    if CONTROL_TOKENS[0] not in vocab and name_of.get(eos) in added:
        token = added.pop(name_of[eos])
        del vocab[token["content"]]
        token["content"] = CONTROL_TOKENS[0]
        added[CONTROL_TOKENS[0]], vocab[CONTROL_TOKENS[0]] = token, eos
        name_of[eos] = CONTROL_TOKENS[0]
    new, order = [], list(range(len(vocab)))
    for number, token in enumerate(CONTROL_TOKENS[:NAMED_CONTROL_TOKENS]):
        if token not in vocab:
            new.append(token)
            vocab[token] = len(order)
            order.append(len(order))
        like = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added[token] = like | {"content": token, "special": True}
        other, before = name_of[number], vocab[token]
        vocab[other], vocab[token] = before, number
        name_of[before], name_of[number] = other, token
        order[number], order[before] = order[before], order[number]
    for token, entry in added.items():
        entry["id"] = vocab[token]
    written["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    # A post-processor would add tokens by their old ids.
    written["truncation"] = written["padding"] = written["post_processor"] = None
    return json.dumps(written, ensure_ascii=False), order, new
