"""What an evaluation found, in figures: totals, a Markdown and a CSV report, two runs compared."""

import csv
import io
import json
import math
from collections import Counter, defaultdict

from common import replacing


def wilson(right, n, z=1.96):
    """The 95 % confidence interval of a share, right of n (Wilson, 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, z * z / n
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def pass_at(k, n, right):
    """The chance that one of k answers is right, of n drawn of which some are right.

    The unbiased estimate of arXiv:2107.03374.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def totals(rows, same_answer):
    """The figures of a run from its rows, one per sample of a problem.

    same_answer(a, b) says which extracted answers vote together.
    """
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row)
    samples = max(map(len, by_problem.values()))
    right = sum(row["verdict"] == "correct" for row in rows)
    strict = sum(row["strict_verdict"] == "correct" for row in rows)
    found = {
        "problems": len(by_problem),
        "accuracy": right / len(rows),
        "accuracy_95": wilson(right / samples, len(by_problem)),
        "strict_accuracy": strict / len(rows),
        "strict_accuracy_95": wilson(strict / samples, len(by_problem)),
        "by_level": shares_of(rows, "level"),
        "by_type": shares_of(rows, "type"),
        "errors": dict(Counter(row["error"] for row in rows if row["error"])),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }
    if samples > 1:
        marks = [[row["verdict"] == "correct" for row in group] for group in by_problem.values()]
        ks = sorted({1 << i for i in range(samples.bit_length())} | {samples})
        found["pass_at"] = {
            str(k): sum(pass_at(k, samples, sum(m)) for m in marks) / len(marks)
            for k in ks
            if k <= samples
        }
        votes = sum(majority(group, same_answer) for group in by_problem.values())
        found["majority"] = votes / len(by_problem)
    return found


def majority(group, same_answer):
    """Whether the answer that most samples of a problem gave is right; the earliest of a tie."""
    camps = []
    for row in group:
        if row["extracted"] is not None:
            camp = next(
                (c for c in camps if same_answer(c[0]["extracted"], row["extracted"])), None
            )
            camp.append(row) if camp else camps.append([row])
    return bool(camps) and max(camps, key=len)[0]["verdict"] == "correct"


def shares_of(rows, field):
    """{value of the field: [right, rows]}, sorted; empty where no row has one."""
    counts = defaultdict(lambda: [0, 0])
    for row in rows:
        if row.get(field) is not None:
            counts[row[field]][0] += row["verdict"] == "correct"
            counts[row[field]][1] += 1
    return {key: counts[key] for key in sorted(counts, key=lambda k: (len(k), k))}


def percent(share, interval=None):
    text = f"{share:.1%}"
    return text if interval is None else f"{text} ({interval[0]:.1%} to {interval[1]:.1%})"


def markdown(result, beside):
    """The report of a run; beside: the lines of other runs in the table that ends it."""
    found = result["totals"]
    lines = [
        f"# {result['task']}: {result['run']}",
        "",
        "```",
        result["command"],
        "```",
        "",
        f"weights `{result['weights']}`, sha256 {result['weights_sha256'][:16]}; "
        f"{result['params']:,} parameters",
        f"data `{result['data']}`, sha256 {result['data_sha256'][:16]}",
        "",
        "| | |",
        "|---|---|",
        f"| problems | {found['problems']} |",
        f"| accuracy, lenient | {percent(found['accuracy'], found['accuracy_95'])} |",
        f"| accuracy, strict | {percent(found['strict_accuracy'], found['strict_accuracy_95'])} |",
        *(f"| pass@{k} | {percent(share)} |" for k, share in found.get("pass_at", {}).items()),
        *([f"| majority vote | {percent(found['majority'])} |"] if "majority" in found else []),
        f"| not finished in time | {percent(found['truncated'])} |",
        f"| mean length | {found['mean_tokens']:.0f} tokens |",
        f"| time | {result['seconds']:.0f} s |",
        *(f"| {kind.replace('_', ' ')} | {n} |" for kind, n in sorted(found["errors"].items())),
    ]
    for field in ("level", "type"):
        shares = found[f"by_{field}"]
        if len(shares) > 1:
            lines += ["", f"| {field} | right | of | share |", "|---|---|---|---|"]
            lines += [f"| {k} | {r} | {n} | {percent(r / n)} |" for k, (r, n) in shares.items()]
    lines += [
        "",
        "| run | problems | lenient | strict | weights | data |",
        "|---|---|---|---|---|---|",
    ]
    lines += [*beside, line_of(result)]
    return "\n".join([*lines, "", "Intervals: 95 %, Wilson.", ""])


def line_of(result):
    """A result in the table of all runs of its task."""
    t = result["totals"]
    return (
        f"| {result['run']} | {t['problems']} | {percent(t['accuracy'], t['accuracy_95'])} | "
        f"{percent(t['strict_accuracy'])} | {result['weights_sha256'][:8]} | "
        f"{result['data_sha256'][:8]} |"
    )


COLUMNS = "problem sample level type gold extracted verdict strict_verdict error tokens seconds"


def table(rows):
    """The rows of a run as CSV, without the texts."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS.split(), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(path, result):
    """Writes a result as path, a .json file, and its report beside it as .md and .csv."""
    beside = []
    for other in sorted(path.parent.glob("*.json"), key=lambda other: other.stat().st_mtime):
        if other != path:
            try:
                beside.append(line_of(json.loads(other.read_text(encoding="utf-8"))))
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                beside.append(f"| {other.name} cannot be read: {error!r} | | | | | |")
    written = {
        ".csv": table(result["problems"]),
        ".md": markdown(result, beside),
        ".json": json.dumps(result, ensure_ascii=False, indent=1),
    }
    for suffix, text in written.items():
        with replacing(path.with_suffix(suffix)) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def compare(old, new):
    """Lines that say which problems flipped between two results, and by how much that is more
    than chance: the exact sign test of the flips (McNemar, 1947).
    """

    def by_problem(result):
        """Other data may have other numbers; then prompt and gold answer say which problem, and of
        those that are equal in both it is the first, the second, ...
        """
        same = old["data_sha256"] == new["data_sha256"]
        rows, times = {}, Counter()
        for row in result["problems"]:
            asked = row["problem"] if same else json.dumps([row["prompt"], row["gold"]])
            key = asked, row["sample"]
            rows[*key, times[key]] = row
            times[key] += 1
        return rows

    before, after = by_problem(old), by_problem(new)
    shared = [key for key in before if key in after]
    verdicts = {key: (before[key]["verdict"], after[key]["verdict"]) for key in shared}
    won = [key for key in shared if verdicts[key] == ("wrong", "correct")]
    lost = [key for key in shared if verdicts[key] == ("correct", "wrong")]
    flips = len(won) + len(lost)
    tail = sum(math.comb(flips, i) for i in range(min(len(won), len(lost)) + 1))
    chance = min(1.0, 2 * tail / 2**flips)
    lines = [
        f"{len(shared)} answers in both; {old['run']} {percent(old['totals']['accuracy'])}, "
        f"{new['run']} {percent(new['totals']['accuracy'])}",
        f"{len(won)} became right, {len(lost)} wrong; p = {chance:.3f} (exact sign test)",
    ]
    for mark, keys in (("+", won), ("-", lost)):
        for key in keys:
            given = " -> ".join(repr(rows[key]["extracted"]) for rows in (before, after))
            row = after[key]
            lines.append(f"{mark} problem {row['problem']}: {given}, gold {row['gold']!r}")
    return lines
