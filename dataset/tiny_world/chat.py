"""The conversations of Tiny World: sft_tiny.jsonl for training, eval_tiny.jsonl for evaluation.

Both are made by the same functions, one per kind of conversation, from different topics: a `Pool`
holds the villagers, strangers, sums and stories of training, or the held-out ones.
Each function returns (category, messages, expected): the messages end with the right answer, and
expected is what the evaluation compares a model's answer with: the whole answer or a list of words.
"""

from dataset.tiny_world.text import (
    DIRECT,
    SHORT_KINDS,
    Villager,
    meaning,
    sentence,
    steps,
    story,
    story_of,
    word_problem,
    words,
)

KINDS = list(words.facts)


class Pool:
    """What the conversations of one file may talk about."""

    def __init__(self, world, held_out):
        self.people = world.held_out if held_out else world.known
        self.strangers = world.held_out_strangers if held_out else world.strangers
        self.sums = list(world.held_out_sums) if held_out else world.sums
        self.pairs = list(world.held_out_pairs) if held_out else world.pairs
        self.stories = list(world.held_out_stories) if held_out else world.stories


def turns(*texts, system=None):
    """Texts of user and assistant in turn, as messages."""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def ask(rng, person, kind, pronoun=False, wording=None):
    """A question about one fact, in the given wording or in any."""
    p, ps, po = words.pronouns[person.sex]
    n, ns, o = (p, ps, po) if pronoun else (person.name, f"{person.name}'s", person.name)
    return (wording or rng.choice(words.asks[kind])).format(n=n, ns=ns, o=o)


def answer(person, kind):
    p, ps, _ = words.pronouns[person.sex]
    return sentence(words.answers[kind].format(p=p, ps=ps, v=getattr(person, kind)))


def recall(rng, pool):
    person, kind = rng.choice(pool.people), rng.choice(KINDS)
    text = answer(person, kind)
    return "recall", turns(sentence(ask(rng, person, kind)), text), text


def two_facts(rng, pool):
    person, ((one, first), (two, second)) = rng.choice(pool.people), rng.choice(pool.pairs)
    question = ask(rng, person, one, wording=first).rstrip("?") + " and "
    question += ask(rng, person, two, pronoun=True, wording=second)
    text = f"{answer(person, one)} {answer(person, two)}"
    return "compose", turns(sentence(question), text), text


def story_on_request(rng, pool):
    subject, event = rng.choice(pool.stories), rng.choice(list(words.stories))
    request = rng.choice(["Write a story", "Tell me a story", "Write a short story"])
    request += f" about {story_of(subject, event)}."
    colour, animal, thing = subject
    return "compose", turns(request, story(rng, subject, event)), [f"{colour} {animal}", thing]


def calculation(rng, pool):
    operation, a, b = rng.choice(pool.sums)
    result = f"#### {a + b if operation == '+' else a - b}"
    text = f"{steps(operation, a, b)}\n{result}"
    return "arithmetic", turns(word_problem(rng, operation, a, b), text), [result]


def follow_up(rng, pool):
    """The second question says "she", or names another villager and leaves the rest out."""
    person, ((one, _), (two, wording)) = rng.choice(pool.people), rng.choice(pool.pairs)
    texts = [sentence(ask(rng, person, one)), answer(person, one)]
    if rng.random() < 0.5:
        texts += [
            f"And {ask(rng, person, two, pronoun=True, wording=wording)}",
            answer(person, two),
        ]
        if two != "friend" and rng.random() < 0.4:
            last = rng.choice([kind for kind in KINDS if kind not in (one, two)])
            wording = rng.choice(words.asks[last][:DIRECT])
            texts += [
                f"And {ask(rng, person, last, pronoun=True, wording=wording)}",
                answer(person, last),
            ]
    else:
        other = rng.choice([p for p in pool.people if p is not person])
        texts += [rng.choice(["And {}?", "What about {}?"]).format(other.name), answer(other, one)]
    return "multi_turn", turns(*texts), texts[-1]


