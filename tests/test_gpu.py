"""What only an NVIDIA GPU can show, in the order in which a first failure says most. Skipped
without one; python -m pytest tests/test_gpu.py -x takes a few minutes.

REHEARSAL=1 runs these tests on a CPU, but for what it cannot do: they show nothing then, but their
own mistakes do not wait for the next GPU.
"""

import json
import math
import os
import warnings

import pytest
import torch

from common import IGNORE
from dataset.packing import collate
from dataset.step_plan import to_device
from model import attention
from model.causal_lm import CausalLM, ModelConfig
from model.device import auto_dtype, pick_device
from model.generation import SamplingParams, complete
from model.loss import plain_cross_entropy
from model.preference_losses import pair_log_probabilities
from model.weights import load
from serving.batching import Batcher, Request
from serving.trace import trace
from tests.conftest import ROOT, export, pack, run, write_jsonl
from trainer import (
    runtime,
    train_distillation,
    train_dpo,
    train_full_sft,
    train_grpo,
    train_pretrain,
    training_run,
)
from trainer.distillation import Distillation, Teacher

# cuBLAS reads it once, before its first product; --deterministic 1 sets it for its own process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
REHEARSAL = bool(os.environ.get("REHEARSAL"))
pytestmark = pytest.mark.skipif(
    not REHEARSAL and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"
)
no_rehearsal = pytest.mark.skipif(REHEARSAL, reason="impossible on a CPU, or too slow")
GPU = torch.device("cpu") if REHEARSAL else torch.device("cuda", 0)
SHAPE = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = "--hidden_size 128 --num_hidden_layers 2 --max_seq_len 128 --batch_size 8 --val_interval 10"
SMALL = [*SMALL.split(), "--log_interval", 1, "--learning_rate", 1e-3, "--device", GPU.type]


@pytest.fixture(autouse=True)
def exact():
    """fp32 products in fp32, and what one test has compiled or set does not count in the next."""
    torch.compiler.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


@no_rehearsal
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_by_any_of_its_names(name, monkeypatch):
    assert pick_device(name) == GPU
    assert torch.zeros(1, device=pick_device(name)).device == GPU


@no_rehearsal
def test_auto_takes_what_the_gpu_computes_natively():
    native = torch.cuda.get_device_capability(GPU) >= (8, 0)
    assert auto_dtype(GPU) == ("bf16" if native else "fp16")


@no_rehearsal
def test_flex_attention_works_here_without_a_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FlexAttention is not used")
        for head_dim in (64, 128):
            worked = attention.flex_works(GPU, head_dim)
            assert worked or torch.cuda.get_device_capability(GPU) < (8, 0)


# ------------------------------------------------------------------- the model against the CPU's


def documents(T, rows):
    """Samples of 1 to T tokens that fill about so many rows."""
    generator = torch.Generator().manual_seed(T + rows)
    found, total = [], 0
    while total < T * rows:
        length = int(torch.randint(1, min(T, 200) + 1, (), generator=generator))
        ids = torch.randint(3, 512, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.6, ids, IGNORE)
        found.append((ids, labels))
        total += length
    return found[: max(1, len(found) - 1)]


def loss_and_gradients(model, batch, dtype=torch.float32):
    device = next(model.parameters()).device
    input_ids, labels, *where = to_device(batch, device)
    model.zero_grad()
    with runtime.autocast_to(dtype, device):
        logits = model(input_ids, *where).float()
        loss = model(input_ids, *where, labels=labels)
    loss.backward()
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters()}
    return logits.detach().cpu(), loss.detach().cpu(), gradients


# logits, loss relative to the CPU's, and the norm of a gradient's error relative to its own
TOLERANCE = {torch.float32: (2e-3, 1e-4, 5e-3), torch.bfloat16: (0.3, 1e-2, 8e-2)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "rows, T", [(1, 1), (1, 2), (4, 17), (1, 128), (4, 256), (1, 2048), (4, 2048)]
)
def test_packed_rows_compute_what_they_do_on_a_cpu(rows, T, head_dim, dtype, monkeypatch):
    """With FlexAttention and the masked kernel: logits, loss and the gradient of each weight."""
    of_logits, of_loss, of_gradient = TOLERANCE[dtype]
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**SHAPE, head_dim=head_dim))
    batch = pack(documents(T, rows), T, rows)
    real = batch[3] >= 0
    logits, loss, gradients = loss_and_gradients(model, batch)
    model.to(GPU)
    for flex in (True, False):
        with monkeypatch.context() as patch:
            if not flex:
                patch.setattr(attention, "flex_available", lambda *_: False)
            found_logits, found_loss, found = loss_and_gradients(model, batch, dtype)
        exact = {"atol": of_logits, "rtol": of_logits}
        torch.testing.assert_close(found_logits[real], logits[real], **exact)
        torch.testing.assert_close(found_loss, loss, atol=1e-3, rtol=of_loss)
        for name, gradient in gradients.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < of_gradient, (flex, name, error)


