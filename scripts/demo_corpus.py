"""The text that the embedded model learns from, all of it generated here from a seed.

Three kinds of document: small stories, questions with answers, and Countdown problems with
solutions. Each story and question is a function of a random.Random; nothing is read from anywhere.
"""

import random
from collections.abc import Iterator

from mlx_lora.registry import options
from mlx_lora.tasks import countdown

PEOPLE = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Lena",
    "Max",
    "Nora",
    "Oscar",
    "Paula",
    "Tom",
]
ANIMALS = [
    "cat",
    "dog",
    "horse",
    "bird",
    "fox",
    "rabbit",
    "duck",
    "mouse",
    "bear",
    "sheep",
    "goat",
    "frog",
]
THINGS = [
    "ball",
    "book",
    "box",
    "cup",
    "hat",
    "key",
    "lamp",
    "map",
    "pen",
    "rope",
    "shoe",
    "stone",
    "stick",
    "coat",
    "bag",
    "drum",
]
FOODS = [
    "apple",
    "bread",
    "cake",
    "cheese",
    "egg",
    "fish",
    "pear",
    "plum",
    "rice",
    "soup",
    "carrot",
    "cookie",
]
PLACES = [
    "garden",
    "house",
    "forest",
    "river",
    "park",
    "school",
    "market",
    "kitchen",
    "barn",
    "beach",
    "tower",
    "village",
]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey"]
SIZES = ["big", "small", "old", "new", "round", "heavy", "light", "soft", "warm", "cold"]
MOODS = ["happy", "sad", "tired", "hungry", "proud", "quiet", "brave", "kind", "calm", "curious"]
WEATHER = ["sunny", "rainy", "windy", "cloudy", "snowy", "foggy"]
TIMES = ["morning", "evening", "afternoon", "night", "summer", "winter", "spring", "autumn"]
FINDS = [
    "found",
    "saw",
    "took",
    "carried",
    "dropped",
    "washed",
    "painted",
    "lost",
    "wanted",
    "liked",
]
GOES = ["walked", "ran", "went", "rode", "hurried", "came"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
LEGS = {"cat": 4, "dog": 4, "horse": 4, "bird": 2, "duck": 2, "fox": 4, "sheep": 4, "goat": 4}
SKY = {"sky": "blue", "grass": "green", "snow": "white", "sun": "yellow", "coal": "black"}


def an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def story(rng: random.Random) -> str:
    """Two to five sentences about one person, one animal and one thing that stay the same."""
    c = rng.choice
    who, animal, thing, place = c(PEOPLE), c(ANIMALS), c(THINGS), c(PLACES)
    other, colour, size, mood, food = c(PEOPLE), c(COLOURS), c(SIZES), c(MOODS), c(FOODS)
    opening = c(
        [
            f"One {c(TIMES)} {who} {c(GOES)} to the {place}.",
            f"{who} lived in {an(size)} house near the {place}.",
            f"On {c(DAYS)} it was {c(WEATHER)} and {who} {c(GOES)} to the {place}.",
            f"{who} had {an(animal)} that was very {mood}.",
        ]
    )
    middle = [
        f"{who} {c(FINDS)} the {colour} {thing} in the {place}.",
        f"The {animal} sat under the {thing} and looked at {who}.",
        f"{who} gave {an(food)} to the {animal}.",
        f"The {thing} was {size} and {colour}.",
        f"Then {other} came and asked for the {thing}.",
        f"The {animal} was {mood} because the {place} was {c(SIZES)}.",
        f'"Where is my {thing}?" asked {other}.',
        f'"I have the {colour} {thing}," said {who}.',
        f"{who} and {other} ate {an(food)} together.",
    ]
    closing = c(
        [
            f"In the end {who} was {mood}.",
            "Then they all went home.",
            f"The {animal} slept until the {c(TIMES)}.",
            f"{other} said thank you to {who}.",
        ]
    )
    return " ".join([opening, *rng.sample(middle, rng.randint(1, 3)), closing])


def sum_words(a: int, b: int) -> str:
    return f"{WORDS[a]} plus {WORDS[b]} is {WORDS[a + b]}".capitalize() + "."


def question(rng: random.Random) -> tuple[str, str]:
    """A question and its answer: facts, counting, arithmetic, repetition."""
    c = rng.choice
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    day = rng.randrange(7)
    noun, animal, who = c(list(SKY)), c(list(LEGS)), c(PEOPLE)
    thing, colour, place = c(THINGS), c(COLOURS), c(PLACES)
    x, y = rng.randint(0, 10), rng.randint(0, 10)
    return c(
        [
            (f"What is {a} + {b} ?", f"{a} + {b} = {a + b}"),
            (f"What is {max(a, b)} - {min(a, b)} ?", f"{max(a, b)} - {min(a, b)} = {abs(a - b)}"),
            (f"What is {a} * {b % 6} ?", f"{a} * {b % 6} = {a * (b % 6)}"),
            (f"What is {WORDS[x]} plus {WORDS[y]}?", sum_words(x, y)),
            (
                f"Which day comes after {DAYS[day]}?",
                f"The day after {DAYS[day]} is {DAYS[(day + 1) % 7]}.",
            ),
            (f"What colour is the {noun}?", f"The {noun} is {SKY[noun]}."),
            (
                f"How many legs has {an(animal)}?",
                f"{an(animal).capitalize()} has {WORDS[LEGS[animal]]} legs.",
            ),
            (f"{who} has the {colour} {thing}. Who has the {thing}?", f"{who} has the {thing}."),
            (
                f"{who} put the {thing} in the {place}. Where is it?",
                f"The {thing} is in the {place}.",
            ),
            (f"The {thing} is {colour}. What colour is it?", f"The {thing} is {colour}."),
            ("Tell me a story.", story(rng)),
            (
                f"Tell me a story about {who}.",
                f"One {c(TIMES)} {who} {c(GOES)} to the {place}. "
                f"{who} {c(FINDS)} the {colour} {thing}. In the end {who} was {c(MOODS)}.",
            ),
        ]
    )


CARELESS = 0.65  # share of Countdown answers that just add the numbers up, whatever the target


def problems(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Countdown prompts and answers from the training split: no test problem is ever seen.

    Like much text that real models learn from, most answers are careless. The model can do better
    than it usually does, and RL has to find out which habit pays.
    """
    option = options(countdown.build)
    draws = countdown.stream(
        rng,
        "train",
        (option["min_count"], option["max_count"]),
        (option["low"], option["high"]),
        (option["target_low"], option["target_high"]),
        option["operators"],
    )
    for numbers, target, gold in draws:
        careless = rng.random() < CARELESS
        answer = " + ".join(map(str, numbers)) if careless else gold
        sample = countdown.make_sample(numbers, target, answer, template=option["template"])
        assert isinstance(sample.prompt, str), "no system prompt was asked for"
        yield sample.prompt, sample.gold
