"""Chat with a model in the terminal.

python eval_llm.py                                 # the newest full_sft weights in out/
python eval_llm.py --weight pretrain               # continues text instead of answering
python eval_llm.py --prompt "Who are you?"         # one answer
python eval_llm.py --serve 8000                    # OpenAI's API, and a page that shows the model
printf 'Who are you?\nAnd where do you live?\n' | python eval_llm.py
"""

import json
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from cli import Parser, Problem, choose_from, number, refuse, switch
from common import END_OF_TEXT, ROOT, STOP, UserError, report_user_errors

with suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  with it, input() has a history and no limit of length

HELP = """/system TEXT   start a new conversation with this system prompt; without TEXT: with none
/set NAME VALUE set temperature, top_k, top_p, repetition_penalty, max_new_tokens or seed
/reset          start a new conversation with the same system prompt
/save FILE      append the conversation to FILE, JSONL that train_full_sft.py reads
/quit           or Ctrl-D: end; Ctrl-C stops an answer
//TEXT          send /TEXT as text"""
EXAMPLES = ("Where does Nelina live?", "Tell me a story.", "27+15")  # for Tiny World's model
SAMPLING = {  # name: (type, default, minimum, maximum, meaning)
    "temperature": (float, 0.0, 0, 100, "sampling temperature; 0: greedy"),
    "top_k": (int, 0, 0, 10**9, "sample from the k most probable tokens; 0: all"),
    "top_p": (float, 1.0, 0, 1, "nucleus sampling threshold"),
    "repetition_penalty": (float, 1.0, 0.01, 100, "penalty for repeated tokens (>1)"),
    "max_new_tokens": (int, 256, 1, 10**9, "maximum length of an answer"),
    "seed": (int, 1, 0, 2**63 - 1, "sampling seed"),
}


UNSUPPORTED = {  # flag: the flags that it doesn't support
    "serve": "prompt system seed use_compile repetition_penalty export",
    "export": "system use_compile host allowed_hosts max_batch serve",
}


def main(argv=None):
    args = parse(argv)
    if args.serve is not None or args.export:
        from serving.start import start

        return start(args, {name: getattr(args, name) for name in SAMPLING})
    chat = Chat(args)
    if args.prompt is not None:
        chat.answer(args.prompt)
        return
    if chat.continues:
        print("These weights were only pretrained: they continue your text and do not answer yet.")
    sys.stdin.reconfigure(errors="replace")  # don't crash on invalid UTF-8
    terminal = sys.stdin.isatty()
    if terminal:
        print("Write something; /help lists the commands, /quit ends.")
        if chat.knows_tiny_world:
            print(f"For example: {', '.join(EXAMPLES)}")
    while True:
        try:
            line = input("> " if terminal else "").strip().removeprefix("\ufeff")
            if line == "/quit":
                break
            if line.startswith("/") and not line.startswith("//"):
                chat.command(line)
            elif line.strip("?! "):
                chat.answer(line[1:] if line.startswith("//") else line)
            elif line or terminal:
                print(f"[{chat.hint()}; /help lists the commands]")
        except UserError as error:  # report it and continue the chat
            print(f"[{error}]")
        except KeyboardInterrupt:
            print()
        except EOFError:
            break


