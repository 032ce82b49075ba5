"""What newcomers type: the wordings of training, composed from newcomer.toml, and the wordings
of the evaluation, listed in own_words.toml.
"""

import re
from functools import cache

from dataset.tiny_world.world import read_toml, sentence, words


def compose(frames, parts):
    """Return each part in each frame, in the place of {q} or {x}."""
    return [frame.replace("{q}", p).replace("{x}", p) for frame in frames for p in parts]


def read_training_wordings():
    """Return newcomer.toml, with the wordings that are composed of others."""
    content = read_toml("newcomer.toml")
    content["facts"] = {
        kind: words.asks[kind]
        + content["direct"][kind]
        + compose(content["frames"]["indirect"], content["indirect"][kind])
        + compose(content["frames"]["noun"], content["noun"][kind])
        for kind in words.facts
    }
    content["unknown"] = content["facts"] | content["about"]
    content["small_sums"] = content["sums"]
    things = f"({'|'.join(content['outside_things'])})"
    content["outside"]["things"] = compose(content["outside_frames"], [things])
    return content


def normalise(wording):
    """Return a wording in lower case, without punctuation, any name or number for its fields."""
    wording = wording.replace("{ns}", "{n}s")
    wording = re.sub(r"\{[no]\}", " NAME ", re.sub(r"\{[abcd]\}", " NUMBER ", wording))
    return " ".join(re.sub(r"[^\w\s]", " ", wording.lower()).split())


training, held_out = read_training_wordings(), read_toml("own_words.toml")
held_out["unknown_name"] = held_out["facts"]
HELD_OUT_WORDINGS = {
    normalise(wording)
    for group in held_out.values()
    if isinstance(group, dict)
    for wordings in group.values()
    for wording in wordings
}


@cache
def options(group, only):
    """Return the (key, wording) of a group in training, of one key unless it is None, and how often
    each is chosen: as often as it has alternatives, and the first of a key, the usual one, more.
    """
    pairs, weights = [], []
    for key, wordings in training[group].items():
        if only not in (None, key):
            continue
        for wording in wordings:
            pairs.append((key, wording))
            usual = 3 if wording == wordings[0] else 1
            weights.append(usual * min(1 + wording.count("|"), 25))
    return pairs, weights


def draw_wording(rng, group, only=None):
    """Return (key, wording) of a group in training, or only of one key, which own_words.toml
    doesn't have: of alternatives, (this|that), one is chosen, words are shortened, and others put
    around them.
    """
    pairs, weights = options(group, only)
    while True:
        key, wording = rng.choices(pairs, weights)[0]
        wording = re.sub(r"\(([^()]*)\)", lambda match: rng.choice(match[1].split("|")), wording)
        for whole, short in training["typed"].items():
            if rng.random() < 0.1:
                wording = re.sub(rf"(?i)\b{whole}\b", rng.choice(short), wording)
        if rng.random() < 0.12:
            wording = (
                f"{rng.choice(training['around']['before'])} {wording[0].lower()}{wording[1:]}"
            )
        wording, end = re.fullmatch(r"(.*?)([?.!]*)", wording).groups()
        if rng.random() < 0.1:
            wording += f" {rng.choice(training['around']['after'])}"
        if normalise(wording) not in HELD_OUT_WORDINGS:
            return key, wording + (end or rng.choice(["", "", ".", "?", "!"]))


def as_typed(rng, text):
    """Return a question as people type it: half of them as they are, others in lower case, with
    names or without, or with a typing error.
    """
    text = sentence(text)
    if rng.random() < 0.4:
        return text
    if rng.random() < 0.6:
        text = text.rstrip("?.!")
    if rng.random() < 0.5:
        text = text.lower()
    elif rng.random() < 0.7:
        text = text[0].lower() + text[1:]
    return with_typing_error(rng, text) if rng.random() < 0.12 else text


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
