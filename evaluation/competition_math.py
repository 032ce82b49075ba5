r"""The judge of MATH (Hendrycks et al., arXiv:2103.03874), whose answers are in \boxed{}.

Strict: the official rule (github.com/hendrycks/math): the last \boxed{}, compared as normalized
text. Lenient: mathematical equality, with the optional package math-verify.
"""

import importlib.metadata
import logging
import math
import os
import re
import threading

from evaluation.gsm8k import NUMBER, after_mark, after_words

LONGEST, LONGEST_ANSWER = 20_000, 300  # characters of a solution, from its end, and of an answer
SECONDS = 5  # of a lenient comparison
LARGEST_POWER = 10_000
TINY, ZERO = 1e-3, 1e-90  # below TINY, decimals are compared by their relative difference
BASE = re.compile(r"\d[0-9A-Z]*_\{?\d")  # a number in another base, as 2516_8
# Towers of powers and factorials of large numbers, which would never finish computing.
TOWER = r"\^\s*(?:\{[^{}]*\^|\{[^{}]*\}\s*\^|\d+\s*\^)"
ENDLESS = re.compile(rf"{TOWER}|\d{{4,}}\s*!|[)}}!\]]\s*!|[eE]\d{{4,}}")


def lenient_judge():
    """Return the lenient judge's name and version, or None if math-verify isn't installed."""
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        return None


def extract_answer(text, strict=False):
    r"""Return the content of the last \boxed{} or \fbox{}, or None.

    If there is no box, the lenient rule takes the text after "####" or "the answer is", else the
    last formula between dollar signs, else the last number.
    """
    text = text[-LONGEST:]
    boxed = last_boxed(text)
    if boxed is not None or strict:
        return boxed
    statement = after_mark(text) if "####" in text else after_words(text)
    formulas = re.findall(r"(?<!\\)\$([^$]+)(?<!\\)\$|\\\((.+?)\\\)", statement or text)
    if formulas:
        return "".join(formulas[-1]).strip()
    numbers = [match[0].strip() for match in NUMBER.finditer(text)]
    return statement.strip() if statement else (numbers or [None])[-1]


def last_boxed(text):
    r"""Return the content of the last \boxed{}, or without one of the last \fbox{}, or None."""
    begin = text.rfind("\\boxed")
    if begin < 0:
        begin = text.rfind("\\fbox")
    if begin < 0:
        return None
    content = text[begin:].removeprefix("\\boxed").removeprefix("\\fbox")
    if content.startswith(" ") and not content.lstrip().startswith("{"):  # \boxed 7
        return content.partition("$")[0].partition("\n")[0].strip()
    depth = 0
    for index, letter in enumerate(content):
        depth += (letter == "{") - (letter == "}")
        if letter == "}" and depth == 0:
            return content[content.index("{") + 1 : index]
    return None


def is_equiv(a, b, strict=False):
    """Return whether two answers from extract_answer are equal. None equals nothing.

    Without math-verify, the lenient rule returns None where the official rule doesn't decide.
    """
    if a is None or b is None:
        return False
    if normalize(a) == normalize(b):
        return True
    if strict:
        return False
    return same_mathematics(a, b) if lenient_judge() else None


def same_mathematics(a, b):
    """Return whether math-verify finds two answers equal; False on timeout."""
    if max(len(a), len(b)) > LONGEST_ANSWER or not (is_bounded(a) and is_bounded(b)):
        return False
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it cannot read
    # Its timeout uses a signal, which works on POSIX in the main thread.
    timed = os.name == "posix" and threading.current_thread() is threading.main_thread()
    seconds = SECONDS if timed else None
    if BASE.search(a) or BASE.search(b):  # math-verify drops the base
        return re.sub(r"[\s{}]", "", a) == re.sub(r"[\s{}]", "", b)
    a, b = (parse(f"\\boxed{{{text}}}", parsing_timeout=seconds) for text in (a, b))
    return bool(
        a and b and verify(a, b, timeout_seconds=seconds) and not differ_in_tiny_numbers(a[0], b[0])
    )


def differ_in_tiny_numbers(a, b):
    """Return whether two expressions that math-verify finds equal, maybe lists, differ in a number
    so small that it was rounded to 0. Compares 100 digits.
    """
    is_number = [getattr(x, "is_number", False) and x.is_real for x in (a, b)]
    if not all(is_number):
        parts = [getattr(x, "args", ()) for x in (a, b)]
        return len(parts[0]) == len(parts[1]) and any(map(differ_in_tiny_numbers, *parts))
    size = max(abs(a.evalf(100)), abs(b.evalf(100)))
    return bool(ZERO < size < TINY and abs((a - b).evalf(100)) > TINY * size)


def is_bounded(text):
    """Return whether the numbers in a text can be computed: no power towers or huge factorials."""
    powers = [int(power) for power in re.findall(r"\^\s*\{?\s*-?(\d{1,9})", text)]
    product = math.prod(max(power, 1) for power in powers)
    return product <= LARGEST_POWER and not ENDLESS.search(text)


def normalize(text):
    """Return the official normal form, or the text itself where the official code raises."""
    form = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    form = form.replace("tfrac", "frac").replace("dfrac", "frac")
    for removed in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        form = form.replace(removed, "")
    form, *units = form.split("\\text{ ")
    if len(units) > 1:
        return text
    for old, new in (("\\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0.")):
        form = form.replace(old, new)
    form = "0" + form if form.startswith(".") else form
    left, equals, right = form.partition("=")
    form = right if equals and "=" not in right and len(left) <= 2 else form
    if re.search(r"\\sqrt(?=\\sqrt|$)", form):
        return text
    form = re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", form).replace(" ", "")
    if re.search(r"\\frac(?=\\frac|$)", form):
        return text
    if not re.search(r"\\frac[^{](?=\\frac|$)", form):
        form = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", form)
        form = re.sub(r"\\frac([^{]){", r"\\frac{\1}{", form)
    form = "\\frac{1}{2}" if form == "0.5" else form
    whole = r"(0|-?[1-9][0-9]*)"
    return re.sub(rf"\A{whole}/{whole}\Z", r"\\frac{\1}{\2}", form)