def favourite(rng, pool):
    """A question about what the user said earlier, after a question about something else."""
    kind = rng.choice(["colour", "animal"])
    value = rng.choice(words.values[kind])
    told = f"My favourite {kind} is {'the ' * (kind == 'animal')}{value}."
    _, between, _ = recall(rng, pool)
    between = [message["content"] for message in between]
    text = told.replace("My", "Your")
    ask_back = f"What is my favourite {kind}?"
    return "multi_turn", turns(told, "I will remember that.", *between, ask_back, text), text


def in_a_manner(rng, pool):
    """An answer in a form that the user or the system prompt demands."""
    person, manner = rng.choice(pool.people), rng.choice(list(words.manners))
    kinds = {"one word": SHORT_KINDS, "capitals": [*SHORT_KINDS, "pet"]}
    kind = rng.choice(kinds.get(manner, KINDS))
    value, text = getattr(person, kind), answer(person, kind)
    question = ask(rng, person, kind)
    if manner == "list":
        wanted = rng.sample(KINDS, 2)
        question = f"what do you know of {person.name}'s {wanted[0]} and {wanted[1]}?"
        text = "\n".join(f"- {kind}: {getattr(person, kind)}" for kind in wanted)
    text = {
        "one word": sentence(value),
        "capitals": text.upper(),
        "list": text,
        "polite": f"With pleasure! {text}",
        "pirate": f"Arr! {text} Arr!",
    }[manner]
    instruction = rng.choice(words.manners[manner])
    if manner in ("polite", "pirate") or rng.random() < 0.5:
        return "format", turns(sentence(question), text, system=instruction), text
    return "format", turns(f"{instruction} {sentence(question)}", text), text


def unknown(rng, pool):
    sex, name = rng.choice(pool.strangers)
    stranger = Villager(name, sex, *[""] * 4)
    return (
        "unknown",
        turns(sentence(ask(rng, stranger, rng.choice(KINDS))), words.unknown),
        words.unknown,
    )


def long_talk(rng, pool):
    """One topic after another in the same conversation; in training only."""
    makers = [recall, two_facts, story_on_request, calculation, follow_up, favourite, unknown]
    makers += [small_talk]
    messages = [
        m for maker in rng.choices(makers, k=rng.randint(2, 4)) for m in maker(rng, pool)[1]
    ]
    return None, messages, None


def small_talk(rng, pool):
    """Who the assistant is, and what words mean; in training only."""
    if rng.random() < 0.5:
        return None, turns(*rng.choice(words.identity)), None
    word = rng.choice(list(words.meanings))
    return None, turns(f"What is a {word}?", meaning(word)), None


# How many conversations of each kind the two files hold.
SFT_COUNTS = {
    recall: 800,
    two_facts: 900,
    story_on_request: 400,
    calculation: 1100,
    follow_up: 900,
    favourite: 400,
    in_a_manner: 1900,
    unknown: 250,
    small_talk: 250,
    long_talk: 400,
}
EVAL_COUNTS = {
    recall: 100,
    two_facts: 30,
    story_on_request: 30,
    calculation: 60,
    follow_up: 45,
    favourite: 15,
    in_a_manner: 60,
    unknown: 60,
}


def conversations(world, rng):
    """The records of sft_tiny.jsonl, shuffled."""
    pool = Pool(world, held_out=False)
    makers = [maker for maker, count in SFT_COUNTS.items() for _ in range(count)]
    rng.shuffle(makers)
    for maker in makers:
        yield {"conversations": maker(rng, pool)[1]}


def questions(world, rng, held_out=True, counts=EVAL_COUNTS):
    """The records of eval_tiny.jsonl, or others of their kind; no question occurs twice."""
    pool, seen = Pool(world, held_out), set()
    for maker, count in counts.items():
        while count:
            category, messages, expected = maker(rng, pool)
            prompt = messages[:-1]
            if str(prompt) not in seen:
                seen.add(str(prompt))
                count -= 1
                yield {"category": category, "conversations": prompt, "expected": expected}
