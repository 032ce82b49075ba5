"""Streaming: the parts of an answer that are sent while it grows, each token decoded once."""

from common import END_THINK, THINK, TOOL_CALL


class Draft:
    """An answer that grows token by token. `add` takes a token; `take` returns the text that has
    become certain since the last call. All of it together is the beginning of what `parse_answer`
    makes of the whole answer.

    decode   a function from ids to text
    chat     whether there are reasoning and calls of tools; a call is not sent before it is whole
    stops    texts before which the content ends
    stopped  whether one of them has come
    sent     {field: the length of the text that was taken}
    """

    def __init__(self, decode, chat, stops):
        self.decode, self.chat, self.stops = decode, chat, stops
        self.field, self.sent, self.stopped = None, {}, False
        self.waiting, self.text, self.ready = [], "", {}

    def add(self, token):
        if self.field is None:  # the first token
            reasons = self.chat and token == THINK
            self.field = "reasoning_content" if reasons else "content"
            if reasons:
                return
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
        """Return {field: its new text}, without fields that have none."""
        if self.field in ("reasoning_content", "content"):
            self.advance()
        new, self.ready = self.ready, {}
        return {field: text for field, text in new.items() if text}

    def advance(self, is_end=False):
        """Moves what is certain from the waiting tokens to the text that is ready: not a part of a
        character, nor the beginning of a stop, nor a newline that may belong to the markers.
        """
        piece = self.decode(self.waiting)
        if is_end or not piece.endswith("\ufffd"):
            self.text, self.waiting = self.text + piece, []
        begins, reasons = self.field not in self.sent, self.field == "reasoning_content"
        newlines = "\n" if reasons else "\n\n" if "reasoning_content" in self.sent else ""
        if begins and len(self.text) < len(newlines) and newlines.startswith(self.text):
            return
        text = self.text.removeprefix(newlines) if begins else self.text
        places = [] if reasons else [text.index(stop) for stop in self.stops if stop in text]
        if places:
            certain, self.stopped = text[: min(places)], True
        elif reasons:
            certain = text.removesuffix("\n")
        else:
            certain = text[: len(text) - stop_prefix_length(text, self.stops)]
        if is_end or certain or not begins:
            self.text = text[len(certain) :]
            self.ready[self.field] = self.ready.get(self.field, "") + certain
            self.sent[self.field] = self.sent.get(self.field, 0) + len(certain)


def stop_prefix_length(text, stops):
    """Return the length of the longest end of a text with which a stop begins."""
    longest = max(map(len, stops or [""])) - 1
    for length in range(min(len(text), longest), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
