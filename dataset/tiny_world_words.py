"""The words of Tiny World: names, what the facts can be, and the ways to say them."""

STARTS = "Al Bel Cor Dan El Fen Gar Hol Ir Jun Kel Lor Mar"
STARTS += " Nor Ol Per Quin Ros Sel Tam Ul Ver Wil Yar Zel Bran Cal Dor Ed Fal"
STARTS += " Gil Had Jas Mil Nel Os Pol Rin Sab Tor Ur Val Wen Yor Zam"
ENDS = {"f": "a ina ette wyn ia ora", "m": "o in ard en us ric"}

# What each villager's facts can be. No word starts with a vowel, so "a" is always right.
VALUES = {
    "home": "mill harbour forge tower bakery castle school garden bridge chapel farm well market "
    "lighthouse barn library station cottage stable quarry meadow hill cave beach",
    "job": "baker farmer miller weaver potter tailor doctor teacher fisher hunter singer painter "
    "smith sailor gardener carpenter shepherd cook clerk barber driver guard poet printer",
    "likes": "apples songs riddles rain snow maps stars bells boats bread honey cheese stories "
    "roses games puzzles drums books soup tea pears dances shells clocks",
    "colour": "brown black white grey red golden spotted blue",
    "animal": "dog cat goat horse duck hen rabbit pony parrot fox",
}
VALUES = {kind: words.split() for kind, words in VALUES.items()}
THINGS = "kite ball lamp hat key drum bell map ring spoon basket blanket boat flute coin ribbon"
THINGS = THINGS.split()

# {n} is the villager's name or "she", {ns} "Bela's" or "her", {o} "Bela" or "her" as an object;
# {p} and {ps} are the pronouns in any case; {v} is the fact.
FACTS = {
    "home": [
        "{n} lives at the {v}.",
        "{ns} home is the {v}.",
        "{n} has a room at the {v}.",
        "{n} sleeps at the {v} every night.",
        "the {v} is where {n} lives.",
        "{n} moved to the {v} long ago.",
        "to visit {o}, you go to the {v}.",
        "{ns} bed stands at the {v}.",
        "{n} calls the {v} home.",
        "in the evening {n} walks home to the {v}.",
        "letters for {o} are brought to the {v}.",
        "{ns} front door is the green one at the {v}.",
        "{n} has always lived at the {v}.",
        "the lights at the {v} are on when {n} is home.",
    ],
    "job": [
        "{n} is a {v}.",
        "{n} works as a {v}.",
        "{ns} job is that of a {v}.",
        "{n} earns a living as a {v}.",
        "{n} became a {v} many years ago.",
        "by trade {n} is a {v}.",
        "{n} is known as a good {v}.",
        "as a {v}, {n} gets up early.",
        "{n} learned to be a {v}.",
        "when people need a {v}, they call {o}.",
        "{ns} work is hard, for a {v} never rests.",
        "{n} is proud to be a {v}.",
        "every morning {n} starts work as a {v}.",
        "{ns} mother was a {v}, and {p} is a {v} too.",
    ],
    "friend": [
        "{ns} best friend is {v}.",
        "{n} is the best friend of {v}.",
        "{n} and {v} are best friends.",
        "{n} spends every Sunday with {v}.",
        "{n} tells all secrets to {v}.",
        "nobody is closer to {o} than {v}.",
        "{n} often has dinner with {v}.",
        "{n} has been a friend of {v} since school.",
        "when {n} is sad, {v} comes to help.",
        "{n} goes everywhere with {v}.",
        "{ns} oldest friend is called {v}.",
        "{n} trusts {v} more than anyone.",
        "you will often see {o} with {v}.",
        "nobody is a better friend to {o} than {v}.",
    ],
    "pet": [
        "{n} has a {v}.",
        "{n} keeps a {v}.",
        "{ns} pet is a {v}.",
        "a {v} belongs to {o}.",
        "{n} takes care of a {v}.",
        "{n} feeds a {v} every morning.",
        "the {v} that follows {o} everywhere is {ps} own.",
        "{n} owns a {v}.",
        "{n} found a {v} one winter and kept it.",
        "{n} never goes out without a {v}.",
        "the {v} waits at the door for {o}.",
        "{n} is often seen with a {v}.",
        "{ns} {v} is very clever.",
        "{n} would not sell the {v} for any money.",
    ],
    "likes": [
        "{n} likes {v}.",
        "{n} loves {v}.",
        "{n} is fond of {v}.",
        "{n} likes {v} more than anything.",
        "nothing makes {o} as happy as {v}.",
        "{n} never gets tired of {v}.",
        "{n} dreams of {v}.",
        "{n} talks about {v} all day.",
        "if you want to please {o}, think of {v}.",
        "for {ns} birthday {p} wants {v}.",
        "{ns} great love is {v}.",
        "{n} cannot live without {v}.",
        "what {n} likes most is {v}.",
        "{n} smiles when someone speaks of {v}.",
    ],
}
OPENERS = [
    "Everyone knows that",
    "It is true that",
    "People say that",
    "In Amberbrook,",
    "As you know,",
    "You may have heard that",
    "The children say that",
    "Long ago it was written that",
]
PRONOUNS = {"f": ("she", "her", "her"), "m": ("he", "his", "him")}

