"""Shared fixtures: small data, and a model trained for a few steps, made once for all tests."""

import contextlib
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from common import report_user_errors
from tests import reach

# The cores are shared by pytest-xdist's processes; set before torch is loaded, for children too.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ["OMP_NUM_THREADS"] = str(max(1, min(2, (os.cpu_count() or 1) // WORKERS)))

# Where pytest itself runs under nohup or in the background, its children must still be interrupted.
for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), default)

ROOT = Path(__file__).resolve().parents[1]
TINY = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --device cpu --dtype fp32"
TINY = TINY.split()


def pytest_collection_modifyitems(items):
    """The files with the longest tests first, so that no core waits for one at the end."""
    first = ("test_faults", "test_step", "test_training", "test_lora", "test_generation")
    items.sort(key=lambda item: item.path.stem not in first)


# A process of its own would first load torch for some seconds. This one has loaded it, computes
# nothing, and is forked for each command. Apple's libraries do not survive that.
PRELOADED = ["tests.conftest", "trainer.train_full_sft", "evaluation.run_eval", "torch._dynamo"]
PRELOADED += ["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"]
FORKS = None
if sys.platform == "linux":
    FORKS = multiprocessing.get_context("forkserver")
    FORKS.set_forkserver_preload(PRELOADED)


def run(*command, cwd=ROOT, text_input=None, timeout=120, fork=True, **environment):
    """A command as a user types it; python is this one. fork: without loading torch again, if it
    is a script.
    """
    if FORKS and fork and not environment and str(command[0]).endswith(".py"):
        return run_forked(list(map(str, command)), cwd, text_input or "", timeout)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        input=text_input if text_input is not None else "",
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )


def run_forked(command, cwd, text_input, timeout, environments=({},)):
    """One process for each environment, all at once. When one fails, the others have ten seconds
    to end.
    """
    processes, written, deadline = [], [[], []], time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        for number, environment in enumerate(environments):
            files = [Path(folder) / f"{number} {name}" for name in ("stdin", "stdout", "stderr")]
            for path, text in zip(files, (text_input, "", ""), strict=True):
                path.write_text(text, encoding="utf-8")
            environment = {**environment, "PYTEST_CURRENT_TEST": os.environ["PYTEST_CURRENT_TEST"]}
            process = FORKS.Process(target=become, args=(command, cwd, files, environment))
            with contextlib.chdir(ROOT):  # where the server that forks finds what it loads
                process.start()
            processes.append(process)
            for paths, path in zip(written, files[1:], strict=True):
                paths.append(path)
        failed = False
        while alive := [process for process in processes if process.exitcode is None]:
            if time.monotonic() > deadline:
                for process in alive:
                    process.kill()
                    process.join()
            elif not failed and any(process.exitcode for process in processes):
                failed, deadline = True, min(deadline, time.monotonic() + 10)
            multiprocessing.connection.wait([process.sentinel for process in alive], 0.2)
        printed = ["".join(path.read_text("utf-8") for path in paths) for paths in written]
    if not failed and time.monotonic() > deadline:
        raise subprocess.TimeoutExpired(command, timeout, *printed)
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess(command, code, *printed)


def become(command, cwd, files, environment):
    """Runs a script in a forked process, nearly as python does: the project's folder stays on the
    path.
    """
    os.chdir(cwd)
    os.environ.update(environment)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        with files[number].open(mode) as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: PTH123  no path
    sys.argv, sys.path[0] = command, str(Path(command[0]).resolve().parent)
    with reach.in_fork():
        runpy.run_path(command[0], run_name="__main__")


