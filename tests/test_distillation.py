"""Distillation: the formula, who learns, and a whole run."""

import copy
import json
import random
import shutil
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common import IGNORE, UserError
from dataset.lm_dataset import SFTDataset
from dataset.step_plan import split_samples
from model.causal_lm import CausalLM, ModelConfig
from model.tokenizer import load_tokenizer
from model.weights import build_model, load
from tests.conftest import ROOT, TINY, export, run, torchrun, write_jsonl
from tests.test_training import assert_like_one
from trainer import optimizer, recorded_teacher, train_distillation, train_tokenizer
from trainer.distillation import Distillation, Teacher, add_projections
from trainer.recorded_teacher import RecordedDataset
from trainer.teacher import build_distillation

SMALL = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2}


def small(seed, hidden_size=32):
    torch.manual_seed(seed)
    return CausalLM(ModelConfig(hidden_size=hidden_size, **SMALL))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 8), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = labels[2, 2] = IGNORE
    return ids, labels


def test_the_loss_is_the_formula(batch):
    ids, labels = batch
    student, teacher, T, alpha = small(1, 16), small(2), 3.0, 0.3
    found = Distillation(student, Teacher(teacher), alpha, T)(ids, labels=labels)
    expected = torch.zeros(())
    ours, theirs = (model(ids).double() for model in (student, teacher))
    for row in range(3):
        for place in range(7):
            label = labels[row, place + 1]
            if label == IGNORE:
                continue
            q, p = ours[row, place], theirs[row, place]
            expected = expected - alpha * q.softmax(0)[label].log()
            p, q = (p / T).softmax(0), (q / T).softmax(0)
            expected = expected + (1 - alpha) * T**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-4, rtol=1e-5)


def test_with_alpha_1_or_a_teacher_like_itself_it_is_sft(batch):
    ids, labels = batch
    student = small(1)
    plain = student(ids, labels=labels)
    torch.testing.assert_close(
        Distillation(student, Teacher(small(2)), 1.0, 2.0)(ids, labels=labels), plain
    )
    twin = Distillation(student, Teacher(copy.deepcopy(student)), 0.5, 2.0)(ids, labels=labels)
    torch.testing.assert_close(twin, 0.5 * plain)


def test_the_student_alone_learns(batch):
    ids, labels = batch
    student, teacher = small(1, 16), small(2)
    module = Distillation(student, Teacher(teacher), 0.0, 2.0).train()
    assert not teacher.training and len(list(module.parameters())) == len([*student.parameters()])
    module(ids, labels=labels).backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in student.parameters())


def test_only_supervised_positions_count(batch):
    ids, labels = batch
    student, teacher = small(1), Teacher(small(2), layers=[1])
    add_projections(student, 32, 2)
    one = Distillation(student, teacher, 0.5, 2.0, 1.0)(ids, labels=labels)

    class Other:  # a teacher with other states at all other positions
        layers, config, lm_head_weight = teacher.layers, teacher.config, teacher.lm_head_weight

        def __call__(self, *where):
            found = teacher(*where)
            for states in found:
                states[:, :-1][labels[:, 1:] == IGNORE] += 1
            return found

    assert torch.equal(Distillation(student, Other(), 0.5, 2.0, 1.0)(ids, labels=labels), one)


