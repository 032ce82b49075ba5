"""What runs on GPUs, Apple's machines and Windows, as far as a CPU can show it: branches that are
forced, the `meta` device, which takes every branch that is not the CPU's and refuses tensors of two
devices, and two processes. What needs a GPU is in test_gpu.py.
"""

import json
import pickle
import queue
import threading
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import BlockMask

from common import IGNORE, UserError, atomic_write
from dataset import step_plan
from dataset.lm_dataset import PretrainDataset
from dataset.packing import collate, pad
from dataset.step_plan import batches, to_device
from model import attention
from model.causal_lm import CausalLM, ModelConfig
from model.device import auto_dtype, pick_device, pick_dtype, require_compiler
from model.generation import SamplingParams, complete, make_generator
from model.kv_cache import KVCache
from model.loss import plain_cross_entropy, summed_cross_entropy, supervised_positions
from model.preference_losses import dpo_loss, grpo_loss, pair_log_probabilities
from model.tokenizer import load_tokenizer
from serving.batching import Batcher, Request
from serving.views import ONE_AT_A_TIME
from tests.conftest import ROOT, TINY, fsdp, pack, run, sft, torchrun
from trainer import runtime
from trainer.distillation import Distillation, Teacher, add_projections
from trainer.optimizer import Muon, Optimizers, clip_and_step, compile_layers
from trainer.trainer_utils import generating

META = torch.device("meta")
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def samples(lengths):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (length,), generator=generator) for length in lengths]
    return [(each, each.clone()) for each in ids]


# ---------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    "name, local_rank, picked",
    [("auto", None, "cuda:0"), ("cuda", None, "cuda:0"), ("cuda", "3", "cuda:3")]
    + [("auto", "3", "cuda:3"), ("cuda:1", "3", "cuda:1"), ("cpu", "3", "cpu")],
)
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, name, local_rank, picked):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    device = torch.device(picked)
    assert pick_device(name) == device
    assert taken == ([device] if device.type == "cuda" else [])  # set_device needs the number


