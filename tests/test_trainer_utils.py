"""What both train scripts call: optimizers, random numbers, precision, what learns, the log."""

import copy
import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common import UserError
from dataset.lm_dataset import PretrainDataset, SFTDataset
from model.causal_lm import CausalLM, ModelConfig
from model.device import pick_device, pick_dtype, require_compiler
from model.extend_vocab import extend_vocab, freeze_base
from model.lora import add_lora
from model.tokenizer import load_tokenizer
from model.weights import SHAPE, extra_entries
from tests.conftest import chat, curves_of, flags_read, write_jsonl
from trainer import parameters, runtime, train_distillation
from trainer.metrics import MetricsLog, curves_as_svg
from trainer.optimizer import Muon, compile_layers, make_optimizer, orthogonalize
from trainer.runtime import seed_step
from trainer.trainer_utils import init_model, print_data_summary
from trainer.training_run import Progress


def small(vocab_size=64, **more):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CausalLM(ModelConfig(vocab_size=vocab_size, **shape, **more))


def args_of(**more):
    flags = {"optimizer": "adamw", "parallel": "ddp", "learning_rate": 0.1, "weight_decay": 0.5}
    flags |= dict.fromkeys(("use_lora", "extend_tokens", "freeze_base"))
    return SimpleNamespace(
        **{**flags, "seed": 1, "from_weight": "none", "from_resume": False, **more}
    )


# ----------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_each_weight_that_learns_has_one_place_and_decays_if_it_is_a_matrix(kind, use_moe):
    model = small(use_moe=use_moe, tie_word_embeddings=False)
    model.model.layers[0].requires_grad_(False)
    groups = make_optimizer(model, args_of(optimizer=kind)).param_groups
    decay = {id(w): group["weight_decay"] for group in groups for w in group["params"]}
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(learning) == len(decay)
    assert all(decay[id(w)] == (0.5 if w.dim() > 1 else 0.0) for w in learning)


def test_muon_is_for_the_matrices_of_the_layers_and_both_parts_work_as_one():
    model = small()
    optimizer = make_optimizer(model, args_of(optimizer="muon"))
    matrices = {id(w) for w in model.model.layers.parameters() if w.dim() > 1}
    its = {id(w) for group in optimizer.parts[0].param_groups for w in group["params"]}
    assert its == matrices
    ids = torch.arange(20)[None]
    for lr in (0.0, 0.1):  # the schedule's rate reaches every part
        before = copy.deepcopy(model.state_dict())
        model(ids, labels=ids).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert not any(w.grad is not None and w.grad.any() for w in model.parameters())
        moved = [not torch.equal(w, before[name]) for name, w in model.state_dict().items()]
        assert all(moved) if lr else not any(moved)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
def test_muon_with_five_iterations_takes_the_steps_of_torch(monkeypatch):
    """torch computes in bf16, hence the tolerance."""
    monkeypatch.setattr("trainer.optimizer.orthogonalize", partial(orthogonalize, iterations=5))
    torch.manual_seed(0)
    for shape in ((32, 96), (96, 32), (48, 48)):
        start, gradients = torch.randn(shape), torch.randn(3, *shape)
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimizers = (
            Muon([ours], lr=0.1, weight_decay=0.3),
            torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        )
        for gradient in gradients:
            for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
                weight.grad = gradient.clone()
                optimizer.step()
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)
        assert (ours - start).abs().max() > 0.1


def test_an_orthogonal_matrix_has_the_directions_of_its_matrix_and_lengths_near_one():
    torch.manual_seed(0)
    for shape in ((40, 16), (16, 40), (30, 30)):
        matrix = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        lengths = u.T @ orthogonalize(matrix) @ v.T  # diagonal, since U and V are kept
        assert lengths.diagonal().median() > 0.65 and lengths.diagonal().max() < 1.25
        off = lengths - lengths.diagonal().diag()
        assert off.abs().max() < 1e-4


