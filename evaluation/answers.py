"""The answers of a run on disk: while it goes, and its result. Another run never replaces them."""

import itertools
import json

from common import UserError, replacing
from evaluation.tasks import problem

TEXT = "task run command weights weights_sha256 data data_sha256".split()
OF_RESULT = dict.fromkeys(TEXT, str) | {"params": int, "seconds": int | float, "totals": dict}
OF_ROW = {"problem": int, "sample": int, "tokens": int, "truncated": bool, "prompt": list}
OF_ROW |= {"output": str, "verdict": str, "level": str | None, "type": str | None}


def read_result(path):
    """A stored result. Raises UserError, naming the field, if path holds none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        require_kinds(result, OF_RESULT)
        require_kinds(result["totals"], {"accuracy": int | float})
        for row in [*result["problems"]] or [{}]:
            require_kinds(row, OF_ROW)
            problem(result["task"], row["prompt"], row["gold"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no result of run_eval.py: {error}") from None
    return result


def require_kinds(values, kinds):
    if not isinstance(values, dict):
        raise ValueError(f"it holds {values!r} and no record")
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"its {name} is {values.get(name)!r}")


MAY_DIFFER = "run command weights data params settings".split()  # names, places, what follows


def require_same_run(path, head, run, flag):
    """Raises UserError, naming what differs, unless the run that a file describes in its JSON text
    head is this one: the same question with the same weights.
    """
    try:
        before = json.loads(head)
        before = {**before, **before.get("settings", {}), **before.get("source", {})}
    except (ValueError, TypeError, RecursionError):
        before = {}
    other = [
        f"{name} was {str(before.get(name)):.12} and is {str(value):.12}"
        for name, value in {**run, **run.get("settings", {})}.items()
        if name not in MAY_DIFFER and before.get(name, value) != value
    ]
    if other or "weights_sha256" not in before:
        differ = "; ".join(other) or "it does not say which"
        raise UserError(f"{path} is of another run: {differ}. Give {flag}, or remove that file")


def keep_previous(path, run):
    """Renames a result to NAME_previous, and says so, if its weights file has been trained anew."""
    try:
        before = json.loads(path.read_text("utf-8", "replace"))
        same = before["weights"] == run["weights"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # no result, or none of ours
    if same and before.get("weights_sha256") != run["weights_sha256"]:
        numbers = itertools.chain([""], itertools.count(2))
        names = (path.with_stem(f"{path.stem}_previous{number}") for number in numbers)
        kept = next(free for free in names if not free.exists())
        print(f"the weights were trained anew; the result of the earlier ones is kept as {kept}")
        for file in (path.with_suffix(suffix) for suffix in (".csv", ".md", ".json")):
            try:
                file.replace(kept.with_suffix(file.suffix))
            except FileNotFoundError:
                continue  # somebody removed the report
            except OSError as error:
                raise UserError(
                    f"{file} cannot be renamed: {error.strerror}; close what has it open, or give "
                    "--run NAME"
                ) from None


def begins_part(head):
    """Whether a line is the first that `Part` writes."""
    try:
        values = json.loads(head)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "weights_sha256" in values


class Part:
    """The answers of a run so far, a line each, kept beside where its result will be.

    Its whole batches are taken: a batch is drawn together, so it is repeated together. Raises
    UserError, naming flag, if another run left answers there.
    """

    def __init__(self, path, run, batch_size, flag):
        self.path, self.rows = path, []
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        head, _, rest = text.partition("\n")
        if text and (rest or not begins_part(head)):  # else it holds no answer
            require_same_run(path, head, run, flag)
        for line in rest.split("\n")[:-1]:
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                break  # a machine that went off left it in pieces
        self.rows = self.rows[: len(self.rows) // batch_size * batch_size]
        first = {key: value for key, value in run.items() if key != "command"}
        with replacing(path) as file:
            file.write(as_lines([first, *self.rows]))

    def add(self, rows):
        try:
            with self.path.open("ab") as file:
                file.write(as_lines(rows))
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Make room, and give the same "
                "command again: it goes on"
            ) from None


def as_lines(values):
    return "".join(json.dumps(value) + "\n" for value in values).encode()


class TaskScore:
    """A task's problems, to score a model on while it is trained: all of Tiny World's, else the
    first 200 of a file. Raises UserError if there is no such file.
    """

    def __init__(self, task, path):
        from evaluation.run_eval import parse
        from evaluation.tasks import read_problems

        self.task, tiny = task, task == "tiny_world"
        limits = ["--batch_size", "50", "--max_new_tokens", "120" if tiny else "256"]
        self.args, self.path = parse(["--task", task, *limits]), path
        self.problems = read_problems(task, None if tiny else path)[: None if tiny else 200]

    def score(self, model, tokenizer):
        """The share of the problems that a model solves."""
        from evaluation.run_eval import answer_all
        from evaluation.tasks import held_to, judge

        self.args.allowed = held_to(self.task, self.path, tokenizer)
        rows = answer_all(self.problems, model, tokenizer, self.args)
        verdicts = [judge(self.task, r["output"], r["gold"], r["truncated"]) for r in rows]
        return sum(verdict["verdict"] == "correct" for verdict in verdicts) / len(rows)