def torchrun(processes, *command, cwd=ROOT, timeout=120, fork=True):
    """A job of several processes."""
    if not FORKS or not fork:
        how = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        return run("-m", *how, *command, cwd=cwd, timeout=timeout, OMP_NUM_THREADS="1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    ranks = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return run_forked(list(map(str, command)), cwd, "", timeout, ranks)


def run_here(script, *flags):
    """The same in this process."""
    out, err = io.StringIO(), io.StringIO()
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with report_user_errors():
                code = module.main(list(map(str, flags)))
        except SystemExit as end:
            code = end.code
    code = code if isinstance(code, int) else 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def fsdp(*values):
    """The parameter of a test that shards a model on a CPU, which torch can since 2.7."""
    import torch

    reason = "fsdp on a CPU needs torch 2.7"
    return pytest.param(*values, marks=pytest.mark.skipif(torch.__version__ < "2.7", reason=reason))


def write_jsonl(path, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@contextlib.contextmanager
def serving_at(server, start=True):
    """Context manager: a server of serving/server.py answers in a thread; start: its batchers."""
    batchers = list(server.batchers.values())
    for batcher in batchers if start else ():
        batcher.start()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        for batcher in batchers:
            batcher.ended = True
            if batcher.is_alive():
                batcher.join()
        server.server_close()


def pack(samples, max_seq_len, count=1):
    """A batch of packed rows, as the plan and `collate` make it; with a count, as on a GPU."""
    from dataset.step_plan import best_fit_decreasing, collate

    rows = best_fit_decreasing([len(input_ids) for input_ids, _ in samples], max_seq_len)
    rows = [[samples[item] for item in row] for row in rows]
    return collate(rows, max_seq_len, max_seq_len if count > 1 else 64, count)


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return {"conversations": messages}


def sft(out, *flags, script=None):
    """A few steps of SFT, or of another script of trainer/, in this process."""
    from trainer import train_full_sft

    common = ["--save_dir", out, "--batch_size", 2, "--learning_rate", 1e-2, "--max_seq_len", 96]
    common += ["--dtype", "fp32", "--device", "cpu", "--log_interval", 1]
    (script or train_full_sft).main(list(map(str, [*common, *flags])))


def flags_read(main, *line):
    """The flags that the main() of SFT or distillation reads, without running it."""
    script = sys.modules[main.__module__]
    found, read = [], script.parse_run

    def keep(*given):
        found.append(read(*given)[0])
        sys.exit()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "parse_run", keep)
        with pytest.raises(SystemExit):
            main([str(part) for part in line])
    return found[0]


def curves_of(path):
    """{label: [(x, y)]} of the curves in an SVG, in its own coordinates: y grows downwards."""
    svg = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points").split() for line in svg.iter(f"{space}polyline")]
    labels = [text.text for text in svg.iter(f"{space}text") if text.get("fill")]
    return {
        label: [tuple(map(float, point.split(","))) for point in line]
        for label, line in zip(labels, lines, strict=True)
    }


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with pretrain.jsonl and sft.jsonl: a few dozen records of ragged lengths."""
    folder = tmp_path_factory.mktemp("data")
    numbers = ["one", "two", "three", "four", "five", "six", "seven"]
    texts = [{"text": " and ".join(numbers[: 1 + i % 7]) + f" make {i}."} for i in range(60)]
    write_jsonl(folder / "pretrain.jsonl", texts)
    chats = [
        chat(f"What is {i}?" * (1 + i % 3), "It is a number. " * (1 + i % 4)) for i in range(40)
    ]
    write_jsonl(folder / "sft.jsonl", chats)
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A save_dir that holds tiny pretrain_32 and full_sft_32 weights."""
    out = tmp_path_factory.mktemp("out")
    common = ["--save_dir", out, "--batch_size", 2, "--max_seq_len", 96, "--log_interval", 1]
    for script, name, more in (
        ("train_pretrain.py", "pretrain.jsonl", TINY),
        ("train_full_sft.py", "sft.jsonl", ["--dtype", "fp32", "--device", "cpu"]),
    ):
        done = run_here(f"trainer/{script}", *common, *more, "--data_path", data / name)
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def gsm8k_raw(tmp_path_factory):
    """A folder like the official one: 45 problems to train on, 12 to test with."""
    folder = tmp_path_factory.mktemp("raw")
    for name, numbers in (("train", range(45)), ("test", range(45, 57))):
        records = [
            {
                "question": f"Tom has {i} eggs and buys {i % 5} more. How many?" + " Hm?" * (i % 4),
                "answer": f"Tom has {i}+{i % 5}=<<{i}+{i % 5}={i + i % 5}>>{i + i % 5} eggs.\n"
                + "That is all.\n" * (i % 2)
                + f"#### {i + i % 5:,}",
            }
            for i in numbers
        ]
        write_jsonl(folder / f"{name}.jsonl", records)
    write_jsonl(folder / "test_socratic.jsonl", [{"question": "?", "answer": "#### 1"}])
    return folder


@pytest.fixture(scope="session")
def gsm8k(gsm8k_raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("gsm8k")
    done = run_here("recipes/prepare_math.py", "gsm8k", "--raw", gsm8k_raw, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def evaluated(trained, gsm8k, tmp_path_factory):
    """A stored result of two problems."""
    weight, out = trained / "full_sft_32.pth", tmp_path_factory.mktemp("evaluated")
    flags = ["--weight", weight, "--limit", 2, "--max_new_tokens", 4, "--save_dir", out]
    data = ["--task", "gsm8k", "--data_path", gsm8k / "test.jsonl"]
    done = run_here("evaluation/run_eval.py", *data, *flags)
    assert done.returncode == 0, done.stderr
    return out / "eval" / "gsm8k" / "full_sft_32_limit_2.json"


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A shop of 6 items, as the usual files."""
    folder = tmp_path_factory.mktemp("shop")
    index = {str(i): [f"<a_{i % 3}>", f"<b_{i // 3}>"] for i in range(6)}
    items = {str(i): {"title": f"Pen {i}", "description": f"It writes. {i}"} for i in range(5)}
    (folder / "Shop.index.json").write_text(json.dumps(index))
    (folder / "Shop.item.json").write_text(json.dumps(items))
    head = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
    lines = [head]
    for user in range(30):
        seen, item = [(user + k) % 6 for k in range(1 + user % 4)], (user + 1 + user % 4) % 6
        titles, sids = [f"Pen {i}, new" for i in seen], ["".join(index[str(i)]) for i in seen]
        sid = "".join(index[str(item)])
        lines.append(f'U{user},"{titles}","Pen {item}","{seen}",{item},"{sids}",{sid}')
    (folder / "Shop.valid.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def shop_data(shop, tmp_path_factory):
    out = tmp_path_factory.mktemp("sid")
    done = run_here("recipes/sid.py", "--raw", shop, "--out", out, "--max_history", 3)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def extended(trained, shop_data, tmp_path_factory):
    """A folder with weights that have new tokens, nothing but their rows trained."""
    out = tmp_path_factory.mktemp("extended")
    flags = ["--data_path", shop_data / "train.jsonl", "--from_weight", trained / "pretrain_32.pth"]
    flags += ["--extend_tokens", shop_data / "tokens.txt", "--freeze_base", 1]
    sft(out, *flags, "--weight_decay", 0.5)
    return out


LORA = ["--use_lora", 1, "--lora_rank", 4, "--lora_dropout", 0.1]


@pytest.fixture(scope="session")
def lora_run(trained, data, tmp_path_factory):
    """A folder with the pretrained weights, and adapters trained on them."""
    out = tmp_path_factory.mktemp("lora")
    (out / "pretrain_32.pth").write_bytes((trained / "pretrain_32.pth").read_bytes())
    sft(out, "--data_path", data / "sft.jsonl", *LORA)
    return out


def export(trained, data, folder, *more):
    """What full_sft_32 says of the conversations, into a folder."""
    from recipes import export_hidden_states

    flags = ["--teacher_weight", trained / "full_sft_32.pth", "--data_path", data / "sft.jsonl"]
    flags += ["--offline_dir", folder, "--max_seq_len", 96, "--save_dir", folder / "out"]
    flags += ["--dtype", "fp32", "--device", "cpu", "--shard_size", 12, "--batch_size", 5]
    export_hidden_states.main(list(map(str, [*flags, *more])))


@pytest.fixture(scope="session")
def recorded(trained, data, tmp_path_factory):
    """A folder with what full_sft_32 says of conversations and replayed text."""
    folder = tmp_path_factory.mktemp("recorded")
    replay = ["--replay_path", data / "pretrain.jsonl", "--replay_share", 0.5]
    export(trained, data, folder, "--val_split", 0.1, *replay, "--aux_layers", "1,2")
    return folder


@pytest.fixture
def compiled(monkeypatch):
    """The modules that get compiled: by all of torch.compile but the C++ compiler, in seconds."""
    import torch

    modules, plain = [], torch.nn.Module.compile
    monkeypatch.setattr("trainer.optimizer.require_compiler", lambda device: None)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m: modules.append(m) or plain(m, backend="aot_eager")
    )
    return modules


def opened(name, model, tokenizer, chats, trained_length):
    """An OpenModel as `open_model` returns it."""
    from model.weights import OpenModel

    stage = "full_sft" if chats else "pretrain"
    return OpenModel(name, model, tokenizer, stage, {"max_seq_len": trained_length}, [])
