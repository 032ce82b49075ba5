"""Read data files: JSONL and JSON arrays, optionally gzipped. Other kinds of files are reported
with how to convert them.
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
DECOMPRESS = "decompress it first"
KINDS = {  # first bytes of an unsupported file: (what it is, what to do)
    b"PAR1": ("a Parquet file", TO_JSONL.format("read_parquet")),
    b"ARROW1": ("an Arrow file", TO_JSONL.format("read_feather")),
    b"PK\x03\x04": ("a zip archive or an Excel sheet", f"{DECOMPRESS}, or save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", DECOMPRESS),
    b"BZh": ("compressed with bzip2", DECOMPRESS),
    b"\xfd7zXZ": ("compressed with xz", DECOMPRESS),
    b"%PDF": ("a PDF file", "write its text as records"),
    b"GGUF": ("a GGUF file", "give the folder with config.json it was made from"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"<!doctype": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
}


def read_records(path, notes=None):
    """Yield (line number, record) for a JSONL file, streamed, or a JSON array, read into memory.

    A record is a dict; anything that isn't a JSON object is yielded as a ValueError instead.
    Reading stops at a syntax error in an array, and at the first value after an array. The Counter
    notes counts records with a repeated key. Raises UserError for a missing or unsupported file.
    """
    notes = Counter() if notes is None else notes
    repeated = set()

    def to_dict(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):
            repeated.update(record)
        return record

    with open_data_file(path) as file:
        try:
            lines = (line.strip(codecs.BOM_UTF8 + b" \t\r\n") for line in file)
            first_line = next(filter(None, lines), b"")
            file.seek(0)
            is_array = first_line.startswith(b"[") and not is_conversation(parse_line(first_line))
            items = array_items(file, to_dict) if is_array else line_items(file, to_dict)
            for index, (number, item) in enumerate(items):
                if repeated:
                    notes["records with a repeated key: the last value is used"] += 1
                    repeated.clear()
                if is_conversation(item):
                    item = {"messages": item}
                if not isinstance(item, dict | ValueError):
                    item = ValueError(f"expected a JSON object, got {type(item).__name__}")
                if index == 0 and isinstance(item, ValueError) and not is_array:
                    require_lines(path)
                yield number, item
        except (OSError, EOFError, zlib.error) as error:  # the last two: damaged gzip files
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read: {reason}") from None


def parse_line(line):
    """Return the value of a line of JSON, or None if it isn't JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def is_message(value):
    return isinstance(value, dict) and bool({"role", "from"} & set(value))


def is_conversation(value):
    """Return whether a value is a list of messages."""
    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        return False
    return all({"content", "value", "tool_calls"} & set(message) for message in value)


def open_data_file(path):
    """Open a text file to read bytes, decompressing gzip. Raises UserError, naming the kind, if its
    first bytes belong to another file type.
    """
    file = open_file(path)
    start = file.read(64)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        file.close()
        return gzip.open(path)
    for magic, (kind, hint) in KINDS.items():
        if start.lstrip().lower().startswith(magic.lower()):
            file.close()
            raise UserError(f"{path} is {kind}; {hint}")
    return file


def require_lines(path):
    """Raise UserError, naming the kind, if a file whose first line isn't JSON is multi-line JSON,
    CSV or plain text. Reads the first 64 MB.
    """
    with open_data_file(path) as file:
        text = file.read(1 << 26).decode("utf-8-sig", "replace").lstrip()
    head, kind = text.partition("\n")[0].rstrip("\r"), ""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        value, end = None, 0
    if isinstance(value, dict | list) and "\n" in text[:end]:
        kind = "JSON whose first value is spread over several lines"
        hint = "write one record per line (jq -c), or one array of all records"
        if isinstance(value, dict):
            hint += list_hint(value)
    elif "\n{" in text:
        return  # other lines may be records
    elif Path(path).suffix in (".csv", ".tsv") or CSV_HEADER.fullmatch(head):
        kind = "CSV"
        hint = TO_JSONL.format("read_table" if "\t" in head else "read_csv")
    elif Path(path).suffix in (".txt", ".md"):
        kind = "plain text"
        hint = 'for pretraining, write each document as a line {"text": "..."}'
    if kind:
        raise UserError(f"{path} is {kind}; {hint}")


def list_hint(record):
    """Return a hint if a key of an unusable record holds a list of records, otherwise ""."""
    for key, items in record.items():
        if not isinstance(items, list) or not items or not isinstance(items[0], dict):
            continue
        if not is_message(items[0]):
            return f'; "{key}" holds a list of records: write only that list to a file'
    return ""


def line_items(file, to_dict):
    """Yield (line number, value or ValueError) for each line of a JSONL file."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield number, json.loads(text, object_pairs_hook=to_dict)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON: {error.msg}, at character {error.colno}")
        except (ValueError, RecursionError) as error:  # invalid UTF-8, or too many digits
            yield number, ValueError(f"invalid JSON: {error}")


def array_items(file, to_dict):
    """Yield (line number, item or ValueError) for each item of a JSON array."""
    # Invalid UTF-8 becomes an unpaired surrogate, so that only its own record is bad.
    text = file.read().decode("utf-8-sig", "surrogateescape")
    decode = json.JSONDecoder(object_pairs_hook=to_dict).raw_decode
    position = text.index("[") + 1
    line = 1 + text.count("\n", 0, position)
    while True:
        start = SEPARATOR.match(text, position).end()
        line += text.count("\n", position, start)
        try:
            if text.startswith("]", start):
                break
            item, position = decode(text, start)
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"not JSON; the rest of the file is ignored: {error}")
            return
        yield line, item
        line += text.count("\n", start, position)
    if text[start + 1 :].strip():
        problem = "unexpected text after the JSON array; use one array, or one object per line"
        yield line, ValueError(problem)
