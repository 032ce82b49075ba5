"""How well a model does on rows that it does not learn from."""

import numpy as np
import torch
from tqdm import tqdm

from dataset.plan import batches, epoch_plan
from model.loss import supervised_tokens
from trainer.distributed import add_up


@torch.no_grad()
def validation_loss(model, dataset, rows, args, device, autocast, rank=0, world_size=1):
    """(mean loss per supervised token over the rows in nats, more for the log). Where the rows come
    from several files, that is {"val_losses": {file: its mean}}. Each process does its share.
    """
    rows, sums = np.asarray(rows), {}
    file_of = dataset.rows[rows, 0]
    model.eval()
    for file in np.unique(file_of).tolist():
        plan = epoch_plan(dataset, rows[file_of == file], args, 0, rank, world_size)
        micro_batches = [rows_of_batch for step in plan for rows_of_batch in step]
        total, count = 0.0, 0
        for batch in batches(dataset, micro_batches, args):
            input_ids, labels, *where = (part.to(device) for part in batch)
            with autocast:
                total += model(input_ids, *where, labels=labels).item()
            count += supervised_tokens(labels)
        sums[file] = add_up(total, count, device=device)
    model.train()
    total, count = (sum(numbers) for numbers in zip(*sums.values(), strict=True))
    if len(sums) == 1:
        return total / max(1, count), {}
    paths = [dataset.files[file].path for file in sums]
    alike = len({path.name for path in paths}) < len(paths)
    names = [str(path) if alike else path.name for path in paths]
    means = [float(f"{total / max(1, count):.6g}") for total, count in sums.values()]
    losses = dict(zip(names, means, strict=True))
    tqdm.write("validation of " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    return total / max(1, count), {"val_losses": losses}
