"""Incremental detokenization: which text of a growing answer can be sent already."""

from common import END_THINK, THINK, TOOL_CALL


class IncrementalDetokenizer:
    """An answer that grows token by token. `add` appends a token; `take` returns the text that
    became final since the last call. All of it together is a prefix of `parse_answer`'s result.

    decode   a function from ids to text
    chat     whether there may be reasoning and tool calls; incomplete calls aren't sent
    stops    stop strings, before which the content ends
    stopped  whether one of them occurred
    sent     {field: length of the text taken so far}
    """

    def __init__(self, decode, chat, stops):
        self.decode, self.chat, self.stops = decode, chat, stops
        self.field = None  # of the message, to which the next token belongs
        self.sent = {}
        self.stopped = False
        self.waiting = []  # tokens of an incomplete character
        self.text = ""  # decoded text that isn't final
        self.ready = {}  # {field: final text that wasn't taken yet}

    def add(self, token):
        """Append a token."""
        if self.field is None:  # the first token
            if self.chat and token == THINK:
                self.field = "reasoning_content"
                return
            self.field = "content"
        if self.field == "reasoning_content" and token == END_THINK:
            self.advance(is_end=True)
            self.sent.setdefault("reasoning_content", 0)
            self.field, self.waiting, self.text = "content", [], ""
        elif self.field == "content" and self.chat and token == TOOL_CALL:
            self.advance()
            self.field = "calls"
        elif self.field != "calls":
            self.waiting.append(token)

    def take(self):
        """Return {field: new text}, only for fields with new text."""
        if self.field in ("reasoning_content", "content"):
            self.advance()
        new, self.ready = self.ready, {}
        return {field: text for field, text in new.items() if text}

    def advance(self, is_end=False):
        """Move final text from the waiting tokens to `ready`. Parts of a character, prefixes of a
        stop string, and newlines that may belong to the markers aren't final.
        """
        piece = self.decode(self.waiting)
        if is_end or not piece.endswith("\ufffd"):
            self.text, self.waiting = self.text + piece, []
        is_beginning = self.field not in self.sent
        is_reasoning = self.field == "reasoning_content"
        newlines = ""  # of the markers, at the beginning of the field
        if is_reasoning:
            newlines = "\n"
        elif "reasoning_content" in self.sent:
            newlines = "\n\n"
        if is_beginning and len(self.text) < len(newlines) and newlines.startswith(self.text):
            return  # maybe a part of the markers
        text = self.text.removeprefix(newlines) if is_beginning else self.text
        places = [text.index(stop) for stop in self.stops if stop in text]
        if is_reasoning:
            final = text.removesuffix("\n")
        elif places:
            final = text[: min(places)]
            self.stopped = True
        else:
            final = text[: len(text) - stop_prefix_length(text, self.stops)]
        if is_end or final or not is_beginning:
            self.text = text[len(final) :]
            self.ready[self.field] = self.ready.get(self.field, "") + final
            self.sent[self.field] = self.sent.get(self.field, 0) + len(final)


def stop_prefix_length(text, stops):
    """Return the length of the longest suffix of a text that is a prefix of a stop string."""
    longest = max(map(len, stops or [""])) - 1
    for length in range(min(len(text), longest), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
