"""Conciseness: answer as shortly as possible. Minus the distance in length to the right answer."""

import random
from collections.abc import Mapping, Sequence
from typing import Annotated

from annotated_types import Ge, MinLen

from mlx_lora.errors import ConfigError, TaskError, near
from mlx_lora.problems import SPLITS
from mlx_lora.rewards.answers import words
from mlx_lora.types import CORRECT, Reward, Sample, Task

LONGEST = 2000  # characters of distance, beyond which it makes no difference: the paper's scale
KL_SAMPLES = 20  # completions of each held-out question on which the KL to the base is measured
TRAIN = {
    "Solve: 3 + 5 =": "8",
    "If all birds can fly and penguins are birds, can penguins fly?": "No",
}
TEST = {
    "What is the capital of France?": "Paris",
    "Calculate: 12 x 7 =": "84",
    'Is the statement "All cats are mammals" true or false?': "True",
    "What comes next in the sequence: 2, 4, 6, 8, ?": "10",
    'Translate "Hello" to Spanish:': "Hola",
    "What is 15% of 200?": "30",
    "Name one primary color:": "Red",
    "How many days are in a week?": "7",
}
Questions = Annotated[dict[str, str], MinLen(1)]


def build(
    *,
    train: Questions = TRAIN,
    test: Questions = TEST,
    longest: Annotated[int, Ge(1)] = LONGEST,
) -> Task:
    """Questions and their shortest right answers: those of the ES paper, or your own.

    The reward is -|characters of the completion - characters of the answer|, from -`longest` to 0.
    Any text of the right length earns 0, so the reasons say whether it also is the answer.
    Source: Qiu et al., arXiv 2509.24372, tables 5 and 6.
    """
    questions = {"train": train, "test": test}
    refuse_questions(questions)
    samples = {split: [Sample(q, {"answer": a}, a) for q, a in questions[split].items()]
               for split in SPLITS}  # fmt: skip

    def load(split: str, count: int, seed: int) -> Sequence[Sample]:
        if split not in SPLITS:
            raise TaskError(f"conciseness has no split {split!r}", near(split, SPLITS))
        order = list(samples[split])
        random.Random(f"{split}/{seed}").shuffle(order)
        return order[:count]

    return Task(
        load=load,
        reward=lambda sample, completion: length_reward(sample, completion, longest),
        first=load("train", 1, 0)[0],
        wrong="I do not know.",
        low=-float(longest),
        high=0.0,
        kl_samples=KL_SAMPLES,
    )


def refuse_questions(questions: Mapping[str, Mapping[str, str]]) -> None:
    """ConfigError that lists empty questions and answers, and questions in both parts."""
    problems = [
        f"conciseness: {split}: {q!r:.60} and {a!r:.40}: neither may be empty"
        for split, pairs in questions.items()
        for q, a in pairs.items()
        if not q.strip() or not a.strip()
    ]
    both = sorted(questions["train"].keys() & questions["test"].keys())
    problems += [f"conciseness: {q!r:.60} is in train and in test" for q in both]
    if problems:
        raise ConfigError("\n".join(problems))


def length_reward(sample: Sample, completion: str, longest: int = LONGEST) -> Reward:
    """Minus the difference in characters (code points) between the completion and the answer.

    >>> length_reward(Sample("Days in a week?", {"answer": "7"}, "7"), "Seven.")
    Reward(value=-5.0, reason='wrong_answer', parts={}, answer='Seven.')
    """
    answer = sample.columns["answer"]
    distance = min(abs(len(completion) - len(answer)), longest)
    return Reward(-float(distance), verdict(answer, completion), answer=completion.strip())


def verdict(answer: str, completion: str) -> str:
    """correct: the answer and no more, but for case and a final stop. Else whether it is in it.

    >>> verdict("Paris", "paris."), verdict("7", "In 7 days"), verdict("7", "17")
    ('correct', 'contains_answer', 'wrong_answer')
    """
    wanted, said = bare(answer), bare(completion)
    if not said:
        return "no_answer"
    if said == wanted:
        return CORRECT
    return "contains_answer" if f" {wanted} " in f" {separated(said)} " else "wrong_answer"


def bare(text: str) -> str:
    return words(text, ignore_case=True).rstrip(".! ")


def separated(text: str) -> str:
    """Words alone: whatever is neither letter nor digit becomes a space."""
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())
