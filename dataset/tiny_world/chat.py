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
    subject_story,
    word_problem,
    words,
)

KINDS = list(words.facts)
# How often each form of answers is demanded. A single word is the hardest: it is said at once.
MANNERS = {"one word": 5, "capitals": 4, "list": 2, "polite": 2, "pirate": 3}


class Pool:
    """What the conversations of one file may talk about."""

    def __init__(self, world, held_out):
        self.people = world.held_out if held_out else world.known
        self.strangers = world.held_out_strangers if held_out else world.strangers
        self.sums = list(world.held_out_sums) if held_out else world.sums
        self.pairs = list(world.held_out_pairs) if held_out else world.pairs
        self.stories = list(world.held_out_stories) if held_out else world.stories


def choose(rng, shares):
    """A key of shares; how often each is chosen are the values."""
    return rng.choices(list(shares), list(shares.values()))[0]


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
    request += f" about {subject_story(subject, event)}."
    colour, animal, thing = subject
    return "compose", turns(request, story(rng, subject, event)), [f"{colour} {animal}", thing]


def calculation(rng, pool):
    operation, a, b = rng.choice(pool.sums)
    result = f"#### {a + b if operation == '+' else a - b}"
    text = f"{steps(operation, a, b)}\n{result}"
    return "arithmetic", turns(word_problem(rng, operation, a, b), text), [result]


def follow_up(rng, pool):
    """The last question says "she", maybe after another topic; or it names another villager and
    leaves the rest out.
    """
    person, ((one, _), (two, wording)) = rng.choice(pool.people), rng.choice(pool.pairs)
    messages = turns(sentence(ask(rng, person, one)), answer(person, one))
    if rng.random() < 0.3:
        other = rng.choice([p for p in pool.people if p is not person])
        question = rng.choice(["And {}?", "What about {}?"]).format(other.name)
        return "multi_turn", messages + turns(question, answer(other, one)), answer(other, one)
    kinds = [(two, wording)]
    if two != "friend" and rng.random() < 0.4:
        last = rng.choice([kind for kind in KINDS if kind not in (one, two)])
        kinds.append((last, rng.choice(words.asks[last][:DIRECT])))
    for kind, wording in kinds:
        if rng.random() < 0.7:
            messages += talk(rng, pool, 1, IMPERSONAL)
        question = f"And {ask(rng, person, kind, pronoun=True, wording=wording)}"
        text = answer(person, kind)
        messages += turns(question, text)
    return "multi_turn", messages, text


def favourite(rng, pool):
    """A question about what the user said earlier, after questions about something else."""
    kind = rng.choice(["colour", "animal"])
    value = rng.choice(words.values[kind])
    told = f"My favourite {kind} is {'the ' * (kind == 'animal')}{value}."
    text = told.replace("My", "Your")
    messages = turns(told, "I will remember that.") + talk(rng, pool, rng.randint(1, 3), SINGLE)
    return "multi_turn", messages + turns(f"What is my favourite {kind}?", text), text


def in_a_manner(rng, pool, manner):
    """A question about a villager, and its answer in one of the forms of words.manners."""
    person = rng.choice(pool.people)
    kinds = {"one word": SHORT_KINDS, "capitals": [*SHORT_KINDS, "pet"]}
    kind = rng.choice(kinds.get(manner, KINDS))
    question, text = sentence(ask(rng, person, kind)), answer(person, kind)
    if manner == "list":
        wanted = rng.sample(KINDS, 2)
        question = f"What do you know of {person.name}'s {wanted[0]} and {wanted[1]}?"
        text = "\n".join(f"- {kind}: {getattr(person, kind)}" for kind in wanted)
    return question, {
        "one word": sentence(getattr(person, kind)),
        "capitals": text.upper(),
        "list": text,
        "polite": f"With pleasure! {text}",
        "pirate": f"Arr! {text} Arr!",
    }[manner]


def instruction(rng, pool):
    """The user demands a form of the answer, which holds for this answer alone."""
    manner = choose(rng, {manner: MANNERS[manner] for manner in ("one word", "capitals", "list")})
    question, text = in_a_manner(rng, pool, manner)
    return "format", turns(f"{rng.choice(words.manners[manner])} {question}", text), text


