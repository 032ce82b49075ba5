"""The figures of an evaluation: totals, a table of them, two runs compared."""

import json
import math
from collections import Counter, defaultdict

from common import UserError, atomic_write
from evaluation.tasks import is_right


def wilson(right, n, z=1.96):
    """The 95 % confidence interval of a share, right of n (Wilson, 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, z * z / n
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def pass_at(k, n, right):
    """The probability that one of k answers is right, drawn from n of which some are right.

    The unbiased estimate of arXiv:2107.03374.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def totals(rows, same_answer):
    """The figures of a run from its rows, one per sample of a problem. The lenient accuracy is None
    where its judge was not installed; then the strict one decides what is right.

    same_answer(a, b) returns whether two extracted answers are one in the majority vote.
    """
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row)
    samples = max(map(len, by_problem.values()))
    found = {"problems": len(by_problem)}
    for name, verdict in (("accuracy", "verdict"), ("strict_accuracy", "strict_verdict")):
        right = sum(row[verdict] == "correct" for row in rows)
        # Samples of one problem are not independent: the interval is that of problems.
        found[name] = right / len(rows)
        found[f"{name}_95"] = wilson(right / samples, len(by_problem))
    if any(row["verdict"] is None for row in rows):
        found["accuracy"] = found["accuracy_95"] = None
    found |= {
        "by_level": shares_of(rows, "level"),
        "by_type": shares_of(rows, "type"),
        "errors": dict(Counter(row["error"] for row in rows if row["error"])),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
    }
    if samples > 1:
        right = [sum(map(is_right, group)) for group in by_problem.values()]
        ks = sorted({1 << power for power in range(samples.bit_length())} | {samples})
        found["pass_at"] = {
            str(k): sum(pass_at(k, samples, n) for n in right) / len(right)
            for k in ks
            if k <= samples
        }
        votes = sum(majority(group, same_answer) for group in by_problem.values())
        found["majority"] = votes / len(by_problem)
    return found


def majority(group, same_answer):
    """Whether the answer that most samples of a problem gave is right; the earliest of a tie."""
    votes = []  # lists of rows that gave the same answer
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


def shares_of(rows, field):
    """{value of the field: [right, rows]}, sorted; empty where no row has one."""
    counts = defaultdict(lambda: [0, 0])
    for row in rows:
        if row.get(field) is not None:
            counts[row[field]][0] += is_right(row)
            counts[row[field]][1] += 1
    return {key: counts[key] for key in sorted(counts, key=lambda k: (len(k), k))}


def percent(share, interval=None):
    if share is None:
        return "not judged: pip install math-verify"
    text = f"{share:.1%}"
    return text if interval is None else f"{text} ({interval[0]:.1%} to {interval[1]:.1%})"


def write(path, result):
    """Writes a result as path, a .json file, and its figures as a table beside it, as .md."""
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
    written = {
        ".md": f"{title}\n\n| | |\n|---|---|\n{table}\nIntervals: 95 %, Wilson.\n",
        ".json": json.dumps(result, ensure_ascii=False, indent=1),
    }
    for suffix, text in written.items():
        with atomic_write(path.with_suffix(suffix)) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def compare(old, new):
    """Lines on the problems whose verdict differs between two results, and on the probability of
    such a difference by chance: the exact sign test (McNemar, 1947). Raises UserError for runs of
    different data.
    """
    if old["data_sha256"] != new["data_sha256"]:
        raise UserError(f"{old['run']} and {new['run']} are of different data: compare runs of one")
    before, after = (
        {(row["problem"], row["sample"]): row for row in result["problems"]}
        for result in (old, new)
    )
    shared = [key for key in before if key in after]
    won = [key for key in shared if is_right(after[key]) and not is_right(before[key])]
    lost = [key for key in shared if is_right(before[key]) and not is_right(after[key])]
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