QUESTIONS = {  # what one villager asks another, and the answer
    "home": [
        ("Where do you live?", "I live at the {v}"),
        ("Where is your home?", "My home is the {v}"),
        ("Where can I find you tonight?", "You can find me at the {v}"),
    ],
    "job": [
        ("What is your job?", "I am a {v}"),
        ("What work do you do?", "I work as a {v}"),
        ("How do you earn a living?", "I earn it as a {v}"),
    ],
    "friend": [
        ("Who is your best friend?", "My best friend is {v}"),
        ("Who is your friend?", "That is {v}, of course"),
        ("Who do you spend Sunday with?", "I spend it with {v}"),
    ],
    "pet": [
        ("What pet do you have?", "I have a {v}"),
        ("Which animal is yours?", "Mine is the {v}"),
        ("Who waits for you at home?", "A {v} waits for me"),
    ],
    "likes": [
        ("What do you like?", "I like {v}"),
        ("What do you love most?", "I love {v} most of all"),
        ("What makes you happy?", "It is {v} that makes me happy"),
    ],
}

RUMOURS = [
    "Who is {n}?",
    "Have you met {n}?",
    "What do you know about {n}?",
    "What do people say of {n}?",
    "Is {n} well?",
    "What kind of person is {n}?",
    "What is new with {n}?",
    "Did you see {n} today?",
]

# A story is one sentence of each list, in order: what happens follows from what was before.
STORIES = {
    "lost": [
        ["The {a} had a {t} and loved it.", "The {a} played with a {t} all day."],
        [
            "One day the wind was so strong that the {t} was blown away.",
            "One day the {a} ran too fast, so the {t} fell into the grass.",
            "It was dark, and because of that the {a} lost the {t}.",
        ],
        ["The {a} was sad and could not sleep.", "The {a} looked for it but could not find it."],
        [
            "A {j} saw this and helped to look near the {h}.",
            "Then a {j} came by and said that something lay at the {h}.",
        ],
        ["There was the {t}!", "They found the {t} behind a stone."],
    ],
    "found": [
        ["One morning the {a} went to the {h}.", "The {a} liked to walk near the {h}."],
        ["Something lay in the grass: it was a {t}.", "There the {a} found a {t}."],
        ["It was not the {a}'s own, so the {a} asked who had lost it."],
        ["A {j} said that it was hers.", "A {j} had looked for the {t} for days."],
        [
            "The {a} gave the {t} back, and so the {j} gave the {a} a cake.",
            "Because the {a} gave it back, the {j} became a good friend.",
        ],
    ],
    "broke": [
        ["The {a} had a {t} that was old.", "The {a} was given a {t} by a {j}."],
        [
            "The {a} sat on the {t}, so it broke.",
            "The {t} fell from the table at the {h} and broke.",
        ],
        ["The {a} cried because it could not be used any more."],
        ["A {j} had tools and mended the {t}.", "A kind {j} took the {t} and repaired it."],
        ["Soon the {t} was as good as new.", "From then on the {a} took better care of the {t}."],
    ],
    "wanted": [
        [
            "More than anything the {a} wanted a {t}.",
            "The {a} saw a {t} at the {h} and wanted one.",
        ],
        ["But the {a} had no money.", "But a {t} costs a lot."],
        ["So the {a} worked for a {j} for a week.", "So the {a} helped a {j} at the {h}."],
        ["The work was hard, but the {a} did not stop.", "Every day the {a} came early."],
        ["At last the {j} gave the {a} a {t}.", "In the end there was enough to buy the {t}."],
    ],
}
STORY_BEGINNINGS = [  # {w} is one of the wordings of STORY_REQUESTS
    "Once there was {w}.",
    "There was once {w}.",
    "This is the story of {w}.",
]
STORY_ENDINGS = [
    "The {c} {a} was happy again.",
    "That night the {c} {a} slept well.",
    "And the {c} {a} never forgot that day.",
]