def test_three_iterations_are_three_times_the_polynomial():
    """Muon's quintic, a s + b s^3 + c s^5, on singular values that are known beforehand."""
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(5, 5, generator=generator))[0] for _ in range(2))
    values = torch.tensor([3.0, 1.0, 0.5, 0.1, 0.02])
    expected = values / values.norm()
    for _ in range(3):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    result = orthogonalize(left * values @ right.T)
    torch.testing.assert_close(result, left * expected @ right.T, atol=1e-5, rtol=1e-4)


def test_adapters_get_adamw():
    model = small()
    add_lora(model)
    assert isinstance(make_optimizer(model, args_of(optimizer="muon")), torch.optim.AdamW)


def test_rows_that_stay_do_not_decay():
    """With a decay of a half of each step the old rows stay to the bit, and new ones move."""
    tokenizer = load_tokenizer()
    model = small(tokenizer.get_vocab_size())
    extend_vocab(model, tokenizer, {"<a_1>": "", "<b_1>": ""})
    freeze_base(model)
    optimizer = make_optimizer(model, args_of(weight_decay=5.0))
    before, ids = model.lm_head.weight.clone(), torch.tensor([[5, 2048, 2049, 7, 2048]])
    for _ in range(3):
        model(ids, labels=ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.lm_head.weight[:2048], before[:2048])
    assert ((model.lm_head.weight - before)[2048:].abs() > 0.01).any(dim=1).all()


# ------------------------------------------------------------------------------- random numbers


def test_the_random_numbers_of_a_step_follow_from_seed_step_and_process():
    drawn = {}
    for _ in range(2):
        for place in [
            (seed, step, rank) for seed in (1, 2) for step in (0, 1, 2) for rank in (0, 1)
        ]:
            torch.randn(3)  # whatever was drawn before
            seed_step(*place)
            drawn.setdefault(place, []).append(tuple(torch.rand(2).tolist()))
    assert all(one == other for one, other in drawn.values())
    assert len(set(map(tuple, drawn.values()))) == 12


def test_first_weights_follow_from_the_seed(capsys):
    def begin(seed):
        torch.randn(3)
        flags = dict.fromkeys(SHAPE) | {"hidden_size": 16, "num_hidden_layers": 1}
        flags |= {"tokenizer_path": None, "dropout": 0.3}
        model, _ = init_model(args_of(seed=seed, max_seq_len=3000, **flags))
        assert model.model.dropout.p == 0.3
        assert model.config.max_position_embeddings == 3000  # as long as the rows
        return model.lm_head.weight

    assert torch.equal(begin(1), begin(1)) and not torch.equal(begin(1), begin(2))
    assert "from scratch: 0.04 M parameters, vocabulary 2048" in capsys.readouterr().out


# --------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize(
    "device, native, picked",
    [("cpu", "_is_avx512_bf16_supported", "bf16"), ("cpu", None, "fp32"), ("meta", None, "fp32")],
)
def test_auto_computes_in_bf16_where_the_processor_has_it(monkeypatch, device, native, picked):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == native, raising=False)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[picked]
    assert pick_dtype("auto", torch.device(device)) == dtype
    if device == "cpu":
        args = SimpleNamespace(dtype="auto", device="cpu", deterministic=0)
        assert runtime.start_runtime(args).dtype == dtype
        assert args.dtype == picked  # so that a resumed run computes as it began


def test_a_given_precision_is_taken():
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.half}.items():
        assert pick_dtype(name, torch.device("cpu")) == dtype


def test_a_device_that_is_not_there_is_named():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name} .*auto"):
            pick_device(name)


