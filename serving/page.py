"""The page: page.html with its initial data, as a single self-contained file."""

import json
import os
from pathlib import Path

from common import ROOT, STOP, UserError, atomic_write
from model.generation import generate
from serving import views

EXAMPLE = """[{"role": "user", "content": "Where does Nelina live?"},
 {"role": "assistant", "content": "She lives at the well."}]"""  # to compare models with
SECOND = "Who are you?"  # the sample that is packed behind the conversation


def page(models, settings, **fields):
    """Return the page as bytes. models {name: Served}; settings: initial sampling parameters."""
    data = {"models": [*models], "settings": settings, "second": SECOND, "text": EXAMPLE} | fields
    text = json.dumps(data)
    text = text.replace("<", "\\u003c")  # so the JSON cannot close the <script>
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("<!-- data -->", text).encode()


def export(models, path, question, settings, logs):
    """Write a page that needs no server: the first model's answer, and the views of all models on
    it. Raises UserError if the question is too long, or if the file can't be written.
    """
    first = next(iter(models.values()))
    room = min(views.MOST_READ, first.model.config.max_position_embeddings)
    try:
        ids = views.turn(first, [], question)["ids"]
        room -= len(ids) + len(views.turn(first, [], SECOND)["ids"])  # for the answer
        if room < 1:
            raise ValueError(f"{len(ids)} tokens leave no room for an answer; shorten it")
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None
    options = settings | {"max_new_tokens": min(settings["max_new_tokens"], room)}
    new = [token for (token,) in generate(first.model, [ids], **options)]
    text = first.tokenizer.decode(new[:-1] if new[-1] in STOP else new, skip_special_tokens=False)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    lines = ",\n ".join(json.dumps(turn, ensure_ascii=False) for turn in turns)
    text = f"[{lines}]" if first.chats else question + text
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
    docs, folder = None, path.resolve().parent  # links to the tutorial, from inside the repository
    if folder.is_relative_to(ROOT):
        docs = Path(os.path.relpath(ROOT / "docs", folder)).as_posix()
    fields = {"recorded": recorded, "ids": ids, "begun": len(ids) - len(new), "text": text}
    data = page(models, settings, **fields, question=question, docs=docs)
    with atomic_write(path) as file:
        file.write(data)
    print(f"{path}: {len(data) / 1000:.0f} kB; open it in a browser")