@pytest.mark.parametrize("rank, picked", [(None, "mps"), ("0", "cpu")])
def test_auto_takes_an_apple_gpu_for_one_process_alone(monkeypatch, rank, picked):
    """gloo sums no tensors of theirs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    if rank:
        monkeypatch.setenv("RANK", rank)
    assert pick_device("auto") == torch.device(picked)


def test_auto_takes_fp16_on_a_gpu_that_only_emulates_bf16(monkeypatch):
    for native, picked in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert auto_dtype(torch.device("cuda")) == picked
    assert auto_dtype(torch.device("mps")) == "fp32"


def test_what_an_apple_gpu_needs_a_newer_torch_for_is_a_sentence(monkeypatch):
    monkeypatch.setattr(runtime, "pick_device", lambda *_: torch.device("mps"))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1"))
    args = SimpleNamespace(dtype="fp16", device="mps", deterministic=0)
    with pytest.raises(UserError, match="--dtype fp16 on an Apple GPU needs torch 2.8"):
        runtime.start_runtime(args)
    with pytest.raises(UserError, match="--use_compile 1 on an Apple GPU needs torch 2.8"):
        require_compiler(torch.device("mps"))


def test_a_gpu_without_triton_compiles_nothing(monkeypatch):
    monkeypatch.setattr("model.device.has_triton", lambda: False)
    with pytest.raises(UserError, match="--use_compile 1 on a GPU needs Triton"):
        require_compiler(torch.device("cuda"))
    monkeypatch.setattr("model.device.has_triton", lambda: True)
    monkeypatch.setattr("model.device.shutil.which", lambda name: None)
    with pytest.raises(UserError, match="--use_compile 1 on a GPU needs a C compiler"):
        require_compiler(torch.device("cuda"))


def test_several_processes_do_not_share_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    assert pick_device("mps") == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes cannot share an Apple GPU"):
        pick_device("mps")


def test_processes_of_one_machine_take_no_gpu_by_its_number(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device cuda:1: each process needs a GPU of its own"):
        pick_device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda:0")


def test_weights_that_are_not_trained_are_fp32_where_bf16_is_emulated(monkeypatch):
    """There is no scaler, and an overflow would end the answer without a word."""
    for auto, taken in (("fp16", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setattr("model.device.auto_dtype", lambda device, auto=auto: auto)
        assert pick_dtype("auto", torch.device("cuda")) == taken
        assert pick_dtype("fp16", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("name, at_once", [("mps", False), ("cpu", False), ("cuda", True)])
def test_only_an_nvidia_gpu_is_sent_memory_that_may_be_freed(monkeypatch, name, at_once):
    """MPS reads it later, when it may hold something else."""
    given, device = [], torch.device(name)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, place, non_blocking: given.append(non_blocking) or self
    )
    batch = pad(samples([5, 9]))
    to_device(batch, device)
    supervised_positions(batch[1], device)
    assert given == [at_once] * 5


def test_an_apple_gpu_is_used_by_one_thread_at_a_time_and_the_cpu_draws_for_it():
    mps = torch.device("mps")
    weight = SimpleNamespace(device=mps, dtype=torch.float32)
    model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight))
    assert Batcher(model, 1, 1).device_lock is ONE_AT_A_TIME
    assert make_generator(3, mps).device.type == "cpu"
    batcher = Batcher(CausalLM(ModelConfig(**SHAPE)), 1, 1)
    batcher.device_lock, request = threading.Lock(), Request([5, 6, 7], SamplingParams(1, 0.0))
    with batcher.device_lock:  # a view is computed
        batcher.submit(request)
        batcher.start()
        with pytest.raises(queue.Empty):
            request.answer.get(timeout=0.5)
    assert request.answer.get(timeout=60) is not None
    batcher.ended = True
    batcher.join()


def test_the_batcher_holds_the_lock_whenever_it_computes(monkeypatch):
    batcher = Batcher(CausalLM(ModelConfig(**SHAPE)), 2, 4)
    batcher.device_lock, held = threading.Lock(), []
    for name in ("prefill", "pack", "step", "sample_next"):
        plain = getattr(batcher, name)
        watched = partial(
            lambda plain, *given: held.append(batcher.device_lock.locked()) or plain(*given), plain
        )
        monkeypatch.setattr(batcher, name, watched)
    requests = [Request([5, 6, 7], SamplingParams(3, 0.0)), Request([8], SamplingParams(2, 0.0))]
    for request in requests:
        batcher.submit(request)
    batcher.start()
    for request in requests:
        while not isinstance(request.answer.get(timeout=60), str):
            pass
    batcher.ended = True
    batcher.join()
    assert len(held) > 6 and all(held)


@pytest.mark.parametrize("times", [2, 100])
def test_a_file_that_windows_refuses_to_replace_is_tried_again(tmp_path, monkeypatch, times):
    replace, refused = Path.replace, []

    def open_elsewhere(path, place):
        refused.append(path)
        if len(refused) <= times:
            raise PermissionError(13, "Access is denied")
        return replace(path, place)

    monkeypatch.setattr(Path, "replace", open_elsewhere)
    monkeypatch.setattr("common.sys.platform", "win32")
    monkeypatch.setattr("common.time.sleep", lambda seconds: None)
    wait = nullcontext() if times == 2 else pytest.raises(UserError, match="Access is denied")
    with wait, atomic_write(tmp_path / "weights.pth") as file:
        file.write(b"new")
    assert (tmp_path / "weights.pth").exists() == (times == 2)
    assert len(list(tmp_path.iterdir())) == (times == 2)


@pytest.mark.parametrize("script", ["trainer/train_pretrain.py", "eval_llm.py"])
def test_a_console_that_lacks_a_character_stops_nothing(trained, data, tmp_path, script):
    """Windows' in cp1252: a model writes any character."""
    if script == "eval_llm.py":
        flags = ["--weight", trained / "full_sft_32.pth", "--prompt", "Hi", "--temperature", 5]
    else:
        flags = ["--data_path", data / "pretrain.jsonl", "--save_dir", tmp_path, *TINY]
        flags += ["--sample_interval", 1, "--sample_prompt", "\N{SNOWMAN}"]
    done = run(ROOT / script, *flags, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------- the model


class OnApple(torch.Tensor):
    """A tensor that says it is on an Apple GPU, so that `attend` takes that branch."""

    device = property(lambda self: torch.device("mps"))


@pytest.mark.parametrize("T, past", [(1, 9), (5, 0), (130, 3)])
def test_attention_on_an_apple_gpu_never_reaches_torchs_kernel(monkeypatch, T, past):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, T, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, past + T, 8, generator=generator)
    mask = attention.causal_mask(past, T, None, "cpu")
    expected = attention.plain_attention(q, k, v, mask)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", None)
    found = attention.attend(q.as_subclass(OnApple), k, v, mask)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, atol=1e-5, rtol=1e-4)