@pytest.mark.parametrize("T", [1, 2, 33, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_attention_is_the_formula(T, dtype):
    generator = torch.Generator().manual_seed(T)
    q, k, v = torch.randn(3, 2, 4, T, 64, generator=generator).to(GPU, dtype)
    k, v = k[:, :2], v[:, :2]
    ids = torch.randint(-1, 5, (2, T), generator=generator).sort(dim=1).values.to(GPU)
    mask = attention.causal_mask(0, T, ids, GPU)
    expected = attention.plain_attention(q.double(), k.double(), v.double(), mask)
    masks = [mask]
    if T > 1 and attention.flex_available(GPU, 64):
        masks.append(attention.document_block_mask(ids))
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for given in masks:
        out = attention.attend(q, k, v, given)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_the_loss_in_larger_chunks_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 2048, 64, generator=generator).to(GPU).requires_grad_()
    weight = torch.randn(512, 64, generator=generator).div(8).to(GPU).requires_grad_()
    labels = torch.randint(3, 512, (4, 2048), generator=generator)
    labels[torch.rand(4, 2048, generator=generator) < 0.2] = IGNORE  # more than a chunk remain
    from model.loss import summed_cross_entropy

    fast = summed_cross_entropy(hidden, weight, labels)
    slow = plain_cross_entropy(hidden, weight, labels.to(GPU))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-2)
    for one, other in zip(
        torch.autograd.grad(fast, (hidden, weight)),
        torch.autograd.grad(slow, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)


def test_greedy_text_is_that_of_the_cpu():
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**SHAPE))
    prompts = [[5, 6, 7, 8], [9], [10] * 40]
    options = {"max_new_tokens": 40, "temperature": 0, "stop_ids": ()}
    expected = complete(model, prompts, **options)
    model.to(GPU)
    assert complete(model, prompts, **options) == expected
    assert [complete(model, [prompt], **options)[0] for prompt in prompts] == expected
    assert complete(model, prompts, **options, use_compile=True) == expected
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        assert all(len(answer) == 40 for answer in complete(model, prompts, **options))


def test_requests_that_share_a_step_and_a_view_of_the_page_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(**SHAPE)).eval()
    prompts = [[5, 6, 7, 8], [9], [10] * 40]
    expected = complete(model, prompts, max_new_tokens=40, temperature=0)
    seen = trace(model, prompts[2])
    batcher = Batcher(model.to(GPU), 2, 10)
    requests = [Request(ids, SamplingParams(40, 0.0)) for ids in prompts]
    for request in requests:
        batcher.submit(request)
    batcher.start()
    for request, answer in zip(requests, expected, strict=True):
        found = []
        while not isinstance(item := request.answer.get(timeout=60), str):
            found.append(item.id)
        assert item != "error" and found == answer
    batcher.ended = True
    batcher.join()
    again = trace(model, prompts[2])
    torch.testing.assert_close(again.logits, seen.logits, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(again.attention, seen.attention, atol=2e-3, rtol=2e-3)


# ----------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("learner", ["model", "distillation", "pairs"])
def test_a_micro_batch_waits_for_nothing(learner):
    """Any wait for the GPU between the loader and the gradients is an error here."""
    torch.manual_seed(0)
    model, teacher = (CausalLM(ModelConfig(**SHAPE)).to(GPU) for _ in range(2))
    taught = Distillation(model, Teacher(teacher), 0.5, 2.0)
    samples = documents(128, 4)
    batch = pack(samples, 128, 4)
    if learner == "pairs":
        batch = collate([*zip(samples, samples, strict=True)], None, 512, len(samples) + 1)
    batch = batch if REHEARSAL else [part.pin_memory() for part in batch]

    def step():
        input_ids, labels, *where = to_device(batch, GPU)
        with runtime.autocast_to(torch.bfloat16, GPU):
            if learner == "pairs":
                loss = pair_log_probabilities(model, (input_ids, labels, *where)).sum()
            else:
                by = taught if learner == "distillation" else model
                loss = by(input_ids, *where, labels=labels)
        (loss / 100).backward()
        return loss

    for _ in range(2):  # the first compiles
        step()
    if not REHEARSAL:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        if not REHEARSAL:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item())


