"""One parser for every command: flags in groups, a line each, and all wrong values told at once. It
imports nothing of the project.
"""

import argparse
import sys

LARGEST = 2**53  # floats hold all whole numbers up to here; a larger one is a mistake


class Problem(str):
    """What is wrong with a flag's value. It stands in the value's place until all are reported."""


def number(kind, low, high=LARGEST, above=False):
    """Return an argparse type: an int or float from low to high; with above, not low itself."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (above and value == low):
            limits = f"above {low}" if above else f"from {low} to {high}"
            whole = "a whole" if kind is int else "a"
            return Problem(f"{text:.40}: give {whole} number {limits}")
        return value

    return convert


def one_of(*choices):
    """An argparse type: one of some words."""
    return lambda text: text if text in choices else Problem(f"{text}: give {'|'.join(choices)}")


def switch(text):
    """An argparse type: 0 or 1."""
    return bool(int(text)) if text in ("0", "1") else Problem(f"{text}: give 0 or 1")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a sentence and exit code 2; abbreviated flags are errors, too."""

    def __init__(self, description="", **options):
        options = {"allow_abbrev": False, "formatter_class": Help} | options
        super().__init__(description=description.partition("\n\n")[0], **options)

    def error(self, message):
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)

    parse_unchecked = argparse.ArgumentParser.parse_args  # wrong values are Problems in it

    def parse_args(self, argv=None):
        """Return the flags as a namespace. Exit with code 2 if a value is wrong."""
        args = self.parse_unchecked(argv)
        stop_at(wrong_values(args))
        return args

    def group(self, title):
        """Return a function add(name, default, help, kind), which adds a flag to a group."""
        group = self.add_argument_group(title)

        def add(name, default, help, kind=str, **more):
            more = {"metavar": "0|1" if kind is switch else "VALUE"} | more
            group.add_argument(f"--{name}", default=default, help=help, type=kind, **more)

        return add


def wrong_values(args):
    """A sentence for each value that `number` and its like could not read."""
    problems = []
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        problems += [f"--{name} {each}" for each in values if isinstance(each, Problem)]
    return problems


def stop_at(problems):
    """Prints them, one a line, and ends with code 2, if there are any."""
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        sys.exit(2)


def refuse(args, parser, command, names):
    """Exit with code 2 if flags that a command doesn't support differ from their defaults."""
    unused = [name for name in names.split() if getattr(args, name) != parser.get_default(name)]
    stop_at([f"{command} doesn't support --{name}; leave that out" for name in unused])
