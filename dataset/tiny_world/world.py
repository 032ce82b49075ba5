"""The villagers of Tiny World, and what is held out of the training files for the evaluation."""

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace


def read_toml(name):
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8-sig"))


def sentence(text):
    """Return the text with a capital letter at its start."""
    return text[0].upper() + text[1:]


words = SimpleNamespace(**read_toml("words.toml"))
VILLAGERS, HELD_OUT = 48, 16  # even numbers: best friends stay together
LARGEST = 49  # number in the sums
DIRECT = 4  # the first wordings of words.asks can be joined to another question by "and"
SHORT_KINDS = ["home", "job", "likes"]  # a single word says these facts


@dataclass
class Villager:
    name: str
    sex: str
    home: str
    job: str
    likes: str
    pet: str
    friend: str = ""


@dataclass
class Split:
    """What the conversations of one file are about.

    people     villagers of whom facts are asked
    owners     {(kind of fact, value): the villagers of whom it is true}
    strangers  (sex, name) of nobody in the village
    sums       (operation, a, b)
    pairs      two questions that are joined, each a (kind of fact, wording)
    stories    (colour, animal, thing)
    """

    people: list
    owners: dict
    strangers: list
    sums: list
    pairs: list
    stories: list
    held_out: bool = False


class World:
    """The villagers, and what is held out of the training files for the evaluation.

    known       villagers in the conversations
    held_out    villagers in the pretraining text only
    training    the Split of the training conversations; evaluation: the held-out one
    """

    def __init__(self, seed):
        rng = random.Random(seed)
        names = [(s, a + b) for a in words.starts for s in words.ends for b in words.ends[s]]
        rng.shuffle(names)
        people = []
        for index, (sex, name) in enumerate(names[:VILLAGERS]):
            home, job, likes = (words.values[kind][index % 24] for kind in SHORT_KINDS)
            pet = f"{rng.choice(words.values['colour'])} {rng.choice(words.values['animal'])}"
            people.append(Villager(name, sex, home, job, likes, pet))
        for kind in SHORT_KINDS:  # each value stays equally frequent
            values = [getattr(person, kind) for person in people]
            rng.shuffle(values)
            for person, value in zip(people, values, strict=True):
                setattr(person, kind, value)
        for one, other in zip(people[::2], people[1::2], strict=True):
            one.friend, other.friend = other.name, one.name
        self.people, self.known, self.held_out = people, people[HELD_OUT:], people[:HELD_OUT]
        colours, animals = words.values["colour"], words.values["animal"]
        stories = hold_out(rng, [(c, a, t) for c in colours for a in animals for t in words.things])
        sums = [("+", a, b) for a in range(11, LARGEST) for b in range(11, LARGEST + 1 - a)]
        sums += [("-", a, b) for a in range(21, LARGEST + 1) for b in range(11, a - 9)]
        sums = hold_out(rng, sums)
        # After a question about a friend, "she" would be one of two people.
        asks = [(kind, wording) for kind in words.facts for wording in words.asks[kind][:DIRECT]]
        pairs = hold_out(rng, [(a, b) for a in asks for b in asks if a[0] not in (b[0], "friend")])
        owners = find_owners(people)
        known = {key: group for key, group in owners.items() if not shared(group, self.held_out)}
        others = {key: group for key, group in owners.items() if key not in known}
        strangers = names[VILLAGERS:400], names[400:]
        training, evaluation = zip(strangers, sums, pairs, stories, strict=True)
        self.training = Split(self.known, known, *training)
        self.evaluation = Split(self.held_out, others, *evaluation, held_out=True)


def hold_out(rng, items, part=0.1):
    """Return (items of training, held-out items), a random tenth."""
    held_out = dict.fromkeys(rng.sample(items, int(len(items) * part)))
    return [item for item in items if item not in held_out], list(held_out)


def find_owners(people):
    """Return {(kind of fact, value): the villagers of whom it is true}."""
    owners = {}
    for person in people:
        for kind in (*SHORT_KINDS, "pet"):
            owners.setdefault((kind, getattr(person, kind)), []).append(person)
    return owners


def shared(group, people):
    return [person for person in group if person in people]
