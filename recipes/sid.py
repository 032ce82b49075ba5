"""Convert a sequential-recommendation dataset with semantic ids to chat format.

    python recipes/sid.py --raw FOLDER --out out/sid

Reads *.index.json, {item: tokens}; *.item.json, {item: {"title", "description"}}; and *.csv with
the histories, whose list columns are Python literals.
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
from dataset.jsonl import open_data_file
from dataset.prepare import assign_parts, write_parts

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
    """Write train, valid and test conversations, tokens.txt for --extend_tokens, sids.json with all
    ids, and a manifest. The test part only asks for the next id. Returns 0.
    """
    index, items = (read_objects(args.raw, f"*.{kind}.json") for kind in ("index", "item"))
    require_valid(args.raw, index, items)
    parts = {name: [] for name in PARTS}
    for name, row in split(args):
        records = history_records(row, items, args.max_history)
        parts[name] += records[:1] if name == "test" else records
    for item, tokens in index.items():
        if item in items:
            parts["train"] += item_records("".join(tokens), items[item]["title"])
    files = {f"{name}.jsonl": records for name, records in parts.items() if records}
    manifest = {"task": "sid", "source": str(args.raw), "seed": args.seed}
    tokens = sorted({token for item in index.values() for token in item})
    sids = sorted({"".join(item) for item in index.values()})
    lines = "".join(f"{token}\n" for token in tokens)
    manifest |= {"max_history": args.max_history}
    texts = {"tokens.txt": lines, "sids.json": json.dumps(sids)}
    write_parts(args.out, files, manifest, texts=texts)
    return 0


def split(args):
    """Return (part, row) for each history. Keep the split of the files if one is named train;
    otherwise assign each customer's histories to one part.
    """
    paths = sorted(args.raw.glob("*.csv"))
    file_parts = {path: part_in_name(path) for path in paths}
    rows = [(file_parts[path], row) for path in paths for row in read_histories(path)]
    if not rows:
        raise UserError(f"--raw {args.raw}: it has no *.csv file with histories")
    if "train" in file_parts.values():
        return [(part or "train", row) for part, row in rows]
    customers = [row.get("user_id") or number for number, (_, row) in enumerate(rows)]
    distinct = list(dict.fromkeys(customers))
    part_indices = assign_parts([""] * len(distinct), [8, 1, 1], args.seed)
    pairs = zip(distinct, part_indices, strict=True)
    part_of_customer = {customer: PARTS[part] for customer, part in pairs}
    pairs = zip(customers, rows, strict=True)
    return [(part_of_customer[customer], row) for customer, (_, row) in pairs]


def part_in_name(path):
    """Return the part in a file name, e.g. Shop.valid.csv, or None."""
    words = re.findall("[a-z]+", path.stem.lower())
    names = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
    return next((names[word] for word in words if word in names), None)


def read_objects(folder, pattern):
    """Merge the JSON objects of all matching files."""
    paths = sorted(folder.glob(pattern)) if is_folder(folder) else []
    if not paths:
        raise UserError(f"--raw {folder}: it has no {pattern}")
    objects = {}
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} isn't a JSON object: {content!r:.100}")
        if twice := sorted(set(objects) & set(content)):
            print(f"warning: {len(twice)} items are in several {pattern}; using {path}")
        objects |= content
    return objects


def require_valid(folder, index, items):
    """Raise UserError for an invalid item; warn about items that share tokens."""
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
    shared = {sid: names for sid, names in by_tokens.items() if len(names) > 1}
    if shared:
        sid, example = next(iter(shared.items()))
        count = sum(map(len, shared.values()))
        print(
            f"warning: {count} items share their tokens with another, e.g. {', '.join(example)} "
            f"{sid}; no model can distinguish these"
        )


def read_histories(path):
    """Yield the rows of a CSV file with parsed list columns. Raises UserError with the line."""
    with io.TextIOWrapper(open_data_file(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                for name in LISTS:
                    row[name] = ast.literal_eval(row[name])
                    if not is_texts(row[name]):
                        raise ValueError(f"{name} isn't a list of texts")
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
    """Return the records of a history, the next-id task first. Uses the most recent items."""
    ids, titles = (row[name][-max_history:] for name in reversed(LISTS))
    ids, titles, sid = ", ".join(ids), "\n".join(titles), row["item_sid"]
    description = items.get(row["item_id"], {}).get("description")
    tasks = [("next_id", ids, sid), ("next_title", ids, row["item_title"])]
    tasks += [("next_description", ids, description)] if description else []
    tasks += [("titles_to_next_id", titles, sid)]
    preference = row.get("user_preference")
    tasks += [("preference_to_next_id", f"{preference}. So far: {ids}", sid)] if preference else []
    return [record(*task) for task in tasks]


def item_records(sid, title):
    return [record("id_to_title", sid, title), record("title_to_id", title, sid)]


def record(task, value, answer):
    turns = [("user", ASK[task].format(value)), ("assistant", answer)]
    conversation = [{"role": role, "content": content} for role, content in turns]
    return {"conversations": conversation, "task": task, "source": "sid"}


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--raw", type=Path, required=True, help="folder of index, items and histories")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--seed", type=number(int, 0), default=1, help="seed of the split (%(default)s)")
    add("--max_history", type=number(int, 1), default=10, help="latest items (%(default)s)")
    return prepare_sid(parser.parse_args(argv))


if __name__ == "__main__":
    with report_user_errors():
        sys.exit(main())
