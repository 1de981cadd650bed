"""What an experiment may say and this version does not do: an error, so that no run looks as if."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lora.adapter.inits import REBASING, is_harmless
from mlx_lora.adapter.schedules import NEEDS_KL
from mlx_lora.config import resolved
from mlx_lora.errors import ConfigError
from mlx_lora.schema import Experiment, Stage

METHODS = ("sft", "grpo", "es")
UNUSED = {  # keys that a method does not act on
    "grpo": ("train", "test", "epochs"),
    "es": (
        "train", "test", "epochs", "batch_size", "learning_rate", "lr_schedule",
        "scale_schedule", "grad_accumulation_steps", "grad_checkpoint",
        "lora_parameters.lora_plus_ratio",
    ),
    "sft": (),
}  # fmt: skip
SHARED = (  # what stages have in common, because the model and its adapter are one
    "model", "quantize", "fine_tune_type", "num_layers", "lora_parameters", "init",
    "resume_adapter_file", "adapter_path", "trust_remote_code", "check", "eval",
)  # fmt: skip
OWN = ("dropout", "lora_plus_ratio")  # of lora_parameters: may differ from stage to stage


def refuse(experiment: Experiment) -> None:
    """ConfigError that lists all of it."""
    problems = [line for e in experiment.loops for line in (*ignored(e), *moving(e))]
    problems += [*differing(experiment), *late(experiment)]
    if problems:
        raise ConfigError(
            "\n".join(dict.fromkeys(problems)),
            "Remove or change these, so that the run is what its file says.",
        )


def ignored(e: Stage) -> Iterator[str]:
    """Keys with a value that would silently be ignored."""
    if e.method not in METHODS:
        yield f"method {e.method} is not available yet: use {' or '.join(METHODS)}"
        return
    if e.fine_tune_type == "full":
        yield "fine_tune_type full is not available: use lora or dora"
    if e.method == "es":
        yield from unfit_for_es(e)
    plain, default = resolved(e), resolved(Stage(method=e.method))
    if e.eval.every and not e.task:
        yield "eval.every measures accuracy on a task: name one (SFT validates by steps_per_eval)"
    if e.eval.patience and e.is_rl and not e.eval.every:
        yield "eval.patience counts evaluations: give eval.every"
    keys = [k for k in UNUSED[e.method] if value(plain, k) != value(default, k)]
    if keys:
        yield f"method {e.method} does not act on {', '.join(keys)} yet"


def unfit_for_es(e: Stage) -> Iterator[str]:
    """What evolution strategies cannot start from or step with."""
    if e.fine_tune_type == "dora":
        yield "method es perturbs plain LoRA, not dora: use fine_tune_type lora, or method grpo"
    if e.optimizer not in ("sgd", "adam"):
        yield f"method es steps with sgd (with or without momentum) or adam, not {e.optimizer}"
    elif e.optimizer_config.get(e.optimizer, {}).get("weight_decay"):
        yield f"method es decays toward the start with es.anchor, not {e.optimizer}'s weight_decay"
    if e.es.init_scale != 1 and (
        e.resume_adapter_file or not is_harmless(e.init.name, e.init.options)
    ):
        yield "es.init_scale scales A, which moves the model unless the adapter starts at zero"


def value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def moving(e: Stage) -> Iterator[str]:
    """A scale schedule on an adapter that already does something: moving its scale moves the model.

    And one that looks at a KL which nobody measures.
    """
    if e.scale_schedule is None or e.scale_schedule.name == "constant":
        return
    name, init = e.scale_schedule.name, e.init
    still = is_harmless(init.name, init.options) and init.name not in REBASING
    if e.resume_adapter_file or not still:
        start = "resume_adapter_file" if e.resume_adapter_file else f"the init {init.name}"
        yield (
            f"scale_schedule: {name} does not go with {start}, whose lora_b is not zero: at a "
            "smaller scale the model would be another one"
        )
    if name in NEEDS_KL and not e.is_rl:
        yield f"scale_schedule: {name} looks at the KL to the base; {e.method} measures none"


def late(experiment: Experiment) -> Iterator[str]:
    """The same for a stage that takes over the adapter of another."""
    for number, e in enumerate(experiment.loops[1:], start=2):
        if e.method == "es" and e.es.init_scale != 1:
            yield f"stages.{number - 1}.es.init_scale: stage {number} starts from a trained adapter"
        if e.scale_schedule is not None:
            yield (
                f"stages.{number - 1}.scale_schedule: stage {number} starts from a trained "
                "adapter, and another scale would make it another model. Only the first stage "
                "may have one"
            )


def differing(experiment: Experiment) -> Iterator[str]:
    """Keys that should be the same in every stage."""
    plain = [resolved(e) for e in experiment.loops]
    for p in plain:
        for own in OWN:
            p["lora_parameters"].pop(own)
    keys = [k for k in SHARED if any(p.get(k) != plain[0].get(k) for p in plain)]
    if keys:
        yield f"stages share one model and one adapter: {', '.join(keys)} should be the same in all"
