"""The tokenizer: byte-level BPE, trained by `trainer/train_tokenizer.py`.

Control tokens mark the structure of a conversation. They have fixed ids. Text never becomes one: a
user's `<|im_start|>` becomes the ordinary tokens of those twelve characters.
"""

from pathlib import Path

from tokenizers import Tokenizer

from common import UserError

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
    """The tokenizer of a file, or of the JSON text that a weights file carries.

    Always load a tokenizer with this function. It sets `encode_special_tokens`, by which text never
    becomes a control token; neither the file format nor pickling keeps that switch.

    Raises UserError for a file that is not a tokenizer or has other control tokens.
    """
    source = str(path) if json_text is None else "the tokenizer inside the weights"
    try:
        text = Path(path).read_text(encoding="utf-8") if json_text is None else json_text
        tokenizer = Tokenizer.from_str(text)
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
