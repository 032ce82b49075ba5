"""The conversations of Tiny World: sft_tiny.jsonl for training, eval_tiny.jsonl for evaluation.

Both are made by the same functions, one per topic, from different splits: the villagers, strangers,
sums and stories of training, or the held-out ones. Each function returns a `Topic`. Questions in a
newcomer's own words are in newcomer.py.
"""

from dataclasses import dataclass, replace

from dataset.tiny_world import newcomer
from dataset.tiny_world.text import (
    answer,
    fill,
    meaning,
    steps,
    story,
    subject_story,
    word_problem,
)
from dataset.tiny_world.world import DIRECT, SHORT_KINDS, Villager, sentence, words

KINDS = list(words.facts)
# How often each form of answers is demanded. A single word is the hardest: it is said at once.
MANNERS = {"one word": 5, "capitals": 4, "list": 2, "polite": 2, "pirate": 3}


@dataclass
class Topic:
    """A few exchanges on one topic. The messages end with the right answer; expected is what the
    evaluation compares a model's answer with: the whole answer, or a list of words.
    """

    category: str
    messages: list
    expected: str | list


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
    return fill(wording or rng.choice(words.asks[kind]), person, pronoun=pronoun)


def recall(rng, split):
    person, kind = rng.choice(split.people), rng.choice(KINDS)
    text = answer(person, kind)
    return Topic("recall", turns(sentence(ask(rng, person, kind)), text), text)


def two_facts(rng, split):
    person, ((one, first), (two, second)) = rng.choice(split.people), rng.choice(split.pairs)
    question = ask(rng, person, one, wording=first).rstrip("?") + " and "
    question += ask(rng, person, two, pronoun=True, wording=second)
    text = f"{answer(person, one)} {answer(person, two)}"
    return Topic("compose", turns(sentence(question), text), text)


def story_on_request(rng, split):
    subject, event = rng.choice(split.stories), rng.choice(list(words.stories))
    request = rng.choice(["Write a story", "Tell me a story", "Write a short story"])
    request += f" about {subject_story(subject, event)}."
    colour, animal, thing = subject
    return Topic(
        "compose", turns(request, story(rng, subject, event)), [f"{colour} {animal}", thing]
    )


def calculation(rng, split):
    operation, a, b = rng.choice(split.sums)
    result = f"#### {a + b if operation == '+' else a - b}"
    text = f"{steps(operation, a, b)}\n{result}"
    return Topic("arithmetic", turns(word_problem(rng, operation, a, b), text), [result])


def follow_up(rng, split):
    """The last question says "she", maybe after another topic; or it names another villager and
    leaves the rest out.
    """
    person, ((one, _), (two, wording)) = rng.choice(split.people), rng.choice(split.pairs)
    messages = turns(sentence(ask(rng, person, one)), answer(person, one))
    if rng.random() < 0.3:
        other = rng.choice([p for p in split.people if p is not person])
        question = rng.choice(["And {}?", "What about {}?"]).format(other.name)
        return Topic(
            "multi_turn", messages + turns(question, answer(other, one)), answer(other, one)
        )
    kinds = [(two, wording)]
    if two != "friend" and rng.random() < 0.4:
        last = rng.choice([kind for kind in KINDS if kind not in (one, two)])
        kinds.append((last, rng.choice(words.asks[last][:DIRECT])))
    for kind, wording in kinds:
        if rng.random() < 0.7:
            messages += talk(rng, split, 1, IMPERSONAL)
        question = f"And {ask(rng, person, kind, pronoun=True, wording=wording)}"
        text = answer(person, kind)
        messages += turns(question, text)
    return Topic("multi_turn", messages, text)


def favourite(rng, split):
    """A question about what the user said earlier, after questions about something else."""
    kind = rng.choice(["colour", "animal"])
    value = rng.choice(words.values[kind])
    told = f"My favourite {kind} is {'the ' * (kind == 'animal')}{value}."
    text = told.replace("My", "Your")
    messages = turns(told, "I will remember that.") + talk(rng, split, rng.randint(1, 3), SINGLE)
    return Topic("multi_turn", messages + turns(f"What is my favourite {kind}?", text), text)


def in_a_manner(rng, split, manner):
    """A question about a villager, and its answer in one of the forms of words.manners."""
    person = rng.choice(split.people)
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


def instruction(rng, split):
    """The user demands a form of the answer, which holds only for this answer."""
    manner = choose(rng, {manner: MANNERS[manner] for manner in ("one word", "capitals", "list")})
    question, text = in_a_manner(rng, split, manner)
    return Topic("format", turns(f"{rng.choice(words.manners[manner])} {question}", text), text)


