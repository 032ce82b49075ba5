"""Exchanges as newcomers begin them: small talk, facts in any wording, bare sums, other subjects.

The wordings of training are composed from newcomer.toml; those of the evaluation are listed in
own_words.toml. A function per group returns an `Exchange` for a wording.
"""

import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.tiny_world.text import (
    LARGEST,
    Villager,
    fill,
    meaning,
    named,
    sentence,
    steps,
    story,
    words,
)

OUTSIDE = "I don't know that. I only know the village of Amberbrook."
TOO_HARD = f"I can only add and subtract numbers from 0 to {LARGEST}."
# What the evaluation looks for in answers to small talk.
KEYWORDS = {
    "hello": "Hello",
    "how_are_you": "I am well",
    "thanks": "You are welcome",
    "bye": "Goodbye",
    "nature": "language model",
    "maker": "trained me",
    "ability": "I can tell you",
    "size": "three million parameters",
    "age": "minutes old",
    "origin": "Amberbrook",
    "learning": "I learned to speak",
}


def read_toml(name):
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8-sig"))


training, held_out = read_toml("newcomer.toml"), read_toml("own_words.toml")


@dataclass
class Exchange:
    """A question, its answer, and the words that the evaluation looks for in an answer."""

    question: str
    answer: str
    expected: list


def compose(frames, parts):
    """Return each part in each frame, in the place of {q} or {x}."""
    return [frame.replace("{q}", p).replace("{x}", p) for frame in frames for p in parts]


def training_wordings():
    """Return {group: list of (key, wording)}."""
    frames = training["frames"]
    facts = {
        kind: words.asks[kind]
        + training["direct"][kind]
        + compose(frames["indirect"], training["indirect"][kind])
        + compose(frames["noun"], training["noun"][kind])
        for kind in words.facts
    }
    things = f"({'|'.join(training['outside_things'])})"
    groups = {
        "small talk": training["small_talk"],
        "facts": facts,
        "yes or no": training["yes_or_no"],
        "reverse": training["reverse"],
        "about": training["about"],
        "sums": training["sums"],
        "small sums": training["sums"],
        "too hard": {"all": training["too_hard"]},
        "outside": {"all": training["outside"] + compose(training["outside_frames"], [things])},
        "unknown": facts | {"about": training["about"]["all"]},
        "stories": {"any": training["stories"]},
        "story about": {"hero": training["story_about"]},
        "meaning": training["meaning"],
    }
    return {
        group: [(key, wording) for key, texts in wordings.items() for wording in texts]
        for group, wordings in groups.items()
    }


TRAINING_WORDINGS = training_wordings()


def alternatives(wording):
    """Return how many alternatives a wording has, at most 25: how often it is chosen."""
    return min(1 + wording.count("|"), 25)


def normalised(wording):
    """Return a wording without punctuation, in lower case, any name or number for its fields."""
    for field, text in (("{ns}", "NAME s"), ("{n}", "NAME"), ("{o}", "NAME"), ("{b}", "{a}")):
        wording = wording.replace(field, text)
    return " ".join(re.sub(r"[^\w\s]", " ", wording.lower()).split())


def draw_wording(rng, group):
    """Return (key, wording) of a group, not one of own_words.toml: of alternatives, (this|that),
    one is chosen, and a few words may come before or after.
    """
    options = TRAINING_WORDINGS[group]
    while True:
        key, wording = rng.choices(options, [alternatives(wording) for _, wording in options])[0]
        wording = re.sub(r"\(([^()]*)\)", lambda m: rng.choice(m[1].split("|")), wording)
        wording = with_words_around(rng, abbreviate(rng, wording))
        if normalised(wording) not in HELD_OUT_WORDINGS:
            return key, wording


def abbreviate(rng, wording):
    for whole, short in training["typed"].items():
        if rng.random() < 0.15:
            wording = re.sub(rf"(?i)\b{whole}\b", lambda _, short=short: rng.choice(short), wording)
    return wording


def with_words_around(rng, wording):
    if rng.random() < 0.12:
        wording = f"{rng.choice(training['around']['before'])} {wording[0].lower()}{wording[1:]}"
    if rng.random() < 0.12:
        end = re.search(r"[?.!]*$", wording)[0]
        wording = wording.removesuffix(end) + f" {rng.choice(training['around']['after'])}{end}"
    if wording[-1] not in "?.!":
        wording += rng.choice(["", "", ".", "?", "!"])
    return wording


