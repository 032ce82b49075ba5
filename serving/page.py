"""The page: page.html with its initial data, as a single self-contained file."""

import json
import os
from pathlib import Path

from common import ROOT, STOP, UserError, atomic_write
from model.generation import SamplingParams, generate
from serving import views

EXAMPLE = """[{"role": "user", "content": "Where does Nelina live?"},
 {"role": "assistant", "content": "She lives at the well."}]"""  # to compare models with
SECOND = "Who are you?"  # the sample that is packed behind the conversation


def page(models, settings, **fields):
    """Return the page as bytes. models {name: OpenModel}; settings: initial sampling parameters."""
    data = {"models": [*models], "settings": settings, "second": SECOND, "text": EXAMPLE} | fields
    text = json.dumps(data)
    text = text.replace("<", "\\u003c")  # so the JSON cannot close the <script>
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("<!-- data -->", text).encode()


def record_views(name, served, ids, question):
    """Return the data of the views of one model, by the names that page.html looks up."""
    recorded = {
        f"tokens {name}": views.tokens(served, ids),
        f"attention {name}": views.attention(served, ids),
        f"attention {name} packed": views.attention(served, ids, SECOND),
        f"layers {name}": views.layers(served, ids),
        f"tokenizer {name}": views.tokenizer(served, question),
    }
    for token in set(ids):
        recorded[f"token {name} {token}"] = views.token(served, token)
    return recorded


def export(models, path, question, settings, logs):
    """Write a page that needs no server: the first model's answer, and the views of all models on
    it. Raises UserError if the question is too long, or if the file can't be written.
    """
    first = next(iter(models.values()))
    limit = min([views.MOST_READ, *map(views.context_length, models.values())])
    try:
        ids = views.append_turn(first, [], question)["ids"]
        second_ids = views.append_turn(first, [], SECOND)["ids"]
        max_new_tokens = limit - len(ids) - len(second_ids)
        if max_new_tokens < 1:
            raise ValueError(f"{len(ids)} tokens leave no room for an answer; shorten it")
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None
    max_new_tokens = min(max_new_tokens, settings["max_new_tokens"])
    params = SamplingParams(**settings | {"max_new_tokens": max_new_tokens})
    new_ids = [token for (token,) in generate(first.model, [ids], params)]
    answer_ids = new_ids[:-1] if new_ids[-1] in STOP else new_ids
    answer = first.tokenizer.decode(answer_ids, skip_special_tokens=False)
    text = question + answer
    if first.chats:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines = ",\n ".join(json.dumps(turn, ensure_ascii=False) for turn in turns)
        text = f"[{lines}]"
    ids += new_ids
    recorded = {"compare": views.compare(models, text), "runs": views.runs(logs)}
    for name, served in models.items():
        recorded |= record_views(name, served, ids, question)
    docs = None  # links to the tutorial, from inside the repository
    folder = path.resolve().parent
    if folder.is_relative_to(ROOT):
        docs = Path(os.path.relpath(ROOT / "docs", folder)).as_posix()
    fields = {"recorded": recorded, "ids": ids, "begun": len(ids) - len(new_ids), "text": text}
    data = page(models, settings, **fields, question=question, docs=docs)
    with atomic_write(path) as file:
        file.write(data)
    print(f"{path}: {len(data) / 1000:.0f} kB; open it in a browser")
