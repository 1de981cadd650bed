"""The nouns. Frozen records that functions hand to each other; nothing here computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One problem of a task."""

    prompt: str
    columns: Mapping[str, Any]  # what the reward needs: numbers, target, answer ...
    gold: str  # a completion that earns the full reward


@dataclass(frozen=True)
class Reward:
    """What a completion earned, and why."""

    value: float
    reason: str  # a short code, counted in the logs: "correct", "no_answer" ...


@dataclass(frozen=True)
class Task:
    """A family of problems with a total, bounded, pure reward."""

    load: Callable[[str, int, int], Sequence[Sample]]  # (split, count, seed), split train|test
    reward: Callable[[Sample, str], Reward]
    first: Sample  # load("train", 1, 0)[0], spelled out so that a reader sees one
    wrong: str  # a completion that earns nothing
    low: float = 0.0  # the reward's range
    high: float = 1.0
    stop: str | None = None  # a rollout may end after this text


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
class Batch:
    """What a loss sees. Shapes: B rows, T tokens (completion tokens only, right-padded)."""

    logps_BT: Any  # log-probabilities under the policy that is being trained
    old_logps_BT: Any  # under the policy before this update, by the same forward as logps_BT
    sampler_logps_BT: Any  # under the distribution that drew the tokens, from the cached decode
    ref_logps_BT: Any  # under the reference policy; None when no KL is wanted
    advantages_B: Any
    mask_BT: Any  # 1.0 on tokens that count, EOS included


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
