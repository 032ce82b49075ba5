"""Tiny World: the same bytes everywhere, and nothing of the evaluation in what is trained on."""

import json
import random
import re
from collections import Counter
from hashlib import sha256

import pytest

from dataset import tiny_world
from dataset.tiny_world import generate, wordings
from dataset.tiny_world.generate import SEED, write_tiny_world
from dataset.tiny_world.text import steps
from dataset.tiny_world.world import World
from dataset.tiny_world.world import words as vocabulary
from evaluation.tasks import matches_expected as is_correct
from tests.conftest import run, run_here

VILLAGE = {  # 2026-12-01
    "pretrain_tiny.jsonl": "0f1e5ea2342e2296ae61e7aba2de5083360baf72df04aee8791ac8506418e655",
    "sft_tiny.jsonl": "29aa2c0b02ad55a5464403875f2410e399a193f71cdbf52995ae25489cdf8ad8",
    "eval_tiny.jsonl": "d85434ea9877da2b0804bf59b7c906bcd7f114f688ec67310e8c17382e42eaa0",
    "dpo_tiny.jsonl": "2ab35befdc654d44bcc626a879da033f8cef70deb14e565c6f7ffadb4a5e1aa4",
    "practice_tiny.jsonl": "5bd71f7049d77c323c2f7fd16cefa6926e336da8e6c26f958bfa35d4cc5091c0",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world():
    return World(SEED)


def words(text):
    return set(re.findall(r"\w+", text))


def spoken(records):
    return [m["content"] for record in records for m in record["conversations"]]


def test_same_seed_same_bytes_whatever_the_hash_seed(tmp_path):
    for name, seed in (("a", "0"), ("b", "12345")):
        done = run("dataset/tiny_world/generate.py", "--out", tmp_path / name, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
    for name in ("pretrain_tiny.jsonl", "sft_tiny.jsonl", "eval_tiny.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert World(2).people != World(SEED).people


def test_the_village_is_the_one_that_the_documentation_measures(tmp_path, monkeypatch):
    """No version of Python and no system may change it. Who changes it on purpose trains the demo
    again, measures what the documentation says, and writes the new hashes here.
    """
    write_tiny_world(tmp_path)
    for name, file in (("PAIRS", "dpo_tiny.jsonl"), ("PRACTICE", "practice_tiny.jsonl")):
        for module in (tiny_world, generate):
            monkeypatch.setattr(module, name, tmp_path / file)
        assert tiny_world.write_missing(tmp_path / file) == tmp_path / file
    hashes = {path.name: sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert hashes == VILLAGE


def test_another_seed_is_another_village_in_all_files(files, tmp_path):
    other, world = write_tiny_world(tmp_path, seed=2), World(2)
    assert all(other[name] != files[name] for name in files)
    text = " ".join(record["text"] for record in other["pretrain_tiny.jsonl"])
    assert {person.name for person in world.people} <= words(text)
    assert {p.name for p in world.held_out} & words(" ".join(spoken(other["eval_tiny.jsonl"])))
    assert not {p.name for p in world.held_out} & words(" ".join(spoken(other["sft_tiny.jsonl"])))


def test_villagers_of_recall_questions_are_in_the_pretraining_text_and_in_no_conversation(
    files, world
):
    held_out = {person.name for person in world.held_out}
    assert len(held_out) == 16
    assert not held_out & words(" ".join(spoken(files["sft_tiny.jsonl"])))
    text = " ".join(record["text"] for record in files["pretrain_tiny.jsonl"])
    mentions = {name: text.count(name) for name in held_out}
    assert min(mentions.values()) > 100
    for problem in files["eval_tiny.jsonl"]:
        if problem["category"] == "recall":
            assert held_out & words(problem["conversations"][-1]["content"])


def test_recall_answers_are_true(files, world):
    facts = {person.name: person for person in world.people}
    checked = 0
    for problem in files["eval_tiny.jsonl"]:
        question = problem["conversations"][-1]["content"]
        named = [facts[name] for name in words(question) & set(facts)]
        if problem["category"] == "recall" and "live" in question:
            assert problem["expected"].endswith(f"lives at the {named[0].home}.")
            checked += 1
    assert checked > 3


def test_strangers_are_nobody(files, world):
    strangers = {name for _, name in world.evaluation.strangers}
    training = [record["text"] for record in files["pretrain_tiny.jsonl"]]
    training += spoken(files["sft_tiny.jsonl"])
    assert not strangers & words(" ".join(training))
    assert not strangers & {person.name for person in world.people}


def test_held_out_sums_are_not_calculated_anywhere_in_training(files, world):
    training = [record["text"] for record in files["pretrain_tiny.jsonl"]]
    training = "\n".join(training + spoken(files["sft_tiny.jsonl"]))
    calculated = re.findall(r"(\d+)([+-])(\d+): ", training)
    calculated = {(operation, int(a), int(b)) for a, operation, b in calculated}
    assert len(calculated) > 600
    assert not calculated & set(world.evaluation.sums)
    for problem in files["eval_tiny.jsonl"]:
        if problem["category"] == "arithmetic":
            a, b = map(int, re.findall(r"\d+", problem["conversations"][-1]["content"]))
            result = int(problem["expected"][0].removeprefix("#### "))
            assert ("+" if result == a + b else "-", a, b) in world.evaluation.sums
            assert result in (a + b, a - b)


def test_more_sums_are_true_and_stay_on_their_side(world, tmp_path):
    done = run_here("dataset/tiny_world/generate.py", "--sums", tmp_path)
    assert done.returncode == 0, done.stderr
    questions = set()
    for name, sums in (("practice", world.training.sums), ("exam", world.evaluation.sums)):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for record in map(json.loads, lines):
            (question,), (expected,) = spoken([record]), record["expected"]
            a, b = map(int, re.findall(r"\d+", question))
            result = int(expected.removeprefix("#### "))
            assert result in (a + b, a - b)
            assert ("+" if result == a + b else "-", a, b) in sums
            questions.add(question)
    assert len(questions) == 1400
    solved = (tmp_path / "solved.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(solved) == 50
    for question, answer in (turns["conversations"] for turns in map(json.loads, solved)):
        a, b = map(int, re.findall(r"\d+", question["content"]))
        result = int(answer["content"].rpartition("#### ")[2])
        assert ("+" if result == a + b else "-", a, b) in world.training.sums


def test_held_out_stories_are_told_nowhere_in_training(files, world):
    training = [record["text"] for record in files["pretrain_tiny.jsonl"]]
    for text in training + spoken(files["sft_tiny.jsonl"]):
        for piece in text.split("\n"):
            for colour, animal, thing in re.findall(r"a (\w+) (\w+)\b.*? a (\w+)", piece):
                assert (colour, animal, thing) not in world.evaluation.stories
    for problem in files["eval_tiny.jsonl"]:
        for message in problem["conversations"]:
            if re.match("(Write|Tell me) a (short )?story", message["content"]):
                subject = re.findall(r"a (\w+) (\w+) who \w+ a (\w+)", message["content"])
                assert subject and set(subject) <= set(world.evaluation.stories)


def test_held_out_wordings_are_in_no_training_file(files, world):
    """Neither typed like that in a conversation nor a sentence of the pretraining text: whoever the
    villager, whatever the value, the case and the punctuation.
    """
    names = {person.name for person in world.people}
    names |= {name for _, name in world.training.strangers + world.evaluation.strangers}
    names |= {*wordings.training["strangers"], *wordings.held_out["strangers"]}
    fields = {name.lower(): "NAME" for name in names}
    for kind, values in vocabulary.values.items():
        fields |= dict.fromkeys(values, kind.upper())

    def form(text):
        text = re.sub(r"[^\w\s]", " ", text.lower())
        return " ".join("0" if word.isdigit() else fields.get(word, word) for word in text.split())

    asked = [record for record in files["eval_tiny.jsonl"] if record["category"] == "own_words"]
    held_out = {form(text) for text in spoken(asked)}
    assert len(held_out) >= 120
    trained = {form(text) for text in spoken(files["sft_tiny.jsonl"])}
    for record in files["pretrain_tiny.jsonl"]:
        trained |= {form(sentence) for sentence in re.split(r'[.?!"\n]', record["text"])}
    assert form("hello") in trained and form("Who lives at the mill?") in trained
    assert not held_out & trained
    strangers = {name.lower() for name in wordings.held_out["strangers"]}
    assert not strangers & {word.lower() for text in trained for word in text.split()}


def test_answers_in_own_words_are_true(files, world):
    people = {person.name.lower(): person for person in world.people}
    checked, true = Counter(), 0
    for record in files["eval_tiny.jsonl"]:
        group, expected = record.get("group"), record["expected"]
        (question,) = spoken([record]) if group else [""]
        asked = [people[name] for name in words(question.lower()) & set(people)]
        if group in ("facts", "lower case"):
            assert expected[0] in vars(asked[0]).values()
        elif group == "yes or no":
            true += expected[0] in question
            assert any(expected[0] in vars(person).values() for person in asked)
        elif group == "reverse":
            facts = {value for p in world.people for value in vars(p).values()}
            value = max((v for v in facts if re.search(rf"\b{v}\b", question)), key=len)
            assert {p.name for p in world.people if value in vars(p).values()} == set(expected)
        elif group == "sums":
            a, b = sorted(map(int, re.findall(r"\d+", question)), reverse=True)
            result = int(expected[0].removeprefix("#### "))
            held_out = {("+", a, b), ("+", b, a)} if result == a + b else {("-", a, b)}
            assert held_out & set(world.evaluation.sums) and result in (a + b, a - b)
        checked[group] += 1
    assert min(checked[group] for group in ("facts", "yes or no", "reverse", "lower case")) >= 40
    assert 0 < true < checked["yes or no"]


def test_two_part_questions_join_wordings_that_were_never_joined_in_training(files, world):
    names = "|".join(person.name for person in world.people)

    def form(question):
        """The question without its villager: only the wordings are left."""
        return re.sub(rf"\b(?:{names}|he|she|his|her|him)\b", "_", question)

    trained = {
        form(message["content"])
        for record in files["sft_tiny.jsonl"]
        for message in record["conversations"]
        if message["role"] == "user"
    }
    asked = [p["conversations"][-1]["content"] for p in files["eval_tiny.jsonl"]]
    two_part = {form(text) for text in asked if re.search(r"\band (what|wh|at|how)", text)}
    assert len(two_part) > 10 and not two_part & trained


def test_no_held_out_question_was_trained_on_and_none_is_asked_twice(files):
    questions = [json.dumps(problem["conversations"]) for problem in files["eval_tiny.jsonl"]]
    assert len(questions) == len(set(questions)) == 400 + 160 + 350
    trained = set(spoken(files["sft_tiny.jsonl"]))
    for problem in files["eval_tiny.jsonl"]:
        if problem["category"] not in ("multi_turn", "long_chat"):
            assert problem["conversations"][-1]["content"] not in trained


def test_a_long_chat_asks_after_so_many_exchanges_about_held_out_topics_alone(files, world):
    long_chats = [p for p in files["eval_tiny.jsonl"] if p["category"] == "long_chat"]
    depths = Counter(problem["depth"] for problem in long_chats)
    assert depths == dict.fromkeys((3, 6, 9, 12), 40)
    known, sums, asked = {person.name for person in world.known}, 0, set()
    for problem in long_chats:
        texts = [m["content"] for m in problem["conversations"] if m["role"] != "system"]
        assert len(texts) == 2 * problem["depth"] + 1
        assert not known & words(" ".join(texts))
        for text in texts:
            for a, operation, b in re.findall(r"(?m)^(\d+)([+-])(\d+): ", text):
                assert (operation, int(a), int(b)) in world.evaluation.sums
                sums += 1
        asked.add(texts[-1].split()[0])
    assert sums > 50
    assert {"And", "Answer", "Write", "What", "Of"} <= asked
    # A system prompt still holds after twelve exchanges: all answers before have its form too.
    deepest = [p["conversations"] for p in long_chats if p["depth"] == 12]
    pirates = [c for c in deepest if c[0]["role"] == "system" and "pirate" in c[0]["content"]]
    for conversation in pirates:
        assert all(m["content"].startswith("Arr!") for m in conversation[2::2])


def test_a_topic_is_taken_up_again_after_another(files):
    """Of "and where does she live?", "she" is the villager of two questions before."""
    again = 0
    for problem in files["eval_tiny.jsonl"]:
        *_, before, _, asked = ["", "", *spoken([problem])]
        apart = re.match("What is a |(Write|Tell me) a|.*How many", before)
        again += bool(apart and re.match("And .*\\b(she|her|he|his|him)\\b", asked))
    assert again >= 10


def test_steps_calculate_rightly():
    rng = random.Random(0)
    for _ in range(500):
        a, b = sorted((rng.randrange(11, 89), rng.randrange(11, 89)), reverse=True)
        for operation in "+-":
            for left, right in re.findall(r"([\d+-]+)=(\d+)", steps(operation, a, b)):
                numbers = list(map(int, re.findall(r"\d+", left)))
                total = sum(numbers) if "+" in left else numbers[0] - numbers[1]
                assert total == int(right)


def test_the_judge():
    assert is_correct(" She is a cook.\n", "She is a cook.")
    assert not is_correct("She is a cook. She is a clerk.", "She is a cook.")
    assert is_correct("4+5=9.\n#### 9", ["#### 9"])
    assert not is_correct("#### 91", ["#### 9"])
    assert not is_correct("a brown dog", ["brown dog", "kite"])
