"""Evaluation metrics, reports, and the comparison of two runs."""

import json
import math
from collections import Counter, defaultdict

from common import UserError, atomic_write
from evaluation.tasks import is_right


def wilson(right, n, z=1.96):
    """Return (low, high) of the 95 % confidence interval for right of n (Wilson, 1927)."""
    p, spread = right / n, z * z / n
    center = p + spread / 2
    half_width = z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return (center - half_width) / (1 + spread), (center + half_width) / (1 + spread)


def pass_at(k, n, right):
    """Return the probability that at least one of k answers, drawn from n of which some are right,
    is right: the unbiased estimate of arXiv:2107.03374.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def compute_metrics(rows, same_answer):
    """Compute the metrics of a run from its rows, one per sample of a problem. The lenient accuracy
    is None if its judge isn't installed; then the strict one decides what is right.

    same_answer(a, b) returns whether two extracted answers count as one in the majority vote.
    """
    by_problem = rows_by_problem(rows)
    samples = max(map(len, by_problem.values()))
    metrics = {"problems": len(by_problem)}
    for name, verdict in (("accuracy", "verdict"), ("strict_accuracy", "strict_verdict")):
        num_right = sum(row[verdict] == "correct" for row in rows)
        # Samples of one problem aren't independent, so the interval is over problems.
        metrics[name] = num_right / len(rows)
        metrics[f"{name}_95"] = wilson(num_right / samples, len(by_problem))
    if any(row["verdict"] is None for row in rows):
        metrics["accuracy"] = metrics["accuracy_95"] = None
    metrics |= {
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
        metrics["pass_at"] = {
            str(k): sum(pass_at(k, samples, n) for n in num_right) / len(num_right) for k in ks
        }
        votes = sum(majority(group, same_answer) for group in by_problem.values())
        metrics["majority"] = votes / len(by_problem)
    return metrics


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


def metric_rows(result):
    """Return the rows of a report, (name, value as text), from a stored result."""
    totals = result["totals"]
    judge = f" ({result['lenient_judge']})" if result.get("lenient_judge") else ""
    rows = [
        ("command", f"`{result['command']}`"),
        ("weights", f"{result['weights']}, sha256 {result['weights_sha256'][:16]}"),
        ("data", f"{result['data']}, sha256 {result['data_sha256'][:16]}"),
        ("problems", totals["problems"]),
        (f"accuracy, lenient{judge}", percent(totals["accuracy"], totals["accuracy_95"])),
        ("accuracy, strict", percent(totals["strict_accuracy"], totals["strict_accuracy_95"])),
    ]
    rows += [(f"pass@{k}", percent(share)) for k, share in totals.get("pass_at", {}).items()]
    if "majority" in totals:
        rows.append(("majority vote", percent(totals["majority"])))
    for name, (right, n) in (totals["by_level"] | totals["by_type"]).items():
        rows.append((name, f"{right} of {n}, {percent(right / n)}"))
    rows += [(kind.replace("_", " "), n) for kind, n in sorted(totals["errors"].items())]
    rows.append(("mean length", f"{totals['mean_tokens']:.0f} tokens"))
    rows.append(("time", f"{result['seconds']:.0f} s"))
    return rows


def write_report(path, result):
    """Write a result to path, a .json file, and a table of its metrics to an .md file."""
    table = "".join(f"| {name} | {value} |\n" for name, value in metric_rows(result))
    title = f"# {result['task']}: {result['run']}"
    texts = {
        ".md": f"{title}\n\n| | |\n|---|---|\n{table}\nIntervals: 95 %, Wilson.\n",
        ".json": json.dumps(result, ensure_ascii=False, indent=1),
    }
    for suffix, text in texts.items():
        with atomic_write(path.with_suffix(suffix)) as file:
            file.write(text.encode("utf-8", "backslashreplace"))


def print_report(result):
    """Print the scores of a stored result."""
    totals, parts = result["totals"], result["totals"]["by_type"] | result["totals"]["by_level"]
    for part, score in result["scores"].items():
        n = parts[part][1] if part in parts else len(result["problems"])
        print(f"{part:24} {score:6.1%} of {n:4}")
    strict = percent(totals["strict_accuracy"])
    if totals["accuracy"] is None:
        strict = percent(totals["strict_accuracy"], totals["strict_accuracy_95"])
        print(f"strict {strict}; 95 % intervals")
        print("for the lenient score: pip install math-verify, then --rescore")
    else:
        lenient = percent(totals["accuracy"], totals["accuracy_95"])
        print(f"lenient {lenient}, strict {strict}; 95 % intervals")
    for k, share in totals.get("pass_at", {}).items():
        print(f"pass@{k:19} {share:6.1%}")
    if "majority" in totals:
        print(f"{'majority vote':24} {totals['majority']:6.1%}")


def compare(old, new):
    """Compare two results. Returns lines of text: the problems whose number of right answers
    differs, and the p-value of the exact sign test over problems (McNemar, 1947). Raises UserError
    if their data or their judges differ.
    """
    names = f"{old['run']} and {new['run']}"
    if old["data_sha256"] != new["data_sha256"]:
        raise UserError(f"{names} have different data; choose runs on one file")
    if old.get("lenient_judge") != new.get("lenient_judge"):
        raise UserError(f"{names} were judged differently; judge both again with --rescore")
    before, after = rows_by_problem(old["problems"]), rows_by_problem(new["problems"])
    shared = [problem for problem in before if problem in after]
    gain = {p: mean_right(after[p]) - mean_right(before[p]) for p in shared}
    num_better = sum(change > 0 for change in gain.values())
    num_worse = sum(change < 0 for change in gain.values())
    num_changed = num_better + num_worse
    tail = sum(math.comb(num_changed, i) for i in range(min(num_better, num_worse) + 1))
    p_value = min(1.0, 2 * tail / 2**num_changed)
    accuracies = [
        f"{result['run']} {percent(sum(mean_right(rows[p]) for p in shared) / max(1, len(shared)))}"
        for result, rows in ((old, before), (new, after))
    ]
    lines = [
        f"{len(shared)} problems in both; {', '.join(accuracies)}",
        f"{num_better} became better, {num_worse} worse; p = {p_value:.3f} (exact sign test)",
    ]
    for problem in sorted(shared, key=lambda problem: -gain[problem]):  # the better ones first
        if gain[problem] != 0:
            mark = "+" if gain[problem] > 0 else "-"
            answers = f"{extracted_answers(before[problem])} -> {extracted_answers(after[problem])}"
            gold = after[problem][0]["gold"]
            lines.append(f"{mark} problem {problem}: {answers}, gold {gold!r}")
    return lines


def rows_by_problem(rows):
    """Return {problem: its rows}."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["problem"]].append(row)
    return groups


def mean_right(rows):
    """Return the fraction of a problem's answers that are right."""
    return sum(map(is_right, rows)) / len(rows)


def extracted_answers(rows):
    """Return the extracted answers of a problem as text."""
    return ", ".join(repr(row["extracted"]) for row in rows)
