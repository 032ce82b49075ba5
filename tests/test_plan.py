"""Which rows a run takes: by properties that hold for any data and any seed."""

import pytest

from dataset.errors import UserError
from dataset.lm_dataset import SFTDataset
from dataset.tokenizer import load_tokenizer
from tests.conftest import TINY, chat, run_here, write_jsonl


def numbered(path, count, longest=1):
    """Documents of different lengths, of which no two are alike."""
    texts = [f"{i}" + " word" * (i * 7 % longest) for i in range(count)]
    return write_jsonl(path, [{"text": text} for text in texts])


@pytest.mark.parametrize("again", ["the same path", "a link", "a copy"])
def test_a_file_given_twice_is_refused(tmp_path, again):
    """What is held out of one would be trained on in the other."""
    path = write_jsonl(tmp_path / "a.jsonl", [chat("Hi", f"{i}") for i in range(9)])
    other = path if again == "the same path" else tmp_path / "b.jsonl"
    if again == "a copy":
        other.write_bytes(path.read_bytes())
    elif again == "a link":
        other.hardlink_to(path)
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        with pytest.raises(UserError, match=r"a.jsonl.*'.*a\.jsonl\*2'"):
            SFTDataset([path, other], load_tokenizer(), **options)
    flags = ["--from_weight", "none", "--data_path", path, other, "--save_dir", tmp_path / "out"]
    done = run_here("trainer/train_full_sft.py", *flags, *TINY)
    assert done.returncode == 2 and "a.jsonl*2" in done.stderr and "Traceback" not in done.stderr