def test_a_long_batch_is_read_in_chunks_with_the_same_gradients(batch, monkeypatch):
    ids, labels = batch
    gradients = []
    for size in (512, 3):
        monkeypatch.setattr("model.loss.CHUNK", size)
        student = small(1, 16)
        Distillation(student, Teacher(small(2)), 0.5, 2.0)(ids, labels=labels).backward()
        gradients.append([weight.grad for weight in student.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_without_loss_has_a_gradient_of_zero():
    student = small(1, 16)
    labels = torch.full((1, 1), IGNORE)
    loss = Distillation(student, Teacher(small(2)), 0.5, 2.0)(labels.clamp(min=0), labels=labels)
    loss.backward()
    assert loss == 0 and not any(weight.grad.any() for weight in student.parameters())


def test_a_teacher_returns_the_hidden_states_of_its_layers(batch):
    transformers = pytest.importorskip("transformers")
    teacher = small(2).eval()
    config = transformers.Qwen3Config(
        **{**vars(teacher.config), "num_hidden_layers": 1}, attn_implementation="eager"
    )
    judge = transformers.Qwen3ForCausalLM(config).eval()
    judge.load_state_dict(teacher.state_dict())
    last, first = Teacher(teacher, layers=[1])(batch[0])
    with torch.no_grad():
        expected = judge.model(batch[0], output_hidden_states=True)
        layer = []
        judge.model.layers[0].register_forward_hook(lambda *call: layer.append(call[2]))
        judge(batch[0])
    torch.testing.assert_close(last, expected.last_hidden_state)
    out = layer[0][0] if isinstance(layer[0], tuple) else layer[0]
    torch.testing.assert_close(first, out)


def test_the_hidden_states_error_is_the_formula(batch):
    ids, labels = batch
    torch.manual_seed(0)
    student, teacher = small(1, 16), Teacher(small(2), layers=[1])
    add_projections(student, 32, 2)
    losses = [
        Distillation(student, teacher, 0.5, 2.0, beta)(ids, labels=labels) for beta in (0, 0.3)
    ]
    layers = []
    student.model.layers[0].register_forward_hook(lambda *call: layers.append(call[2]))
    ours, theirs = (student.hidden_states(ids), layers[0]), teacher(ids)
    expected = 0.0
    for matrix, mine, other in zip(student.projections, ours, theirs, strict=True):
        for row, place in (labels[:, 1:] != IGNORE).nonzero().tolist():
            error = matrix.weight @ mine[row, place] - other[row, place]
            expected = expected + 0.3 * (error**2).mean()
    torch.testing.assert_close(losses[1] - losses[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "depth, teacher_depth, layers, compared",
    [
        (2, 4, [2, 4], [1, 2]),
        (4, 2, [1, 2], [2, 4]),
        (3, 3, [3, 1], [3, 1]),
        (1, 8, [1, 7], [1, 1]),
    ],
)
def test_a_teachers_layer_is_compared_with_the_students_at_its_share_of_the_depth(
    batch, depth, teacher_depth, layers, compared
):
    ids, labels = batch
    torch.manual_seed(0)
    student, teacher = (
        CausalLM(ModelConfig(hidden_size=width, **{**SMALL, "num_hidden_layers": parse_layers}))
        for width, parse_layers in ((16, depth), (32, teacher_depth))
    )
    add_projections(student, 32, 3)
    losses = [
        Distillation(student, Teacher(teacher, layers), 0.5, 2.0, beta)(ids, labels=labels)
        for beta in (0, 0.3)
    ]
    outputs = {}
    for name, model in (("ours", student), ("theirs", teacher)):
        for number, layer in enumerate(model.model.layers, start=1):
            layer.register_forward_hook(
                lambda *call, at=(name, number): outputs.update({at: call[2]})
            )
        outputs[name, "last"] = model.hidden_states(ids)
    pairs = [("last", "last"), *zip(compared, layers, strict=True)]
    supervised, expected = labels[:, 1:] != IGNORE, 0.0
    for matrix, (mine, other) in zip(student.projections, pairs, strict=True):
        error = outputs["ours", mine] @ matrix.weight.T - outputs["theirs", other]
        expected = expected + 0.3 * error.square().mean(dim=-1)[:, :-1][supervised].sum()
    torch.testing.assert_close(losses[1] - losses[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_layers_that_are_watched_may_be_compiled_or_computed_twice(batch, how, compiled):
    ids, labels = batch
    gradients = []
    for changed in (False, True):
        torch.manual_seed(0)
        student = small(1, 16).train()
        add_projections(student, 32, 2)
        student.model.grad_checkpoint = changed and how == "checkpointed"
        if changed and how == "compiled":
            optimizer.compile_layers(student)
        module = Distillation(student, Teacher(small(2), layers=[1]), 0.5, 2.0, 0.3)
        for _ in range(2):
            student.zero_grad()
            module(ids, labels=labels).backward()
        gradients.append([weight.grad for weight in student.parameters()])
    assert len(compiled) == (how == "compiled")
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def distill(trained, data, out, *more):
    flags = ["--teacher_weight", trained / "full_sft_32.pth", "--data_path", data / "sft.jsonl"]
    flags += ["--save_dir", out, "--batch_size", 2, "--max_seq_len", 96, "--log_interval", 1]
    flags += [*TINY, "--hidden_size", 16, "--from_weight", "none", *more]
    train_distillation.main(list(map(str, flags)))


def test_a_run_and_its_resumption(trained, data, tmp_path, capsys):
    distill(trained, data, tmp_path / "whole", "--distill_alpha", 0.2)
    assert "distilling from" in capsys.readouterr().out
    lines = (tmp_path / "whole/logs/distilled_16.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    middle = (json.loads(lines[-1])["step"] + 1) // 2
    parts = tmp_path / "parts"
    distill(trained, data, parts, "--distill_alpha", 0.2, "--save_interval", middle)
    folder = parts / "checkpoints"
    earlier = folder / f"distilled_16_step{middle:06d}.pth"
    earlier.replace(folder / "distilled_16_resume.pth")
    train_distillation.main(["--from_resume", "1", "--save_dir", str(parts)])
    one, other = (
        load(tmp_path / f"{name}/distilled_16.pth")["model"] for name in ("whole", "parts")
    )
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_teacher_with_another_tokenizer_is_refused(trained, data, tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "one two three " * 50}] * 3)
    path = tmp_path / "tokenizer.json"
    flags = ["--data_path", text, "--vocab_size", 300, "--out", path]
    train_tokenizer.main(list(map(str, flags)))
    with pytest.raises(UserError, match="tokenizer"):
        distill(trained, data, tmp_path / "out", "--tokenizer_path", path)


def from_disk(folder, out, *more):
    flags = ["--offline_dir", folder, "--save_dir", out, "--batch_size", 2, "--log_interval", 1]
    flags += [*TINY, "--hidden_size", 16, "--from_weight", "none", "--max_seq_len", 96, *more]
    train_distillation.main(list(map(str, flags)))


def same_runs(one, other):
    for key in ("loss", "val_loss"):
        values = [
            [
                json.loads(line)[key]
                for line in (out / "logs/distilled_16.jsonl").read_text("utf-8").splitlines()
            ]
            for out in (one, other)
        ]
        assert values[0] == pytest.approx(values[1], abs=1e-4) and len(values[0]) > 3
    states = [load(out / "distilled_16.pth")["model"] for out in (one, other)]
    assert not any("projections" in name for name in states[0])
    assert states[0].keys() == states[1].keys()
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], atol=1e-4, rtol=1e-3)


HIDDEN = ["--hidden_weight", 0.2]


def as_recorded(data):
    """The flags of the fixture `recorded`."""
    replay = ["--replay_path", data / "pretrain.jsonl", "--replay_share", 0.5]
    return ["--val_split", 0.1, *replay, "--aux_layers", "1,2"]


def test_online_and_offline_agree(recorded, trained, data, tmp_path, capsys):
    distill(trained, data, tmp_path / "on", *HIDDEN, *as_recorded(data))
    from_disk(recorded, tmp_path / "off", *HIDDEN)
    assert "distilling from " + str(recorded) in capsys.readouterr().out
    same_runs(tmp_path / "on", tmp_path / "off")


def test_the_parts_of_a_recording_are_those_of_the_data_and_have_no_sample_in_common(
    trained, data, tmp_path
):
    split = ["--val_split", 0.2, "--seed", 3]
    export(trained, data, tmp_path, *split)
    dataset = SFTDataset(data / "sft.jsonl", load_tokenizer(), 96)
    whole = [tuple(part.tolist()) for row in dataset for part in row]
    whole, found = Counter(zip(whole[::2], whole[1::2], strict=True)), Counter()
    valid = Counter(dataset[row][0].numpy().tobytes() for row in split_samples(dataset, 0.2, 3)[1])
    for part in ("train", "valid"):
        recorded = RecordedDataset(tmp_path / part, load_tokenizer(), 96)
        assert len(recorded) > 1
        found += Counter((tuple(ids.tolist()), tuple(labels.tolist())) for ids, labels in recorded)
        if part == "valid":
            assert Counter(ids.numpy().tobytes() for ids, _ in recorded) == valid
    assert found == whole


def test_recorded_samples_count_their_supervised_tokens_as_others_do(recorded):
    """The first token of replayed text is never supervised, though its mask is 1."""
    data = RecordedDataset(recorded / "train", load_tokenizer(), 96)
    labels = [labels for _, labels in data]
    assert any(first != IGNORE for first, *_ in labels)
    assert data.files[0].supervised.tolist() == [int((x[1:] != IGNORE).sum()) for x in labels]


def test_a_shard_holds_the_states_of_each_sample_alone(recorded, trained):
    content = load(trained / "full_sft_32.pth")
    model, _ = build_model(content, "it")
    teacher = Teacher(model, layers=[1, 2])
    shard, start = torch.load(recorded / "train" / "00000.pt", weights_only=True), 0
    assert len(set(shard["lengths"].tolist())) > 3
    states = [shard["hidden_states"], *shard["aux_hidden_states"].unbind(1)]
    for length in shard["lengths"].tolist():
        ids = shard["input_ids"][start : start + length].long()
        for recorded, alone in zip(states, teacher(ids[None]), strict=True):
            found = recorded[start : start + length]
            torch.testing.assert_close(found, alone[0], atol=1e-4, rtol=1e-3)
        start += length
    assert start == len(shard["input_ids"]) == len(shard["loss_mask"])


def test_projections_are_resumed(recorded, tmp_path):
    from_disk(recorded, tmp_path / "whole", *HIDDEN)
    parts, moved = tmp_path / "parts", tmp_path / "moved"
    from_disk(recorded, parts, *HIDDEN, "--save_interval", 3)
    shutil.copytree(recorded, moved)
    folder = parts / "checkpoints"
    steps = sorted(folder.glob("*_step*.pth"))
    steps[0].replace(folder / "distilled_16_resume.pth")
    again = ["--from_resume", "1", "--save_dir", parts, "--offline_dir", moved]
    train_distillation.main(list(map(str, again)))
    one, other = (
        load(tmp_path / name / "checkpoints/distilled_16_resume.pth") for name in ("whole", "parts")
    )
    assert one["model"]["projections.0.weight"].shape == (32, 16)
    assert one["run"]["step"] == other["run"]["step"]
    assert all(torch.equal(weight, other["model"][name]) for name, weight in one["model"].items())


def test_projections_learn_though_all_else_is_frozen(recorded):
    student = CausalLM(ModelConfig(hidden_size=16, num_hidden_layers=1))
    add_projections(student, 32, 3)
    student.requires_grad_(False)
    args = {"offline_dir": recorded, "parallel": "ddp", "max_seq_len": 96, "aux_layers": ""}
    args |= {"distill_alpha": 0.1, "distill_temperature": 1.0, "hidden_weight": 0.1, "seed": 1}
    plain = CausalLM(ModelConfig(hidden_size=16, num_hidden_layers=1))
    drawn = build_distillation(copy.deepcopy(plain), load_tokenizer(), SimpleNamespace(**args))
    module = build_distillation(student, load_tokenizer(), SimpleNamespace(**args))
    learn = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert learn == {f"student.projections.{index}.weight" for index in range(3)}
    assert len(module.teacher.widths) == 3
    for seed, same in ((1, True), (2, False)):
        args["seed"] = seed  # new projections are drawn by it
        other = build_distillation(copy.deepcopy(plain), load_tokenizer(), SimpleNamespace(**args))
        weight = other.student.projections[0].weight
        assert torch.equal(weight, drawn.student.projections[0].weight) == same
    args["hidden_weight"] = 0.0  # the states of further layers are then not read
    module = build_distillation(student, load_tokenizer(), SimpleNamespace(**args))
    assert len(module.teacher.widths) == 1


def test_an_export_goes_on_where_it_stopped(recorded, trained, data, tmp_path, capsys):
    how, folder = as_recorded(data), tmp_path / "again"
    export(trained, data, folder, *how)
    shards = sorted(folder.glob("*/*.pt"))
    assert [path.relative_to(folder) for path in shards] == [
        path.relative_to(recorded) for path in sorted(recorded.glob("*/*.pt"))
    ]
    kept, lost = shards[0], shards[1]
    before, lost_before = kept.stat().st_mtime_ns, torch.load(lost, weights_only=True)
    lost.unlink()
    with pytest.raises(UserError, match="00001.pt cannot be read.*continues"):
        from_disk(folder, tmp_path / "out")
    export(trained, data, folder, *how)
    assert kept.stat().st_mtime_ns == before
    made = torch.load(lost, weights_only=True)
    assert {"input_ids", "loss_mask", "hidden_states", "aux_hidden_states"} <= set(made)
    assert made.keys() == lost_before.keys()
    assert all(torch.equal(part, lost_before[name]) for name, part in made.items())
    with pytest.raises(UserError, match="other data, flags or weights"):
        export(trained, data, folder, *how, "--seed", 2)
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    capsys.readouterr()
    export(trained, data, folder, *how)
    assert "manifest.json is damaged: it is written again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--max_seq_len", 50], "--max_seq_len 50 is below its 96"),
        ([*HIDDEN, "--aux_layers", "1"], "recording"),
        (["--aux_layers", "1"], "--aux_layers: needs --hidden_weight above 0"),
        (["--parallel", "fsdp"], "ddp"),
        (["--replay_path", __file__], "includes teacher and data"),
        (["--teacher_weight", "x"], "includes teacher and data"),
    ],
)
def test_what_does_not_fit_a_recording_is_refused(recorded, tmp_path, flags, says, capsys):
    try:
        from_disk(recorded, tmp_path, *flags)
    except UserError as error:
        assert says in str(error)
    except SystemExit as end:
        assert end.code == 2 and says in capsys.readouterr().err
    else:
        pytest.fail("it was not refused")


