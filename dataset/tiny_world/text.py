"""The villagers of Tiny World, and the text about them: pretrain_tiny.jsonl.

Each function below writes one kind of text; `pretraining_text` says how much there is of each.
"""

from dataset.tiny_world.wordings import draw_wording
from dataset.tiny_world.world import SHORT_KINDS, find_owners, sentence, words

LOWER_CASE = 0.3  # share of some texts that have names in lower case, as people type them


def fill(wording, person, value="", pronoun=False):
    """Return a wording with a villager, by name or by pronoun, and a value in their places."""
    p, ps, po = words.pronouns[person.sex]
    n, ns, o = (p, ps, po) if pronoun else (person.name, f"{person.name}'s", person.name)
    return wording.format(n=n, ns=ns, o=o, p=p, ps=ps, v=value)


def fact(rng, person, kind, pronoun=False, templates=words.facts):
    """One fact about a villager in one of its wordings."""
    return sentence(fill(rng.choice(templates[kind]), person, getattr(person, kind), pronoun))


def name_as_typed(rng, person):
    return person.name.lower() if rng.random() < LOWER_CASE else person.name


def answer(person, kind):
    """The answer to a question about a fact."""
    return sentence(fill(words.answers[kind], person, getattr(person, kind)))


def portrait(rng, person):
    """All facts about one villager, shuffled: a name first, then mostly pronouns."""
    name = name_as_typed(rng, person)
    kinds = rng.sample(list(words.facts), len(words.facts))
    lines = []
    for index, kind in enumerate(kinds):
        line = fact(rng, person, kind, pronoun=index > 0 and rng.random() < 0.3)
        if rng.random() < 0.15:
            named = line.startswith(person.name)
            line = f"{rng.choice(words.openers)} {line if named else line[0].lower() + line[1:]}"
        lines.append(line)
    text = " ".join(lines)
    return text.replace(person.name, name)


def dialogue(rng, person, other):
    """Two villagers meet; the first answers questions about two of their facts."""
    hello = rng.choice(["Good morning", "Hello", "Good evening", "Welcome", "Nice to see you"])
    lines = [f'{other.name} met {person.name}. "{hello}, {person.name}," said {other.name}.']
    for kind in rng.sample(list(words.facts), 2):
        question, answer = rng.choice(words.questions[kind])
        said = rng.choice(["said", "answered", "replied"])
        answer = answer.format(v=getattr(person, kind))
        lines.append(f'"{question}" asked {other.name}. "{answer}," {said} {person.name}.')
    return " ".join(lines)


def introductions(rng, people):
    """Whether villagers are men or women: most answers begin with "he" or "she"."""
    says = {"f": "She is a woman", "m": "He is a man"}
    four = rng.sample(people, 4)
    return " ".join(f"Do you know {p.name}? {says[p.sex]} of Amberbrook." for p in four)


def errand(rng):
    """Things that are asked for and brought in the same order; trains copying."""
    one, other = rng.sample(words.values["job"], 2)
    things = [f"a {rng.choice(words.values['colour'])} {t}" for t in rng.sample(words.things, 2)]
    things.insert(rng.randrange(3), f"a {rng.choice(words.values['animal'])}")
    said = named(things)
    return f'"Bring me {said}," said a {one} to a {other}. The {other} brought {said}.'


def named(kinds):
    """Join words as in "a, b and c"."""
    return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)


def gossip(rng, person):
    """A question about a villager and an answer with facts without the name: two or three of any
    kind, or the kinds in the question; some answers are in capitals.
    """
    asker, teller, said = rng.choice(words.values["job"]), rng.choice(words.values["job"]), "said"
    shouts = rng.random() < 0.4
    kinds, templates = (SHORT_KINDS + ["pet"], 1) if shouts else (words.facts, None)
    question, kinds = rng.choice(words.rumours), rng.sample(list(kinds), rng.choice([2, 3]))
    if rng.random() < 0.6:
        question = f"What of {{n}}, {named(kinds)}?"
    templates = {kind: words.facts[kind][:templates] for kind in kinds}
    facts = " ".join(fact(rng, person, kind, pronoun=True, templates=templates) for kind in kinds)
    if shouts:
        facts, said = facts.upper(), "shouted"
    question = question.format(n=person.name)
    question = question.lower() if rng.random() < LOWER_CASE else question
    return f'"{question}" asked a {asker}. "{facts}" {said} a {teller}.'


def comparison(rng, person, others):
    """The same question about several villagers, in full only about the first."""
    kind, lines = rng.choice(list(words.facts)), []
    asker, teller = rng.sample(words.values["job"], 2)
    for who in [person, *others]:
        question = "And {n}?" if lines else f"What of {{n}}, {kind}?"
        told = fact(rng, who, kind, pronoun=True)
        lines.append(f'"{question.format(n=who.name)}" asked a {asker}. "{told}" said a {teller}.')
    return " ".join(lines)


def subject_story(subject, event):
    """What a story is about: "a brown dog who lost a kite"; event is a key of words.stories."""
    return words.story_requests[event].format(**dict(zip("cat", subject, strict=True)))


def story(rng, subject, event, beginnings=None):
    """A story about a (colour, animal, thing). Its first sentence repeats the request, so a model
    can copy it, and all later sentences follow from it. beginnings: how many of the wordings of
    the first sentence may be chosen.
    """
    filled = dict(zip("cat", subject, strict=True)) | {"w": subject_story(subject, event)}
    filled |= {"h": rng.choice(words.values["home"]), "j": rng.choice(words.values["job"])}
    parts = [words.story_beginnings[:beginnings], *words.stories[event], words.story_endings]
    return " ".join(rng.choice(part).format(**filled) for part in parts)


