"""The steps of both train scripts, against the same steps written by hand in plain PyTorch.

A run takes all documents in each of its three steps, an epoch each, with SGD instead of AdamW. So
the weights move by learning rate times gradient. The gradient is that of the documents alone, one
by one: no rows, no padding, no micro-batches, no processes.
"""

import inspect
import json
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common import END_OF_TEXT, IGNORE
from model.causal_lm import CausalLM, ModelConfig
from model.chat_template import render
from model.tokenizer import load_tokenizer
from model.weights import load, write_weights
from tests.conftest import ROOT, chat, torchrun, write_jsonl
from trainer import runtime, train_full_sft, train_pretrain, training_run

SCRIPTS = {"pretrain": train_pretrain, "full_sft": train_full_sft}
MODELS = {"dense": {}, "moe": {"use_moe": True, "num_experts": 4, "router_aux_loss_coef": 0.5}}
WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with weights to start from, and data of both kinds: of ragged lengths and masks."""
    folder = tmp_path_factory.mktemp("step")
    tokenizer = load_tokenizer()
    for name, more in MODELS.items():
        torch.manual_seed(3)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = CausalLM(ModelConfig(tokenizer.get_vocab_size(), **shape, **more))
        for parameter_name, weight in model.named_parameters():
            if "mlp.gate" in parameter_name:  # an uneven router: its balance loss has a gradient
                torch.nn.init.normal_(weight, std=1.0)
        path = folder / f"{name}.pth"
        write_weights(path, model.state_dict(), model.config, tokenizer, "pretrain")
    for name, first in (("train", 0), ("valid", 3)):
        texts = [" and ".join(WORDS[first : first + n]) + "." for n in (1, 7, 2, 4, 6, 3, 5)]
        chats = [
            chat("Count!" * (1 + i % 3), t, "And?", "No. " * (1 + i % 4))
            for i, t in enumerate(texts)
        ]
        write_jsonl(folder / f"pretrain_{name}.jsonl", [{"text": text} for text in texts])
        write_jsonl(folder / f"full_sft_{name}.jsonl", chats)
    return folder


def documents(world, stage, name="train"):
    """(ids, labels) of each record, made by hand."""
    found = []
    for line in (world / f"{stage}_{name}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if stage == "pretrain":
            ids = [*load_tokenizer().encode(record["text"]).ids, END_OF_TEXT]
            supervised = [1] * len(ids)
        else:
            ids, supervised = render(record["conversations"])
        ids = torch.tensor(ids)
        found.append((ids, torch.where(torch.tensor(supervised) == 1, ids, IGNORE)))
    return found


def flags(world, out, stage, model="dense", **more):
    values = {"save_dir": out, "from_weight": world / f"{model}.pth", "epochs": 3, "seed": 4}
    values |= {"data_path": world / f"{stage}_train.jsonl", "max_seq_len": 80}
    values |= {"val_data_path": world / f"{stage}_valid.jsonl"}
    values |= {"learning_rate": 0.5, "warmup_steps": 1, "min_lr_ratio": 0.2, "grad_clip": 0}
    values |= {"device": "cpu", "dtype": "fp32", "log_interval": 1, "val_interval": 1}
    values |= {"save_interval": 1, "keep_checkpoints": 9, "packing": 0, "batch_size": 8, **more}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


RATES = [0.25, 0.5, 0.1]  # half way up, the highest, and 0.2 of it


def watched_run(stage, flags, broken=None, sgd=True):
    """Runs a train script; returns the micro-batches that this process computed, in order.

    broken: the number of one whose loss becomes NaN. sgd: instead of the script's own optimizer.
    """
    script, seen, held = SCRIPTS[stage], [], []
    make_optimizer, signature = script.make_optimizer, inspect.signature(CausalLM.forward)

    def before(model, args, kwargs):
        if torch.is_grad_enabled():
            given = signature.bind(model, *args, **kwargs).arguments
            batch = {name: part.clone() for name, part in given.items() if name != "self"}
            batch |= {"held": held[0], "training": model.training, "random": torch.get_rng_state()}
            seen.append(batch)

    def after(model, args, loss):
        return loss * math.nan if torch.is_grad_enabled() and len(seen) - 1 == broken else None

    def watch(model, args):
        local = [getattr(weight, "_local_tensor", weight) for weight in model.parameters()]
        held.append(sum(weight.numel() for weight in local))
        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after)
        return torch.optim.SGD(model.parameters(), 1.0) if sgd else make_optimizer(model, args)

    script.make_optimizer = watch
    try:
        script.main(flags)
    finally:
        script.make_optimizer = make_optimizer
    return seen


def run_cases(text):
    """What each process of a torchrun job does: one run after the other, in one process group."""
    with runtime.torchrun_process():
        rank, processes = runtime.join_process_group()
        runtime.join_process_group, training_run.shut_down = lambda: (rank, processes), lambda: None
        cases, mark = json.loads(text), Path("first")
        with runtime.rank_zero_first():
            if rank == 0:
                time.sleep(0.5)
                mark.touch()
            assert mark.exists()
        for case in cases:
            seen = watched_run(case["stage"], case["flags"], case["broken"] if rank else None)
            torch.save(seen, f"{case['out']}/seen_{rank}.pt")


def name_of(stage, model):
    return f"{stage}_32{'_moe' if model == 'moe' else ''}"


def states(world, out, stage, model):
    """The weights at the start and after each step."""
    name, folder = name_of(stage, model), out / "checkpoints"
    paths = [world / f"{model}.pth", *sorted(folder.glob(f"{name}_step*.pth"))]
    return [load(path)["model"] for path in [*paths, folder / f"{name}_resume.pth"]]


def log(out, stage, model):
    path = out / "logs" / f"{name_of(stage, model)}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def model_with(world, model, state):
    config = ModelConfig(**load(world / f"{model}.pth")["config"])
    model = CausalLM(config)
    model.load_state_dict(state)
    return model


def mean_loss(model, samples):
    """The cross-entropy of each document alone, summed, per supervised token."""
    total, count = 0.0, 0
    for ids, labels in samples:
        logits = model(ids[None])[0, :-1]
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=IGNORE)
        count += int((labels[1:] != IGNORE).sum())
    return total / count


def balance_loss(model, micro_batches):
    """E * sum_e(choices of e per token * mean probability of e): its mean over the layers, and over
    the micro-batches of all processes.
    """
    scores, losses = [], []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: scores.append(out))
    for batch in micro_batches:
        model(batch["input_ids"], batch["position_ids"], batch["document_ids"])
    for of_layer in scores:
        E, k = model.config.num_experts, model.config.num_experts_per_tok
        p = of_layer.reshape(-1, E).softmax(dim=-1)
        chosen = p >= p.sort(dim=-1, descending=True).values[:, k - 1 : k]
        losses.append(E * (chosen.float().mean(dim=0) * p.mean(dim=0)).sum())
    assert len(losses) == len(micro_batches) * model.config.num_hidden_layers
    return sum(losses) / len(losses)


def check_steps(world, out, stage, model, seen, grad_clip=0, skipped=None):
    """Asserts that each step of a run is the plain one. seen: by process, its micro-batches."""
    samples, lines = documents(world, stage), log(out, stage, model)
    weights = states(world, out, stage, model)
    assert len(lines) == 3 and len(weights) == 4
    for step, line in enumerate(lines):
        start, end = (len(seen[0]) * at // 3 for at in (step, step + 1))
        micro_batches = [batch for of_process in seen for batch in of_process[start:end]]
        assert all(batch["training"] for batch in micro_batches)
        assert line["lr"] == pytest.approx(RATES[step])
        before, after = weights[step : step + 2]
        with torch.no_grad():
            held_out = mean_loss(model_with(world, model, after), documents(world, stage, "valid"))
        assert line["val_loss"] == pytest.approx(held_out.item(), rel=2e-5)
        if step == skipped:
            assert line["loss"] is None and line["grad_norm"] is None
            assert all(torch.equal(after[name], weight) for name, weight in before.items())
            continue
        plain = model_with(world, model, before).train()
        loss = objective = mean_loss(plain, samples)
        if model == "moe":
            balance = balance_loss(plain, micro_batches)
            objective = loss + plain.config.router_aux_loss_coef * balance
        objective.backward()
        norm = sum(w.grad.square().sum() for w in plain.parameters()).sqrt().item()
        assert line["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-4)
        scale = min(1.0, grad_clip / norm) if grad_clip else 1.0
        for name, weight in plain.named_parameters():
            expected = before[name] - RATES[step] * scale * weight.grad
            torch.testing.assert_close(after[name], expected, atol=2e-6, rtol=2e-5)


# ------------------------------------------------------------------------------- a single process


@pytest.mark.parametrize(
    "stage, model, more",
    [
        ("pretrain", "dense", {"batch_size": 3, "accumulation_steps": 3}),  # the last: one row
        (
            "pretrain",
            "moe",
            {"batch_size": 1, "accumulation_steps": 9, "packing": 1, "max_seq_len": 20},
        ),
        ("full_sft", "dense", {"batch_size": 1, "accumulation_steps": 9, "packing": 1}),
        ("full_sft", "moe", {"batch_size": 4, "accumulation_steps": 2}),
    ],
)
def test_a_step_is_that_of_plain_pytorch(world, tmp_path, stage, model, more):
    seen = watched_run(stage, flags(world, tmp_path, stage, model, **more))
    assert len(seen) % 3 == 0 and len(seen) > 3  # several micro-batches a step
    check_steps(world, tmp_path, stage, model, [seen])


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("grad_clip", [0.01, 1000.0])
def test_a_gradient_is_clipped_if_it_is_longer_than_the_flag_says(
    world, tmp_path, stage, grad_clip
):
    seen = watched_run(stage, flags(world, tmp_path, stage, grad_clip=grad_clip))
    check_steps(world, tmp_path, stage, "dense", [seen], grad_clip)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_step_that_is_left_out_leaves_nothing_for_the_next(world, tmp_path, stage):
    """Its third micro-batch is broken: the first two have gradients, which must go, too."""
    how = {"batch_size": 2, "accumulation_steps": 4}
    seen = watched_run(stage, flags(world, tmp_path, stage, **how), broken=6)
    assert len(seen) == 12
    check_steps(world, tmp_path, stage, "dense", [seen], skipped=1)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_adamw_is_its_formula_and_weight_decay_pulls_on_matrices_alone(world, tmp_path, stage):
    how = {"learning_rate": 0.01, "weight_decay": 3.0, "optimizer": "adamw"}
    watched_run(stage, flags(world, tmp_path, stage, **how), sgd=False)
    weights = states(world, tmp_path, stage, "dense")
    m, v = ({name: torch.zeros_like(w) for name, w in weights[0].items()} for _ in range(2))
    clear = {}  # AdamW divides by the size of the gradient: of tiny ones only noise is left
    for step, (before, after) in enumerate(zip(weights[:-1], weights[1:], strict=True)):
        lr = 0.02 * RATES[step]
        plain = model_with(world, "dense", before)
        mean_loss(plain, documents(world, stage)).backward()
        for name, weight in plain.named_parameters():
            m[name] = 0.9 * m[name] + 0.1 * weight.grad
            v[name] = 0.95 * v[name] + 0.05 * weight.grad**2
            mean, square = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            decay = 0.0 if "norm" in name else lr * 3.0
            expected = before[name] * (1 - decay) - lr * mean / (square.sqrt() + 1e-8)
            clear[name] = clear.get(name, True) & (weight.grad.abs() > 1e-4)
            assert clear[name].any()
            one, other = after[name][clear[name]], expected[clear[name]]
            torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_dropout_is_used_on_loaded_weights_and_not_in_validation(world, tmp_path, stage):
    seen = watched_run(stage, flags(world, tmp_path, stage, dropout=0.5))
    assert all(batch["training"] for batch in seen)  # after a validation, too
    weights = states(world, tmp_path, stage, "dense")
    for step, line in enumerate(log(tmp_path, stage, "dense")):
        with torch.no_grad():
            before, after = (model_with(world, "dense", state) for state in weights[step:][:2])
            plain = mean_loss(before, documents(world, stage)).item()
            held_out = mean_loss(after, documents(world, stage, "valid")).item()
        assert abs(line["loss"] - plain) > 1e-2
        assert line["val_loss"] == pytest.approx(held_out, rel=2e-5)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_the_best_weights_are_those_of_the_lowest_validation_loss(
    world, tmp_path, stage, monkeypatch
):
    losses = iter([3.0, 2.0, 4.0])
    monkeypatch.setattr(SCRIPTS[stage], "validation_loss", lambda *_: {"val_loss": next(losses)})
    SCRIPTS[stage].main(flags(world, tmp_path, stage, save_best_at_end=1))
    second = states(world, tmp_path, stage, "dense")[2]
    for path in (tmp_path / f"{stage}_32.pth", tmp_path / f"checkpoints/{stage}_32_best.pth"):
        best = load(path)
        assert best["training"]["step"] == 2
        assert all(torch.equal(weight, second[name]) for name, weight in best["model"].items())


# ---------------------------------------------------------------------------------- two processes

TWO = {
    "moe, ddp": ("pretrain", "moe", {"batch_size": 2, "accumulation_steps": 2}),
    "clipped, fsdp": ("pretrain", "dense", {"parallel": "fsdp", "grad_clip": 0.05}),
    "moe, fsdp": (
        "full_sft",
        "moe",
        {"packing": 1, "parallel": "fsdp", "batch_size": 2, "accumulation_steps": 2},
    ),
    "uneven, ddp": ("full_sft", "dense", {"batch_size": 1, "accumulation_steps": 4}),
    "broken, ddp": ("full_sft", "dense", {"batch_size": 2, "accumulation_steps": 2}),
}
if torch.__version__ < "2.7":  # which cannot shard on a CPU
    TWO = {name: run for name, run in TWO.items() if "fsdp" not in name}


@pytest.fixture(scope="session")
def two_processes(world, tmp_path_factory):
    """A folder for each of these runs. One job does them all: loading torch takes longest."""
    folder, cases = tmp_path_factory.mktemp("two"), []
    for name, (stage, model, more) in TWO.items():
        out = folder / name
        out.mkdir()
        case = {"stage": stage, "flags": flags(world, out, stage, model, **more), "out": str(out)}
        cases.append({**case, "broken": 3 if "broken" in name else None})  # of the second process
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests import test_step"
    (folder / "job.py").write_text(f"{start}\ntest_step.run_cases(sys.argv[1])\n", encoding="utf-8")
    done = torchrun(2, folder / "job.py", json.dumps(cases), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def seen_by_both(out):
    return [torch.load(out / f"seen_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", TWO)
def test_a_step_of_two_processes_is_that_of_plain_pytorch(world, two_processes, name):
    """Also where only one of them has a loss that is not finite: both leave that step out."""
    stage, model, more = TWO[name]
    out = two_processes / name
    seen, skipped = seen_by_both(out), 1 if "broken" in name else None
    check_steps(world, out, stage, model, seen, more.get("grad_clip", 0), skipped)


def test_every_process_draws_random_numbers_of_its_own_in_each_step(two_processes):
    for name in TWO:
        seen = seen_by_both(two_processes / name)
        per_step = len(seen[0]) // 3
        states = [batch["random"].numpy().tobytes() for part in seen for batch in part[::per_step]]
        assert len(set(states)) == len(states) == 6


def test_fsdp_shards_what_ddp_copies(world, two_processes):
    for name, (_, model, more) in TWO.items():
        held = [part[0]["held"] for part in seen_by_both(two_processes / name)]
        state = load(world / f"{model}.pth")["model"]
        size = sum(w.numel() for n, w in state.items() if n != "lm_head.weight")  # it is tied
        assert held == [size / 2 if "parallel" in more else size] * 2