def small_talk(rng, split, topic, wording):
    answer = training["small_talk_answers"][topic]
    return Exchange(wording, answer, [KEYWORDS.get(topic, "Seedling")])


def answer(person, kind):
    """The answer to a question about a fact."""
    return sentence(fill(words.answers[kind], person, getattr(person, kind)))


def facts(rng, split, kind, wording):
    person = rng.choice(split.people)
    return Exchange(fill(wording, person), answer(person, kind), [getattr(person, kind)])


def lower_case(rng, split, kind, wording):
    exchange = facts(rng, split, kind, wording)
    return Exchange(exchange.question.lower(), exchange.answer, exchange.expected)


def yes_or_no(rng, split, kind, wording):
    person, is_true = rng.choice(split.people), rng.random() < 0.5
    right = value = getattr(person, kind)
    while not is_true and value in (right, person.name):
        value = getattr(rng.choice(split.people), kind)
    verdict = "so yes" if is_true else "so no"
    said = f"{answer(person, kind).rstrip('.')}, {verdict}."
    return Exchange(fill(wording, person, value), said, [verdict, right])


def reverse(rng, split, kind, wording):
    """Who lives at a place, and the like: one villager, or several."""
    value, people = rng.choice(
        [(v, people) for (k, v), people in split.owners.items() if k == kind]
    )
    names = [person.name for person in people]
    one, several = training["reverse_answers"][kind]
    text = (
        several.format(n=named(names), v=value)
        if len(names) > 1
        else one.format(n=names[0], v=value)
    )
    return Exchange(wording.format(v=value), text, names)


def about(rng, split, _, wording):
    person = rng.choice(split.people)
    p = sentence(words.pronouns[person.sex][0])
    text = (
        f"{person.name} is a {person.job}. {p} lives at the {person.home} and likes {person.likes}."
    )
    return Exchange(fill(wording, person), text, [person.job, person.home, person.likes])


def sums(rng, split, sign, wording):
    a, b = rng.choice([(a, b) for operation, a, b in split.sums if operation == sign])
    return calculated(sign, a, b, wording)


def small_sums(rng, split, sign, wording):
    """A sum with a number of at most 10, which no sum of the evaluation has."""
    total = rng.choice([rng.randrange(11), rng.randrange(LARGEST + 1)])
    b = rng.randrange(min(total, 10) + 1)
    a = total - b if sign == "+" else total
    if sign == "+" and rng.random() < 0.5:
        a, b = b, a
    return calculated(sign, a, b, wording)


def calculated(sign, a, b, wording):
    result = a + b if sign == "+" else a - b
    text = steps(sign, a, b) if max(a, b) > 9 else f"{a}{sign}{b}={result}."
    return Exchange(wording.format(a=a, b=b), f"{text}\n#### {result}", [f"#### {result}"])


def too_hard(rng, split, _, wording):
    small, large = range(2, LARGEST + 1), range(LARGEST + 1, 10 ** rng.choice([2, 3, 4]))
    a, b, c, d = (rng.choice(numbers) for numbers in (small, small, large, large))
    return Exchange(wording.format(a=a, b=b, c=c, d=d), TOO_HARD, [TOO_HARD])


def outside(rng, split, _, wording):
    return Exchange(wording, OUTSIDE, ["only know"])


def unknown(rng, split, _, wording):
    """Somebody who isn't in the village, with a name of its kind or of this world."""
    names = held_out["strangers"] if split.held_out else training["strangers"]
    if not split.held_out and rng.random() < 0.6:
        names = [name for _, name in split.strangers]
    stranger = Villager(rng.choice(names), "f", *[""] * 4)
    return Exchange(fill(wording, stranger), words.unknown, ["never heard"])


def stories(rng, split, kind, wording):
    """A story without a subject, or about a hero."""
    colour, animal, thing = rng.choice(split.stories)
    if kind == "hero" and rng.random() < 0.6:
        animal = rng.choice(training["heroes"])
    text = story(rng, (colour, animal, thing), rng.choice(list(words.stories)), beginnings=1)
    return Exchange(wording.format(c=animal), text, ["Once there was"])


def meanings(rng, split, _, wording):
    word = rng.choice(list(words.meanings))
    return Exchange(wording.format(v=word), meaning(word), [words.meanings[word]])