def lines_of(out, name):
    text = (out / "logs" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("use_compile", [0, pytest.param(1, marks=no_rehearsal)])
def test_an_epoch_of_the_embedded_world_compiles_once(tmp_path, use_compile):
    """With validation and samples on the way; each shape would be compiled anew."""
    torch._dynamo.utils.counters.clear()
    flags = [*SMALL, "--save_dir", tmp_path, "--max_seq_len", 256, "--batch_size", 64]
    flags += ["--use_compile", use_compile, "--sample_interval", 10, "--val_interval", 20]
    train_pretrain.main(list(map(str, flags)))
    lines = lines_of(tmp_path, "pretrain_128")
    assert lines[-1]["val_loss"] < 0.7 * lines[0]["loss"]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # FlexAttention and its mask, each with and without gradients; with use_compile also the layer.
    assert graphs <= (10 if use_compile else 6), graphs


HOW = {
    "bf16": ["--dtype", "bf16"],
    "fp16": ["--dtype", "fp16"],
    "fp32": ["--dtype", "fp32"],
    "recomputed": ["--grad_checkpoint", 1],
    "padded": ["--packing", 0],
    "accumulated": ["--accumulation_steps", 4, "--batch_size", 2],
    "moe": ["--use_moe", 1],
    "adamw": ["--optimizer", "adamw"],
    "dropout": ["--dropout", 0.1],
    "no workers": ["--num_workers", 0],
}


def pretrain(data, out, *more):
    flags = ["--data_path", data / "pretrain.jsonl", "--save_dir", out, "--epochs", 20]
    train_pretrain.main(list(map(str, [*SMALL, *flags, *more])))
    return load(next(out.glob("*.pth")))["model"]


@pytest.mark.parametrize("how", HOW)
def test_pretraining_learns(data, tmp_path, how):
    pretrain(data, tmp_path, *HOW[how])
    lines = lines_of(tmp_path, "pretrain_128_moe" if how == "moe" else "pretrain_128")
    assert all(line["grad_norm"] is not None for line in lines[-5:])
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_deterministic_runs_and_resumed_ones_end_in_the_same_bits(data, tmp_path, monkeypatch):
    exact = ["--deterministic", 1, "--dropout", 0.1]
    one, other = (pretrain(data, tmp_path / name, *exact) for name in "ab")
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    from tests.test_training import StopAt

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "StopSignal", StopAt(5))
        with pytest.raises(SystemExit):
            pretrain(data, tmp_path / "c", *exact)
    train_pretrain.main(["--from_resume", "1", "--save_dir", str(tmp_path / "c")])
    resumed = load(tmp_path / "c" / "pretrain_128.pth")["model"]
    assert all(torch.equal(weight, resumed[name]) for name, weight in one.items())


@pytest.mark.parametrize("more", [[], ["--use_lora", 1], ["--use_compile", 1]])
def test_sft_with_a_score_and_samples(trained, data, tmp_path, more):
    flags = ["--from_weight", trained / "pretrain_32.pth", "--data_path", data / "sft.jsonl"]
    flags += ["--save_dir", tmp_path, "--device", GPU.type, "--max_seq_len", 128, "--batch_size", 8]
    flags += ["--best_metric", "tiny_world", "--sample_interval", 2, "--val_interval", 4]
    flags += ["--epochs", 4, "--learning_rate", 1e-3, "--log_interval", 1]
    train_full_sft.main(list(map(str, [*flags, *more])))
    name = "lora_full_sft_32" if "--use_lora" in more else "full_sft_32"
    lines = lines_of(tmp_path, name)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_distillation_from_weights_and_from_a_recording(trained, data, tmp_path):
    common = ["--from_weight", "none", "--hidden_size", 32, "--num_hidden_layers", 1]
    common += ["--max_seq_len", 96, "--batch_size", 4, "--epochs", 3, "--log_interval", 1]
    export(trained, data, tmp_path / "recorded", "--device", GPU.type)
    teacher = ["--teacher_weight", trained / "full_sft_32.pth", "--data_path", data / "sft.jsonl"]
    for name, source in (("a", teacher), ("b", ["--offline_dir", tmp_path / "recorded"])):
        out = ["--save_dir", tmp_path / name, "--device", GPU.type]
        train_distillation.main(list(map(str, [*common, *source, *out])))
        lines = lines_of(tmp_path / name, "distilled_32")
        assert lines[-1]["loss"] < lines[0]["loss"]