def test_blocks_that_do_not_work_are_not_used_and_a_line_says_why(monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: True)
    for capability, line in (((7, 5), None), ((8, 0), "no compiler")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)

        def fails(function):
            raise RuntimeError("no compiler\nmore")

        monkeypatch.setattr(attention, "compile_once", fails)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert not attention.flex_works.__wrapped__(torch.device("cpu"), 64)
        assert [str(each.message) for each in said] == (
            [f"FlexAttention is not used, packed rows are slower: {line}"] if line else []
        )


@pytest.mark.parametrize("factor, works", [(1.0, True), (1.1, False)])
def test_blocks_are_used_where_output_and_gradients_are_the_formulas(monkeypatch, factor, works):
    """What a GPU would compute is given here."""

    def blocks(q, k, v, mask):
        (documents,) = given
        return factor * attention.plain_attention(
            q, k, v, attention.causal_mask(0, q.shape[2], documents, "cpu")
        )

    given = []
    mask = BlockMask.from_kv_blocks(*(torch.zeros(1, 1, 1, dtype=torch.int),) * 2)
    monkeypatch.setattr(attention, "document_block_mask", lambda ids: given.append(ids) or mask)
    monkeypatch.setattr(attention, "attend", blocks)
    monkeypatch.setattr(attention, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert attention.flex_works.__wrapped__(torch.device("cpu"), 64) == works
    assert len(said) == (not works)


@pytest.fixture
def on_meta(monkeypatch):
    """A model of tensors without values, of which each number is 1; autocast does not know them.
    What reads several numbers, the experts and `generate`, cannot run on them.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    with META:
        return CausalLM(ModelConfig(**SHAPE))


@pytest.mark.parametrize("collate", [lambda rows: pack(rows, 64), pad])
def test_a_step_on_the_meta_device(collate, on_meta):
    """Model, loss, gradients and optimizer mix no tensors of two devices."""
    model, scaler = on_meta, torch.amp.GradScaler("cpu", enabled=False)
    matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if all(weight is not m for m in matrices)]
    optimizer = Optimizers(Muon(matrices, 0.1, 0.1), torch.optim.AdamW(others, lr=0.1))
    for lengths in ([5, 9, 30], [1], []):
        input_ids, labels, *where = to_device(collate(samples(lengths)), META)
        assert labels.device.type == "cpu"
        logits = model(input_ids, *where)
        assert logits.shape == (*input_ids.shape, 64) and logits.device == META
        model(input_ids, *where, labels=labels).backward()
        assert all(weight.grad.device == META for weight in model.parameters())
        assert clip_and_step(model, optimizer, scaler, 1.0) == 1
        assert all(weight.grad is None for weight in model.parameters())
    cache = KVCache(model.config, 2, 20, META)
    for T in (7, 1, 1):
        model(torch.zeros(2, T, dtype=torch.long, device=META), None, None, cache)


def test_steps_of_dpo_and_grpo_on_the_meta_device(on_meta):
    one, other, empty = samples([5, 9]), samples([7, 30]), []
    for pairs in ([one, other], [one], empty):
        policy = pair_log_probabilities(on_meta, to_device(collate(pairs, None, 64, 3), META))
        assert policy.shape == (len(pairs), 2) and policy.device == META
        dpo_loss(policy, torch.zeros(len(pairs), 2), 0.1)[0].backward()
    for rows in (one, empty):
        input_ids, labels, *_ = to_device(pad(rows), META)
        advantages = torch.zeros(len(rows))
        grpo_loss(on_meta, (input_ids, labels, None, None), advantages)[0].backward()
    assert all(weight.grad.device == META for weight in on_meta.parameters())


def test_a_step_of_distillation_on_the_meta_device(on_meta):
    with META:
        teacher = Teacher(CausalLM(ModelConfig(**SHAPE)), [1])
        add_projections(on_meta, 32, 2)
    for lengths in ([5, 9, 30], []):
        input_ids, labels, *where = to_device(pack(samples(lengths), 64), META)
        loss = Distillation(on_meta, teacher, 0.5, 2.0, 1.0)(input_ids, *where, labels=labels)
        loss.backward()
    assert all(weight.grad.device == META for weight in on_meta.parameters())


def test_labels_may_stay_on_the_cpu_and_the_loss_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 40, 16, generator=generator, requires_grad=True)
    weight = torch.randn(64, 16, generator=generator, requires_grad=True)
    labels = torch.randint(3, 64, (2, 40), generator=generator)
    labels[:, ::3] = IGNORE
    ours, plain = (
        torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        for loss in (summed_cross_entropy, plain_cross_entropy)
    )
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    half = weight.detach().bfloat16().requires_grad_()  # as sharded layers are gathered
    (grad,) = torch.autograd.grad(summed_cross_entropy(hidden, half, labels), half)
    torch.testing.assert_close(grad.float(), plain[1], atol=3e-1, rtol=3e-2)


# ------------------------------------------------------------------------------------ the batches


@pytest.mark.parametrize("packing", [0, 1])
def test_a_gpus_batches_have_one_shape_and_the_same_tokens(data, packing):
    """Padded rows have the length of the longest sample, in blocks of 128."""
    dataset = PretrainDataset(data / "pretrain.jsonl", load_tokenizer(), 64)
    args = SimpleNamespace(packing=packing, max_seq_len=512, num_workers=0, batch_size=3)
    micro_batches = [[[0], [1], [2]], [[3], [4]], [[5]], []]
    plain = list(batches(dataset, micro_batches, args, torch.device("cpu")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no memory to pin
        fixed = list(batches(dataset, micro_batches, args, torch.device("cuda")))
    for one, other in zip(plain, fixed, strict=True):
        # Samples of at most 64 tokens: a quarter of a row of 512 is enough, and costs less.
        assert all(part.shape == ((12, 128) if packing else (3, 128)) for part in other)
        tokens = [batch[0][batch[3] >= 0].sort().values for batch in (one, other)]
        assert torch.equal(*tokens)
        supervised = [batch[1][batch[1] != IGNORE].sort().values for batch in (one, other)]
        assert torch.equal(*supervised)


@pytest.mark.parametrize(
    "device, system, flag, workers",
    [("cuda", "linux", None, 2), ("cuda", "win32", None, 0), ("cpu", "linux", None, 0)]
    + [("cuda", "win32", 3, 3), ("cuda", "linux", 0, 0)],
)
def test_other_processes_prepare_the_batches_of_a_gpu(
    data, monkeypatch, device, system, flag, workers
):
    """Not on Windows, where each validation would wait for them to load torch."""
    given = []
    monkeypatch.setattr(step_plan, "DataLoader", lambda *_, **how: given.append(how) or iter(()))
    monkeypatch.setattr("dataset.step_plan.sys.platform", system)
    dataset = PretrainDataset(data / "pretrain.jsonl", load_tokenizer(), 64)
    args = SimpleNamespace(packing=1, max_seq_len=64, num_workers=flag, batch_size=3)
    assert not list(batches(dataset, [], args, torch.device(device)))
    assert given[0]["num_workers"] == workers
    assert given[0]["pin_memory"] == (device == "cuda")


def test_a_process_that_is_started_anew_maps_the_tokens_itself(data, tmp_path):
    dataset = PretrainDataset(data / "pretrain.jsonl", load_tokenizer(), 64, cache_dir=tmp_path)
    content = pickle.dumps(dataset.files[0])
    assert dataset.files[0].ids.tobytes() not in content
    again = pickle.loads(pickle.dumps(dataset))
    for index in range(len(dataset)):
        assert all(map(torch.equal, dataset[index], again[index]))
    in_memory = PretrainDataset(data / "pretrain.jsonl", load_tokenizer(), 64)
    assert torch.equal(pickle.loads(pickle.dumps(in_memory))[3][0], dataset[3][0])


# -------------------------------------------------------------------------------------- compiling


def test_samples_of_a_compiled_model_compile_nothing(compiled):
    torch._dynamo.utils.counters.clear()
    model = CausalLM(ModelConfig(**SHAPE))
    compile_layers(model)
    assert not torch._dynamo.config.optimize_ddp
    ids = torch.arange(3, 20)[None]
    model(ids)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    with generating(model, None):
        for T in (3, 5, 9):
            model(ids[:, :T])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    model(ids[:, :7])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


# -------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("device, nccl, backend", [("cuda", True, "nccl"), ("cuda", False, "gloo")])
def test_gradients_have_a_group_of_their_own_that_gives_up_soon(monkeypatch, device, nccl, backend):
    """Counts wait for six hours, for the process that tokenises."""
    made = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", lambda *how, **more: made.append((how, more)))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert runtime.join_process_group() == (0, 2)
    assert made == [(("gloo",), {"timeout": timedelta(hours=6)})]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(dist, "new_group", lambda **how: how)
    monkeypatch.setattr(runtime, "DistributedDataParallel", lambda model, **how: how)
    weight = SimpleNamespace(device=torch.device(device))
    model = SimpleNamespace(parameters=lambda: iter([weight]))
    found = runtime.parallelize(model, "ddp", torch.bfloat16)
    limit = timedelta(minutes=10)
    assert found["process_group"] == {"backend": backend, "timeout": limit}


@pytest.fixture
def alone_in_a_job():
    """A job of one process, this one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parallel", [fsdp("fsdp")])
def test_sharded_layers_get_positions_and_the_residual_stream_in_fp32(alone_in_a_job, parallel):
    """As with ddp, where autocast leaves them so. The layers compute in bf16."""
    model, seen, inside = CausalLM(ModelConfig(**SHAPE)), [], []
    learner = runtime.parallelize(model, parallel, torch.bfloat16)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given: seen.extend([given[0], *given[1]]))
        layer.mlp.register_forward_hook(lambda layer, _, out: inside.append(out))
    input_ids, labels, *where = pack(samples([5, 9]), 64)
    with torch.autocast("cpu", torch.bfloat16):
        learner(input_ids, *where, labels=labels).backward()
    assert len(seen) == 6 and all(tensor.dtype == torch.float32 for tensor in seen)
    assert all(tensor.dtype == torch.bfloat16 for tensor in inside)


