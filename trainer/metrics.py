"""out/logs/NAME.jsonl, one JSON object a line, and its picture beside it at the end."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from common import UserError


class MetricsLog:
    """Writes the log. A resumed run cuts off what came after its checkpoint, and goes on there."""

    def __init__(self, path, kept_bytes=0, silent=False):
        self.path, self.silent = Path(path), silent
        if silent:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(min(kept_bytes, file.tell()))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, **values):
        """Adds a line; returns how many bytes the log has now."""
        if self.silent:
            return 0
        for key, value in values.items():
            if isinstance(value, float):  # JSON knows no NaN
                values[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(values).encode() + b"\n")
                return file.tell()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Make room, and go on from the "
                "last checkpoint with --from_resume 1"
            ) from None

    def draw(self, path=None):
        """The loss curve as a PNG, beside the log unless path says where; returns its path, or the
        log's own where matplotlib is not.
        """
        os.environ.setdefault("MPLBACKEND", "Agg")
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            return self.path
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        sources = {name for line in lines for name in line.get("val_losses", {})}
        curves = {"training": [line["loss"] for line in lines]}
        curves["validation"] = [line["val_loss"] for line in lines]
        for name in sorted(sources):
            losses = [line.get("val_losses", {}).get(name) for line in lines]
            curves[f"validation, {name}"] = losses
        for label, losses in curves.items():
            tokens = [line["tokens"] for line in lines]
            points = [(x, y) for x, y in zip(tokens, losses, strict=True) if y is not None]
            style = "--" if "," in label else "-"
            axes.plot(*zip(*points, strict=True), style, label=label) if points else None
        axes.set(xlabel="tokens trained on", ylabel="loss (nats per token)", title=self.path.stem)
        seen = [loss for losses in curves.values() for loss in losses if loss]
        if seen and max(seen) > 20 * min(seen):  # a few high ones would press the rest flat
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
        path = path or self.path.with_name(f"{self.path.stem}_loss.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, format="png")
        plt.close(figure)
        return path


def step_profiler(log_path, enabled):
    """What the loop calls step() of after each training step: a torch profiler that leaves out four
    steps, looks at three, prints what took longest, and writes a trace for chrome://tracing beside
    the log.
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
