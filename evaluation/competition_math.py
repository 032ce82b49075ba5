r"""The judge of MATH (Hendrycks et al., arXiv:2103.03874), whose answers stand in \boxed{}.

Strict: the official rule (github.com/hendrycks/math): the last \boxed{}, and equal text once some
spellings are the same. Lenient: the same mathematics, by the optional package math-verify.
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
# Towers of powers and factorials of large numbers, which no library ends to compute.
TOWER = r"\^\s*(?:\{[^{}]*\^|\{[^{}]*\}\s*\^|\d+\s*\^)"
ENDLESS = re.compile(rf"{TOWER}|\d{{4,}}\s*!|[)}}!\]]\s*!|[eE]\d{{4,}}")


def lenient_judge():
    """The lenient judge and its version; None where math-verify is not installed."""
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        return None


def extract_answer(text, strict=False):
    r"""The content of the last \boxed{} or \fbox{}; None if there is none.

    Lenient, where there is no box: what follows "####" or "the answer is", else the last formula
    between dollar signs, else the last number.
    """
    text = text[-LONGEST:]
    boxed = last_boxed(text)
    if boxed is not None or strict:
        return boxed
    place = after_mark(text) if "####" in text else after_words(text)
    formulas = re.findall(r"(?<!\\)\$([^$]+)(?<!\\)\$|\\\((.+?)\\\)", place or text)
    if formulas:
        return "".join(formulas[-1]).strip()
    numbers = [found[0].strip() for found in NUMBER.finditer(text)]
    return place.strip() if place else (numbers or [None])[-1]


def last_boxed(text):
    begin = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if begin < 0:
        return None
    rest = text[begin:].removeprefix("\\boxed").removeprefix("\\fbox")
    if rest.startswith(" ") and not rest.lstrip().startswith("{"):  # \boxed 7
        return rest.partition("$")[0].partition("\n")[0].strip()
    depth = 0
    for at, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if letter == "}" and depth == 0:
            return rest[rest.index("{") + 1 : at]
    return None


def is_equiv(a, b, strict=False):
    """Whether two answers, as extract_answer gives them, are the same. None equals nothing.

    Lenient without math-verify, the result is None where the official rule does not decide.
    """
    if a is None or b is None:
        return False
    if official(a) == official(b):
        return True
    if strict:
        return False
    return same_mathematics(a, b) if lenient_judge() else None


def same_mathematics(a, b):
    """Whether math-verify finds two answers equal; False for what it could not end to compute."""
    if max(len(a), len(b)) > LONGEST_ANSWER or not (is_bounded(a) and is_bounded(b)):
        return False
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it cannot read
    # Its time limit is a signal: it works on POSIX, in the main thread.
    timed = os.name == "posix" and threading.current_thread() is threading.main_thread()
    seconds = SECONDS if timed else None
    if BASE.search(a) or BASE.search(b):  # math-verify drops the base
        return re.sub(r"[\s{}]", "", a) == re.sub(r"[\s{}]", "", b)
    a, b = (parse(f"\\boxed{{{text}}}", parsing_timeout=seconds) for text in (a, b))
    return bool(
        a and b and verify(a, b, timeout_seconds=seconds) and not differ_though_tiny(a[0], b[0])
    )


def differ_though_tiny(a, b):
    """Whether two expressions that math-verify finds equal differ in a number so small that it was
    rounded to 0; they may be lists of numbers. 100 digits tell such a number from 0.
    """
    is_number = [getattr(x, "is_number", False) and x.is_real for x in (a, b)]
    if not all(is_number):
        parts = [getattr(x, "args", ()) for x in (a, b)]
        return len(parts[0]) == len(parts[1]) and any(map(differ_though_tiny, *parts))
    size = max(abs(a.evalf(100)), abs(b.evalf(100)))
    return bool(ZERO < size < TINY and abs((a - b).evalf(100)) > TINY * size)


def is_bounded(text):
    """Whether the numbers in a text can be computed: no towers of powers, no huge factorials."""
    powers = [int(power) for power in re.findall(r"\^\s*\{?\s*-?(\d{1,9})", text)]
    return not ENDLESS.search(text) and math.prod(powers) <= LARGEST_POWER


def official(text):
    """The official normal form; the text itself where the official rules break off."""
    form = text
    for old, new in (
        *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
        *(("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")),
    ):
        form = form.replace(old, new)
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
