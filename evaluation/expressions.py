"""The value of an expression, as LaTeX or as plain text: \\frac{1}{2}, 2(x+1), 3\\sqrt{5}, 1.5e3.

A small recursive descent parser that calculates as it reads; nothing is ever handed to eval, and
length, depth and the size of numbers have limits, so hostile text costs no more than honest text.
Rational numbers stay exact. A variable is a random fraction, so two expressions that agree at some
points are the same one (Schwartz and Zippel: two different polynomials would hardly agree).
"""

import cmath
import math
import random
import re
from fractions import Fraction

TOKEN = re.compile(r"\s*((?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d{1,3}(?!\w))?|\\[a-zA-Z]+|[a-zA-Z]+|\S)")
CONSTANTS = {"\\pi": cmath.pi, "π": cmath.pi, "i": 1j, "e": cmath.e}
GREEK = "alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi omega infty".split()
FUNCTIONS = {name: getattr(cmath, name) for name in ("sin", "cos", "tan", "exp", "sqrt")}
FUNCTIONS |= {f"arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")}
FUNCTIONS |= {"ln": cmath.log, "log": cmath.log10, "sec": lambda x: 1 / cmath.cos(x)}
FUNCTIONS |= {"csc": lambda x: 1 / cmath.sin(x), "cot": lambda x: 1 / cmath.tan(x)}
NAMES = {*FUNCTIONS, *GREEK, "frac", "binom", "pi"}
TIMES, OVER = ("*", "\\cdot", "\\times", "×", "·"), ("/", "\\div", "÷")
TOLERANCE = Fraction(1, 10**6)  # relative
LONGEST, DEEPEST, MOST_BITS, POINTS = 300, 30, 4000, 3
FAILURES = (ValueError, ArithmeticError)


def same_value(a, b, tolerance=TOLERANCE):
    """Whether two expressions have the same value, whatever their variables are.

    Fractions and whole numbers are compared exactly; roots, constants and decimals to a relative
    tolerance. What cannot be read is equal to nothing.
    """
    try:
        left, right = (Expression(text) for text in (a, b))
        pairs = [(left.value(point), right.value(point)) for point in range(POINTS)]
    except FAILURES:
        return False
    exact = "." not in a + b or left.variables or right.variables
    return all(close(x, y, tolerance, exact) for x, y in pairs)


def proportional(equation, other, tolerance=TOLERANCE):
    """Whether two equations, each a pair of texts, differ by a constant factor only."""
    try:
        ratios = []
        for point in range(POINTS):
            left, right = (
                Expression(a).value(point) - Expression(b).value(point)
                for a, b in (equation, other)
            )
            ratios.append(left / right)
    except FAILURES:
        return False
    return ratios[0] != 0 and all(close(r, ratios[0], tolerance, True) for r in ratios)


def close(x, y, tolerance, exact):
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        if exact or x.denominator == y.denominator == 1:
            return x == y
        return abs(x - y) <= tolerance * max(abs(x), abs(y))
    x, y = complex(x), complex(y)
    if not (cmath.isfinite(x) and cmath.isfinite(y)):
        return False
    return abs(x - y) <= max(1e-12, float(tolerance) * max(abs(x), abs(y)))


def is_readable(text):
    """Whether an expression has a value."""
    try:
        Expression(text).value(0)
    except FAILURES:
        return False
    return True


