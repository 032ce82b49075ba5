"""Distillation: SFT whose loss also compares the model with a teacher.

    python trainer/train_distillation.py --teacher_weight full_sft --from_weight pretrain_small
    python trainer/train_distillation.py --from_weight none --hidden_size 192
    python trainer/train_distillation.py --offline_dir out/offline --from_weight pretrain_small

The loop is that of train_full_sft.py, and so are all other flags; the loss is in
trainer/distillation.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import report_user_errors
from trainer import train_full_sft
from trainer.runtime import report_lost_process


def main(argv=None):
    train_full_sft.main(argv, save_weight="distilled", teacher_weight="full_sft")


if __name__ == "__main__":
    with report_user_errors(), report_lost_process():
        main()
