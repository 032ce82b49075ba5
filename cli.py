"""The argument parser of all commands: flags in groups, and all invalid values reported at once. It
imports nothing from the project.
"""

import argparse
import sys

LARGEST = 2**53  # floats represent all integers up to here; a larger one is a typo


class Problem(str):
    """A validation error, kept as the flag's value so that all errors are reported at once."""


def number(kind, low, high=LARGEST, above=False):
    """Return an argparse type: an int or float from low to high; above=True excludes low."""

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


def choose_from(*choices):
    """Return an argparse type: one of the words in choices."""
    return lambda text: text if text in choices else Problem(f"{text}: give {'|'.join(choices)}")


def switch(text):
    """Convert 0 or 1 to a bool; an argparse type."""
    return bool(int(text)) if text in ("0", "1") else Problem(f"{text}: give 0 or 1")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one sentence and rejects abbreviated flags."""

    def __init__(self, description="", **options):
        options = {"allow_abbrev": False, "formatter_class": Help} | options
        super().__init__(description=description.partition("\n\n")[0], **options)

    def error(self, message):
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)

    parse_unchecked = argparse.ArgumentParser.parse_args  # invalid values are returned as Problems

    def parse_args(self, argv=None):
        """Parse the flags into a namespace. Exits with code 2 if a value is invalid."""
        args = self.parse_unchecked(argv)
        stop_at(wrong_values(args))
        return args

    def group(self, title):
        """Return a function add(name, default, help, kind) that adds flags to a new group."""
        group = self.add_argument_group(title)

        def add(name, default, help, kind=str, **options):
            options.setdefault("metavar", "0|1" if kind is switch else "VALUE")
            group.add_argument(f"--{name}", default=default, help=help, type=kind, **options)

        return add


def wrong_values(args):
    """Return an error message for each invalid value, a list of str."""
    problems = []
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        problems += [f"--{name} {item}" for item in values if isinstance(item, Problem)]
    return problems


def stop_at(problems):
    """Print the error messages, one per line, and exit with code 2, if there are any."""
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        sys.exit(2)


def refuse(args, parser, command, names):
    """Exit with code 2 if flags that the command doesn't support differ from their defaults."""
    unused = [name for name in names.split() if getattr(args, name) != parser.get_default(name)]
    stop_at([f"{command} doesn't support --{name}; leave that out" for name in unused])
