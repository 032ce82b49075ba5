"""Evaluation metrics, reports, and the comparison of two runs."""

import json
import math
from collections import Counter, defaultdict

from common import UserError, atomic_write
from evaluation.tasks import is_right


def wilson(right, n, z=1.96):
    """Return (low, high) of the 95 % confidence interval for right of n (Wilson, 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, spread = right / n, z * z / n
    center = p + spread / 2
    half_width = z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return (center - half_width) / (1 + spread), (center + half_width) / (1 + spread)


def pass_at(k, n, right):
    """Return the probability that at least one of k answers, drawn from n of which some are right,
    is right: the unbiased estimate of arXiv:2107.03374.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def totals(rows, same_answer):
    """Compute the metrics of a run from its rows, one per sample of a problem. The lenient accuracy
    is None if its judge isn't installed; then the strict one decides what is right.

    same_answer(a, b) returns whether two extracted answers count as one in the majority vote.
    """
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row)
    samples = max(map(len, by_problem.values()))
    figures = {"problems": len(by_problem)}
    for name, verdict in (("accuracy", "verdict"), ("strict_accuracy", "strict_verdict")):
        num_right = sum(row[verdict] == "correct" for row in rows)
        # Samples of one problem aren't independent, so the interval is over problems.
        figures[name] = num_right / len(rows)
        figures[f"{name}_95"] = wilson(num_right / samples, len(by_problem))
    if any(row["verdict"] is None for row in rows):
        figures["accuracy"] = figures["accuracy_95"] = None
    figures |= {
        "by_level": accuracy_by(rows, "level"),
        "by_type": accuracy_by(rows, "type"),
        "errors": dict(Counter(row["error"] for row in rows if row["error"])),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }
    if samples > 1:
        num_right = [sum(map(is_right, group)) for group in by_problem.values()]
        ks = [2**power for power in range(samples.bit_length())]  # 1, 2, 4, ... <= samples
        if samples not in ks:
            ks.append(samples)
        figures["pass_at"] = {
            str(k): sum(pass_at(k, samples, n) for n in num_right) / len(num_right) for k in ks
        }
        votes = sum(majority(group, same_answer) for group in by_problem.values())
        figures["majority"] = votes / len(by_problem)
    return figures


def majority(group, same_answer):
    """Return whether the most frequent answer to a problem is right; ties go to the earliest."""
    votes = []  # lists of rows with the same answer
    for row in group:
        if row["extracted"] is None:
            continue
        for same in votes:
            if same_answer(same[0]["extracted"], row["extracted"]):
                same.append(row)
                break
        else:
            votes.append([row])
    return bool(votes) and is_right(max(votes, key=len)[0])


def accuracy_by(rows, field):
    """Return {value of the field: [number right, number of rows]}, sorted; {} if no row has it."""
    counts = defaultdict(lambda: [0, 0])
    for row in rows:
        if row.get(field) is not None:
            counts[row[field]][0] += is_right(row)
            counts[row[field]][1] += 1
    return {key: counts[key] for key in sorted(counts, key=lambda k: (len(k), k))}


def percent(share, interval=None):
    """Format a fraction, with its confidence interval."""
    if share is None:
        return "not judged: pip install math-verify"
    text = f"{share:.1%}"
    return text if interval is None else f"{text} ({interval[0]:.1%} to {interval[1]:.1%})"


def write(path, result):
    """Write a result to path, a .json file, and a table of its metrics to an .md file."""
    totals = result["totals"]
    judge = f" ({result['lenient_judge']})" if result.get("lenient_judge") else ""
    figures = {
        "command": f"`{result['command']}`",
        "weights": f"{result['weights']}, sha256 {result['weights_sha256'][:16]}",
        "data": f"{result['data']}, sha256 {result['data_sha256'][:16]}",
        "problems": totals["problems"],
        f"accuracy, lenient{judge}": percent(totals["accuracy"], totals["accuracy_95"]),
        "accuracy, strict": percent(totals["strict_accuracy"], totals["strict_accuracy_95"]),
    }
    figures |= {f"pass@{k}": percent(share) for k, share in totals.get("pass_at", {}).items()}
    if "majority" in totals:
        figures["majority vote"] = percent(totals["majority"])
    for name, (right, n) in (totals["by_level"] | totals["by_type"]).items():
        figures[name] = f"{right} of {n}, {percent(right / n)}"
    figures |= {kind.replace("_", " "): n for kind, n in sorted(totals["errors"].items())}
    figures["mean length"] = f"{totals['mean_tokens']:.0f} tokens"
    figures["time"] = f"{result['seconds']:.0f} s"
    table = "".join(f"| {name} | {value} |\n" for name, value in figures.items())
    title = f"# {result['task']}: {result['run']}"
    texts = {
        ".md": f"{title}\n\n| | |\n|---|---|\n{table}\nIntervals: 95 %, Wilson.\n",
        ".json": json.dumps(result, ensure_ascii=False, indent=1),
    }
    for suffix, text in texts.items():
        with atomic_write(path.with_suffix(suffix)) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def compare(old, new):
    """Compare two results. Returns lines of text: the problems whose verdict differs, and the
    p-value of the exact sign test (McNemar, 1947). Raises UserError if their data differs.
    """
    if old["data_sha256"] != new["data_sha256"]:
        raise UserError(
            f"{old['run']} and {new['run']} have different data; choose runs on one file"
        )
    before, after = (
        {(row["problem"], row["sample"]): row for row in result["problems"]}
        for result in (old, new)
    )
    shared = [key for key in before if key in after]
    won = [key for key in shared if is_right(after[key]) and not is_right(before[key])]
    lost = [key for key in shared if is_right(before[key]) and not is_right(after[key])]
    flips = len(won) + len(lost)
    tail = sum(math.comb(flips, i) for i in range(min(len(won), len(lost)) + 1))
    p_value = min(1.0, 2 * tail / 2**flips)
    lines = [
        f"{len(shared)} answers in both; {old['run']} {percent(old['totals']['accuracy'])}, "
        f"{new['run']} {percent(new['totals']['accuracy'])}",
        f"{len(won)} became right, {len(lost)} wrong; p = {p_value:.3f} (exact sign test)",
    ]
    for mark, keys in (("+", won), ("-", lost)):
        for key in keys:
            answers = " -> ".join(repr(rows[key]["extracted"]) for rows in (before, after))
            row = after[key]
            lines.append(f"{mark} problem {row['problem']}: {answers}, gold {row['gold']!r}")
    return lines
