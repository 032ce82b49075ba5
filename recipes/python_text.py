"""Build a pretraining corpus from Python's own documentation: the language reference, and the
docstrings of the standard library.

    python recipes/python_text.py --out out/python.jsonl
"""

import ast
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser
from common import report_user_errors
from dataset.tiny_world.generate import write

SHORTEST = 80  # characters: shorter docstrings are rarely sentences


def docstrings(path):
    """Yield the docstrings of a Python file: module, classes and functions."""
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/python.jsonl"))
    args = parser.parse_args(argv)
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.glob("**/*.py")) if path.is_file()]
    others = {"test", "tests", "site-packages", "dist-packages", "lib2to3"}
    files = [path for path in files if others.isdisjoint(path.relative_to(library).parts)]
    texts = [*topics.values(), *(text for path in files for text in docstrings(path))]
    texts = [text for text in dict.fromkeys(texts) if len(text) >= SHORTEST]
    write(args.out, [{"text": text} for text in texts])
    print(f"{args.out}: {len(texts)} texts, {sum(map(len, texts)) / 1e6:.1f} million characters")


if __name__ == "__main__":
    with report_user_errors():
        main()