def test_a_missing_compiler_is_told_before_the_first_step(monkeypatch):
    monkeypatch.setattr(
        shutil, "which", lambda name: name if name in ("clang", "clang++") else None
    )
    require_compiler(torch.device("cpu"))
    monkeypatch.setattr("model.device.has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "gcc" else None)
    require_compiler(torch.device("cuda"))  # Triton compiles there, which needs C only
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--use_compile 1 needs a C"):
        require_compiler(torch.device("cpu"))


def test_each_layer_is_compiled_by_itself_and_computes_what_it_did(compiled):
    model, ids = small(), torch.arange(20)[None]
    before = model(ids)
    compile_layers(model)
    assert compiled == [*model.model.layers]
    torch.testing.assert_close(model(ids), before)


# ------------------------------------------------------------------------------------ what learns


def test_new_rows_alone_are_counted(tmp_path, capsys):
    (tmp_path / "new.txt").write_text("<a_1>\n<b_1>\n", encoding="utf-8")
    tokenizer = load_tokenizer()
    model = small(tokenizer.get_vocab_size())
    args = args_of(extend_tokens=tmp_path / "new.txt", freeze_base=True)
    parameters.choose_trainable(model, tokenizer, args)
    said = capsys.readouterr().out
    assert "2 new tokens; the vocabulary has 2050 entries" in said and "\n64 of " in said
    assert extra_entries(model) == {"first_new_token": 2048}
    args.parallel = "fsdp"
    with pytest.raises(UserError, match="--freeze_base 1 needs unsharded weights"):
        parameters.choose_trainable(model, tokenizer, args)


def test_a_model_that_is_trained_as_a_whole_needs_no_line(capsys):
    model = small()
    parameters.choose_trainable(model, None, args_of())
    assert capsys.readouterr().out == "" and extra_entries(model) == {}


# --------------------------------------------------------------------------------------- figures


def test_what_cannot_be_used_of_the_data_is_counted_and_five_bad_lines_are_shown(tmp_path, capsys):
    records = [chat("Hi?", "Hello!"), chat("Long? " * 40, "x"), chat("Long?", "Yes. " * 40)]
    records += [{"conversations": []}] * 7
    path = write_jsonl(tmp_path / "data.jsonl", records)
    data = SFTDataset(path, load_tokenizer(), max_length=30)
    print_data_summary(data, range(len(data)), [], SimpleNamespace(max_seq_len=30))
    lines = capsys.readouterr().out.splitlines()
    mean = sum(len(data[row][0]) for row in range(len(data))) / len(data)
    assert lines[0] == f"2 samples of {mean:.0f} tokens to train on, 0 to validate on"
    assert "2 records are longer than --max_seq_len 30" in lines
    assert "1 records dropped: nothing supervised within --max_seq_len" in lines
    assert "7 bad records skipped (--strict_data 1 stops at them):" in lines
    shown = [line.split(":")[0].strip() for line in lines if line.startswith("  line ")]
    assert shown == [f"line {number}" for number in range(4, 9)]


def test_flawless_data_takes_one_line(tmp_path, capsys):
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": "one two"}, {"text": "three"}])
    data = PretrainDataset(path, load_tokenizer())
    print_data_summary(data, [0], [1], SimpleNamespace(max_seq_len=30))
    said = capsys.readouterr().out
    assert said == f"1 samples of {len(data[0][0])} tokens to train on, 1 to validate on\n"


# --------------------------------------------------------------------------------------- the log


REST = {"epoch": 0, "lr": 0.1, "grad_norm": 1.0, "data_wait_s": 0.0}


def test_a_resumed_log_goes_on_where_its_checkpoint_was(tmp_path):
    path = tmp_path / "logs" / "x.jsonl"
    run = Progress()
    log = MetricsLog(path, run, 0)

    def losses():
        return [json.loads(line)["loss"] for line in path.read_text().splitlines()]

    log.write(run, loss=1 / 3, **REST)
    kept = run.log_bytes
    assert kept == path.stat().st_size
    log.write(run, loss=float("nan"), **REST)
    assert losses() == [0.333333, None]
    run.log_bytes = kept
    MetricsLog(path, run, 0).write(run, loss=1.0, **REST)
    assert losses() == [0.333333, 1.0] and run.log_bytes == path.stat().st_size
    MetricsLog(tmp_path / "y.jsonl", run, 0, silent=True).write(run, loss=1.0, **REST)
    assert not (tmp_path / "y.jsonl").exists()
    MetricsLog(path, Progress(), 9)  # a new run begins a new log
    assert path.read_bytes() == b""


def test_a_curve_without_points_is_not_drawn():
    svg = curves_as_svg({"training": [(1, 2.0), (2, 1.0)], "validation": []}, "x")
    assert svg.count("<polyline") == 1 and "validation" not in svg


def test_the_picture_has_the_points_that_are_finite_and_a_scale_on_which_they_are_seen(tmp_path):
    for highest in (3.0, 300.0):
        run = Progress()
        log = MetricsLog(tmp_path / "a & b.jsonl", run, 0)
        for tokens, loss, val_loss in (
            (10, highest, None),
            (20, float("inf"), 2.5),
            (40, 2.0, None),
        ):
            run.tokens = tokens
            log.write(run, loss=loss, val_loss=val_loss, **REST)
        assert log.draw() == tmp_path / "a & b_loss.svg"
        curves = curves_of(log.draw())
        assert [len(curves[label]) for label in ("training", "validation")] == [2, 1]
        (x1, y1), (x2, y2) = curves["training"]
        ((x3, y3),) = curves["validation"]
        left = 2 * x3 - x2  # where no token is: 20 of 40 is half of the way
        assert x1 - left == pytest.approx((x2 - left) / 4, abs=0.2)
        zero = 350
        top = min(highest, 40)  # 20 times the lowest
        assert [(zero - y) / (zero - 40) for y in (y1, y2, y3)] == pytest.approx(
            [min(loss, top) / top for loss in (highest, 2.0, 2.5)], abs=1e-3
        )


# ----------------------------------------------------------------------- processes and other ways


def test_a_process_alone_sums_its_own_values_and_waits_for_nobody():
    assert runtime.all_reduce_sum(3, True, torch.tensor(2.5)) == [3.0, 1.0, 2.5]
    compute = runtime.start_runtime(SimpleNamespace(dtype="fp32", device="cpu", deterministic=0))
    assert runtime.is_rank_zero() and (compute.rank, compute.world_size) == (0, 1)
    assert compute.sum(3, True) == [3.0, 1.0]
    runtime.barrier()


def end_with(error):
    with runtime.torchrun_process():
        raise error


def test_a_process_that_lost_another_says_so_and_other_errors_keep_their_traceback(
    monkeypatch, capsys
):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for reason in ("[gloo/tcp] Connection closed by peer", "Timed out waiting", "NCCL error"):
        with pytest.raises(SystemExit) as end:
            end_with(RuntimeError(f"{reason}\nmore"))
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert re.match(r"error: process 1 lost another .*--from_resume 1\n$", said)
        assert reason in said and "more" not in said
    with pytest.raises(RuntimeError, match="shapes"):
        end_with(RuntimeError("shapes do not fit"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="peer"):
        end_with(RuntimeError("peer"))


def test_a_script_ends_with_its_code():
    end_with(SystemExit(0))
    for code in (2, 130):
        with pytest.raises(SystemExit) as end:
            end_with(SystemExit(code))
        assert end.value.code == code


def test_gradients_are_sent_in_a_steps_last_micro_batch_alone():
    """Each micro-batch's would give the same sum, in more time."""
    runner = torch.nn.Linear(1, 1)
    runner.no_sync = lambda: "not sent"
    assert runtime.gradient_sync(runner, False) == "not sent"
    assert runtime.gradient_sync(runner, True) != "not sent"


@pytest.mark.parametrize("equals", [False, True])
def test_distillation_has_a_teacher_unless_it_is_recorded(tmp_path, equals):
    """Flags are parsed: --from_weight NAME is --from_weight=NAME."""

    def given(name, value):
        return [f"{name}={value}"] if equals else [name, value]

    args = flags_read(
        train_distillation.main, *given("--from_weight", "none"), *given("--from_resume", 0)
    )
    assert (args.save_weight, args.from_weight) == ("distilled", "none")
    assert args.teacher_weight is None  # full_sft, see `build_distillation`
    (tmp_path / "train").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    args = flags_read(
        train_distillation.main, *given("--offline_dir", tmp_path), *given("--from_weight", "x")
    )
    assert args.teacher_weight is None and args.offline_dir == tmp_path
