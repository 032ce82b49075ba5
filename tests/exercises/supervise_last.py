"""Exercise 4 of docs/5_sft.md: only the last answer of a conversation is supervised."""

from dataset.lm_dataset import SFTDataset
from model.tokenizer import load_tokenizer
from tests.conftest import chat, write_jsonl


def supervised(tmp_path, record, **options):
    path, tokenizer = write_jsonl(tmp_path / "x.jsonl", [record]), load_tokenizer()
    _, labels = SFTDataset(path, tokenizer, **options)[0]
    return tokenizer.decode(labels[labels != -100].tolist(), skip_special_tokens=False)


def test_only_the_last_answer_is_supervised(tmp_path):
    talk = chat("Where?", "Here.", "When?", "Now.")
    assert supervised(tmp_path, talk, last_answer_only=True) == "Now.<|im_end|>"


def test_a_single_answer_is_the_last(tmp_path):
    assert supervised(tmp_path, chat("Where?", "Here."), last_answer_only=True) == "Here.<|im_end|>"


def test_the_default_supervises_all_answers(tmp_path):
    talk = chat("Where?", "Here.", "When?", "Now.")
    assert supervised(tmp_path, talk) == "Here.<|im_end|>Now.<|im_end|>"
