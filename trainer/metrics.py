"""out/logs/NAME.jsonl, one JSON object a line, the progress bar, and the picture of the loss."""

import html
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from common import UserError


class MetricsLog:
    """The log of a run and its progress bar; silent on all but the first process.

    tokens_per_s is that of training alone, without validation and saving. The first step does not
    count once there is a second: it compiles and allocates.
    """

    def __init__(self, path, run, total_steps, silent=False, profile=False):
        self.path, self.silent, self.total_steps = Path(path), silent, total_steps
        self.steps, self.tokens, self.seconds = 0, 0, 0.0  # of this process
        self.bar = tqdm(total=total_steps, initial=run.step, unit="step", disable=silent or None)
        self.profiler = step_profiler(self.path, profile and not silent)
        if silent:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:  # what came after the checkpoint is cut off
                file.truncate(min(run.log_bytes, file.tell()))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def count(self, tokens, began):
        """Counts a training step that began at a time.perf_counter()."""
        if self.steps == 1:
            self.tokens, self.seconds = 0, 0.0
        self.steps += 1
        self.tokens += tokens
        self.seconds += time.perf_counter() - began
        self.bar.update()
        self.profiler.step()

    def write(self, run, *, epoch, loss, lr, grad_norm, data_wait_s, val_loss=None, **more):
        """Adds a line to the log; prints those of the first step and of validations."""
        speed = self.tokens / max(self.seconds, 1e-9)
        self.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}")
        if val_loss is not None or run.step == 1:
            validation = "" if val_loss is None else f"validation {val_loss:.3f}, "
            progress = f"step {run.step} of {self.total_steps}: loss {loss:.3f}"
            tqdm.write(f"{progress}, {validation}{speed:,.0f} tokens/s")
        line = {"step": run.step, "epoch": epoch, "tokens": run.tokens, "loss": loss}
        line |= {"val_loss": val_loss, **more, "lr": lr, "grad_norm": grad_norm}
        line |= {"tokens_per_s": speed, "data_wait_s": data_wait_s}
        for key, value in line.items():
            if isinstance(value, float):  # JSON has no NaN
                line[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        if self.silent:
            return
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                run.log_bytes = file.tell()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Make room, and go on from the "
                "last checkpoint with --from_resume 1"
            ) from None

    def draw(self, path=None):
        """Draws the loss curves beside the log, or at path; returns where. With matplotlib it is a
        PNG, else a plain SVG.
        """
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        losses = {"training": [line["loss"] for line in lines]}
        losses["validation"] = [line["val_loss"] for line in lines]
        for file in sorted({name for line in lines for name in line.get("val_losses", {})}):
            of_file = [line.get("val_losses", {}).get(file) for line in lines]
            losses[f"validation, {file}"] = of_file
        curves = {}
        for label, values in losses.items():
            points = zip([line["tokens"] for line in lines], values, strict=True)
            curves[label] = [(x, y) for x, y in points if y is not None]
        curves = {label: points for label, points in curves.items() if points}
        try:
            os.environ.setdefault("MPLBACKEND", "Agg")
            import matplotlib  # noqa: F401

            draw, suffix = draw_png, "png"
        except ImportError:
            draw, suffix = draw_svg, "svg"
        path = path or self.path.with_name(f"{self.path.stem}_loss.{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(curves, self.path.stem, path)
        return path


def draw_png(curves, title, path):
    """Draws {label: [(tokens, loss)]} with matplotlib."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), "--" if "," in label else "-", label=label)
    axes.set(xlabel="tokens trained on", ylabel="loss (nats per token)", title=title)
    seen = [loss for points in curves.values() for _, loss in points if loss]
    if seen and max(seen) > 20 * min(seen):  # a few high values would flatten the rest
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")


def draw_svg(curves, title, path):
    """Draws {label: [(tokens, loss)]} as an SVG of 700 x 400, by hand."""
    most = max((x for points in curves.values() for x, _ in points), default=1)
    top = max((y for points in curves.values() for _, y in points), default=1) or 1
    left, right, above, below = 60, 680, 40, 350

    def place(x, y):
        return f"{left + (right - left) * x / most:.1f},{below - (below - above) * y / top:.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 400" font-family="sans-serif" '
        'font-size="13"><rect width="700" height="400" fill="white"/>',
        f'<text x="{left}" y="24" font-size="15">{html.escape(title)}: nats per token</text>',
        f'<text x="{right}" y="390" text-anchor="end">{most:,} tokens trained on</text>',
    ]
    for part in range(5):
        y = below - (below - above) * part / 4
        parts.append(f'<path d="M{left},{y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="8" y="{y + 4:.1f}">{top * part / 4:.2f}</text>')
    for index, (label, points) in enumerate(curves.items()):
        colour, line = COLOURS[index % len(COLOURS)], " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = above + 20 * (index + 1)
        text = html.escape(label)
        parts.append(
            f'<text x="{right - 8}" y="{y}" fill="{colour}" text-anchor="end">{text}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def step_profiler(log_path, enabled):
    """An object whose step() is called after each training step: a torch profiler that leaves out
    four steps, records three, prints what took longest, and writes a trace for chrome://tracing
    beside the log.
    """
    if not enabled:
        return SimpleNamespace(step=lambda: None)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    kinds = kinds[: 1 + torch.cuda.is_available()]
    path = log_path.with_name(f"{log_path.stem}_trace.json")

    def report(profiler):
        order = "self_cuda_time_total" if len(kinds) > 1 else "self_cpu_time_total"
        tqdm.write(profiler.key_averages().table(sort_by=order, row_limit=15))
        profiler.export_chrome_trace(str(path))
        tqdm.write(f"trace: {path}")

    when = torch.profiler.schedule(wait=3, warmup=1, active=3, repeat=1)
    return torch.profiler.profile(activities=kinds, schedule=when, on_trace_ready=report)