def system_prompt(rng, pool, exchanges=1):
    """The system prompt demands a form, and all answers have it."""
    manner = choose(rng, MANNERS)
    asked = [in_a_manner(rng, pool, manner) for _ in range(exchanges)]
    texts = [text for pair in asked for text in pair]
    return "format", turns(*texts, system=rng.choice(words.manners[manner])), texts[-1]


def unknown(rng, pool):
    sex, name = rng.choice(pool.strangers)
    stranger = Villager(name, sex, *[""] * 4)
    return (
        "unknown",
        turns(sentence(ask(rng, stranger, rng.choice(KINDS))), words.unknown),
        words.unknown,
    )


def small_talk(rng, pool):
    """Who the assistant is, and what words mean."""
    question, text = rng.choice(words.identity)
    if rng.random() < 0.5:
        word = rng.choice(list(words.meanings))
        question, text = f"What is a {word}?", meaning(word)
    return None, turns(question, text), text


# The topics of a conversation, and how often each comes.
IMPERSONAL = {calculation: 10, story_on_request: 2, small_talk: 2}
SINGLE = {recall: 5, two_facts: 6, instruction: 12, unknown: 3} | IMPERSONAL
TOPICS = SINGLE | {follow_up: 15, favourite: 8}
# How many questions of each kind the evaluation asks; LONG_CHATS more at each of DEPTHS.
EVAL_COUNTS = {
    recall: 100,
    two_facts: 30,
    story_on_request: 30,
    calculation: 60,
    follow_up: 45,
    favourite: 15,
    instruction: 20,
    system_prompt: 40,
    unknown: 60,
}
DEPTHS = (3, 6, 9, 12)
LONG_CHATS = 40
SFT_CONVERSATIONS = 2600
LONGEST = 14  # exchanges of a training conversation


def talk(rng, pool, exchanges, topics):
    """The messages of a number of exchanges, one topic after another."""
    messages = []
    while len(messages) < 2 * exchanges:
        topic = choose(rng, topics)(rng, pool)[1]
        if len(messages) + len(topic) <= 2 * exchanges:
            messages += topic
    return messages


def long_chat(rng, pool, depth):
    """A question of any kind after `depth` exchanges of other topics."""
    maker = rng.choice([*(maker for maker in TOPICS if maker is not small_talk), system_prompt])
    if maker is system_prompt:
        _, messages, expected = system_prompt(rng, pool, depth + 1)
        return "long_chat", messages, expected
    _, topic, expected = maker(rng, pool)
    while len(topic) > 2 * (depth + 1):
        _, topic, expected = maker(rng, pool)
    return "long_chat", talk(rng, pool, depth + 1 - len(topic) // 2, TOPICS) + topic, expected


def conversations(world, rng):
    """The records of sft_tiny.jsonl."""
    pool = Pool(world, held_out=False)
    for _ in range(SFT_CONVERSATIONS):
        exchanges = rng.randint(1, LONGEST)
        if rng.random() < 0.3:
            _, messages, _ = system_prompt(rng, pool, exchanges)
        else:
            messages = talk(rng, pool, exchanges, TOPICS)
        yield {"conversations": messages}


def preferences(world, rng, count=400):
    """Pairs of answers about villagers whom conversations mention; the chosen one is short."""
    people, asked = Pool(world, held_out=False).people, set()
    while len(asked) < count:
        person, kind = rng.choice(people), rng.choice(SHORT_KINDS)
        question = sentence(ask(rng, person, kind))
        if question not in asked:
            asked.add(question)
            short, whole = sentence(getattr(person, kind)), answer(person, kind)
            yield {"prompt": question, "chosen": short, "rejected": whole}


def questions(world, rng, held_out=True, counts=EVAL_COUNTS, depths=DEPTHS):
    """The records of eval_tiny.jsonl, or others of their kind; no question occurs twice."""
    pool, seen = Pool(world, held_out), set()
    asked = [(maker, {}) for maker, count in counts.items() for _ in range(count)]
    asked += [(long_chat, {"depth": depth}) for depth in depths for _ in range(LONG_CHATS)]
    for maker, options in asked:
        prompt = None
        while str(prompt) in seen or prompt is None:
            category, messages, expected = maker(rng, pool, **options)
            prompt = messages[:-1]
        seen.add(str(prompt))
        record = {"category": category, **options, "conversations": prompt}
        yield record | {"expected": expected}