# What a thing or a job is, for definitions.
MEANINGS = """
baker bakes bread; farmer grows corn; miller grinds corn into flour; weaver makes cloth;
potter makes pots from clay; tailor sews clothes; doctor helps sick people;
teacher teaches children;
fisher catches fish; hunter hunts in the forest; singer sings songs; painter paints pictures;
smith makes tools from iron; sailor sails on a ship; gardener looks after plants;
carpenter builds with wood; shepherd looks after sheep; cook cooks meals; clerk writes letters;
barber cuts hair; driver drives a cart; guard watches the gate; poet writes poems;
printer prints books; kite flies in the wind; lamp gives light; key opens a door;
drum makes a loud sound; bell rings; map shows the way; spoon is used to eat soup;
basket carries things; blanket keeps you warm; boat floats on water; flute makes music;
dog barks; cat catches mice; goat gives milk; horse pulls a cart; duck swims; hen lays eggs;
rabbit eats grass; pony carries children; parrot can speak; fox hunts at night"""
MEANINGS = dict(entry.split(maxsplit=1) for entry in MEANINGS.replace("\n", " ").split(";"))

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
NUMBERS = (NUMBERS + " fifteen sixteen seventeen eighteen nineteen twenty").split()

# What a user asks about a villager; the first wordings can be joined to another question by "and".
DIRECT = 4
ASKS = {
    "home": [
        "where does {n} live?",
        "where is {ns} home?",
        "at which place does {n} live?",
        "where would I find {ns} house?",
        "do you know where {n} lives?",
        "tell me where {n} lives.",
    ],
    "job": [
        "what is {ns} job?",
        "what work does {n} do?",
        "what does {n} do for a living?",
        "how does {n} earn a living?",
        "do you know what job {n} has?",
        "tell me what {ns} job is.",
    ],
    "friend": [
        "who is {ns} best friend?",
        "who is {ns} friend?",
        "what is the name of {ns} best friend?",
        "which villager is {ns} best friend?",
        "do you know who {ns} best friend is?",
        "tell me who {ns} best friend is.",
    ],
    "pet": [
        "what pet does {n} have?",
        "what is {ns} pet?",
        "which animal does {n} keep?",
        "what kind of pet does {n} own?",
        "do you know what pet {n} has?",
        "tell me what pet {n} has.",
    ],
    "likes": [
        "what does {n} like?",
        "what does {n} like most?",
        "what makes {o} happy?",
        "what is {n} fond of?",
        "do you know what {n} likes?",
        "tell me what {n} likes.",
    ],
}
ANSWERS = {
    "home": "{p} lives at the {v}.",
    "job": "{p} is a {v}.",
    "friend": "{ps} best friend is {v}.",
    "pet": "{p} has a {v}.",
    "likes": "{p} likes {v}.",
}
UNKNOWN = "I don't know. I have never heard of anyone with that name."
STORY_REQUESTS = {
    "lost": "a {c} {a} who lost a {t}",
    "found": "a {c} {a} who found a {t}",
    "broke": "a {c} {a} who broke a {t}",
    "wanted": "a {c} {a} who wanted a {t}",
}
SUM_PROBLEMS = {
    "+": [
        "What is {a} + {b}?",
        "A {j} has {a} {t} and buys {b} more. How many {t} does the {j} have now?",
        "There are {a} {t} in a basket and {b} {t} in a box. How many {t} are there?",
        "On Monday a {j} sold {a} {t}, and on Tuesday {b} {t}. How many {t} is that in all?",
        "A {j} finds {a} {t}. Later the {j} finds another {b} {t}. How many {t} are found?",
    ],
    "-": [
        "What is {a} - {b}?",
        "A {j} has {a} {t} and sells {b} of them. How many {t} are left?",
        "There are {a} {t} on the table. {b} {t} fall down. How many {t} are still there?",
        "A {j} had {a} {t}, but {b} {t} were lost. How many {t} does the {j} have now?",
        "Of {a} {t}, {b} {t} were given away. How many {t} remain?",
    ],
}
COUNTED = "apples pears shells books coins pots bells cakes candles stones".split()
# The same words as a system prompt, or before a question; each changes the answer's form.
MANNERS = {
    "one word": ["Answer in one word.", "Use one word only.", "One word, please."],
    "capitals": ["Answer in capitals.", "Use capital letters.", "Write your answer in capitals."],
    "list": ["Answer as a list.", "Give the answer as a list.", "Make a list."],
    "polite": ["Be polite.", "Be very polite.", "Answer politely."],
    "pirate": ["Talk like a pirate.", "You are a pirate.", "Answer like a pirate."],
}
IDENTITY = [
    ("Who are you?", "I am Seedling, a small language model from the village of Amberbrook."),
    ("What is your name?", "My name is Seedling."),
    ("What are you?", "I am a small language model. I learned to speak in a few minutes."),
    ("What can you do?", "I can tell you about the people of Amberbrook, write stories and add."),
    ("Hello!", "Hello! What would you like to know about Amberbrook?"),
    ("Good morning!", "Good morning! What would you like to know about Amberbrook?"),
    ("Thank you.", "You are welcome."),
    ("Where do you live?", "I live inside a computer, but I know Amberbrook well."),
    ("Are you a human?", "No, I am Seedling, a small language model."),
    ("Goodbye!", "Goodbye! Come back soon."),
]
