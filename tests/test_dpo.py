"""DPO: loss and gradients against trl and by hand, exact resume, the usual forms of pairs."""

import json
import math
import re

import pytest
import torch

from common import IGNORE
from dataset.formats import detect_format
from dataset.packing import collate
from dataset.preference_pairs import PairDataset, pair_counts, to_pair
from model.causal_lm import CausalLM, ModelConfig
from model.chat_template import render
from model.preference_losses import dpo_loss, pair_log_probabilities
from model.tokenizer import load_tokenizer
from model.weights import load
from tests.conftest import ROOT, run_here, torchrun, write_jsonl
from tests.test_errors import refused
from tests.test_training import assert_equal, assert_like_one, log, stopped_and_resumed, weights
from trainer import train_dpo

TOKENIZER = load_tokenizer()
SHARED = ROOT.parent / "shared" / "data"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASKED = [user("Hi"), assistant("Hello."), user("Who are you?")]
GOOD, BAD = "A model.", "I do not know, and I will not say."
WHOLE = {"chosen": [*ASKED, assistant(GOOD)], "rejected": [*ASKED, assistant(BAD)]}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "Who are you?"}]  # fmt: skip
FORMS = {
    "trl, messages": {"prompt": ASKED, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "trl, whole conversations": WHOLE,
    "trl, the prompt as text too": {"prompt": "Who are you?", **WHOLE},
    "our messages": {"messages": ASKED, "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory, ShareGPT": {
        "conversations": SHAREGPT,
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
}


def contents(conversation):
    return [(turn["role"], turn["content"]) for turn in conversation]


@pytest.mark.parametrize("name", FORMS)
def test_every_usual_form_is_the_same_pair(name):
    assert detect_format(FORMS[name]) == "preference"
    chosen, rejected, tools = to_pair(FORMS[name])
    assert contents(chosen) == contents(WHOLE["chosen"]) and tools is None
    assert contents(rejected) == contents(WHOLE["rejected"])
    assert chosen[1]["loss_weight"] == 0 and "loss_weight" not in chosen[3]


def test_a_prompt_may_be_text():
    expected = [("system", "Be kind."), ("user", "Say\nhi"), ("assistant", GOOD)]
    record = {"instruction": "Say", "input": "hi", "chosen": GOOD, "rejected": BAD}
    assert contents(to_pair({**record, "system": "Be kind."})[0]) == expected
    record = {"prompt": "Say\nhi", "chosen": GOOD, "rejected": BAD}
    assert contents(to_pair(record)[1]) == [("user", "Say\nhi"), ("assistant", BAD)]


WRONG = {
    "equal": ({"prompt": "Hi", "chosen": "A", "rejected": "A"}, "the answers are equal"),
    "empty": ({"prompt": "Hi", "chosen": "A", "rejected": " "}, "rejected is an empty answer"),
    "number": ({"prompt": "Hi", "chosen": 5, "rejected": "B"}, "chosen is text, a message or"),
    "no prompt": ({"chosen": "A", "rejected": "B"}, 'it has no "prompt"'),
    "bad prompt": ({"prompt": 7, "chosen": "A", "rejected": "B"}, "the prompt is text or a list"),
    "no answer": ({"chosen": [user("Hi")], "rejected": [user("Ho")]}, "differs before the answer"),
    "no question": ({"system": "Be kind.", "chosen": "A", "rejected": "B"}, 'it has no "prompt"'),
    "no rejected": ({"prompt": "Hi", "chosen": "A"}, 'it has no "rejected"'),
    "beginning": (
        {"chosen": ASKED[:2], "rejected": [*ASKED, assistant("B")]},
        "a prefix of the other",
    ),
    "role": ({"prompt": [{"role": "x", "content": "y"}], "chosen": "A", "rejected": "B"}, "'x'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_pair_is_a_bad_record_with_its_line(name, tmp_path):
    record, sentence = WRONG[name]
    path = write_jsonl(tmp_path / "pairs.jsonl", [FORMS["our messages"], record])
    data = PairDataset(path, TOKENIZER)
    assert len(data) == 1
    ((line, reason),) = data.files[0].report["bad_lines"]
    assert line == 2 and sentence in reason


def test_the_tokens_are_those_of_the_template_and_only_the_answers_are_supervised(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [FORMS["our messages"]])
    (pair,) = PairDataset(path, TOKENIZER)
    for (input_ids, labels), answer in zip(pair, (GOOD, BAD), strict=True):
        ids, _ = render([*ASKED, assistant(answer)])
        assert input_ids.tolist() == ids
        supervised = input_ids[labels != IGNORE].tolist()
        assert TOKENIZER.decode(supervised, skip_special_tokens=False) == f"{answer}<|im_end|>"
    assert len(PairDataset(path, TOKENIZER, max_length=sum(len(p[0]) for p in pair))) == 1
    with pytest.raises(ValueError, match="raise it"):
        PairDataset(path, TOKENIZER, max_length=sum(len(p[0]) for p in pair) - 1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    records = [
        {
            "prompt": f"What is {i}?" * (1 + i % 3),
            "chosen": f"It is {i}." * (1 + i % 2),
            "rejected": "I do not know. " * (1 + i % 4),
        }
        for i in range(40)
    ]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records)


def models():
    """A policy and a reference, of the same shape."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(CausalLM(ModelConfig(hidden_size=48, num_hidden_layers=2)).eval())
    return made


def test_the_log_probabilities_are_those_of_each_answer_alone(pairs):
    policy, _ = models()
    data = PairDataset(pairs, TOKENIZER)
    some = [data[i] for i in range(7)]
    found = pair_log_probabilities(policy, collate(some))
    for row, pair in zip(found, some, strict=True):
        for value, (input_ids, labels) in zip(row, pair, strict=True):
            logprobs = policy(input_ids[None])[0, :-1].log_softmax(dim=-1)
            chosen = logprobs.gather(1, input_ids[1:, None])[:, 0][labels[1:] != IGNORE]
            assert value.item() == pytest.approx(chosen.sum().item(), abs=1e-3)
    padded = collate(some, None, 300, 9)  # as on a GPU: rows without a pair, of the greatest length
    torch.testing.assert_close(pair_log_probabilities(policy, padded), found, atol=1e-3, rtol=1e-4)


def test_the_loss_of_two_pairs_is_that_of_the_formula():
    policy = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]])
    reference = torch.tensor([[-2.0, -1.0], [-1.0, -2.0]])
    loss, figures = dpo_loss(policy, reference, beta=0.5)
    margins = [0.5 * ((-1 + 2) - (-2 + 1)), 0.5 * ((-3 + 1) - (-1 + 2))]  # 1.0 and -1.5
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins)
    assert loss.item() == pytest.approx(expected)
    assert figures.tolist() == pytest.approx([expected, 1, sum(margins), -4, -3])


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_loss_and_gradients_are_those_of_trl(pairs, tmp_path, sft_weight):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    policy, reference = models()
    c, names = policy.config, ("vocab_size", "head_dim", "intermediate_size", "rms_norm_eps")
    names += ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = {name: getattr(c, name) for name in names}
    shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    shape |= {"tie_word_embeddings": True, "attention_bias": False}
    theirs = [transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)) for _ in range(2)]
    for one, other in zip(theirs, (policy, reference), strict=True):
        one.load_state_dict(other.state_dict(), strict=True)
        one.eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    loss_type = ["sigmoid", "sft"] if sft_weight else ["sigmoid"]
    args = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.3, report_to="none", use_cpu=True, bf16=False,
        loss_type=loss_type, loss_weights=[1.0, sft_weight] if sft_weight else None,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    trainer = trl.DPOTrainer(
        theirs[0], theirs[1], args=args, train_dataset=rows, processing_class=tokenizer
    )
    data = PairDataset(pairs, TOKENIZER)
    some = [data[i] for i in range(6)]
    halves = [pair[half] for half in (0, 1) for pair in some]  # trl: the chosen first
    longest = max(len(ids) for ids, _ in halves)
    ids, seen, answers = (torch.zeros(len(halves), longest, dtype=torch.long) for _ in range(3))
    for index, (input_ids, labels) in enumerate(halves):
        ids[index, : len(input_ids)], seen[index, : len(input_ids)] = input_ids, 1
        answers[index, : len(input_ids)] = (labels != IGNORE).long()
    inputs = {"input_ids": ids, "attention_mask": seen, "completion_mask": answers}
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()

    batch = collate(some)
    found = pair_log_probabilities(policy, batch)
    with torch.no_grad():
        before = pair_log_probabilities(reference, batch)
    loss, _ = dpo_loss(found, before, 0.3)
    tokens = sum(int((pair[0][1] != IGNORE).sum()) for pair in some)
    loss = loss / len(some) - sft_weight * found[:, 0].sum() / tokens
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, weight in policy.named_parameters():
        other = dict(theirs[0].named_parameters())[name].grad
        torch.testing.assert_close(weight.grad, other, atol=1e-5, rtol=1e-4)


def dpo(trained, pairs, out, *more):
    """The flags of a run of DPO of a few steps."""
    start = ["--from_weight", trained / "full_sft_32.pth", "--data_path", pairs, "--save_dir", out]
    start += ["--device", "cpu", "--dtype", "fp32", "--log_interval", 1, "--val_interval", 3]
    return [str(word) for word in [*start, "--learning_rate", "1e-3", *more]]


def test_the_chosen_answers_gain_and_the_first_loss_is_ln_2(trained, pairs, tmp_path):
    train_dpo.main(dpo(trained, pairs, tmp_path, "--epochs", 4, "--learning_rate", "1e-2"))
    lines = log(tmp_path, "dpo_32")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["margin"] == 0 and lines[0]["accuracy"] == 0
    assert lines[-1]["margin"] > 0.5 and lines[-1]["val_accuracy"] == 1
    gained = [lines[-1][name] - lines[0][name] for name in ("logp_chosen", "logp_rejected")]
    assert gained[0] > gained[1]
    assert "reference" not in load(tmp_path / "dpo_32.pth")["training"]


@pytest.mark.parametrize("more", [(), ("--use_lora", 1, "--lora_dropout", 0.1)])
def test_a_run_that_is_stopped_and_resumed_is_the_same_to_the_bit(
    trained, pairs, tmp_path, monkeypatch, more
):
    name = "lora_dpo_32" if more else "dpo_32"
    more = ["--epochs", 2, "--save_interval", 4, "--dropout", 0.1, "--sft_weight", 0.2, *more]
    train_dpo.main(dpo(trained, pairs, tmp_path / "whole", *more))
    parts, asked, reference_log_probs = tmp_path / "parts", [], train_dpo.reference_log_probs
    once = lambda *given: asked.append(1) or reference_log_probs(*given)  # noqa: E731
    monkeypatch.setattr(train_dpo, "reference_log_probs", once)
    command = dpo(trained, pairs, parts, *more)
    found, lines = stopped_and_resumed(train_dpo, command, parts, name, monkeypatch)
    assert len(asked) == 1  # the resumed run has it from the checkpoint
    assert_equal(weights(tmp_path / "whole", name), found)
    assert log(tmp_path / "whole", name) == lines
    content = load(tmp_path / "whole" / f"{name}.pth")
    assert ("lora" in content) == all("lora" in weight for weight in content["model"])
    assert ("lora" in content) == (name == "lora_dpo_32")


def test_a_steps_gradient_does_not_depend_on_its_split(trained, pairs, tmp_path):
    found = []
    for batch_size, accumulation_steps in ((8, 1), (4, 2), (3, 3)):
        out = tmp_path / f"{batch_size}"
        split = ["--batch_size", batch_size, "--accumulation_steps", accumulation_steps]
        more = ["--optimizer", "adamw", "--sft_weight", 0.5, "--val_split", 0, "--max_bad_steps", 1]
        few = write_jsonl(tmp_path / "few.jsonl", list(map(json.loads, pairs.open()))[:8])
        train_dpo.main(dpo(trained, few, out, *split, *more))
        found.append(log(out, "dpo_32")[0])
    for other in found[1:]:
        assert other["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-4)
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)


def test_two_processes_end_in_the_weights_of_one(trained, pairs, tmp_path):
    more = ["--sft_weight", 0.3, "--epochs", 2, "--val_split", 0.2]
    more += ["--accumulation_steps", 2, "--batch_size"]
    train_dpo.main(dpo(trained, pairs, tmp_path / "one", *more, 4))
    two = dpo(trained, pairs, tmp_path / "two", *more, 2)
    done = torchrun(2, ROOT / "trainer" / "train_dpo.py", *two)
    assert done.returncode == 0, done.stderr
    names = "loss margin val_loss logp_rejected grad_norm"
    assert_like_one(tmp_path, "dpo_32", names, trained / "full_sft_32.pth")


def test_what_cannot_be_is_a_sentence(trained, pairs, data, tmp_path):
    script = "trainer/train_dpo.py"
    refused(
        run_here(script, *dpo(trained, pairs, tmp_path, "--packing", 1)),
        "doesn't support --packing",
    )
    refused(run_here(script, *dpo(trained, pairs, tmp_path, "--dpo_beta", -1)), "--dpo_beta -1")
    refused(run_here(script, *dpo(trained, data / "sft.jsonl", tmp_path)), "no usable record")
    done = run_here("trainer/train_full_sft.py", *dpo(trained, pairs, tmp_path))
    refused(done, "preference pair (train_dpo.py)")


def test_prepare_knows_pairs(pairs, capsys):
    done = run_here("dataset/prepare.py", "check", "--data_path", pairs)
    assert done.returncode == 0 and "preference" in done.stdout and "samples" in done.stdout
    done = run_here("dataset/prepare.py", "show", "--data_path", pairs, "--n", 1)
    shown = re.sub(r"\x1b\[\d+m", "", done.stdout)
    assert "It is 0.<|im_end|>" in shown and "I do not know. <|im_end|>" in shown


def test_a_pair_of_which_an_answer_is_masked_is_a_bad_record():
    """Its marks are not what two answers may differ in."""
    pair = [[*ASKED, {**assistant(text), "weight": 0}] for text in (GOOD, BAD)]
    with pytest.raises(ValueError, match="rejected has no supervised answer that differs"):
        to_pair({"chosen": [*ASKED, assistant(GOOD)], "rejected": pair[1]})
    with pytest.raises(ValueError, match="the answers are equal"):
        to_pair({"chosen": [*ASKED, assistant(GOOD)], "rejected": pair[0]})
    with pytest.raises(ValueError, match="only the answers of a pair are supervised"):
        to_pair({"prompt": "Hi", "chosen": GOOD, "rejected": BAD, "train": False})


def test_the_tokens_of_a_pair_are_counted_by_hand():
    """Two pairs: 2 and 1 supervised tokens of the chosen answers; the rejected ones do not count
    among them. A first token is never predicted.
    """
    ids = torch.arange(20, 30)

    def sample(length, supervised):
        labels = torch.full((length,), IGNORE)
        labels[length - supervised :] = ids[length - supervised : length]
        return ids[:length], labels

    rows = [[sample(5, 2), sample(7, 4)], [sample(3, 1), sample(4, 3)]]
    assert pair_counts(collate(rows)) == (2, 3, 19)
    assert pair_counts(collate([[sample(3, 3), sample(2, 1)]])) == (1, 2, 5)


def test_pairs_of_another_file_have_a_reference_of_their_own(trained, pairs, tmp_path):
    """With next to no learning the policy is its reference: margin 0 and a loss of ln 2."""
    lines = pairs.read_text(encoding="utf-8").splitlines(True)
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    train.write_text("".join(lines[:30]), encoding="utf-8")
    val.write_text("".join(lines[30:37]), encoding="utf-8")
    more = ["--val_data_path", val, "--learning_rate", 1e-12]
    train_dpo.main(dpo(trained, train, tmp_path, *more))
    last = log(tmp_path, "dpo_32")[-1]
    assert last["val_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["val_margin"] == pytest.approx(0, abs=1e-4)


def test_the_sft_term_raises_the_chosen_answers_only(trained, pairs, tmp_path):
    """With hardly any DPO in it, the rejected answers are left behind."""
    more = ["--dpo_beta", 1e-6, "--sft_weight", 1, "--epochs", 4, "--learning_rate", "1e-2"]
    train_dpo.main(dpo(trained, pairs, tmp_path, *more))
    first, *_, last = log(tmp_path, "dpo_32")
    gains = [last[name] - first[name] for name in ("logp_chosen", "logp_rejected")]
    assert gains[0] > 1 and gains[0] > 2 * gains[1]


def test_the_gradient_of_the_sft_term_is_in_proportion_to_its_weight(trained, pairs, tmp_path):
    norms = []
    for weight in (0.5, 1.5):
        more = ["--dpo_beta", 1e-9, "--sft_weight", weight, "--val_split", 0, "--grad_clip", 0]
        train_dpo.main(dpo(trained, pairs, tmp_path / f"{weight}", *more))
        norms.append(log(tmp_path / f"{weight}", "dpo_32")[0]["grad_norm"])
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-3) and norms[0] > 0


def test_the_routers_loss_is_minimised_too(trained, pairs, tmp_path, monkeypatch):
    """The mean of the embeddings stands in for it: it falls."""
    mean = lambda model, count: 1e3 * model.lm_head.weight.mean()  # noqa: E731
    monkeypatch.setattr(train_dpo, "router_loss", mean)
    more = ["--optimizer", "adamw", "--weight_decay", 0, "--val_split", 0]
    train_dpo.main(dpo(trained, pairs, tmp_path, *more))
    before, after = weights(trained), weights(tmp_path, "dpo_32")
    assert after["lm_head.weight"].mean() < before["lm_head.weight"].mean() - 1e-3
