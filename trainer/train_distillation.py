"""Distillation: SFT whose loss also asks how far the student is from a teacher.

    python trainer/train_distillation.py --teacher_weight full_sft --student pretrain_small
    python trainer/train_distillation.py --teacher_weight full_sft --student none --hidden_size 192
    python trainer/train_distillation.py --offline_dir out/offline --student pretrain_small

The loop is that of train_full_sft.py, and so are all other flags; the loss is in
model/distillation.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import report_user_errors
from trainer import distributed, train_full_sft


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    words = ["--from_weight" if word == "--student" else word for word in argv]
    usual = ["--save_weight", "distilled"]
    if not {"--from_resume", "--offline_dir"} & set(words):  # else the teacher is the run's
        usual += ["--teacher_weight", "full_sft"]
    train_full_sft.main([*usual, *words])


if __name__ == "__main__":
    with report_user_errors(), distributed.ending_in_plain_words():
        main()
