"""Every usual format becomes the same conversation; what cannot be meant is a bad record."""

import json
import random
from collections import Counter
from itertools import islice

import pytest

from dataset.formats import detect_format, to_conversation, to_text
from dataset.jsonl import read_records
from dataset.lm_dataset import PretrainDataset, SFTDataset
from model.chat_template import call_text, parse_list, render, tools_text
from model.tokenizer import CONTROL_TOKENS, load_tokenizer
from tests.conftest import ROOT, write_jsonl

SHARED = ROOT.parent / "shared" / "data"
SETS = ["gsm8k/train.jsonl", "gsm8k/test.jsonl"]
SETS += [f"formats/glaive_toolcall_{language}_demo.json" for language in ("en", "zh")]
SETS += ["formats/reason_tool_use_demo_50.jsonl"]
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SYSTEM = {"role": "system", "content": "Be kind."}
CONTEXT = {**ASKED[0], "loss_weight": 0}
QUESTION = {"role": "user", "content": "2 + 2?"}
SAID = [{"role": "user", "content": "Say\nhi"}, ASKED[1]]
CALL = {"name": "add", "arguments": {"a": 1}}
LLAMA = {"name": "add", "parameters": {"a": 1}}


def converted(record):
    notes = Counter()
    messages, tools = to_conversation(record, detect_format(record), notes)
    return messages, tools, dict(notes)


def sharegpt(*turns, **more):
    return {"conversations": [{"from": f, "value": v} for f, v in turns], **more}


PARTS = [{"type": "text", "text": "Be "}, {"type": "text", "value": "kind."}]
ALPACA = {"instruction": "Say", "input": "hi", "output": "Hello.", "system": "Be kind."}
ORCA = {"question": "Hi", "response": "Hello."}


@pytest.mark.parametrize(
    "name, record, messages",
    [
        ("conversations", {"conversations": ASKED}, ASKED),
        ("sharegpt", sharegpt(("Human", "Hi"), ("GPT", "Hello.")), ASKED),
        (
            "sharegpt",
            sharegpt(("user", "Hi"), ("bard", "Hello."), system="Be kind."),
            [SYSTEM, *ASKED],
        ),
        ("openai", {"prompt": "unused", "messages": ASKED}, ASKED),
        (
            "openai",
            {"messages": [{"role": "developer", "content": PARTS}, *ASKED]},
            [SYSTEM, *ASKED],
        ),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, ASKED),
        (
            "alpaca",
            {**ALPACA, "history": [["Hi", "Hello."]]},
            [SYSTEM, *ASKED, {"role": "user", "content": "Say\nhi"}, ASKED[1]],
        ),
        ("openorca", {"system_prompt": "Be kind.", **ORCA}, [SYSTEM, *ASKED]),
        ("openorca", {"system_prompt": "", **ORCA}, ASKED),
        ("qa", {"question": "Hi", "answer": "Hello."}, ASKED),
        ("prompt", {"prompt": "Hi", "completion": "Hello."}, ASKED),
        ("prompt", {"prompt": [ASKED[0]], "completion": [ASKED[1]]}, [CONTEXT, ASKED[1]]),
        ("input", {"input": "Hi", "output": "Hello."}, ASKED),
        ("dolly", {"instruction": "Hi", "context": "", "response": "Hello."}, ASKED),
        (
            "dolly",
            {"instruction": "Say", "context": "hi", "response": "Hello.", "category": "qa"},
            [{"role": "user", "content": "Say\nhi"}, ASKED[1]],
        ),
        ("metamath", {"query": "Hi", "response": "Hello.", "type": "x"}, ASKED),
        ("conversations", {"conversations": ["Hi", "Hello."], "source": "lima"}, ASKED),
        ("ultrachat", {"id": "0", "data": ["Hi", "Hello.", "Hi"]}, [*ASKED, ASKED[0]]),
        (
            "openmath",
            {"question": "Hi", "expected_answer": "7", "generated_solution": "Hello."},
            ASKED,
        ),
        ("openmath2", {"problem": "Hi", "generated_solution": "Hello."}, ASKED),
        ("qa", {"question": "2 + 2?", "answer": 4}, [QUESTION, {**ASKED[1], "content": "4"}]),
        ("qa", {"question": "Say", "context": "hi", "answer": "Hello."}, SAID),
        ("math", {"problem": "Hi", "level": "1", "solution": "Hello."}, ASKED),
    ],
)
def test_a_record_of_each_format_becomes_a_conversation(name, record, messages):
    assert detect_format(record) == name
    assert converted(record) == (messages, None, {})


