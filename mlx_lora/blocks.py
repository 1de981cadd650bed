"""The blocks of an experiment file: frozen, strict mappings. null means the default, as in mlx-lm.

A field's docstring gives its unit and range.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Portion = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
AboveOne = Annotated[float, Field(gt=1)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]  # not strict: YAML gives lists
Stops = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
QUANTIZATION = {"affine": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
INSTEAD = {"alpha": "scale", "sigma": "perturb_scale", "epochs": "iters"}  # of two, give one
MOST_SOFT = 10  # knots of a soft curve: it is made of powers, and those of more leave float32


class Block(BaseModel):
    """A mapping with known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def null_means_default(cls, raw: Any) -> Any:
        return {k: v for k, v in raw.items() if v is not None} if isinstance(raw, dict) else raw

    @model_serializer(mode="wrap")
    def one_of_two(self, plain: Any) -> dict[str, Any]:
        values = plain(self)
        unused = {old for new, old in INSTEAD.items() if values.get(new) is not None}
        return {k: v for k, v in values.items() if k not in unused}


class Named(BaseModel):
    """An entry of a table and its options: `NAME` or `{name: NAME, option: value}`."""

    model_config = Block.model_config

    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def from_name(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            return {"name": raw}
        if not isinstance(raw, dict) or set(raw) == {"name", "options"}:
            return raw
        options = {k: v for k, v in raw.items() if k != "name" and v is not None}
        return {"options": options, **({"name": raw["name"]} if "name" in raw else {})}

    @model_serializer
    def to_plain(self) -> Any:
        return {"name": self.name, **self.options} if self.options else self.name


class LoraParameters(Block):
    rank: Count = 8
    """Inner width r of A (d_in × r) and B (r × d_out)."""
    scale: Positive = 20.0
    """What multiplies the update BA. Unused when alpha is given: read `effective_scale`."""
    alpha: Positive | None = None
    """PEFT's way to say it, in place of scale: scale = alpha / rank (rslora: / sqrt(rank))."""
    rslora: bool = False
    """With alpha: divide by sqrt(rank), so that the update's size does not shrink with rank.
    `scale: rslora` says the same."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs dropped in SFT. RL trains with 0."""
    keys: Texts | None = None
    """Layers to adapt, `self_attn.q_proj` or short `q_proj`. null: every linear layer."""
    rank_pattern: dict[str, Count] | None = None
    """Another rank for some layers, by the end of their names or a regular expression for it, as
    in PEFT: {q_proj: 4, layers.0.mlp.*: 16}. `mlx-lora advise` writes one."""
    type: Literal["lora", "spline"] = "lora"
    """`spline` bends the update through a learned curve; mlx-lm cannot load it."""
    num_knots: Several = 5
    """Spline: knots of the curve."""
    k_min: float = -3.0
    """Spline: the first knot, in units of the calibrated range."""
    k_max: float = 3.0
    """Spline: the last knot. Above k_min."""
    interpolation_method: Literal["piecewise", "soft"] = "piecewise"
    """Spline: straight pieces, or a smooth mean of neighbours, which is slower."""
    extrapolation: Literal["linear", "clamp"] = "linear"
    """Spline: beyond the ends the curve goes on straight, or stops, where no gradient flows."""
    spline_reg_weight: NotNegative = 0.01
    """Spline: how strongly curves are pulled to the identity."""
    calibrate: NotNegative = 0.1
    """Spline: the grid is stretched to hold updates of this share of W x, then what comes.
    0: it is not."""
    lora_plus_ratio: Positive = 1.0
    """Learning rate of lora_b over that of lora_a (LoRA+, arXiv 2402.12354, tries 16)."""

    @model_validator(mode="before")
    @classmethod
    def rslora_is_no_number(cls, raw: Any) -> Any:
        return rslora_spelled_out(raw)

    @property
    def effective_scale(self) -> float:
        return self.scale_at(self.rank)

    def scale_at(self, rank: int) -> float:
        """The scale in force on a layer of this rank."""
        if self.alpha is None:
            return self.scale
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


def rslora_spelled_out(raw: Any) -> Any:
    """`{scale: rslora, alpha: 16}` as `{rslora: true, alpha: 16}`.

    >>> rslora_spelled_out({"scale": "rslora", "alpha": 16})
    {'rslora': True, 'alpha': 16}
    """
    if not isinstance(raw, dict) or raw.get("scale") != "rslora":
        return raw
    return {"rslora": True, **{k: v for k, v in raw.items() if k not in ("scale", "rslora")}}


class Quantize(Block):
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    """Bits per weight."""
    group_size: Literal[16, 32, 64, 128] = 64
    """Weights that share a scale: 32, 64 or 128; the mx and nv modes have one size each."""
    mode: Literal["affine", "mxfp4", "nvfp4", "mxfp8"] = "affine"
    """MLX's quantization mode. Bits and group size default to what the mode wants."""

    @model_validator(mode="before")
    @classmethod
    def mode_decides(cls, raw: Any) -> Any:
        mode = raw.get("mode") if isinstance(raw, dict) else None
        if not isinstance(mode, str) or mode not in QUANTIZATION:
            return raw
        bits, group_size = QUANTIZATION[mode]
        return {"bits": bits, "group_size": group_size, **raw}


class LrSchedule(Block):
    name: Literal["cosine_decay", "linear_schedule", "exponential_decay", "step_decay"]
    """A function of mlx.optimizers."""
    arguments: Annotated[list[float], Field(min_length=1)]
    """Its positional arguments, the first is the learning rate to start from."""
    warmup: Whole = 0
    """Steps of linear warm-up before it."""
    warmup_init: NotNegative = 0.0
    """Learning rate at the first warm-up step."""


class HfDataset(Block):
    path: str
    """Hub id of a dataset (needs the `datasets` package)."""
    config: dict[str, Any] = {}
    """More keyword arguments of datasets.load_dataset."""
    train_split: str = "train[:80%]"
    valid_split: str = "train[-10%:]"
    test_split: str | None = None
    prompt_feature: str | None = None
    completion_feature: str | None = None
    chat_feature: str | None = None
    text_feature: str | None = None


class Check(Block):
    on_fail: Literal["stop", "warn"] = "stop"
    """What a failed check before the first step does: ends the run, or is only said."""
    expect: Literal["same", "healthy", "changed"] | None = None
    """null: `same` for a fresh adapter, `healthy` for one from disk."""
    prompts: str | None = None
    """A JSONL or text file of texts to read and prompts to continue. null: the ones we ship."""
    samples: Count | None = None
    """Prompts continued, at most. null: all."""
    limits: dict[str, dict[str, float]] = {}
    """Other thresholds, by gate: {divergence: {fail: 0.2}} (docs/check.md has the defaults)."""


class RolloutOptions(Block):
    temperature: NotNegative = 1.0
    """1 samples from the model as it is, 0 is greedy."""
    top_p: Share = 1.0
    """Sample from the smallest set of tokens with this much probability. 1: all."""
    top_k: Whole = 0
    """Sample from the k likeliest tokens. 0: all."""
    max_tokens: Count = 256
    """Tokens of a completion, at most."""
    stop: Stops | None = None
    """Texts after which a completion ends. null: the task's own, []: none."""
    width: Count = 128
    """Rows decoded together, at most, in evaluations too. Waiting prompts take the places of rows
    that end."""
    reward_seconds: Positive = 60
    """Seconds that the rewards of one group may take."""


class RejectionSampling(Block):
    problems: Count = 512
    """Training problems of the task."""
    samples: Count = 8
    """Completions of each, by the model as it stands when the stage begins."""
    keep: Count = 2
    """Correct and distinct completions of a problem that are learnt from, at most."""
    temperature: Positive = 1.0
    """The other options of sampling are those of `rollout`."""


class Sft(Block):
    max_grad_norm: Positive | None = None
    """Longer gradients are shortened to this. null: not, as in mlx-lm."""
    order: Literal["mlx_lm", "shuffled"] | None = None
    """Of the rows: mlx-lm's own at this seed, or every row once an epoch, shuffled anew. null:
    mlx_lm, but shuffled with epochs and for rejection samples."""
    first_padding: bool | None = None
    """Whether the loss counts the padding token behind a row, as mlx-lm's does. null: true, but
    false with packing and for rejection samples."""
    packing: bool = False
    """Put several texts into a row of up to max_seq_length tokens. No text sees another."""


class Grpo(Block):
    group_size: Several = 8
    """Rollouts per prompt; advantages compare them."""
    loss: str = "dapo"
    """`mlx-lora ls losses`"""
    advantage: str = "group_mean"
    """`mlx-lora ls advantages`"""
    beta: NotNegative = 0.0
    """Weight of the KL to the model with the adapter switched off. 0: no second forward pass."""
    clip_low: Share | None = None
    """A token stops learning below a probability ratio of 1 - clip_low. null: the loss's own."""
    clip_high: Positive | None = None
    """... and above 1 + clip_high; of cispo the highest ratio itself. null: the loss's own."""
    epochs: Count = 1
    """Passes over the same rollouts."""
    minibatches: Count = 1
    """Optimizer steps of a pass, each on its part of the rows."""
    importance_sampling: Literal["token", "sequence", "none"] = "token"
    """Weight of learner over sampler: of each token, cut at is_cap; of each row, which does not
    train above is_cap; or none."""
    is_cap: AboveOne = 2.0
    """Highest such weight."""
    dynamic_sampling: Whole = 0
    """Rounds of fresh problems, at most, until batch_size groups have a spread of rewards."""
    overlong_buffer: Whole = 0
    """Tokens before max_tokens over which a penalty grows from 0 to -1. 0: no penalty."""
    mask_truncated: bool = False
    """Do not learn from rollouts that were cut at max_tokens."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are shortened to this."""

    @property
    def clips(self) -> dict[str, float]:
        """Options of the loss: the clip values that were given."""
        given = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return {name: value for name, value in given.items() if value is not None}


class Es(Block):
    population: Several = 32
    """Perturbed adapters per generation."""
    antithetic: bool = True
    """Use every perturbation with both signs, which cancels half of the noise."""
    init_scale: Positive = 1.0
    """Gain of A at the start. B starts at zero, so generation 0 is the base model."""
    perturb_scale: NotNegative = 0.15
    """RMS of a perturbation of the weights over the RMS of the weights, per layer."""
    sigma: NotNegative | None = None
    """In place of perturb_scale: standard deviation in the factor's units, one for all layers."""
    noise: Literal["rademacher", "uniform"] = "rademacher"
    """Distribution of the noise. Both are the same bits on every machine."""
    factor: Literal["b", "alternate"] = "b"
    """Which factor is perturbed and learns: lora_b, or both in turns, never at once."""
    turn: Count = 25
    """Generations of a turn."""
    step_scale: Positive = 1.5
    """Size of an update: step_scale · sigma / sqrt(population), falling linearly to 0."""
    anchor: Portion = 0.0
    """Share of the distance from the start that each update takes back: forgetting less."""
    fitness: str = "z_score"
    """How rewards become weights of the update: `mlx-lora ls fitness`"""
    samples_per_generation: Count = 64
    """Problems each member solves; the same ones for all members of a generation."""
    test_samples: Count = 100
    """Held-out problems of each evaluation."""


class Monitor(Block):
    every: Count = 10
    """Steps between measurements of the KL and of gradients by module, and between kept samples."""
    check_every: Whole = 50
    """Steps between looks at the model's soundness while it trains. 0: none."""
    policy: Literal["warn", "stop", "rollback"] = "warn"
    """What follows when it is not sound: an alert; also stop, or go back to the last sound step."""
    cooldown: Whole = 100
    """Steps after such an alert in which it is not repeated."""
    spectrum_every: Whole = 10
    """Steps between looks at the adapter's spectra, kept in spectra.jsonl. 0: none."""
    alerts: dict[str, dict[str, float]] = {}
    """Other thresholds of alerts on the adapter, by name: {saturated: {steps: 200}}."""
    dynamics: dict[str, float] = {}
    """How looks are summed up: {window: 5, change: 0.05, settled: 50}."""


class Eval(Block):
    n: Count = 200
    """Held-out problems."""
    every: Whole = 0
    """Steps between evaluations; the best adapter is kept in adapters/best. 0: only before and
    after training. SFT keeps the adapter of the lowest validation loss."""
    patience: Whole = 0
    """Evaluations in a row without a better one before the run stops. 0: never."""
