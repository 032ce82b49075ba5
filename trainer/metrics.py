"""The metrics log out/logs/NAME.jsonl, the progress bar, and the loss curve."""

import html
import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from common import UserError, atomic_write


class MetricsLog:
    """A run's log and progress bar; silent except on rank 0.

    tokens_per_s covers only training, without validation and saving. The first step, which compiles
    and allocates, is excluded once there is a second.
    """

    def __init__(self, path, progress, total_steps, silent=False):
        self.path = Path(path)
        self.total_steps = total_steps
        self.silent = silent
        self.steps, self.tokens, self.seconds = 0, 0, 0.0  # by this process
        self.curves = {}  # to draw instead of the losses: {label: (key, factor)}
        self.unit = "nats per token"
        self.bar = tqdm(
            total=total_steps, initial=progress.step, unit="step", disable=silent or None
        )
        if silent:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:  # drop log lines newer than the checkpoint
                file.truncate(min(progress.log_bytes, file.tell()))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def count(self, tokens, began):
        """Count a training step that began at this time.perf_counter()."""
        if self.steps == 1:
            self.tokens, self.seconds = 0, 0.0
        self.steps += 1
        self.tokens += tokens
        self.seconds += time.perf_counter() - began
        self.bar.update()

    def write(self, progress, *, epoch, loss, lr, grad_norm, data_wait_s, val_loss=None, **others):
        """Append a line to the log; print a summary for the first step and validations."""
        speed = self.tokens / max(self.seconds, 1e-9)
        loss_text = "none" if loss is None else f"{loss:.3f}"
        self.bar.set_postfix(loss=loss_text, tokens_per_s=f"{speed:.0f}")
        if val_loss is not None or progress.step == 1:
            validation = "" if val_loss is None else f"validation {val_loss:.3f}, "
            at = f"step {progress.step} of {self.total_steps}"
            tqdm.write(f"{at}: loss {loss_text}, {validation}{speed:,.0f} tokens/s")
        line = {"step": progress.step, "epoch": epoch, "tokens": progress.tokens, "loss": loss}
        line |= {"val_loss": val_loss, **others, "lr": lr, "grad_norm": grad_norm}
        line |= {"tokens_per_s": speed, "data_wait_s": data_wait_s}
        for key, value in line.items():
            if isinstance(value, float):  # JSON has no NaN
                line[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        if self.silent:
            return
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                progress.log_bytes = file.tell()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Free some space, and resume "
                "from the last checkpoint with --from_resume 1"
            ) from None

    def draw(self):
        """Draw the loss curves as an SVG next to the log. Returns its path."""
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        curve_keys = self.curves or {"training": ("loss", 1), "validation": ("val_loss", 1)}
        losses = {}
        for label, (key, factor) in curve_keys.items():
            values = [line.get(key) for line in lines]
            losses[label] = [value if value is None else factor * value for value in values]
        for file in sorted({name for line in lines for name in line.get("val_losses", {})}):
            file_losses = [line.get("val_losses", {}).get(file) for line in lines]
            losses[f"validation, {file}"] = file_losses
        curves = {}
        for label, values in losses.items():
            points = zip([line["tokens"] for line in lines], values, strict=True)
            curves[label] = [(x, y) for x, y in points if y is not None]
        path = self.path.with_name(f"{self.path.stem}_loss.svg")
        with atomic_write(path) as file:
            svg = curves_as_svg(curves, self.path.stem, self.unit, clip=not self.curves)
            file.write(svg.encode("utf-8"))
        return path


COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")


def curves_as_svg(curves, title, unit="nats per token", clip=True):
    """Return an SVG, 700 x 400, of curves {label: [(tokens, loss)]}. clip draws losses above 20
    times the minimum at the upper edge, because they would flatten the rest.
    """
    tokens = [x for points in curves.values() for x, _ in points] or [1]
    losses = [y for points in curves.values() for _, y in points] or [1]
    max_tokens, bottom = max(tokens), min(0, *losses)
    top = min(max(losses), 20 * min(losses)) if clip else max(losses)
    top = top if top > bottom else bottom + 1
    left, right, above, below = 60, 680, 40, 350

    def place(x, y):
        y = (min(y, top) - bottom) / (top - bottom)
        return f"{left + (right - left) * x / max_tokens:.1f},{below - (below - above) * y:.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 400" font-family="sans-serif" '
        'font-size="13"><rect width="700" height="400" fill="white"/>',
        f'<text x="{left}" y="24" font-size="15">{html.escape(title)}: {unit}</text>',
        f'<text x="{right}" y="390" text-anchor="end">{max_tokens:,} tokens trained on</text>',
    ]
    for tick in range(5):
        y = below - (below - above) * tick / 4
        parts.append(f'<path d="M{left},{y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="8" y="{y + 4:.1f}">{bottom + (top - bottom) * tick / 4:.2f}</text>')
    for index, (label, points) in enumerate(curves.items()):
        if not points:
            continue
        colour, line = COLOURS[index % len(COLOURS)], " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        legend = f'x="{right - 8}" y="{above + 20 * (index + 1)}" text-anchor="end"'
        parts.append(f'<text {legend} fill="{colour}">{html.escape(label)}</text>')
    return "\n".join([*parts, "</svg>\n"])
