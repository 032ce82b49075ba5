"""Chat with a model in the terminal.

python eval_llm.py                                 # the newest full_sft weights in out/
python eval_llm.py --weight pretrain               # continues text instead of answering
python eval_llm.py --prompt "Who are you?"         # one answer, then the end
printf 'Who are you?\nAnd where do you live?\n' | python eval_llm.py
"""

import argparse
import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from common import END_OF_TEXT, ROOT, STOP, UserError, report_user_errors

with suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  input() then has no limit of length, but a history

HELP = """/system TEXT   a system prompt for a new conversation; without TEXT: none
/set NAME VALUE one of: temperature, top_k, top_p, repetition_penalty, max_new_tokens, seed
/reset          forget the conversation
/save FILE      write it as a line of JSONL that train_full_sft.py reads
/quit           or Ctrl-D; Ctrl-C stops an answer"""
SAMPLING = {  # name: (kind, default, lowest, highest, meaning)
    "temperature": (float, 0.0, 0, 100, "0: always the most probable token"),
    "top_k": (int, 0, 0, 10**9, "sample from the k most probable tokens; 0: from all"),
    "top_p": (float, 1.0, 0, 1, "sample from the most probable tokens with this sum"),
    "repetition_penalty": (float, 1.0, 0.01, 100, "above 1: repeats less"),
    "max_new_tokens": (int, 256, 1, 10**9, "maximum length of an answer, in tokens"),
    "seed": (int, 1, 0, 2**63 - 1, "of the sampling"),
}
LONGEST_LINE = 4095  # bytes that a terminal of Linux passes on where readline does not read it


def in_range(name, text):
    """The value of a sampling setting. Raises UserError with the limits if text is none."""
    kind, _, low, high, _ = SAMPLING[name]
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise UserError(f"{name} {text}: give a number from {low} to {high}")
    return value


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--weight", dest="from_weight", help="a name in --save_dir, or a path; default: full_sft")
    add("--lora", metavar="NAME", help="adapters to merge into the weights: lora_NAME_512.pth")
    add("--save_dir", type=Path, default=ROOT / "out", help="folder of weights")
    add("--hidden_size", type=int, help="only where several sizes have the name")
    add("--prompt", help="answer this and end")
    add("--system", default="", help="system prompt")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the weights")
    compiled = "1: torch.compile the step to the next token; needs a C++ compiler"
    add("--use_compile", type=int, choices=[0, 1], default=0, help=compiled)
    for name, (_, default, *_, text) in SAMPLING.items():
        add(f"--{name}", default=default, help=text)
    args = parser.parse_args(argv)
    for name in SAMPLING:
        setattr(args, name, in_range(name, getattr(args, name)))
    text = args.system + (args.prompt or "")
    if text != text.encode("utf-8", "replace").decode():
        raise UserError("--prompt and --system: give text in UTF-8")
    if args.from_weight == "none":
        raise UserError("--weight none: only trained weights can chat; give a name or a path")
    return args


