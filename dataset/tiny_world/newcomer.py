"""Exchanges as newcomers begin them: small talk, facts in any wording, bare sums, other subjects.

A function per group of wordings (wordings.py) returns an `Exchange`.
"""

from dataclasses import dataclass, replace

from dataset.tiny_world.text import answer, fill, meaning, named_owners, steps, story
from dataset.tiny_world.wordings import as_typed, draw_wording, held_out, training
from dataset.tiny_world.world import LARGEST, Villager, sentence, words

OUTSIDE = "I don't know that. I only know the village of Amberbrook."
TOO_HARD = f"I can only add and subtract numbers from 0 to {LARGEST}."


@dataclass
class Exchange:
    """A question, its answer, and the words that the evaluation looks for in an answer."""

    question: str
    answer: str
    expected: list


def small_talk(rng, split, topic, wording):
    text, keyword = training["small_talk_answers"][topic]
    return Exchange(wording, text, [keyword])


def facts(rng, split, kind, wording):
    person = rng.choice(split.people)
    return Exchange(fill(wording, person), answer(person, kind), [getattr(person, kind)])


def lower_case(rng, split, kind, wording):
    exchange = facts(rng, split, kind, wording)
    return replace(exchange, question=exchange.question.lower())


def yes_or_no(rng, split, kind, wording):
    """The answer to whether a fact is true is the fact. Half of the values are of others."""
    person = rng.choice(split.people)
    value = right = getattr(person, kind)
    if rng.random() < 0.5:
        others = [getattr(other, kind) for other in split.people]
        value = rng.choice([other for other in others if other not in (right, person.name)])
    return Exchange(fill(wording, person, value), answer(person, kind), [right])


def reverse(rng, split, kind, wording):
    """Who lives at a place, and the like: one villager, or several."""
    value = rng.choice([value for other, value in split.owners if other == kind])
    names = [person.name for person in split.owners[kind, value]]
    return Exchange(wording.format(v=value), named_owners(kind, value, names), names)


def about(rng, split, key, wording):
    person = rng.choice(split.people)
    facts = [person.job, person.home, person.likes]
    p = sentence(words.pronouns[person.sex][0])
    text = f"{p} is a {person.job}. {p} lives at the {person.home} and likes {person.likes}."
    return Exchange(fill(wording, person), text, facts)


def sums(rng, split, sign, wording):
    operation, a, b = rng.choice(split.sums)
    while operation != sign:
        operation, a, b = rng.choice(split.sums)
    return calculate(sign, a, b, wording)


def small_sums(rng, split, sign, wording):
    """A sum with a number of at most 10, which no sum of the evaluation has."""
    total = rng.randrange(rng.choice([11, LARGEST + 1]))
    b = rng.randrange(min(total, 10) + 1)
    if sign == "-":
        return calculate(sign, total, b, wording)
    return calculate(sign, *rng.sample([total - b, b], 2), wording)


def calculate(sign, a, b, wording):
    result = a + b if sign == "+" else a - b
    text = steps(sign, a, b) if max(a, b) > 9 else f"{a}{sign}{b}={result}."
    result = f"#### {result}"
    return Exchange(wording.format(a=a, b=b), f"{text}\n{result}", [result])


def too_hard(rng, split, key, wording):
    small, large = range(2, LARGEST + 1), range(LARGEST + 1, 10 ** rng.choice([2, 3, 4]))
    a, b, c, d = (rng.choice(numbers) for numbers in (small, small, large, large))
    return Exchange(wording.format(a=a, b=b, c=c, d=d), TOO_HARD, [TOO_HARD])


def outside(rng, split, key, wording):
    return Exchange(wording, OUTSIDE, ["only know"])


def unknown(rng, split, key, wording):
    """About somebody who isn't in the village, with a name of its kind or of the real world."""
    names = held_out["strangers"] if split.held_out else training["strangers"]
    if not split.held_out and rng.random() < 0.6:
        names = [name for _, name in split.strangers]
    stranger = Villager(rng.choice(names), "f", *[""] * 4)
    return Exchange(fill(wording, stranger), words.unknown, ["I don't know"])


def stories(rng, split, key, wording):
    colour, hero, thing = rng.choice(split.stories)
    if key == "hero" and rng.random() < 0.6:
        hero = rng.choice(training["heroes"])
    text = story(rng, (colour, hero, thing), rng.choice(list(words.stories)), beginnings=1)
    return Exchange(wording.format(c=hero), text, ["Once there was"])


def meanings(rng, split, key, wording):
    word = rng.choice(defined(split))
    return Exchange(wording.format(v=word), meaning(word), [words.meanings[word]])


def defined(split):
    """Return the words whose meanings are asked: only the jobs of the split, as in questions
    of who has them, so that neither kind of question is the only one about a job.
    """
    jobs = set(words.values["job"])
    return [word for word in words.meanings if word not in jobs or ("job", word) in split.owners]


# group of wordings in training: (function, how often it comes)
GROUPS = {
    "small_talk": (small_talk, 30),
    "facts": (facts, 18),
    "yes_or_no": (yes_or_no, 11),
    "reverse": (reverse, 12),
    "about": (about, 11),
    "sums": (sums, 12),
    "small_sums": (small_sums, 4),
    "too_hard": (too_hard, 3),
    "outside": (outside, 18),
    "unknown": (unknown, 9),
    "stories": (stories, 3),
    "story_about": (stories, 1),
    "meaning": (meanings, 2),
}
# group of wordings in the evaluation: (function, how often each wording is asked)
HELD_OUT_GROUPS = {
    "greetings": (small_talk, 1),
    "closings": (small_talk, 1),
    "itself": (small_talk, 1),
    "facts": (facts, 2),
    "lower_case": (lower_case, 4),
    "yes_or_no": (yes_or_no, 4),
    "reverse": (reverse, 4),
    "about": (about, 4),
    "sums": (sums, 2),
    "outside": (outside, 1),
    "unknown_name": (unknown, 1),
    "stories": (stories, 1),
}


def new_exchange(rng, split):
    """Return an exchange of training, typed as people type."""
    group = rng.choices(list(GROUPS), [share for _, share in GROUPS.values()])[0]
    exchange = GROUPS[group][0](rng, split, *draw_wording(rng, group))
    return replace(exchange, question=as_typed(rng, exchange.question))


def follow_up(rng, split):
    """Return two exchanges about a villager; the second question says "she" or "he"."""
    person, kinds, exchanges = rng.choice(split.people), {"friend"}, []
    while len(exchanges) < 2:
        kind, wording = draw_wording(rng, "facts")
        if kind not in kinds:
            question = as_typed(rng, fill(wording, person, pronoun=bool(exchanges)))
            exchanges.append(Exchange(question, answer(person, kind), [getattr(person, kind)]))
            kinds = {kind}  # a friend may follow, but then "she" would be one of two people
    return exchanges


def own_words(rng, split, known):
    """Yield (group, Exchange) for every wording of own_words.toml, more than once where villagers
    or numbers differ: in turn about villagers of the held-out split and of the known one.
    """
    questions = set()
    for group, (function, count) in HELD_OUT_GROUPS.items():
        asked = [(key, wording) for key, texts in held_out[group].items() for wording in texts]
        for key, wording in asked:
            for i in range(count):
                exchange = function(rng, known if i % 2 else split, key, wording)
                while exchange.question in questions:
                    exchange = function(rng, known if i % 2 else split, key, wording)
                questions.add(exchange.question)
                yield group.replace("_", " "), exchange
