"""The tokenizer: byte-level BPE, trained by `trainer/train_tokenizer.py`.

Control tokens mark the structure of a conversation. They have fixed ids, and text can never become
one: a user who types `<|im_start|>` gets the ordinary tokens of those twelve characters.
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

    Use nothing else to load one: that text stays text is a switch (`encode_special_tokens`) which
    the file format does not keep, and which is set here. It is lost by pickling, too.

    Raises UserError, with the remedy, for a file that is no tokenizer or has other control tokens.
    """
    source = str(path) if json_text is None else "the tokenizer inside the weights"
    try:
        text = Path(path).read_text(encoding="utf-8") if json_text is None else json_text
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing more precise than Exception
        raise UserError(
            f"{source} cannot be read as a tokenizer ({error}); "
            "make one with: python trainer/train_tokenizer.py"
        ) from error
    for index, token in enumerate(CONTROL_TOKENS[:NAMED_CONTROL_TOKENS]):
        if tokenizer.token_to_id(token) != index:
            raise UserError(
                f"{source}: {token} has id {tokenizer.token_to_id(token)} and not {index}; "
                "make a tokenizer with: python trainer/train_tokenizer.py"
            )
    tokenizer.encode_special_tokens = True
    return tokenizer