def meaning(word):
    kind = "someone who" if word in words.values["job"] else "something that"
    kind = "an animal that" if word in words.values["animal"] else kind
    return f"A {word} is {kind} {words.meanings[word]}."


def in_capitals(word):
    return f"In capital letters, {word} is {word.upper()}."


def small_sum(rng):
    """A sum of two digits, or counting, in digits or in words. A sum and its difference do not
    stand together: a model would copy the second from the first and learn one of them.
    """
    a, b = rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.02:
        start, stop = a + 1, a + 3 + b
        counted = ", ".join(map(str, range(start, stop + 1)))
        return f"Counting from {start} to {stop}: {counted}."
    if rng.random() < 0.1:
        a, b, total = words.numbers[a], words.numbers[b], words.numbers[a + b]
        made, left = f"{a} and {b} make {total}.", f"take {b} from {total} and {a} is left."
        return sentence(rng.choice([made, left]))
    return rng.choice([f"{a}+{b}={a + b}.", f"{a + b}-{b}={a}."])


def steps(operation, a, b):
    """A sum of two two-digit numbers in steps that are each small enough to memorise.

    27+15: 20+10=30, 7+5=12, 30+12=42.
    42-15: 30-10=20, 12-5=7, 20+7=27.
    """
    tens, ones = a - a % 10, a % 10
    if operation == "-" and ones < b % 10:
        tens, ones = tens - 10, ones + 10
    sign = 1 if operation == "+" else -1
    high, low = tens + sign * (b - b % 10), ones + sign * (b % 10)
    parts = f"{tens}{operation}{b - b % 10}={high}, {ones}{operation}{b % 10}={low}"
    return f"{a}{operation}{b}: {parts}, {high}+{low}={high + low}."


def word_problem(rng, operation, a, b):
    """A question that asks for a sum or a difference, in one of its wordings."""
    text = rng.choice(words.sum_problems[operation])
    return text.format(a=a, b=b, t=rng.choice(words.counted), j=rng.choice(words.values["job"]))


def card(rng, person):
    """Facts about a villager as a list, or in single words."""
    name = name_as_typed(rng, person)
    if rng.random() < 0.3:
        kinds = rng.sample(list(words.facts), rng.choice([2, 3]))
        lines = [f"- {kind}: {getattr(person, kind)}" for kind in kinds]
        return "\n".join([f"{name}, {named(kinds)}"] + lines)
    lines = []
    for kind in rng.sample(SHORT_KINDS, 2):
        forms = [f"{kind} of {name}?", f"{name}'s {kind}?", f"what of {name}, {kind}?"]
        question = rng.choice(forms)
        lines.append(f"{question}\n{sentence(getattr(person, kind))}")
    return "\n".join(lines)


def register(rng, owners):
    """Who lives at a place, works as something, likes something, or has a pet: the facts the other
    way round. owners: {(kind, value): villagers}.
    """
    lines = []
    for kind, value in rng.sample(list(owners), 3):
        names = [person.name for person in owners[kind, value]]
        if rng.random() < 0.8:
            _, wording = draw_wording(rng, "reverse", kind)
            lines.append(sentence(wording.format(v=value)))
        form = rng.choices(range(len(words.registers[kind])), [4, 1, 1])[0]
        lines.append(named_owners(kind, value, names, form))
    return " ".join(lines)


def named_owners(kind, value, names, form=0):
    """Return the sentence that names the villagers of whom a fact is true."""
    template = words.registers[kind][form][min(len(names), 2) - 1]
    return sentence(template.format(n=named(names), v=value))


def remembered(rng, person):
    """What one villager says about himself, repeated by another after an unrelated fact."""
    kind = rng.choice(["colour", "animal"])
    value = "the " * (kind == "animal") + rng.choice(words.values[kind])
    one, other = rng.sample(words.values["job"], 2)
    between = fact(rng, person, rng.choice(list(words.facts)))
    return (
        f'"My favourite {kind} is {value}," said a {one} to a {other}. {between} '
        f'"Your favourite {kind} is {value}," said the {other}.'
    )


def pretraining_text(world, rng):
    """The documents of pretrain_tiny.jsonl, each of one kind."""
    people, values = world.people, [word for group in words.values.values() for word in group]

    texts = [portrait(rng, person) for person in people for _ in range(44)]
    texts += [gossip(rng, person) for person in people for _ in range(90)]
    texts += [
        comparison(rng, person, rng.sample(people, rng.choice([1, 2])))
        for person in people
        for _ in range(24)
    ]
    texts += [dialogue(rng, person, rng.choice(people)) for person in people for _ in range(6)]
    texts += [card(rng, person) for person in people for _ in range(100)]
    texts += [introductions(rng, people) for _ in range(400)]
    owners = find_owners(people)
    texts += [register(rng, owners) for _ in range(4000)]
    texts += [errand(rng) for _ in range(400)]
    texts += [remembered(rng, rng.choice(people)) for _ in range(800)]
    texts += [" ".join(in_capitals(rng.choice(values)) for _ in range(5)) for _ in range(150)]
    texts += [
        story(rng, rng.choice(world.training.stories), rng.choice(list(words.stories)))
        for _ in range(750)
    ]
    texts += [" ".join(small_sum(rng) for _ in range(8)) for _ in range(1700)]
    texts += [
        "\n".join(steps(*rng.choice(world.training.sums)) for _ in range(3)) for _ in range(750)
    ]
    for operation, a, b in rng.choices(world.training.sums, k=600):
        texts.append(f"{word_problem(rng, operation, a, b)}\n{steps(operation, a, b)}")
    texts += [" ".join(map(meaning, rng.sample(list(words.meanings), 3))) for _ in range(200)]
    rng.shuffle(texts)
    return texts