@pytest.mark.parametrize("parallel", [fsdp("fsdp")])
def test_a_sharded_model_answers_in_several_batches(alone_in_a_job, parallel):
    """The first one leaves the root's weights gathered. The next step shards them again."""
    torch.manual_seed(0)
    model, prompts = CausalLM(ModelConfig(**SHAPE)), [[5, 6, 7], [8]]
    options = {"max_new_tokens": 5, "temperature": 0}
    expected = complete(model, prompts, **options)
    learner = runtime.parallelize(model, parallel, torch.float32)
    for _ in range(2):
        input_ids, labels, *where = pack(samples([5, 9]), 64)
        learner(input_ids, *where, labels=labels).backward()
        with generating(model, SimpleNamespace(autocast=nullcontext())):
            assert [complete(model, prompts, **options) for _ in range(3)] == [expected] * 3


def test_fsdp_on_a_cpu_of_an_older_torch_is_a_sentence(alone_in_a_job, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0"))
    with pytest.raises(UserError, match="--parallel fsdp on a CPU needs torch 2.7"):
        runtime.parallelize(CausalLM(ModelConfig(**SHAPE)), "fsdp", torch.float32)


@pytest.mark.parametrize("parallel", ["ddp", fsdp("fsdp")])
def test_two_processes_score_and_write_samples(trained, data, gsm8k, tmp_path, parallel):
    """Of a sharded model, generation starts from what a step has gathered. In bf16, both are the
    single process.
    """
    problems = (gsm8k / "test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    (tmp_path / "valid.jsonl").write_text("".join(problems), encoding="utf-8")
    flags = ["--from_weight", trained / "pretrain_32.pth", "--data_path", data / "sft.jsonl"]
    flags += ["--val_data_path", tmp_path / "valid.jsonl", "--dtype", "bf16"]
    more = ["--save_dir", tmp_path / "two", "--max_seq_len", 96, "--batch_size", 2]
    more += ["--val_interval", 2, "--sample_interval", 4, "--log_interval", 1, "--device", "cpu"]
    more += ["--parallel", parallel, "--best_metric", "gsm8k", "--learning_rate", 1e-3]
    done = torchrun(2, ROOT / "trainer/train_full_sft.py", *flags, *more, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Who are you? -> " in done.stderr + done.stdout
    sft(tmp_path / "one", *flags, "--batch_size", 4, "--learning_rate", 1e-3)
    logs = [tmp_path / name / "logs" / "full_sft_32.jsonl" for name in ("one", "two")]
    one, two = ([json.loads(line) for line in log.open(encoding="utf-8")] for log in logs)
    for name in ("loss", "grad_norm"):
        values = ([line[name] for line in lines] for lines in (one, two))
        assert next(values) == pytest.approx(next(values), rel=1e-2), name