def test_tool_calls_in_all_their_spellings_are_the_same_tokens():
    text = json.dumps(CALL)
    wrapped = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"from": "function_call", "value": text},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": f"[{text}]"},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "assistant", "content": [{"type": "tool_call", "value": text}]},
        {"role": "assistant", "content": None, "tool_calls": [wrapped]},
        {"from": "function_call", "value": '{"name": "add", "parameters": {"a": 1}}'},
        {"role": "assistant", "content": None, "tool_calls": [LLAMA]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": LLAMA}]},
    ]
    rendered = []
    for turn in turns:
        user = {"from": "human", "value": "Hi"} if "from" in turn else ASKED[0]
        tool = {"from": "observation", "value": "2"}
        answer = tool if "from" in turn else {"role": "tool", "content": "2"}
        messages, tools, _ = converted({"conversations": [user, turn, answer]})
        rendered.append(render(messages, tools))
    assert all(one == rendered[0] for one in rendered)
    assert 5 in rendered[0][0] and sum(rendered[0][1]) > 3


@pytest.mark.parametrize(
    "more", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": " "}, {"parameters": {}}]
)
def test_a_call_without_arguments_has_none(more):
    assert json.loads(call_text({"name": "now", **more})) == {"name": "now", "arguments": {}}


def test_the_turns_that_are_left_out_are_counted():
    empty = {"role": "assistant", "content": " "}
    messages, _, notes = converted(
        {"messages": [SYSTEM, ASKED[1], ASKED[0], ASKED[0], empty, ASKED[1], ASKED[0]]}
    )
    assert messages == [SYSTEM, ASKED[0], ASKED[0], ASKED[1], ASKED[0]]
    assert notes == {"leading assistant turns dropped": 1, "empty assistant turns dropped": 1}
    ids, mask = render(messages)
    assert mask[-1] == 0 and ids[-2] == 2  # the user's last turn is there, and not supervised