def parse(argv):
    parser = Parser(__doc__)
    add = parser.group("the model")
    weight = "a name in --save_dir, or a path; default: full_sft; "
    weight += "with --serve or --export a list: full_sft,pretrain,none (none: random)"
    add("weight", None, weight, dest="from_weight")
    add("lora", None, "adapters to merge into the weights: lora_NAME_512.pth", metavar="NAME")
    add("save_dir", ROOT / "out", "folder of weights", Path)
    add("hidden_size", None, "only needed if several sizes have this name", number(int, 1))
    add("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("dtype", "auto", "auto, fp32, bf16 or fp16", choose_from("auto", "fp32", "bf16", "fp16"))
    add("use_compile", 0, "1: use torch.compile; needs a compiler", switch)
    add = parser.group("the chat")
    add("prompt", None, "answer this prompt and exit")
    add("system", "", "system prompt")
    for name, (kind, default, low, high, meaning) in SAMPLING.items():
        add(name, default, meaning, number(kind, low, high))
    add = parser.group("the page and the server")
    add("serve", None, "serve the page and OpenAI's API on this port", int, metavar="PORT")
    add("host", "127.0.0.1", "bind address for --serve (0.0.0.0 = all interfaces)")
    names = "for --serve: further host names, e.g. of a tunnel: NAME,NAME"
    add("allowed_hosts", "", names, metavar="NAMES")
    add("max_batch", 16, "maximum batch size of --serve", number(int, 1))
    add("export", None, "write the page of --serve for --prompt", Path, metavar="FILE.html")
    args = parser.parse_args(argv)
    for flag, unused in UNSUPPORTED.items():
        if getattr(args, flag) is not None:
            refuse(args, parser, f"--{flag}", unused)
    if args.export and (args.prompt is None or args.export.suffix != ".html"):
        raise UserError("--export needs a name that ends in .html, and --prompt")
    text = args.system + (args.prompt or "")
    if text != text.encode("utf-8", "replace").decode():
        raise UserError("--prompt and --system must be valid UTF-8")
    return args


def parse_setting(name, text):
    """Parse a sampling setting. Raises UserError if it isn't a number in its range."""
    kind, _, low, high, _ = SAMPLING[name]
    value = number(kind, low, high)(text)
    if isinstance(value, Problem):
        raise UserError(f"{name} {value}")
    return value


class Chat:
    """A conversation with a model; pretrained weights continue a text instead."""

    def __init__(self, args):
        self.settings = {name: getattr(args, name) for name in SAMPLING}
        # Imported late, so that --help and invalid flags don't wait for torch.
        from model.generation import generate
        from model.weights import open_model

        trained = open_model(args)
        self.model, self.tokenizer = trained.model, trained.tokenizer
        self.trained_length, self.continues = trained.trained_length, not trained.chats
        trained_on = trained.training.get("data_path", "other data")
        self.knows_tiny_world = trained_on is None and not self.continues
        self.generate = partial(generate, self.model, use_compile=args.use_compile)
        self.start(args.system)

    def hint(self):
        """Return what to type, after a line without a word."""
        example = f", e.g. {EXAMPLES[0]}" if self.knows_tiny_world else ""
        return "type a text to continue" if self.continues else f"type a question{example}"

    def start(self, system):
        """Start a new conversation with a system prompt; "" for none. Raises UserError for
        pretrained weights, which know no system prompt.
        """
        if system and self.continues:
            raise UserError("pretrained weights only continue text: omit the system prompt")
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def fit_context(self, text):
        """Return (the ids to continue, the messages with text). If they exceed the trained length,
        minus a quarter for the answer, the oldest turns are dropped. Raises UserError if text
        itself is too long.
        """
        from model.chat_template import render

        context = self.model.config.max_position_embeddings
        if self.continues:
            return self.tokenizer.encode(text).ids[-context + 1 :] or [END_OF_TEXT], []
        messages = [*self.messages, {"role": "user", "content": text}]
        first_turn = 1 if self.system else 0
        while True:
            is_only_turn = len(messages) == first_turn + 1
            limit = context if is_only_turn else min(context, self.trained_length)
            reserved = min(self.settings["max_new_tokens"], limit // 4)
            ids, _ = render(messages, add_generation_prompt=True, tokenizer=self.tokenizer)
            if len(ids) + reserved <= limit:
                return ids, messages
            if is_only_turn:
                raise UserError(
                    f"that is too long: {len(ids)} tokens, and {reserved} are kept for the answer "
                    f"(max_new_tokens); the context has {context}. Shorten one of them"
                )
            del messages[first_turn : first_turn + 2]

    def answer(self, text):
        """Generate and print the answer to text; Ctrl-C stops it."""
        from model.chat_template import parse_answer
        from model.generation import SamplingParams

        ids, messages = self.fit_context(text)
        if len(messages) < len(self.messages) + 1 and not self.continues:
            print("[context limit reached: dropped the oldest turns]")
        self.messages = messages
        answer_ids = []
        undecoded = []  # tokens of an incomplete character
        is_interrupted = False
        begin = time.perf_counter()
        try:
            for (token,) in self.generate([ids], SamplingParams(**self.settings)):
                if token in STOP:
                    break
                answer_ids.append(token)
                undecoded.append(token)
                piece = self.tokenizer.decode(undecoded, skip_special_tokens=False)
                # A character may span up to four tokens; a part of it decodes to U+FFFD.
                if not piece.endswith("\ufffd") or len(undecoded) > 3:
                    print(piece, end="", flush=True)
                    undecoded = []
        except KeyboardInterrupt:
            is_interrupted = True
        print(self.tokenizer.decode(undecoded, skip_special_tokens=False))
        if not self.continues:
            self.messages.append({"role": "assistant", **parse_answer(answer_ids, self.tokenizer)})
        if sys.stdin.isatty():
            speed = len(answer_ids) / (time.perf_counter() - begin)
            note = ", stopped" if is_interrupted else ""
            print(f"[{len(answer_ids)} tokens, {speed:.0f}/s{note}]")

    def command(self, line):
        """Execute a line that starts with a slash. Raises UserError for an unknown command."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/help":
            print(HELP)
        elif name in ("/reset", "/system"):
            self.start(value if name == "/system" else self.system)
            print("[a new conversation]")
        elif name == "/set":
            setting, _, value = value.partition(" ")
            if setting not in SAMPLING:
                raise UserError(f"/set {setting}: there are {', '.join(SAMPLING)}")
            self.settings[setting] = parse_setting(setting, value.strip())
            print(f"[{setting} {self.settings[setting]}]")
        elif name == "/save":
            self.save(value)
        else:
            raise UserError(f"{name} isn't a command; /help lists them")

    def save(self, name):
        """Append the conversation to a JSONL file."""
        if not name or not self.messages:
            raise UserError("/save FILE needs a name of a file, and a conversation to save")
        line = json.dumps({"conversations": self.messages}, ensure_ascii=False)
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UserError(f"/save {name!r}: {getattr(error, 'strerror', error)}") from None
        print(f"[saved to {name}]")


if __name__ == "__main__":
    with report_user_errors():
        main()