def test_preferences_and_rewards(trained, tmp_path):
    pair = {"chosen": "A number.", "rejected": "It is a letter."}
    pairs = [{"prompt": f"What is {i}?"} | pair for i in range(20)]
    common = ["--from_weight", trained / "full_sft_32.pth", "--save_dir", tmp_path, "--epochs", 6]
    common += ["--device", GPU.type, "--dtype", "fp32", "--learning_rate", 1e-2]
    common += ["--log_interval", 1]
    data = ["--data_path", write_jsonl(tmp_path / "pairs.jsonl", pairs)]
    train_dpo.main(list(map(str, [*common, *data])))
    lines = lines_of(tmp_path, "dpo_32")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert lines[-1]["loss"] < 0.5 and lines[-1]["accuracy"] == 1

    ask = [[{"role": "user", "content": pair["prompt"]}] for pair in pairs]
    asked = [{"category": "sum", "conversations": turns, "expected": ["e"]} for turns in ask]
    data = ["--data_path", write_jsonl(tmp_path / "asked.jsonl", asked), "--val_split", 0.2]
    (tmp_path / "mine.py").write_text("def e(prompt, answer, gold):\n    return answer.count('e')")
    data += ["--reward", f"{tmp_path / 'mine.py'}:e", "--max_new_tokens", 12]
    train_grpo.main(list(map(str, [*common, *data])))
    lines = lines_of(tmp_path, "grpo_32")
    assert lines[-1]["reward"] > lines[0]["reward"]
    assert all(line["grad_norm"] is not None for line in lines)


# -------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("mode, other", [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_torchrun_with_nccl_and_resumed_in_the_other_mode(data, trained, tmp_path, mode, other):
    count = max(1, torch.cuda.device_count())
    flags = ["--from_weight", trained / "pretrain_32.pth", "--data_path", data / "sft.jsonl"]
    flags += ["--save_dir", tmp_path, "--max_seq_len", 96, "--batch_size", 2, "--val_interval", 3]
    flags += ["--best_metric", "tiny_world", "--sample_interval", 2, "--dtype", "bf16"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    script = [ROOT / "trainer" / "train_full_sft.py", *flags]
    done = run(*torchrun, *script, "--parallel", mode, "--epochs", 1, timeout=400)
    assert done.returncode == 0, done.stderr
    more = ["--from_resume", 1, "--parallel", other, "--epochs", 2]
    done = run(*torchrun, *script, *more, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = lines_of(tmp_path, "full_sft_32")
    assert lines[-1]["epoch"] == 1 and lines[-1]["loss"] < lines[0]["loss"]


def test_a_lost_process_is_named(data, tmp_path):
    """The others end with a sentence instead of waiting for nccl's limit."""
    if not REHEARSAL and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (tmp_path / "die.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from trainer import train_pretrain as train\n"
        "lr = train.set_learning_rate\n"
        "def dies(optimizer, step, *more):\n"
        "    if step == 3 and os.environ['RANK'] == '1': os._exit(1)\n"
        "    return lr(optimizer, step, *more)\n"
        "train.set_learning_rate = dies\n"
        "from common import report_user_errors\n"
        "with report_user_errors(), train.torchrun_process(): train.main()\n",
        encoding="utf-8",
    )
    flags = [*SMALL[:-2], "--data_path", data / "pretrain.jsonl", "--save_dir", tmp_path]
    flags += ["--epochs", 20]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = run(*torchrun, tmp_path / "die.py", *flags, timeout=200)
    assert "lost another one of this job" in done.stderr


def test_the_chat_and_the_evaluation(trained, tmp_path):
    answer = ["eval_llm.py", "--weight", trained / "full_sft_32.pth", "--prompt", "Who are you?"]
    done = run(*answer, "--device", GPU.type, "--dtype", "fp32", "--max_new_tokens", 8)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    flags = ["--weight", trained / "full_sft_32.pth", "--limit", 20, "--max_new_tokens", 20]
    scores = {}
    for device in {"cpu", GPU.type}:
        out = tmp_path / device
        done = run("evaluation/run_eval.py", *flags, "--device", device, "--save_dir", out)
        assert done.returncode == 0, done.stderr
        (path,) = (out / "eval" / "tiny_world").glob("*.json")
        rows = json.loads(path.read_text(encoding="utf-8"))["problems"]
        scores[device] = [row["output"] for row in rows]
    assert scores["cpu"] == scores[GPU.type]