def test_a_damaged_folder_is_named(recorded, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(recorded, folder)
    shard = folder / "train" / "00001.pt"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="00001.pt is damaged.*continues"):
        from_disk(folder, tmp_path / "out")
    for text in ("{", "[]", "{}"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="not written by recipes/export_hidden_states.py"):
            from_disk(folder, tmp_path / "out")


def bit_flipped(path, at):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


HARMS = {
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "cut": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path, other: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": lambda path, other: bit_flipped(path, 0.5),
    "another bit flipped": lambda path, other: bit_flipped(path, 0.8),
    "garbage": lambda path, other: path.write_bytes(random.Random(0).randbytes(5000)),
    "of another": lambda path, other: path.write_bytes(other),
}


@pytest.mark.parametrize("how", HARMS)
def test_a_damaged_recording_is_refused_and_the_same_command_mends_it(
    recorded, trained, data, tmp_path, how
):
    command, folder = as_recorded(data), tmp_path / "copy"
    shutil.copytree(recorded, folder, ignore=shutil.ignore_patterns("out"))
    shards = ["train/00000.pt", "train/00001.pt", "valid/00000.pt"]
    names = [*shards, "tokenizer.json", "output.pt"]
    whole = {name: (folder / name).read_bytes() for name in names}
    others = dict(zip(shards, [whole[name] for name in shards[1:] + shards[:1]], strict=True))
    others["tokenizer.json"] = whole["tokenizer.json"] + b"\n"
    if how == "of another":  # an output layer of the same shape, from a recording of other data
        export(trained, data, tmp_path / "other", "--seed", 2)
        others["output.pt"] = (tmp_path / "other" / "output.pt").read_bytes()

    def read():
        for part in ("train", "valid"):
            recorded_teacher.recorded_tokens(folder / part)
        return recorded_teacher.OfflineTeacher(folder, "cpu")

    read()
    for name in names:
        HARMS[how](folder / name, others.get(name))
        with pytest.raises(UserError, match="it continues") as error:
            read()
        assert name == "tokenizer.json" or str(folder / name) in str(error.value)
        (folder / name).write_bytes(whole[name])
    kept = folder / "train" / "00002.pt"
    before = kept.stat().st_mtime_ns
    for name in names:
        HARMS[how](folder / name, others.get(name))
    export(trained, data, folder, *command)
    assert kept.stat().st_mtime_ns == before
    assert (folder / "tokenizer.json").read_bytes() == whole["tokenizer.json"]
    for name in [*shards, "output.pt"]:
        made, was = (torch.load(place / name, weights_only=True) for place in (folder, recorded))
        assert made.keys() == was.keys()
        assert all(torch.equal(part, was[key]) for key, part in made.items())