def system_prompt(rng, split, exchanges=1):
    """The system prompt demands a form, and all answers have it."""
    manner = choose(rng, MANNERS)
    asked = [in_a_manner(rng, split, manner) for _ in range(exchanges)]
    texts = [text for pair in asked for text in pair]
    return Topic("format", turns(*texts, system=rng.choice(words.manners[manner])), texts[-1])


def unknown(rng, split):
    sex, name = rng.choice(split.strangers)
    stranger = Villager(name, sex, *[""] * 4)
    question = sentence(ask(rng, stranger, rng.choice(KINDS)))
    return Topic("unknown", turns(question, words.unknown), words.unknown)


def definition(rng, split):
    word = rng.choice(newcomer.defined(split))
    return Topic("definition", turns(f"What is a {word}?", meaning(word)), meaning(word))


def in_own_words(rng, split):
    """An exchange as a newcomer begins it, or two about one villager."""
    exchanges = [newcomer.new_exchange(rng, split)]
    if rng.random() < 0.15:
        exchanges = newcomer.follow_up(rng, split)
    texts = [text for each in exchanges for text in (each.question, each.answer)]
    return Topic("own_words", turns(*texts), exchanges[-1].expected)


# The topics of a conversation, and how often each comes.
IMPERSONAL = {calculation: 10, story_on_request: 2, definition: 2}
SINGLE = {recall: 5, two_facts: 6, instruction: 12, unknown: 3} | IMPERSONAL
TOPICS = SINGLE | {follow_up: 15, favourite: 8}
TRAINING_TOPICS = TOPICS | {in_own_words: 45}
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
LONG_CONVERSATIONS, SHORT_CONVERSATIONS = 2200, 3200
LONGEST = 14  # exchanges of a training conversation


def talk(rng, split, exchanges, topics):
    """The messages of a number of exchanges, one topic after another."""
    messages = []
    while len(messages) < 2 * exchanges:
        topic = choose(rng, topics)(rng, split)
        if len(messages) + len(topic.messages) <= 2 * exchanges:
            messages += topic.messages
    return messages


def long_chat(rng, split, depth):
    """A question of any kind after `depth` exchanges of other topics."""
    makers = [*(maker for maker in TOPICS if maker is not definition), system_prompt]
    maker = rng.choice(makers)
    if maker is system_prompt:
        topic = system_prompt(rng, split, depth + 1)
        return replace(topic, category="long_chat")
    topic = maker(rng, split)
    while len(topic.messages) > 2 * (depth + 1):
        topic = maker(rng, split)
    before = talk(rng, split, depth + 1 - len(topic.messages) // 2, TOPICS)
    return Topic("long_chat", before + topic.messages, topic.expected)


def conversations(world, rng):
    """The records of sft_tiny.jsonl."""
    split = world.training
    for _ in range(LONG_CONVERSATIONS):
        exchanges = rng.randint(1, LONGEST)
        if rng.random() < 0.27:
            messages = system_prompt(rng, split, exchanges).messages
        else:
            messages = talk(rng, split, exchanges, TRAINING_TOPICS)
        yield {"conversations": messages}
    for _ in range(SHORT_CONVERSATIONS):
        exchanges = rng.randint(1, 4)
        yield {"conversations": talk(rng, split, exchanges, {in_own_words: 1})}


def preferences(world, rng, count=400):
    """Pairs of answers about villagers whom conversations mention; the chosen one is short."""
    asked = set()
    while len(asked) < count:
        person, kind = rng.choice(world.known), rng.choice(SHORT_KINDS)
        question = sentence(ask(rng, person, kind))
        if question not in asked:
            asked.add(question)
            short, whole = sentence(getattr(person, kind)), answer(person, kind)
            yield {"prompt": question, "chosen": short, "rejected": whole}


def questions(world, rng, held_out=True, counts=EVAL_COUNTS, depths=DEPTHS):
    """The records of eval_tiny.jsonl, or others of their kind; no question occurs twice."""
    split, seen = world.evaluation if held_out else world.training, set()
    asked = [(maker, {}) for maker, count in counts.items() for _ in range(count)]
    asked += [(long_chat, {"depth": depth}) for depth in depths for _ in range(LONG_CHATS)]
    for maker, options in asked:
        prompt = None
        while str(prompt) in seen or prompt is None:
            topic = maker(rng, split, **options)
            prompt = topic.messages[:-1]
        seen.add(str(prompt))
        record = {"category": topic.category, **options, "conversations": prompt}
        yield record | {"expected": topic.expected}


def questions_in_own_words(world, rng):
    """The other records of eval_tiny.jsonl: the wordings of own_words.toml."""
    split = world.evaluation
    known = replace(split, people=world.known, owners=world.training.owners)
    for group, asked in newcomer.own_words(rng, split, known):
        record = {"category": "own_words", "group": group, "conversations": turns(asked.question)}
        yield record | {"expected": asked.expected}