class Expression:
    """A text, cut into tokens. Raises ValueError, here or in value(), if it is no expression."""

    def __init__(self, text):
        if len(text) > LONGEST:
            raise ValueError("too long")
        self.tokens, self.variables = [], set()
        for token in TOKEN.findall(text):
            word = token.isalpha() and token not in FUNCTIONS
            if word and len(token) > 1 and not (len(token) == 2 and token.islower()):
                raise ValueError(f"{token} is a word")  # while xy is x times y
            self.tokens += list(token) if word else [token]

    def value(self, point):
        """A Fraction or a complex number; point says which values the variables have."""
        self.at, self.depth, self.point = 0, 0, point
        result = self.sum()
        if self.at < len(self.tokens):
            raise ValueError(f"{self.tokens[self.at]} is not expected here")
        return result

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else ""

    def skip(self, *tokens):
        """Whether the next token is one of these; then it is taken."""
        found = self.peek() in tokens
        self.at += found
        return found

    def closed_by(self, closing):
        inner = self.sum()
        if not self.skip(closing):
            raise ValueError(f"{closing} is missing")
        return inner

    def sum(self):
        """sum = ["+" | "-"] product {("+" | "-") product}"""
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("nested too deeply")
        sign = -1 if self.skip("-") else 1
        self.skip("+")
        result = sign * self.product()
        while self.peek() in ("+", "-"):
            result = result + (1 if self.take() == "+" else -1) * self.product()
        self.depth -= 1
        return result

    def product(self):
        """product = power {["*" | "/"] power}: 2x is 2 times x."""
        result = self.power()
        while True:
            if self.skip(*OVER):
                result = result / self.signed()
            elif self.skip(*TIMES):
                result = result * self.signed()
            elif self.begins_factor():
                result = result * self.power()
            else:
                return result

    def begins_factor(self):
        token = self.peek()
        return token in ("(", "{", "π") or token.removeprefix("\\") in NAMES or token.isalpha()

    def signed(self):
        """["-"] power"""
        return -self.power() if self.skip("-") else self.power()

    def power(self):
        """power = atom ["!"] ["^" signed]"""
        base = self.atom()
        if self.skip("!"):
            base = Fraction(math.factorial(small(base)))
        if not self.skip("^"):
            return base
        self.depth += 1
        exponent = self.signed() if self.depth <= DEEPEST else math.nan
        self.depth -= 1
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if exponent.denominator == 1 and bits * abs(exponent) <= MOST_BITS:
                return base**exponent
        return complex(base) ** complex(exponent)

    def atom(self):
        token = self.take()
        name = token.removeprefix("\\")
        if token[:1].isdigit() or token.startswith("."):
            return self.variable(token) if self.peek() == "_" else Fraction(token)
        if token in ("(", "{"):
            return self.closed_by(")" if token == "(" else "}")
        if token == "|":
            inner = self.closed_by("|")
            return abs(inner) if isinstance(inner, Fraction) else complex(abs(inner))
        if name == "frac":
            above = self.atom()
            return above / self.atom()
        if name == "binom":
            n = small(self.atom())
            return Fraction(math.comb(n, small(self.atom())))
        if name in FUNCTIONS:
            return self.function(name)
        if token in CONSTANTS and self.peek() != "_":
            return CONSTANTS[token]
        if token.isalpha() or name in GREEK:
            return self.variable(token)
        raise ValueError(f"{token or 'the end'} is not expected here")

    def variable(self, name):
        if self.skip("_"):
            name += "_"
            begin, braces = self.at, 0
            while self.at == begin or braces:
                token = self.take()
                if not token:
                    raise ValueError(f"the index of {name} does not end")
                braces += (token == "{") - (token == "}")
                name += token if token not in ("{", "}") else ""
        self.variables.add(name)
        return Fraction(2 * random.Random(f"{name} {self.point}").randrange(-999, 999) + 1, 997)

    def function(self, name):
        base = root = exponent = None
        if name == "log" and self.skip("_"):
            base = self.atom()
        if name == "sqrt" and self.skip("["):
            root = self.closed_by("]")
        if self.skip("^"):
            exponent = self.atom()
        argument = self.atom()
        while name != "sqrt" and self.peek().isalpha() and self.peek() not in FUNCTIONS:
            argument = argument * self.power()  # sin 2x
        result = FUNCTIONS[name](complex(argument))
        if base is not None:
            result = cmath.log(complex(argument)) / cmath.log(complex(base))
        if root is not None:
            result = complex(argument) ** (1 / complex(root))
        return result if exponent is None else result ** complex(exponent)


def small(number):
    """A value as an int. Raises ValueError if it is no whole number from 0 to 100."""
    if not isinstance(number, Fraction) or number.denominator > 1 or not 0 <= number <= 100:
        raise ValueError(f"{number} is no small whole number")
    return int(number)
