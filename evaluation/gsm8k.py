"""The judge of GSM8K, whose answers are numbers.

Strict: the official rule (github.com/openai/grade-school-math): the number after the first "####",
without commas, must be the same text. Lenient: any usual notation of the same number.
"""

import re
from fractions import Fraction

OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−]\s?)?(?:[$€£](?P<inner>-)?)?"
    r"(?P<digits>(?:(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)|(?<!\d)\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?P<power>e[+-]?\d{1,3}\b)?(?P<over>\s?/\s?\d+(?![\d/]))?"
)
ANSWER = re.compile(
    r"\banswer(?:\s+[a-z]+){0,4}?\s*(?:\bis\b|\bare\b|=|:)+|(?<![\w])A:", re.IGNORECASE
)
SPELLINGS = (
    (r"\{,\}", ","),
    (  # 1'000'000 and 1 000 000; but 3 100 is two numbers in "3 100 dollar bills"
        r"(?<![\d.,/])(\d{1,3})((?:[\u00a0\u2009\u202f'’]\d{3})+"
        r"|(?: \d{3}){2,}| 000| \d{3}(?! [a-zA-Z]))(?![\d/-])",
        lambda groups: groups[1] + re.sub(r"\D", "", groups[2]),
    ),
    (r"(?<=\d)[kK]\b", "e3"),
    (r"(?<=\d)\s?thousand\b", "e+03"),
    (r"(?<=\d)\s?million\b", "e+06"),
    (r"(?<=\d)\s?billion\b", "e+09"),
    (r"\\[,!;]|\*\*", ""),
    (r"\\[dt]?frac\{(-?\d{1,20})\}\{(\d{1,20})\}", r"\1/\2"),
    (r"\s?(?:\\times|×|\*|x)\s?10\s?\^\s?\{?(-?\d{1,3})\}?", r"e\1"),
    (  # 2 1/2 is 5/2
        r"(?<![\d/.])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d/])",
        lambda mixed: f"{int(mixed[1]) * int(mixed[3]) + int(mixed[2])}/{mixed[3]}",
    ),
)
LONGEST, LONGEST_NUMBER = 20_000, 1_000  # characters


def extract_answer(text, strict=False):
    """Return the final number of a solution as text, without commas, currency and units; None if it
    has no number. Fractions are kept: "3/4".
    """
    if strict:
        match = OFFICIAL.search(text)
        return match[1].strip().replace(",", "") if match else None
    text = text[-LONGEST:]
    for spelling, replacement in SPELLINGS:
        text = re.sub(spelling, replacement, text)
    text = text.replace("\\$", "$")
    for statement in answer_statements(text):
        result = statement.rpartition("=")[2]
        numbers = list(NUMBER.finditer(result)) or list(NUMBER.finditer(statement))
        if numbers:
            return format_number(numbers[0])
    numbers = list(NUMBER.finditer(text))
    return format_number(numbers[-1]) if numbers else None


def is_correct(answer, gold, strict=False):
    """Return whether answer and gold, a solution or a number, have the same final number."""
    expected = extract_answer(gold, strict) or extract_answer(f"#### {gold}", strict)
    number = extract_answer(answer, strict)
    if number is None or expected is None:
        return False
    if strict or number == expected or max(len(number), len(expected)) > LONGEST_NUMBER:
        return number == expected
    # "4 million", 4e+06, is 4000000, or 4 where the question asks for millions.
    readings = (number, number.partition("e+0")[0])
    try:
        return exact_value(expected) in map(exact_value, readings)
    except ZeroDivisionError:
        return False


def exact_value(number):
    """Return the exact value of a number or fraction from `extract_answer`: 0.5 is 1/2."""
    number, _, over = number.partition("/")
    return Fraction(number) / Fraction(over or 1)


def answer_statements(text):
    """Yield the parts of a solution that state its answer, the most reliable first."""
    if "####" in text:
        yield after_mark(text)
    boxed = text.rfind("\\boxed")
    if boxed >= 0:
        yield text[boxed + 6 :].partition("\n")[0].partition("}")[0]
    stated = after_words(text)
    if stated is not None:
        yield stated


def after_mark(text):
    """Return the line after the last "####"."""
    return text.rpartition("####")[2].strip().partition("\n")[0]


def after_words(text):
    """Return the sentence after the last "the answer is", or None."""
    matches = list(ANSWER.finditer(text))
    if not matches:
        return None
    return re.split(r"\.(?:\s|$)|\n", text[matches[-1].end() :].lstrip(), maxsplit=1)[0]


def format_number(number):
    minus = "-" if number["sign"] or number["inner"] else ""
    over = (number["over"] or "").replace(" ", "")
    return minus + number["digits"].replace(",", "") + (number["power"] or "") + over