# The groups of training: (function, how often it comes).
GROUPS = {
    "small talk": (small_talk, 14),
    "facts": (facts, 22),
    "yes or no": (yes_or_no, 12),
    "reverse": (reverse, 12),
    "about": (about, 6),
    "sums": (sums, 6),
    "small sums": (small_sums, 4),
    "too hard": (too_hard, 3),
    "outside": (outside, 12),
    "unknown": (unknown, 8),
    "stories": (stories, 2),
    "story about": (stories, 1),
    "meaning": (meanings, 3),
}


def exchange(rng, split, groups=GROUPS):
    """An exchange of training, typed as people type."""
    group = rng.choices(list(groups), [share for _, share in groups.values()])[0]
    key, wording = draw_wording(rng, group)
    clean = groups[group][0](rng, split, key, wording)
    return replace(clean, question=as_typed(rng, sentence(clean.question)))


def follow_up(rng, split):
    """Two exchanges: the second question is about another fact, with a pronoun."""
    person, pronoun, exchanges = rng.choice(split.people), False, []
    kinds = set()
    while len(exchanges) < 2:
        kind, wording = draw_wording(rng, "facts")
        if kind in kinds or kind == "friend" and not pronoun:
            continue
        question = fill(wording, person, pronoun=pronoun)
        text = as_typed(rng, sentence(question))
        exchanges.append(Exchange(text, answer(person, kind), [getattr(person, kind)]))
        kinds.add(kind)
        pronoun = True
    return exchanges


def as_typed(rng, text):
    """Return a text as people type it: half of the texts as they are, others without punctuation,
    in lower case, with names or without, or with a typing error.
    """
    if rng.random() < 0.4:
        return text
    if rng.random() < 0.6:
        text = text.rstrip("?.!")
    if rng.random() < 0.5:
        text = text.lower()
    elif rng.random() < 0.7:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12:
        text = with_typing_error(rng, text)
    return text


def with_typing_error(rng, text):
    """Swap two letters of a word in lower case, or omit or repeat one."""
    long_words = list(re.finditer(r"\b[a-z]{4,}\b", text))
    if not long_words:
        return text
    word = rng.choice(long_words)
    i = rng.randrange(word.start() + 1, word.end() - 1)
    before, letter, after = text[:i], text[i], text[i + 1 :]
    swapped = before + after[0] + letter + after[1:]
    return rng.choice([swapped, before + after, before + letter + letter + after])


# The groups of the evaluation: (function, wordings by key, how often each is asked).
SMALL_TALK = held_out["small_talk"]
GREETINGS, CLOSINGS = ("hello", "how_are_you"), ("thanks", "bye")
ITSELF = [topic for topic in SMALL_TALK if topic not in (*GREETINGS, *CLOSINGS)]
HELD_OUT_GROUPS = {
    "greetings": (small_talk, {topic: SMALL_TALK[topic] for topic in GREETINGS}, 1),
    "closings": (small_talk, {topic: SMALL_TALK[topic] for topic in CLOSINGS}, 1),
    "itself": (small_talk, {topic: SMALL_TALK[topic] for topic in ITSELF}, 1),
    "facts": (facts, held_out["facts"], 2),
    "lower case": (lower_case, held_out["lower_case"], 4),
    "yes or no": (yes_or_no, held_out["yes_or_no"], 4),
    "reverse": (reverse, held_out["reverse"], 4),
    "about": (about, held_out["about"], 4),
    "sums": (sums, held_out["sums"], 2),
    "outside": (outside, {"all": held_out["outside"]}, 1),
    "unknown": (unknown, {"all": [w for texts in held_out["facts"].values() for w in texts]}, 1),
    "stories": (stories, {"any": held_out["stories"]}, 1),
}


HELD_OUT_WORDINGS = {
    normalised(wording)
    for _, wordings, _ in HELD_OUT_GROUPS.values()
    for texts in wordings.values()
    for wording in texts
}


def own_words(rng, split, known):
    """Yield (group, Exchange) for every wording of own_words.toml, more than once where villagers
    or numbers differ: in turn about villagers of the held-out split and of the known one.
    """
    questions = set()
    for group, (function, wordings, count) in HELD_OUT_GROUPS.items():
        asked = [(key, wording) for key, texts in wordings.items() for wording in texts]
        for key, wording in asked:
            for i in range(count):
                exchange = function(rng, known if i % 2 else split, key, wording)
                while exchange.question in questions:
                    exchange = function(rng, known if i % 2 else split, key, wording)
                questions.add(exchange.question)
                yield group, exchange
