"""Reading data files: JSONL, JSON arrays, both also packed with gzip, and a sentence for each other
kind of file that people have.
"""

import codecs
import gzip
import json
import re
import zlib
from collections import Counter
from pathlib import Path

from common import UserError, open_file

SEPARATOR = re.compile(r"[\s,]*")  # between the items of a JSON array
CSV_HEADER = re.compile(r'[\w "]+([,;\t][\w "]+)+')
TO_JSONL = "convert it, e.g. by pandas.{}(FILE).to_json('x.jsonl', orient='records', lines=True)"
UNPACK = "unpack it, and give what is in it"
KINDS = {  # the first bytes of files of another kind: what it is, and the remedy
    b"PAR1": ("a Parquet file", TO_JSONL.format("read_parquet")),
    b"ARROW1": ("an Arrow file", TO_JSONL.format("read_feather")),
    b"PK\x03\x04": ("a zip archive or an Excel sheet", f"{UNPACK}, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("packed with zstd", UNPACK),
    b"BZh": ("packed with bzip2", UNPACK),
    b"\xfd7zXZ": ("packed with xz", UNPACK),
    b"%PDF": ("a PDF file", "write its text as records"),
    b"GGUF": ("a GGUF file", "give the folder with config.json that it was made of"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"<!doctype": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}


def read_records(path, notes=None):
    """Yield (line number, record) of a JSONL file or of one JSON array. Only an array is held in
    memory.

    A record is a dict; what is not a JSON object is yielded as a ValueError in its place. Reading
    ends where an array is broken, and at the first value after an array. The Counter notes counts
    records in which a key is repeated. Raises UserError for a file that is missing or of another
    kind.
    """
    notes, repeated = Counter() if notes is None else notes, set()

    def to_dict(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):
            repeated.update(record)
        return record

    with open_text(path) as file:
        try:
            lines = (line.strip(codecs.BOM_UTF8 + b" \t\r\n") for line in file)
            first_line = next(filter(None, lines), b"")
            file.seek(0)
            is_array = first_line.startswith(b"[") and not is_conversation(parse_line(first_line))
            items = array_items(file, to_dict) if is_array else line_items(file, to_dict)
            for index, (number, item) in enumerate(items):
                if repeated:
                    notes["records with a repeated key, of which the last value is taken"] += 1
                    repeated.clear()
                if is_conversation(item):
                    item = {"messages": item}
                if not isinstance(item, dict | ValueError):
                    item = ValueError(f"not a record in braces, but {type(item).__name__}")
                if index == 0 and isinstance(item, ValueError) and not is_array:
                    require_lines(path)
                yield number, item
        except (OSError, EOFError, zlib.error) as error:  # the last two: of a damaged gzip file
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read: {reason}") from None


def parse_line(line):
    """Return the value of a line of JSON, None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_message(value):
    return isinstance(value, dict) and bool({"role", "from"} & set(value))


def is_conversation(value):
    """Whether a value is a list of messages."""
    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        return False
    return all({"content", "value", "tool_calls"} & set(message) for message in value)


def open_text(path):
    """Return a text file, open to be read as bytes; a gzip file is unpacked on the way. Raises
    UserError, which names the kind, for what its first bytes show to be no text.
    """
    file = open_file(path)
    start = file.read(64)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        file.close()
        return gzip.open(path)
    for magic, (kind, remedy) in KINDS.items():
        if start.lstrip().lower().startswith(magic.lower()):
            file.close()
            raise UserError(f"{path} is {kind}; {remedy}")
    return file


def require_lines(path):
    """Raise UserError, which names the kind, if a file whose first line isn't JSON is JSON over
    several lines, CSV or plain text. The first 64 MB are looked at.
    """
    with open_text(path) as file:
        text = file.read(1 << 26).decode("utf-8-sig", "replace").lstrip()
    head, kind = text.partition("\n")[0].rstrip("\r"), ""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        value, end = None, 0
    if isinstance(value, dict | list) and "\n" in text[:end]:
        kind = "JSON whose first value is spread over several lines"
        remedy = "write each record on a line of its own (jq -c), or all in one array"
        remedy += list_hint(value) if isinstance(value, dict) else ""
    elif "\n{" in text:
        return  # other lines may be records
    elif Path(path).suffix in (".csv", ".tsv") or CSV_HEADER.fullmatch(head):
        kind = "CSV"
        remedy = TO_JSONL.format("read_table" if "\t" in head else "read_csv")
    elif Path(path).suffix in (".txt", ".md"):
        kind = "plain text"
        remedy = 'for pretraining, write each document as a line {"text": "..."}'
    if kind:
        raise UserError(f"{path} is {kind}; {remedy}")


def list_hint(record):
    """Return the end of a sentence about a record that can't be used: under which key it holds a
    list of records. Returns "" for a record without such a key.
    """
    for key, items in record.items():
        are_records = isinstance(items, list) and items and isinstance(items[0], dict)
        if are_records and not is_message(items[0]):
            return f'; "{key}" holds a list of records: write only that list into a file'
    return ""


def line_items(file, to_dict):
    """Yield (line number, its value or a ValueError) of a JSONL file."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield number, json.loads(text, object_pairs_hook=to_dict)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg}, at character {error.colno}")
        except (ValueError, RecursionError) as error:  # bad UTF-8, a number of too many digits
            yield number, ValueError(f"JSON that cannot be read: {error}")


def array_items(file, to_dict):
    """Yield (line number, item or ValueError) of a JSON array."""
    # A byte that is not UTF-8 becomes a lone surrogate, which makes only its own record a bad one.
    text = file.read().decode("utf-8-sig", "surrogateescape")
    decode = json.JSONDecoder(object_pairs_hook=to_dict).raw_decode
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    while True:
        start = SEPARATOR.match(text, at).end()
        line += text.count("\n", at, start)
        try:
            if text.startswith("]", start):
                break
            item, at = decode(text, start)
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"not JSON, and reading ends there: {error}")
            return
        yield line, item
        line += text.count("\n", start, at)
    if text[start + 1 :].strip():
        end = "the JSON array ends here; give one array, or a record in braces a line"
        yield line, ValueError(end)