def test_a_turn_of_loss_weight_0_is_not_supervised():
    unsupervised = {**ASKED[1], "loss_weight": 0}
    ids, mask = render(converted({"messages": [*ASKED, ASKED[0], unsupervised]})[0])
    whole, both = render([*ASKED, *ASKED])
    assert ids == whole and sum(mask) * 2 == sum(both) and not any(mask[len(mask) // 2 :])


@pytest.mark.parametrize("key", ["loss_weight", "weight"])
def test_a_turn_is_learned_by_its_weight(key):
    plain = render([*ASKED, *ASKED])
    for weight, turns in ((0, 1), (0.0, 1), (False, 1), (1, 2), (1.0, 2), (True, 2), (None, 2)):
        ids, mask = render(
            converted({"messages": [*ASKED, ASKED[0], {**ASKED[1], key: weight}]})[0]
        )
        assert ids == plain[0] and sum(mask) == sum(plain[1]) // 2 * turns, weight
    for weight in (0.5, "0", "1", -1, 2, [], {}):
        with pytest.raises(ValueError, match=f"message 3 has {key} .*; give {key} 0 or 1"):
            converted({"messages": [SYSTEM, ASKED[0], {**ASKED[1], key: weight}]})
        if key == "loss_weight":
            with pytest.raises(ValueError, match="message 2 has loss_weight .*0 or 1"):
                render([ASKED[0], {**ASKED[1], key: weight}])


MARKS = [("train", False), ("training", False), ("trainable", False), ("loss", False)]
MARKS += [("loss_mask", 0), ("masked", True), ("weight", 0), ("loss_weight", 0)]


@pytest.mark.parametrize("key, value", MARKS)
def test_a_turn_that_is_marked_not_to_be_trained_is_not(key, value):
    """By the names of axolotl, LLaMA-Factory, ms-swift, torchtune, verl and OpenAI."""
    plain = render([*ASKED, *ASKED])
    half = len(plain[1]) // 2
    for marks, expected in (
        ([{key: value}, {}], [0] * half + plain[1][half:]),
        ([{key: 1 - value}, {key: value}], plain[1][:half] + [0] * half),
        ([{key: None}, {key: 1 - value}], plain[1]),
    ):
        turns = [ASKED[0], {**ASKED[1], **marks[0]}, ASKED[0], {**ASKED[1], **marks[1]}]
        assert render(converted({"messages": turns})[0]) == (plain[0], expected), marks


@pytest.mark.parametrize("flags", [[0, 1, 1, 0], [1, 1, 1, 0], [False, True, None, False]])
@pytest.mark.parametrize("key", ["loss_mask", "train"])
def test_a_record_may_have_a_flag_for_each_message(key, flags):
    plain = render([SYSTEM, *ASKED, *ASKED])
    end = len(plain[1]) - len(render(ASKED)[1])
    expected = plain[1][:end] + [0] * (len(plain[1]) - end)
    for record in (
        {"messages": [SYSTEM, *ASKED, *ASKED], key: [0, *flags]},
        {"messages": [*ASKED, *ASKED], "system": "Be kind.", key: flags},
    ):
        messages, _, notes = converted(record)
        assert render(messages) == (plain[0], expected)
        ours = [flag for flag in flags[::2] if flag]
        assert sum(notes.values()) == len(ours)  # a user's turn is never supervised: a note says so


def test_a_record_that_is_marked_is_marked_as_a_whole():
    assert not any(render(converted({"messages": ASKED, "train": False})[0])[1])
    assert any(render(converted({"messages": ASKED, "weight": 1})[0])[1])
    for key, value in (("weight", 0.5), ("loss_mask", [1]), ("train", "false"), ("loss", [2, 0])):
        with pytest.raises(ValueError, match=f"the record has {key} "):
            converted({"messages": ASKED, key: value})
    assert converted({"messages": ASKED, "train": "the first half"})[2] == {}  # a name, not a mark
    assert converted({"messages": ASKED, "train": True})[2] == {}  # and no note of the user's turn


def test_a_key_of_another_meaning_does_not_decide_the_format():
    for data in ("2024-01-01", {"set": 1}, [1]):
        assert converted({"data": data, "question": "Hi", "answer": "Hello."})[0] == ASKED
        assert detect_format({"data": data, "text": "x"}) == "text"
    with pytest.raises(ValueError, match='"data" holds a list of records: write only that list'):
        detect_format({"data": [{"text": "x"}]})


def test_what_stands_in_a_prompt_is_not_dropped():
    answer = [ASKED[1]]
    with pytest.raises(ValueError, match="message 1 is not"):
        converted({"prompt": ["Answer in French.", ASKED[0]], "completion": answer})
    marked = [{**ASKED[0], "train": True}, {**ASKED[1], "weight": 1}, ASKED[0]]
    messages, _, notes = converted({"prompt": marked, "completion": answer})
    assert [turn.get("loss_weight") for turn in messages] == [0, 0, 0, None] and notes == {}
    with pytest.raises(ValueError, match="remove it from the file"):
        to_text({"text": "x", "train": False})


@pytest.mark.parametrize(
    "key",
    ["train_detail", "loss_scale", "is_masked", "no_loss", "assistant_masks", "skip_training"]
    + [
        "do_train",
        "train_on",
        "compute_loss",
        "shouldTrain",
        "exclude_from_training",
        "loss-weight",
    ],
)
def test_another_key_that_speaks_of_the_mask_is_a_bad_record(key):
    with pytest.raises(ValueError, match=f"message 2 has {key} .*give loss_weight 0 or 1"):
        converted({"messages": [ASKED[0], {**ASKED[1], key: 1}]})
    with pytest.raises(ValueError, match=f"the record has {key} .*give loss_weight 0 or 1"):
        converted({"messages": ASKED, key: 1})
    for harmless in (
        "constraint",
        "glossary",
        "name",
        "weight_kg",
        "lossless",
        "train_id",
        "losses",
    ):
        assert converted({"messages": [ASKED[0], {**ASKED[1], harmless: 1}], harmless: 1})[0]
    with pytest.raises(ValueError, match="both"):
        converted({"messages": [ASKED[0], {**ASKED[1], "train": True, "weight": 0}]})


def test_a_leading_answer_with_weight_0_is_context():
    welcome = {"role": "assistant", "content": "Welcome!", "weight": 0}
    messages, _, notes = converted({"messages": [SYSTEM, welcome, *ASKED]})
    assert [turn["content"] for turn in messages] == ["Be kind.", "Welcome!", "Hi", "Hello."]
    assert notes == {} and sum(render(messages)[1]) == sum(render(ASKED)[1])


def test_a_list_of_messages_is_a_record(tmp_path):
    """A conversation a line, as nanochat's files have them; also in one array of conversations."""
    path = tmp_path / "x.jsonl"
    for first in (
        {"role": "user", "content": "Hi"},
        {"id": 1, "content": "x" * 99, "role": "user"},
    ):
        talk = [first, ASKED[1]]
        line = json.dumps(talk)
        for text in (f"{line}\n{line}\n", f"[{line}, {line}]"):
            path.write_text(text, encoding="utf-8")
            assert [r for _, r in read_records(path)] == [{"messages": talk}] * 2
    long = json.dumps([{"role": "user", "content": "x" * 10**5}, ASKED[1]])
    path.write_text(f"{long}\n{long}\n", encoding="utf-8")
    assert len([r["messages"] for _, r in read_records(path)]) == 2
    records = [{"from": "wiki", "text": "a"}, {"value": 3, "text": "b"}]  # records, not messages
    for indent in (None, 1):
        path.write_text(json.dumps(records, indent=indent), encoding="utf-8")
        assert [r for _, r in read_records(path)] == records


@pytest.mark.parametrize("array", [True, False])
def test_repeated_keys_are_counted(tmp_path, array):
    twice = '{"text": "a", "text": "b"}'
    nested = '{"text": "c", "meta": {"x": 1, "x": 2}, "more": {"x": 1, "x": 2}}'
    records = [twice, '{"text": "d"}', nested]
    text = f"[{','.join(records)}]" if array else "\n".join(records)
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    for cache_dir in (None, tmp_path / "cache", tmp_path / "cache"):
        data = PretrainDataset(tmp_path / "x.jsonl", load_tokenizer(), cache_dir=cache_dir)
        ((note, count),) = data.files[0].report["notes"].items()
        assert count == 2 and "repeated key: the last value is used" in note


@pytest.mark.parametrize(
    "turn, says",
    [
        ({"role": "narrator", "content": "x"}, "message 2 has role 'narrator'"),
        ({"from": None, "value": "x"}, "message 2 has role None"),
        ({"role": "user", "content": None}, "message 2 has content None"),
        ({"role": "user", "content": True}, "message 2 has content True"),
        ({"role": "user", "content": "\ud83d"}, "message 2 has content with an unpaired surrogate"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "'image_url'"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, "part of type .'text'."),
        ({"role": "user", "content": [{"type": {}}]}, "part of type {}"),
        ({"role": "assistant", "content": "", "tool_calls": "{"}, "not JSON"),
        ("Hi", "message 2 is not"),
        ({"role": "assistant", "content": "", "tool_calls": "[" * 10**5}, "not JSON"),
    ],
)
def test_what_cannot_be_meant_is_an_error_and_never_silently_a_user(turn, says):
    with pytest.raises(ValueError, match=says):
        to_conversation({"messages": [ASKED[0], turn]}, "openai", Counter())


@pytest.mark.parametrize("talk", ["Hi", {"role": "user", "content": "Hi"}, [], 5])
def test_a_conversation_that_is_no_list_of_messages_is_a_bad_record(talk):
    with pytest.raises(ValueError, match="a conversation is a list of messages, not"):
        to_conversation({"conversations": talk}, "conversations", Counter())


@pytest.mark.parametrize("history", [5, "Hi", {"Hi": "Hello."}, [5], ["Hi"], [["Hi"]]])
def test_a_history_that_is_none_is_a_bad_record(history):
    with pytest.raises(ValueError, match="history is a list of"):
        converted({**ALPACA, "history": history})


def test_a_json_array_is_read_with_line_numbers(tmp_path):
    records = [{"text": "zwölf\u2028" * n, "n": [{"}": "]"}]} for n in range(40)]
    for indent in (None, 2):
        for start in (b"", b"\xef\xbb\xbf\r\n "):
            path = tmp_path / "a.json"
            path.write_bytes(
                start + json.dumps(records, indent=indent, ensure_ascii=False).encode()
            )
            assert [record for _, record in read_records(path)] == records
    text = path.read_bytes().decode("utf-8-sig").split("\n")
    for number, record in list(read_records(path))[:5]:
        assert (
            text[number - 1].strip() == "{"
            and f'"text": {json.dumps(record["text"], ensure_ascii=False)}' in text[number]
        )
    path.write_text('[{"text": "a"}, {"text": ', encoding="utf-8")
    (_, good), (_, bad) = read_records(path)
    assert good == {"text": "a"} and isinstance(bad, ValueError)
    path.write_bytes(b'[{"text": "a"}, {"text": "\xff"}, 7, {"text": "c"}]')
    found = [record for _, record in read_records(path)]
    assert found[0] == {"text": "a"} and found[3] == {"text": "c"}
    assert isinstance(found[2], ValueError) and found[1]["text"] == "\udcff"


@pytest.mark.parametrize(
    "text, good, line",
    [
        ('[{"text": "a"}]\n[{"text": "b"}]\n', ["a"], 1),
        ('[{"text": "a"}][{"text": "b"}]', ["a"], 1),
        ('[\n{"text": "a"}\n]\n\n{"text": "b"}\n', ["a"], 3),
        ("[]\n[]", [], 1),
        ('{"text": "a"}\n[{"text": "b"}]\n{"text": "c"}\n', ["a", "c"], 2),
    ],
)
def test_what_follows_an_array_is_a_bad_record(tmp_path, text, good, line):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    found = list(read_records(tmp_path / "x.json"))
    assert [record["text"] for _, record in found if isinstance(record, dict)] == good
    assert [number for number, record in found if isinstance(record, ValueError)] == [line]


@pytest.mark.parametrize("array", [False, True])
def test_a_number_too_long_to_read_is_one_bad_record(tmp_path, array):
    lines = ['{"text": "a"}', f'{{"text": "b", "n": [{"7" * 5000}]}}', '{"text": "c"}']
    text = f"[{', '.join(lines)}]" if array else "\n".join(lines)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    one, bad, *others = [record for _, record in read_records(tmp_path / "x.json")]
    assert one == {"text": "a"} and others == ([] if array else [{"text": "c"}])
    assert isinstance(bad, ValueError) and "Exceeds the limit (4300 digits)" in str(bad)


@pytest.mark.parametrize("keep_think, kept", [("all", [1, 1]), ("last", [0, 1]), ("none", [0, 0])])
def test_keep_think_says_whose_reasoning_is_kept(tmp_path, keep_think, kept):
    thoughtful = {**ASKED[1], "reasoning_content": "Hm."}
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [ASKED[0], thoughtful] * 2}])
    ids = SFTDataset(path, load_tokenizer(), keep_think=keep_think)[0][0].tolist()
    turns = " ".join(map(str, ids)).split(" 1 ")  # an <|im_start|> is token 1, <think> token 3
    assert [int("3" in turn.split()) for turn in turns[1::2]] == kept