@pytest.mark.parametrize("name", ["train/00000.pt", "output.pt"])
def test_a_file_without_the_mark_of_its_recording_is_named(recorded, tmp_path, name):
    shutil.copytree(recorded, tmp_path / "copy", ignore=shutil.ignore_patterns("out"))
    path = tmp_path / "copy" / name
    content = torch.load(path, weights_only=True)
    del content["belongs"]
    for other in (content, torch.zeros(2)):
        torch.save(other, path)
        with pytest.raises(
            UserError, match=f"{path.name} is from another recording than its manifest.json"
        ):
            recorded_teacher.read(path)


def test_a_recording_whose_manifest_is_damaged_is_mended(recorded, trained, data, tmp_path):
    command, folder = as_recorded(data), tmp_path / "copy"
    shutil.copytree(recorded, folder, ignore=shutil.ignore_patterns("out"))
    shards = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pt")}
    for content in (b"", b"\xff\xfe", b'{"teacher": '):
        (folder / "manifest.json").write_bytes(content)
        export(trained, data, folder, *command)
        text = (recorded / "manifest.json").read_bytes()
        assert (folder / "manifest.json").read_bytes() == text
    assert shards == {path: path.stat().st_mtime_ns for path in shards}
    # Shards of another recording, which lost its manifest, are not taken for this one's.
    (folder / "manifest.json").unlink()
    export(trained, data, folder, *command, "--seed", 2)
    assert all(path.stat().st_mtime_ns != was for path, was in shards.items())


