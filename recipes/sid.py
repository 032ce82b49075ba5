"""Writes recommendation data whose items are a few tokens each as conversations.

    python recipes/sid.py --raw FOLDER --out out/sid

Reads the usual files: *.index.json, {item: its tokens}; *.item.json, {item: {"title",
"description"}}; *.csv with the histories, whose list columns are Python literals.
"""

import ast
import csv
import io
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, number
from common import UserError, is_folder, read_json, report_user_errors
from dataset.formats import is_texts
from dataset.jsonl import open_text
from dataset.prepare import shares, write_parts

ASK = {  # task: the question; {0} is the history, the title or the id
    "next_id": "A customer bought, one after the other: {0}. Which item is next?",
    "next_title": "A customer bought, one after the other: {0}. What is the next item called?",
    "next_description": "A customer bought, one after the other: {0}. Describe the next item.",
    "titles_to_next_id": "A customer bought, one after the other:\n{0}\nWhich item is next?",
    "preference_to_next_id": "A customer likes this: {0}. Which item is next?",
    "id_to_title": "What is {0} called?",
    "title_to_id": "Which item is called {0}?",
}
PARTS = ("train", "valid", "test")
LISTS = ("history_item_title", "history_item_sid")


def prepare_sid(args):
    """Writes train, valid and test conversations, tokens.txt for --extend_tokens, sids.json with
    all ids there are, and a manifest. The test part asks for the next id alone. Returns 0.
    """
    index, items = (read_objects(args.raw, f"*.{kind}.json") for kind in ("index", "item"))
    check(args.raw, index, items)
    parts = {name: [] for name in PARTS}
    for name, row in split(args):
        records = history_records(row, items, args.max_history)
        parts[name] += records[:1] if name == "test" else records
    for item, tokens in index.items():
        if item in items:
            parts["train"] += item_records("".join(tokens), items[item]["title"])
    files = {f"{name}.jsonl": records for name, records in parts.items() if records}
    how = {"task": "sid", "source": str(args.raw), "seed": args.seed}
    tokens = sorted({token for item in index.values() for token in item})
    sids = sorted({"".join(item) for item in index.values()})
    lines = "".join(f"{token}\n" for token in tokens)
    how |= {"max_history": args.max_history}
    write_parts(args.out, files, how, texts={"tokens.txt": lines, "sids.json": json.dumps(sids)})
    return 0


def split(args):
    """(part, row) of each history. The files' own split is kept where one is called train; else
    each customer's histories are drawn into one part.
    """
    paths = sorted(args.raw.glob("*.csv"))
    own = {path: part_of_name(path) for path in paths}
    rows = [(own[path], row) for path in paths for row in read_histories(path)]
    if not rows:
        raise UserError(f"--raw {args.raw}: there is no *.csv file with histories in it")
    if "train" in own.values():
        return [(part or "train", row) for part, row in rows]
    customers = [row.get("user_id") or number for number, (_, row) in enumerate(rows)]
    distinct = list(dict.fromkeys(customers))
    drawn = shares([""] * len(distinct), [8, 1, 1], args.seed)
    part_of = {customer: PARTS[part] for customer, part in zip(distinct, drawn, strict=True)}
    return [(part_of[customer], row) for customer, (_, row) in zip(customers, rows, strict=True)]


def part_of_name(path):
    """The part that a file's name says, as Shop.valid.csv; None where it says none."""
    words = re.findall("[a-z]+", path.stem.lower())
    names = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
    return next((names[word] for word in words if word in names), None)


def read_objects(folder, pattern):
    """The JSON objects of the files that match, as one."""
    paths = sorted(folder.glob(pattern)) if is_folder(folder) else []
    if not paths:
        raise UserError(f"--raw {folder}: there is no {pattern} in it")
    found = {}
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} is no JSON object: {content!r:.100}")
        if twice := sorted(set(found) & set(content)):
            print(f"warning: {len(twice)} items are in several {pattern}; those of {path} count")
        found |= content
    return found


def check(folder, index, items):
    """Raises UserError for the first item without tokens or title."""
    for item, about in items.items():
        if not isinstance(about, dict) or not isinstance(about.get("description") or "", str):
            raise UserError(f"--raw {folder}: item {item} isn't a title and a description as text")
    for item, tokens in index.items():
        if not tokens or not is_texts(tokens):
            raise UserError(f"--raw {folder}: item {item} has no list of tokens: {tokens!r:.100}")
        if item in items and not isinstance(items[item].get("title"), str):
            raise UserError(f"--raw {folder}: item {item} has no title that is text")
    by_tokens = {}
    for item, tokens in index.items():
        by_tokens.setdefault("".join(tokens), []).append(item)
    shared = {sid: items for sid, items in by_tokens.items() if len(items) > 1}
    if shared:
        sid, example = next(iter(shared.items()))
        count = sum(map(len, shared.values()))
        print(
            f"warning: {count} items have the tokens of another one, e.g. {', '.join(example)} "
            f"{sid}; no model can tell these apart"
        )


def read_histories(path):
    """The rows of a CSV file, their list columns as lists. Raises UserError with the line."""
    with io.TextIOWrapper(open_text(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                for name in LISTS:
                    row[name] = ast.literal_eval(row[name])
                    if not is_texts(row[name]):
                        raise ValueError(f"{name} is no list of texts")
                if not is_texts([row["item_sid"], row["item_title"], row["item_id"]]):
                    raise ValueError("the line is too short")
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}; store it as UTF-8") from None
        except csv.Error as error:
            why = f"{error}; is a quote not closed?"
            raise UserError(f"{path}, after line {reader.line_num}: {why}") from None
        except (KeyError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            raise UserError(f"{path}, line {reader.line_num}: {error!r:.200}") from None


def history_records(row, items, max_history):
    """The records of a history, that for the next id first. The most recent items are kept."""
    ids, titles = (row[name][-max_history:] for name in reversed(LISTS))
    ids, titles, sid = ", ".join(ids), "\n".join(titles), row["item_sid"]
    description = items.get(row["item_id"], {}).get("description")
    asked = [("next_id", ids, sid), ("next_title", ids, row["item_title"])]
    asked += [("next_description", ids, description)] if description else []
    asked += [("titles_to_next_id", titles, sid)]
    preference = row.get("user_preference")
    asked += [("preference_to_next_id", f"{preference}. So far: {ids}", sid)] if preference else []
    return [record(*task) for task in asked]


def item_records(sid, title):
    return [record("id_to_title", sid, title), record("title_to_id", title, sid)]


def record(task, given, answer):
    turns = [("user", ASK[task].format(given)), ("assistant", answer)]
    conversation = [{"role": role, "content": content} for role, content in turns]
    return {"conversations": conversation, "task": task, "source": "sid"}


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--raw", type=Path, required=True, help="folder of index, items and histories")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--seed", type=number(int, 0), default=1, help="of the split (%(default)s)")
    add("--max_history", type=number(int, 1), default=10, help="latest items (%(default)s)")
    return prepare_sid(parser.parse_args(argv))


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