def test_an_answer_and_its_end_are_supervised_and_nothing_else(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    path, tokenizer = write_jsonl(tmp_path / "x.jsonl", [{"messages": talk}]), load_tokenizer()
    _, labels = SFTDataset(path, tokenizer)[0]
    supervised = labels[labels != -100].tolist()
    assert tokenizer.decode(supervised, skip_special_tokens=False) == "Hello!<|im_end|>"


@pytest.mark.parametrize("overlong, rows", [("truncate", 1), ("drop", 0), ("split", 3)])
def test_overlong_conversations_are_cut_between_turns(tmp_path, overlong, rows):
    turn = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
    tokenizer = load_tokenizer()
    length = len(render(turn * 2)[0])
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": turn * 6}, {"messages": turn}])
    dataset = SFTDataset(path, tokenizer, max_length=length + 5, overlong=overlong)
    assert (
        len(dataset) == rows + 1
        and dataset.num_too_long == 1
        and dataset.num_dropped == (rows == 0)
    )
    for input_ids, labels in [dataset[i] for i in range(len(dataset))]:
        assert len(input_ids) <= length + 5 and 2 in labels
        assert input_ids[-1] == 2 or input_ids[-2] == 2  # ends with a whole answer
    supervised = [label for i in range(rows) for label in dataset[i][1].tolist() if label != -100]
    once = [i for i, m in zip(*render(turn), strict=True) if m]
    assert supervised == once * {"truncate": 2, "drop": 0, "split": 6}[overlong]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("name", SETS)
def test_masks_are_those_of_transformers_with_the_same_template(name):
    assert compared_with_transformers(SHARED / name) >= 40


PIECES = [
    *(
        "Hi",
        "zwölf 🙂",
        "请问北京的天气怎么样?",
        " ",
        "\n\n",
        "12.50 + 7",
        "It's\r\n",
        "\t<b>",
        "a\u2028b",
    ),
    *(
        '{"a": "\\u00e9"}',
        "```py\nf(x)\n```",
        "#### 42",
        "\\boxed{1}",
        "<think",
        "im_end|>",
        "x" * 300,
    ),
]


def talk(rng, spelling):
    """A conversation in one of the spellings, with everything that may occur in it."""

    def text():
        return "".join(rng.choices(PIECES, k=rng.randrange(1, 6)))

    call = {"name": f"f{rng.choice('äb')}", "arguments": {text(): [text(), 7, None, {"é": True}]}}
    tools = [{"name": "f", "parameters": {"type": "object", "description": text()}}]
    turns = [("system", text())] * rng.randrange(2)
    for _ in range(rng.randrange(1, 4)):
        turns.append(("user", text()))
        if rng.random() < 0.4:
            turns += [("call", call), ("tool", text())]
        turns.append(("assistant", f"A{text()}"))
    if spelling == "sharegpt":
        names = {"user": "human", "call": "function_call", "tool": "observation"}
        said = [(names.get(r, "gpt" if r == "assistant" else r), t) for r, t in turns]
        said = [(name, json.dumps(t) if name == "function_call" else t) for name, t in said]
        return sharegpt(*said, tools=rng.choice(["", json.dumps(tools, ensure_ascii=False)]))
    messages = []
    for role, said in turns:
        message = {"role": role, "content": said}
        if role == "call":
            wrapped = {
                "type": "function",
                "function": {**call, "arguments": json.dumps(call["arguments"])},
            }
            message = {
                "role": "assistant",
                "content": rng.choice([None, "", text()]),
                "tool_calls": [wrapped] * rng.randrange(1, 3),
            }
        if message["role"] == "assistant" and rng.random() < 0.3:
            message["reasoning_content"] = text()
        messages.append(message)
    return {"messages": messages, **({"tools": tools} if rng.random() < 0.5 else {})}


@pytest.mark.parametrize("spelling", ["openai", "sharegpt", "qa"])
def test_masks_of_all_that_may_occur_are_those_of_transformers(tmp_path, spelling):
    rng = random.Random(spelling)
    records = [talk(rng, spelling) for _ in range(60)]
    if spelling == "qa":
        records = [
            {"question": rng.choice(PIECES) + "?", "answer": rng.choice(PIECES) + f" {i}"}
            for i in range(60)
        ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert {detect_format(record) for record in records} == {spelling}
    assert compared_with_transformers(path) == 60


def compared_with_transformers(path):
    """The number of records whose ids and mask are those of transformers; fails at another one."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer, compared = load_tokenizer(), 0
    judge = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()))
    judge.chat_template = TEMPLATE
    for _, record in islice(read_records(path), 1000):
        messages, tools = to_conversation(record, detect_format(record), Counter())
        ids, mask = render(messages, tools, tokenizer=tokenizer)
        if tools := parse_list(tools, "tools"):
            if messages[0]["role"] != "system":
                messages = [{"role": "system", "content": ""}, *messages]
            said = [messages[0]["content"], tools_text(tools)]
            messages[0]["content"] = "\n\n".join(filter(None, said))
        for message in messages:
            message["calls"] = [call_text(call) for call in message.get("tool_calls", [])]
        if any(token in json.dumps(messages) for token in CONTROL_TOKENS):
            continue  # text that looks like a control token becomes one there, and not here
        theirs = judge.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert theirs["input_ids"] == ids and theirs["assistant_masks"] == mask
        compared += 1
    return compared


TEMPLATE = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' -%}
{%- generation -%}
{%- if m.reasoning_content -%}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content -}}
{%- for call in m.calls -%}{{- '<tool_call>' + call + '</tool_call>' -}}{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{%- elif m.role == 'tool' -%}
{{- '<tool_response>' + m.content + '</tool_response><|im_end|>' -}}
{%- else -%}
{{- m.content + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}"""


def test_a_byte_order_mark_is_of_the_first_line_alone(tmp_path):
    """Each part of files that were joined begins with one."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n' + b"\xef\xbb\xbf" + b'{"text": "b"}\n')
    first, second = read_records(path)
    assert first == (1, {"text": "a"})
    assert second[0] == 2 and "not JSON" in str(second[1])


def test_a_list_of_flags_that_contradicts_a_message_is_a_bad_record():
    for flag, own in ((1, 0), (0, 1)):
        messages = [ASKED[0], {**ASKED[1], "loss_weight": own}]
        with pytest.raises(ValueError, match="message 2 is marked both as trained on and as not"):
            converted({"messages": messages, "loss_mask": [0, flag]})
        same = converted({"messages": messages, "loss_mask": [0, own]})[0]
        assert any(render(same)[1]) == bool(own)