def test_wrong_folders_layers_and_numbers_are_refused(trained, data, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        from_disk(tmp_path, tmp_path / "out")
    assert "no manifest.json; run export_hidden_states.py" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        export(
            trained, data, tmp_path / "x", "--shard_size", "0", "--data_path", tmp_path / "no.jsonl"
        )
    said = capsys.readouterr().err
    assert "--shard_size 0: give a whole number" in said and "no.jsonl: No such file" in said
    for layers in ("3", "0", "1,x", "-1"):
        with pytest.raises(UserError, match="layers 1 to 2"):
            export(trained, data, tmp_path / "x", "--aux_layers", layers)


def test_two_processes_distil_as_one_does(trained, data, tmp_path):
    for name, launch, batch_size in (("one", run, 4), ("two", partial(torchrun, 2), 2)):
        flags = [
            "--save_dir",
            tmp_path / name,
            "--data_path",
            data / "sft.jsonl",
            "--val_split",
            0.1,
        ]
        flags += ["--teacher_weight", trained / "full_sft_32.pth", "--hidden_weight", 0.5]
        flags += ["--from_weight", trained / "pretrain_32.pth", "--batch_size", batch_size]
        flags += ["--max_seq_len", 96, "--log_interval", 1, "--dtype", "fp32", "--device", "cpu"]
        done = launch(ROOT / "trainer/train_distillation.py", *flags)
        assert done.returncode == 0, done.stderr
    assert_like_one(
        tmp_path, "distilled_32", "loss val_loss grad_norm", trained / "pretrain_32.pth"
    )


def test_a_part_that_was_not_recorded_has_no_shards(tmp_path):
    manifest = {"shards": {"train": 0}, "config": {}, "aux_layers": [], "teacher": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for part in ("train", "valid"):
        with pytest.raises(UserError, match="has no shard"):
            recorded_teacher.recorded_tokens(tmp_path / part)
