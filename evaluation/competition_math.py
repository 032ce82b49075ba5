r"""The judge of MATH (Hendrycks et al., arXiv:2103.03874), whose answers stand in \boxed{}.

Strict: the official rule (github.com/hendrycks/math): the last \boxed{}, and equal text once some
spellings are the same. Lenient: what models really write, and the same mathematics: numbers by
their value, sets in any order, tuples and intervals with their brackets.
"""

import re

from evaluation.expressions import is_readable, proportional, same_value
from evaluation.gsm8k import NUMBER, after_mark, after_words

LONGEST = 20_000  # characters of a solution, from its end
LONGEST_ANSWER = 1_000
OPENING, CLOSING = "([{", ")]}"
UNIT = r"(?:[a-zA-Z]{3,}|cm|mm|km|ft|in|yd|mi|kg|mg|lb|oz|ml|mL)(?:\s?\^\s?\{?[23]\}?)?"
WORDS = re.compile(r"\(?[a-zA-Z]{2,}(?:[\s'-]+[a-zA-Z]+)*\)?\.?")
SPELLINGS = (
    (r"\\\$|\$|€|£|(?<!\\)\\[!,;:]", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-z])", ""),
    (r"\\%|%|°|\^\s?\{?\s?\\circ\s?\}?|\\degrees?(?![a-z])", ""),
    (r"~|(?<!\\)\\ |\\quad", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"−", "-"),
    (r"√", r"\\sqrt"),
    (r"∞", r"\\infty"),
    (r"π", r"\\pi"),
    (r"∪", r"\\cup"),
    (r"\\leq?(?![a-z])|≤|<=", r"\\le "),
    (r"\\geq?(?![a-z])|≥|>=", r"\\ge "),
    (r"\{,\}", ","),
    (r"(\\sqrt)\s?(\d)", r"\1{\2}"),
    (r"(\\frac)\s?(\d)\s?(?=[\d{])", r"\1{\2}"),
    (r"(\\frac\{[^{}]*\})\s?(\d)", r"\1{\2}"),
    (r"\\(?:mathrm|mathbf|operatorname|text(?:bf|it|rm)?|mbox)\s?\{", r"\\text{"),
    (r"\s?(?:\\times|×)\s?10\s?\^\s?\{?(-?\d{1,3})\}?", r"e\1"),
    (r"\\text\{\s*(?:or|and)\s*\}|\s(?:or|and)\s", ","),
    (r"(?<![\d.])(\d+)\s?(\\frac\{\d+\}\{\d+\})", r"(\1+\2)"),  # a mixed number
    (r"(?<![\d/.])(\d+)\s+(\d+/\d+)(?![\d/])", r"(\1+\2)"),
)


# ---------------------------------------------------------------------------------------- extract


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


# ------------------------------------------------------------------------------------------ judge


def is_equiv(a, b, strict=False):
    """Whether two answers, as extract_answer gives them, are the same. None equals nothing."""
    if a is None or b is None:
        return False
    if official(a) == official(b):
        return True
    if strict or max(len(a), len(b)) > LONGEST_ANSWER:
        return False
    return same(tidy(a), tidy(b))


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


def tidy(text):
    """One spelling for what is written in several; units and currency are left out."""
    for spelling, replacement in SPELLINGS:
        text = re.sub(spelling, replacement, text)
    text = text.strip().rstrip(".").strip()
    text = re.sub(r"(?<=[\d})])\s*\\text\{[^{}]*\}(?:\^\{?[23]\}?)?", "", text)  # a unit
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(rf"(?<=[\d}})])\s+{UNIT}(?:\s+{UNIT})*$", "", text)
    if not re.search(r"[\[({]", text):
        thousands = r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])"
        text = re.sub(thousands, lambda number: number[0].replace(",", ""), text)
    return re.sub(r"\s+", " ", text).strip()


def same(a, b, depth=0):
    if a.replace(" ", "") == b.replace(" ", "") != "":
        return True
    if depth > 5:
        return False
    for split, ordered in ((unions, False), (rows, True), (entries, True)):
        left, right = split(a), split(b)
        if len(left) > 1 or len(right) > 1:
            return all_same(left, right, ordered, depth)
    left, right = bracketed(a), bracketed(b)
    if left and right:
        return left[0] == right[0] and all_same(left[1], right[1], left[0] != "{}", depth)
    if left or right:
        return False
    if a.count("=") == b.count("=") == 1 and proportional(a.split("="), b.split("=")):
        return True
    a, b = value_of(a), value_of(b)
    words = [text.strip("().").lower() for text in (a, b) if WORDS.fullmatch(text)]
    return (len(words) == 2 and words[0] == words[1]) or same_value(a, b)


def all_same(left, right, ordered, depth):
    if len(left) != len(right):
        return False
    if ordered:
        return all(same(a, b, depth + 1) for a, b in zip(left, right, strict=True))
    right = list(right)
    for item in left:
        twin = next((other for other in right if same(item, other, depth + 1)), None)
        if twin is None:
            return False
        right.remove(twin)
    return True


def value_of(text):
    """The right side of "x = 5", "f(x) = 2x" and "x \\in [0, 1]"; the text where it is no such."""
    return re.sub(
        r"^\s*[a-zA-Z](?:_\{?\w\}?)?(?:\([a-zA-Z]\))?\s*(?:=|\\in(?![a-z]))", "", text
    ).strip()


def pieces(text, separator):
    """The parts of a text between separators that stand in no brackets."""
    found, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in OPENING) - (letter in CLOSING)
        if depth == 0 and at >= begin and text.startswith(separator, at):
            found.append(text[begin:at].strip())
            begin = at + len(separator)
    return [*found, text[begin:].strip()]


def unions(text):
    return pieces(value_of(text), "\\cup")


def entries(text):
    return pieces(text, ",")


def rows(text):
    """The rows of a matrix, each as its entries between commas."""
    inner = re.fullmatch(
        r"\\begin\{([pbv]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", text, re.DOTALL
    )
    if not inner:
        return [text]
    lines = [line for line in inner[2].split("\\\\") if line.strip()]
    return ["matrix", *(f"({line.replace('&', ',')})" for line in lines)]


def bracketed(text):
    """(its two brackets, its entries) of a set, a tuple or an interval; None of anything else."""
    text, is_set = value_of(text), text.rstrip().endswith("\\}")
    text = text.replace("\\{", "{").replace("\\}", "}")
    if len(text) < 2 or text[0] not in OPENING or text[-1] not in CLOSING:
        return None
    depth = 0
    for letter in text[:-1]:
        depth += (letter in OPENING) - (letter in CLOSING)
        if depth == 0:
            return None  # as in (x-2)(x+2)
    inner = entries(text[1:-1])
    return (text[0] + text[-1], inner) if len(inner) > 1 or is_set else None


def is_malformed(answer):
    """Whether an answer is nothing that can be read: no number, expression, list, word."""
    if len(answer) > LONGEST_ANSWER:
        return True
    parts = [tidy(answer)]
    for split in (unions, rows, entries, inner, inner, sides):
        parts = [piece for part in parts for piece in split(part)]
    return not all(re.search(r"[a-zA-Z]{2}", part) or is_readable(part) for part in parts)


def inner(text):
    """What stands in the brackets of a tuple, a set or an interval."""
    found = bracketed(text)
    return found[1] if found else [text]


def sides(text):
    """Those of an equation or inequality."""
    return re.split(r"[=<>]", value_of(text))