class Chat:
    """A conversation with a model; with weights of stage pretrain, a text that it continues."""

    def __init__(self, args):
        # Here and not above: torch takes seconds to load, and --help need not wait for it.
        from trainer import checkpoint
        from trainer.distributed import pick_device, pick_dtype
        from trainer.optimizer import require_compiler
        from trainer.trainer_utils import init_model

        self.settings = {name: getattr(args, name) for name in [*SAMPLING, "use_compile"]}
        device = pick_device(args.device)
        if args.use_compile:
            require_compiler(device)
        self.model, self.tokenizer, loaded = init_model(args, device)
        if args.lora:
            checkpoint.merge_adapters(self.model, args)
        self.model.to(pick_dtype(args.dtype, device))
        self.continues = loaded["stage"] == "pretrain" and not args.lora
        self.start_over(args.system)

    def start_over(self, system):
        self.messages = [{"role": "system", "content": system}] if system else []

    def prompt(self, text):
        """The ids of the prompt. Drops the oldest turns, with a notice, when they leave no room."""
        from dataset.chat_template import render

        room = self.model.config.max_position_embeddings
        if self.continues:
            return self.tokenizer.encode(text).ids[-room + 1 :] or [END_OF_TEXT]
        messages, dropped = [*self.messages, {"role": "user", "content": text}], 0
        for_answer = min(self.settings["max_new_tokens"], room // 2)
        while True:
            ids, _ = render(messages, add_generation_prompt=True, tokenizer=self.tokenizer)
            if len(ids) + for_answer <= room:
                break
            first = int(messages[0]["role"] == "system")
            if len(messages) - first < 3:
                raise UserError(
                    f"that is too long: {len(ids)} tokens, and {for_answer} are kept for the "
                    f"answer (max_new_tokens); the context has {room}. Shorten one of them"
                )
            del messages[first : first + 2]
            dropped += 1
        if dropped:
            print(f"[the context is full: the oldest {dropped} question(s) are forgotten]")
        self.messages = messages
        return ids

    def answer(self, text):
        """Prints the answer to text as it is generated; Ctrl-C ends it early."""
        from dataset.chat_template import parse_answer
        from model.generation import generate

        ids, new, waiting = self.prompt(text), [], []
        interrupted, start = False, time.perf_counter()
        old_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for (token,) in generate(self.model, [ids], **self.settings):
                if token in STOP:
                    break
                new.append(token)
                waiting.append(token)
                piece = self.tokenizer.decode(waiting, skip_special_tokens=False)
                # A character may take up to four tokens; a part of it decodes to U+FFFD.
                if not piece.endswith("\ufffd") or len(waiting) > 3:
                    print(piece, end="", flush=True)
                    waiting = []
        except KeyboardInterrupt:
            interrupted = True
        finally:
            signal.signal(signal.SIGINT, old_handler)
        print(self.tokenizer.decode(waiting, skip_special_tokens=False))
        if not self.continues:
            self.messages.append({"role": "assistant", **parse_answer(new, self.tokenizer)})
        speed = len(new) / (time.perf_counter() - start)
        if sys.stdin.isatty():
            print(f"[{len(new)} tokens, {speed:.0f}/s{', stopped' if interrupted else ''}]")

    def command(self, line):
        """Runs a line that starts with a slash; returns False for /quit."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            system = self.messages[0] if self.messages else {"role": "user"}
            self.start_over(system["content"] if system["role"] == "system" else "")
            print("[a new conversation]")
        elif name == "/system":
            self.start_over(rest)
            print(f"[a new conversation, {'with this' if rest else 'without a'} system prompt]")
        elif name == "/set":
            setting, _, value = rest.partition(" ")
            if setting not in SAMPLING:
                raise UserError(f"/set {setting}: there are {', '.join(SAMPLING)}")
            self.settings[setting] = in_range(setting, value.strip())
            print(f"[{setting} {self.settings[setting]}]")
        elif name == "/save":
            self.save(rest)
        elif name != "/quit":
            raise UserError(f"{name} is not a command; /help lists them")
        return name != "/quit"

    def save(self, name):
        """Appends the conversation to a JSONL file."""
        if not name or not self.messages:
            raise UserError(
                "/save FILE writes a conversation; there must be a name, and a question"
            )
        line = json.dumps({"conversations": self.messages}, ensure_ascii=False)
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UserError(f"/save {name!r}: {getattr(error, 'strerror', error)}") from None
        print(f"[saved to {name}]")


def main(argv=None):
    args = parse(argv)
    chat = Chat(args)
    if args.prompt is not None:
        chat.answer(args.prompt)
        return
    if chat.continues:
        print("These weights were only pretrained: they continue your text and do not answer yet.")
    sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 do not end the chat
    terminal = sys.stdin.isatty()
    if terminal:
        print("Write something; /help lists the commands, /quit ends.")
    while True:
        try:
            line = read_line(terminal)
            if line.startswith("/"):
                if not chat.command(line):
                    break
            elif line:
                chat.answer(line)
        except UserError as error:  # in a chat a mistake is told, and the chat goes on
            print(f"[{error}]")
        except KeyboardInterrupt:
            print()
        except EOFError:
            break


def read_line(terminal):
    """The next line that the user writes. Raises UserError if the terminal may have cut it."""
    line = input("> " if terminal else "")
    by_readline = sys.modules.get("readline") and sys.stdout.isatty()
    if terminal and not by_readline and len(line.encode()) == LONGEST_LINE:
        raise UserError(
            f"a line has at most {LONGEST_LINE} bytes in this terminal, and the rest of yours is "
            "lost; give it in shorter lines, or in a pipe: python eval_llm.py < FILE"
        )
    return line.strip()


if __name__ == "__main__":
    with report_user_errors():
        main()
