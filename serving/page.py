"""The page: page.html with its data from the beginning, as one file that loads nothing more."""

import json
import os
from pathlib import Path

from common import ROOT, STOP, replacing
from model.generation import generate
from serving import views

SECOND = "Who are you?"  # the sample that is packed behind the recorded conversation


def page(models, **more):
    """The page as bytes; more is what it has besides the names of the models {name: Served}."""
    known = [{"name": name, "chats": served.chats} for name, served in models.items()]
    text = json.dumps({"models": known, "second": SECOND, **more})
    text = text.replace("<", "\\u003c")  # nothing in it ends the element around it
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("<!-- data -->", text).encode()


def export(models, path, question, settings, logs):
    """Writes a page that needs no server: the first model's answer, as all of the models read it.
    Raises UserError if the file cannot be written, ValueError if the question is too long.
    """
    first = next(iter(models.values()))
    ids = views.turn(first, [], question)["ids"]
    new = [token for (token,) in generate(first.model, [ids], **settings)]
    text = first.tokenizer.decode(new[:-1] if new[-1] in STOP else new, skip_special_tokens=False)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    text = json.dumps(turns, ensure_ascii=False) if first.chats else question + text
    ids += new
    recorded = {"compare": views.compare(models, text), "runs": views.runs(logs)}
    for name, served in models.items():
        recorded[f"tokens {name}"] = views.tokens(served, ids)
        recorded[f"attention {name}"] = views.attention(served, ids)
        recorded[f"attention {name} packed"] = views.attention(served, ids, SECOND)
        recorded[f"layers {name}"] = views.layers(served, ids)
        recorded[f"tokenizer {name}"] = views.tokenizer(served, question)
        for token in {*ids}:
            recorded[f"token {name} {token}"] = views.token(served, token)
    docs, folder = None, path.resolve().parent  # links to the chapters, where they are at hand
    if folder.is_relative_to(ROOT):
        docs = Path(os.path.relpath(ROOT / "docs", folder)).as_posix()
    data = page(models, recorded=recorded, ids=ids, text=text, question=question, docs=docs)
    with replacing(path) as file:
        file.write(data)
    print(f"{path}: {len(data) / 1000:.0f} kB; open it in a browser")
