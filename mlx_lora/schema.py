"""What an experiment file may say. mlx-lm's key names and defaults wherever it has one.

Names of inits, tasks, losses ... are checked against their tables by `config.check_names`.
"""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, field_validator, model_validator

from mlx_lora.blocks import (
    Block,
    Check,
    Count,
    Es,
    Eval,
    Grpo,
    HfDataset,
    LoraParameters,
    LrSchedule,
    Monitor,
    Named,
    Positive,
    Quantize,
    RejectionSampling,
    RolloutOptions,
    Sft,
    Whole,
)
from mlx_lora.tasks import spelled_out
from mlx_lora.yamlfile import KeyPath, Mark

OrAll = Annotated[int, Field(ge=-1)]  # -1: all
Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]
RL = ("grpo", "es")
SERVICES = ("wandb", "swanlab", "trackio", "tensorboard")
SIZES = {"": 1, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}


def split_services(report_to: str | None) -> list[str]:
    """
    >>> split_services("WandB, swanlab"), split_services(None)
    (['wandb', 'swanlab'], [])
    """
    return [name.strip().lower() for name in (report_to or "").split(",") if name.strip()]


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
    """Adapter to start from, in place of the init. Shape and scale left out here are its own."""
    adapter_path: str | None = None
    """A second place for the adapter, beside the run folder's. (mlx-lm: `adapters`.)"""

    data: str = "mlx-community/WikiSQL"
    """SFT: a .jsonl file, a folder with train.jsonl and perhaps valid.jsonl, or a hub id."""
    rejection_sampling: RejectionSampling | None = None
    """SFT: learn from the model's own correct completions of the task's problems, not from data."""
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
    optimizer_config: dict[Optimizer, dict[str, Any]] = Field(
        default_factory=lambda: {name: {} for name in get_args(Optimizer)}
    )
    """Arguments by optimizer: {adamw: {weight_decay: 0.1}}."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    steps_per_report: Count = 10
    steps_per_eval: Count = 200
    """SFT: steps between validations."""
    val_batches: OrAll = 25
    """-1: the whole validation set. 0: no validation."""
    test_batches: OrAll = 500
    """-1: the whole test set."""
    save_every: Count = 100
    """Steps between checkpoints."""
    report_to: str | None = None
    """wandb, swanlab, trackio, tensorboard, or several: `wandb,swanlab`. They must be installed."""
    project_name: str | None = None
    clear_cache_threshold: Whole = 0
    """Bytes (or 500MB, 2GB) of MLX's cache above which it is cleared between steps. 0: never."""
    trust_remote_code: bool = False
    config: str | None = None
    """mlx-lm's --config; means nothing inside a file."""

    check: Check = Check()
    rollout: RolloutOptions = RolloutOptions()
    sft: Sft = Sft()
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

    @property
    def services(self) -> tuple[str, ...]:
        """Those of report_to."""
        return tuple(split_services(self.report_to))

    @property
    def order(self) -> Literal["mlx_lm", "shuffled"]:
        """Of the rows of SFT, in force."""
        ours = self.epochs or self.rejection_sampling
        return self.sft.order or ("shuffled" if ours else "mlx_lm")

    @property
    def padding_limit(self) -> int | None:
        """What `batches.pack` takes as its limit: None where only a row's own tokens count."""
        default = not self.sft.packing and self.rejection_sampling is None
        counts = default if self.sft.first_padding is None else self.sft.first_padding
        return self.max_seq_length if counts else None

    @model_validator(mode="before")
    @classmethod
    def all_layers_in_rl(cls, raw: Any) -> Any:
        """RL adapts every block unless told otherwise; mlx-lm's default is 16."""
        if not isinstance(raw, dict):
            return raw
        layers = -1 if raw.get("method") in RL else 16
        given = {k: v for k, v in raw.items() if v is not None}
        return {"num_layers": layers, **(greedy(given) if raw.get("method") == "es" else given)}

    @field_validator("hf_dataset", mode="before")
    @classmethod
    def one_or_many(cls, raw: Any) -> Any:
        return [raw] if isinstance(raw, dict) else raw

    @field_validator("task", mode="before")
    @classmethod
    def python_is_a_task(cls, raw: Any) -> Any:
        return spelled_out(raw)

    @field_validator("optimizer", mode="before")
    @classmethod
    def any_case(cls, raw: Any) -> Any:
        return raw.lower() if isinstance(raw, str) else raw

    @field_validator("report_to")
    @classmethod
    def known_services(cls, raw: str | None) -> str | None:
        for name in split_services(raw):
            if name not in SERVICES:
                raise ValueError(f"there is no service {name!r}: {', '.join(SERVICES)}")
        return raw

    @field_validator("clear_cache_threshold", mode="before")
    @classmethod
    def size(cls, raw: Any) -> Any:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MG]?B?)", str(raw).upper())
        if not isinstance(raw, str) or not match or match[2] not in SIZES:
            return raw
        return int(float(match[1]) * SIZES[match[2]])


def greedy(raw: dict[str, Any]) -> dict[str, Any]:
    """What a file of ES means where it says nothing: greedy rollouts, steps without momentum."""
    rollout = raw.get("rollout", {})
    if isinstance(rollout, dict) and rollout.get("temperature") is None:
        rollout = {**rollout, "temperature": 0.0}
    return {"optimizer": "sgd", **raw, "rollout": rollout}


class Experiment(Stage):
    """A whole file: one loop, or several that hand their adapter on."""

    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()
    """Run in order; each is the rest of the file with these keys changed, and starts from the
    adapter of the one before."""
    _marks: dict[KeyPath, Mark] = PrivateAttr(default_factory=dict)  # where each key was given

    @model_validator(mode="before")
    @classmethod
    def one_adapter(cls, raw: Any) -> Any:
        """Stages share one adapter: in every block as soon as one of them is RL."""
        stages = raw.get("stages") if isinstance(raw, dict) else None
        if not isinstance(stages, list | tuple) or not all(isinstance(s, dict) for s in stages):
            return raw
        if not any(s.get("method") in RL for s in stages):
            return raw
        shared = [s | {"num_layers": -1} if s.get("num_layers") is None else s for s in stages]
        return {**raw, "stages": shared}

    @property
    def loops(self) -> tuple[Stage, ...]:
        return self.stages or (self,)

    @property
    def first(self) -> Stage:
        """The loop that says which model and which adapter: stages share both."""
        return self.loops[0]

    @property
    def last(self) -> Stage:
        return self.loops[-1]
