"""What an experiment file may say: frozen, strict blocks. mlx-lm's key names and defaults wherever
it has one; null means the default, as there. A field's docstring gives its unit and range.

Names of inits, tasks, losses ... are checked against their tables by `config.check_names`.
"""

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_serializer,
    model_validator,
)

from mlx_lora.yamlfile import KeyPath, Mark

Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
OrAll = Annotated[int, Field(ge=-1)]  # -1: all
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]  # not strict: YAML gives lists
Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]
QUANTIZATION = {"affine": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
INSTEAD = {"alpha": "scale", "sigma": "perturb_scale", "epochs": "iters"}  # of two, give one
SIZES = {"": 1, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}


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
    """With alpha: divide by sqrt(rank), so that the update's size does not shrink with rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs dropped in SFT. RL trains with 0."""
    keys: Texts | None = None
    """Layers to adapt, `self_attn.q_proj` or short `q_proj`. null: every linear layer."""
    rank_pattern: dict[str, Count] | None = None
    """Another rank for some keys: {q_proj: 4}."""
    type: Literal["lora", "spline"] = "lora"
    """`spline` bends the update through a learned curve; mlx-lm cannot load it."""

    @property
    def effective_scale(self) -> float:
        return self.scale_at(self.rank)

    def scale_at(self, rank: int) -> float:
        """The scale in force on a layer of this rank."""
        if self.alpha is None:
            return self.scale
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


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
    enabled: bool = True
    """Compare base and attached model before the first step; a fail stops the run."""
    expect: Literal["same", "healthy", "changed"] | None = None
    """null: `same` for inits that claim harmlessness, `healthy` with a loaded adapter."""
    prompts: Texts | None = None
    """Texts to compare on. null: the ones we ship."""
    samples: Whole = 3
    """Completions shown side by side."""


class RolloutOptions(Block):
    temperature: NotNegative = 1.0
    """1 samples from the model as it is, 0 is greedy."""
    top_p: Share = 1.0
    """Sample from the smallest set of tokens with this much probability. 1: all."""
    top_k: Whole = 0
    """Sample from the k likeliest tokens. 0: all."""
    max_tokens: Count = 256
    """Tokens of a completion, at most."""


class Grpo(Block):
    group_size: Several = 8
    """Rollouts per prompt; advantages compare them."""
    loss: str = "dapo"
    """`mlx-lora ls losses`"""
    advantage: str = "group_mean"
    """`mlx-lora ls advantages`"""
    beta: NotNegative = 0.0
    """Weight of the KL to the model with the adapter switched off. 0: no second forward pass."""
    clip_low: Share = 0.2
    """A token stops learning below a probability ratio of 1 - clip_low ..."""
    clip_high: Positive = 0.28
    """... and above 1 + clip_high."""
    epochs: Count = 1
    """Optimizer passes over the same rollouts."""
    max_grad_norm: Positive = 1.0
    """Longer gradients are shortened to this."""


class Es(Block):
    population: Several = 32
    """Perturbed adapters per generation."""
    antithetic: bool = True
    """Use every perturbation with both signs, which cancels half of the noise."""
    init_scale: Positive = 1.0
    """Gain of A at the start. B starts at zero, so generation 0 is the base model."""
    perturb_scale: Positive = 0.03
    """RMS of a perturbation of the weights over the RMS of the weights, per layer."""
    sigma: Positive | None = None
    """In place of perturb_scale: standard deviation in lora_b's units, one for all layers."""
    step_scale: Positive = 0.5
    """Size of an update: step_scale · sigma / sqrt(population)."""
    fitness: Literal["z_score", "centered_rank"] = "z_score"
    """How rewards become weights of the update."""
    samples_per_generation: Count = 32
    """Problems each member solves; the same ones for all members of a generation."""
    test_samples: Count = 100
    """Held-out problems of each evaluation."""


class Monitor(Block):
    every: Count = 10
    """Steps between measurements of the KL to the base, and between kept samples."""


class Eval(Block):
    n: Count = 200
    """Held-out problems."""
    every: Whole = 0
    """Steps between evaluations. 0: only before and after training."""


class Stage(Block):
    """All that one training loop needs."""

    model: str = "Qwen/Qwen3-0.6b"
    """A local folder, a hub id, or `demo`."""
    method: Literal["sft", "grpo", "es"] = "sft"
    train: bool = True
    """false with `test: true`: only test. (mlx-lm's default is false, and then it does nothing.)"""
    test: bool = False
    """SFT: loss on the test set after training."""
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    quantize: Quantize | None = None
    """Quantize an unquantized model on load. null: as it comes."""
    num_layers: OrAll = 16
    """Blocks to adapt, counted from the end. -1, 0 or more than there are: all. RL: -1."""
    lora_parameters: LoraParameters = LoraParameters()
    init: Named = Named(name="zero")
    scale_schedule: Named | None = None
    """How the scale changes over the steps. null: constant."""
    resume_adapter_file: str | None = None
    """Adapter to start from, in place of the init."""
    adapter_path: str | None = None
    """A second place for the adapter, beside the run folder's. (mlx-lm: `adapters`.)"""

    data: str = "mlx-community/WikiSQL"
    """SFT: folder with train, valid and test .jsonl, or a hub id."""
    hf_dataset: Annotated[tuple[HfDataset, ...], Field(strict=False)] = ()
    """SFT: hub datasets in place of `data`; one block or a list."""
    prompt_feature: str = "prompt"
    completion_feature: str = "completion"
    chat_feature: str = "messages"
    text_feature: str = "text"
    mask_prompt: bool = False
    """No loss on prompts."""
    max_seq_length: Count = 2048
    """SFT: longer examples are cut, in tokens."""
    task: Named | None = None
    """What RL trains on and `eval` measures."""

    iters: Count = 1000
    """Optimizer steps (ES: generations). Unused when `epochs` is given."""
    epochs: Positive | None = None
    """SFT: passes over the training set, in place of iters."""
    batch_size: Count = 4
    """SFT: examples a step. GRPO: prompts a step."""
    grad_accumulation_steps: Count = 1
    grad_checkpoint: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    learning_rate: Positive = 1e-5
    lr_schedule: LrSchedule | None = None
    """Overrules learning_rate."""
    optimizer: Optimizer = "adam"
    optimizer_config: dict[Optimizer, dict[str, Any]] = {name: {} for name in get_args(Optimizer)}
    """Arguments by optimizer: {adamw: {weight_decay: 0.1}}."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    steps_per_report: Count = 10
    steps_per_eval: Count = 200
    """SFT: steps between validations."""
    val_batches: OrAll = 25
    """-1: the whole validation set."""
    test_batches: OrAll = 500
    """-1: the whole test set."""
    save_every: Count = 100
    """Steps between checkpoints."""
    report_to: Literal["wandb", "swanlab", "wandb,swanlab", "swanlab,wandb"] | None = None
    project_name: str | None = None
    clear_cache_threshold: Whole = 0
    """Bytes (or 500MB, 2GB) of MLX's cache above which it is cleared between steps. 0: never."""
    trust_remote_code: bool = False
    config: str | None = None
    """mlx-lm's --config; means nothing inside a file."""

    check: Check = Check()
    rollout: RolloutOptions = RolloutOptions()
    grpo: Grpo = Grpo()
    es: Es = Es()
    monitor: Monitor = Monitor()
    eval: Eval = Eval()

    @property
    def is_rl(self) -> bool:
        return self.method != "sft"

    @property
    def dropout(self) -> float:
        """LoRA dropout in force: none in RL, where sampler and learner must agree."""
        return 0.0 if self.is_rl else self.lora_parameters.dropout

    @model_validator(mode="before")
    @classmethod
    def all_layers_in_rl(cls, raw: Any) -> Any:
        """RL adapts every block unless told otherwise; mlx-lm's default is 16."""
        if not isinstance(raw, dict):
            return raw
        layers = -1 if raw.get("method") in ("grpo", "es") else 16
        return {"num_layers": layers, **{k: v for k, v in raw.items() if v is not None}}

    @field_validator("hf_dataset", mode="before")
    @classmethod
    def one_or_many(cls, raw: Any) -> Any:
        return [raw] if isinstance(raw, dict) else raw

    @field_validator("optimizer", mode="before")
    @classmethod
    def any_case(cls, raw: Any) -> Any:
        return raw.lower() if isinstance(raw, str) else raw

    @field_validator("clear_cache_threshold", mode="before")
    @classmethod
    def size(cls, raw: Any) -> Any:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MG]?B?)", str(raw).upper())
        if not isinstance(raw, str) or not match or match[2] not in SIZES:
            return raw
        return int(float(match[1]) * SIZES[match[2]])


class Experiment(Stage):
    """A whole file: one loop, or several that hand their adapter on."""

    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    """Run in order; each is the rest of the file with these keys changed, and starts from the
    adapter of the one before."""
    _marks: dict[KeyPath, Mark] = PrivateAttr(default_factory=dict)  # where each key was given

    @property
    def loops(self) -> tuple[Stage, ...]:
        return self.stages or (self,)
