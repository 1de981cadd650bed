"""The nouns. Frozen records that functions hand to each other; nothing here computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = tuple[str, str]  # role, content
Prompt = str | tuple[Message, ...]  # one user turn, or a conversation that ends with one
CORRECT = "correct"  # the reason of a completion that solved its problem
SCORED = "scored"  # the reason where nothing is right or wrong, only worth more or less


@dataclass(frozen=True)
class Sample:
    """One problem of a task."""

    prompt: Prompt
    columns: Mapping[str, Any]  # what the reward needs: numbers, target, answer ...
    gold: str  # a completion that earns the full reward
    place: str = field(default="", compare=False)  # "rows.jsonl:12", for messages


@dataclass(frozen=True)
class Reward:
    """What a completion earned, and why."""

    value: float
    reason: str  # a short code, counted in the logs: "correct", "no_answer" ...
    parts: Mapping[str, float] = field(default_factory=dict)  # of several rewards, each unweighted
    answer: str | None = field(default=None, compare=False)  # what was read out of the completion


@dataclass(frozen=True)
class Task:
    """A family of problems with a total, bounded, pure reward."""

    load: Callable[[str, int, int], Sequence[Sample]]  # (split, count, seed), split train|test
    reward: Callable[[Sample, str], Reward]
    first: Sample  # load("train", 1, 0)[0], spelled out so that a reader sees one
    wrong: str  # a completion that earns nothing
    low: float = 0.0  # the reward's range; -inf and inf where a user's own is not known
    high: float = 1.0
    stop: str | None = None  # a rollout may end after this text
    name: str = ""
    group: Callable[[Sample, Sequence[str]], Sequence[Reward]] | None = None  # reward, many at once
    threads: int = 4  # calls of the reward at a time, at most
    notice: str = ""  # a sentence to say before a run
    kl_samples: int = 0  # completions of each held-out problem to measure the KL to the base on


@dataclass(frozen=True)
class Rollout:
    """One sampled completion. Token ids are as drawn, never re-encoded from text."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # ends with EOS when `finished`
    logps: tuple[float, ...]  # nats, of the distribution each id was drawn from
    text: str  # without EOS
    finished: bool  # False: cut at max_tokens


@dataclass(frozen=True)
class Group:
    """A prompt and its G rollouts with their rewards."""

    sample: Sample
    rollouts: Sequence[Rollout]
    rewards: Sequence[Reward]


@dataclass(frozen=True)
class Whole:
    """How much one optimizer step learns from, on all machines: what its means divide by."""

    rows: int
    tokens: int  # completion tokens that count
    max_tokens: int  # of a completion, at most


@dataclass(frozen=True)
class Batch:
    """What a loss sees. Shapes: B rows, T tokens (completion tokens only, right-padded).

    It may be a part of an update: `whole` says of which, so that the parts add up.
    """

    logps_BT: Any  # log-probabilities under the policy that is being trained
    old_logps_BT: Any  # under the policy the rollouts are of, by the same forward as logps_BT
    weights_BT: Any  # old policy over sampler, truncated: corrects for the cached decode
    advantages_B: Any
    mask_BT: Any  # 1.0 on tokens that count, EOS included
    whole: Whole


@dataclass(frozen=True)
class Objective:
    """What a loss says of a Batch; the loss is -(value_BT · share_BT).sum()."""

    value_BT: Any  # what a token is worth: to be raised
    share_BT: Any  # of the token in the whole update; 0 on padding
    metrics: Mapping[str, Any]  # shares of the whole: those of its parts add up


@dataclass(frozen=True)
class Factors:
    """LoRA factors in mlx-lm's layout: scale · (lora_a @ lora_b).T is added to an O×I weight."""

    lora_a_IR: Any
    lora_b_RO: Any


@dataclass(frozen=True)
class Finding:
    """An alert or a gate that spoke. `severity` decides exit codes, nothing else does."""

    name: str
    module: str  # "" when it concerns the whole adapter
    message: str  # a sentence with the numbers in it
    action: str  # what to do
    severity: str = "warn"  # "warn" | "fail"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """A place where a LoRA layer sits, as an init sees it."""

    name: str  # "model.layers.3.self_attn.q_proj"
    in_dims: int
    out_dims: int
    rank: int
    scale: float
    linear: Any  # the frozen layer underneath


@dataclass(frozen=True)
class Start:
    """What an init made: factors by site, layers to put underneath, and what it measured."""

    factors: Mapping[str, Factors]
    bases: Mapping[str, Any] = field(default_factory=dict)  # frozen layers that replace the base's
    measured: Mapping[str, float] = field(default_factory=dict)  # kept in adapter_config.json
