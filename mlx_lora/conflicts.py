"""Keys that are fine one by one and do not go together: refused, or said before the run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_lora.blocks import (
    INSTEAD,
    MOST_SOFT,
    QUANTIZATION,
    Es,
    Grpo,
    LoraParameters,
    Monitor,
    RolloutOptions,
)
from mlx_lora.schema import RL, Experiment, Stage
from mlx_lora.yamlfile import KeyPath

SPLINE = (
    "num_knots", "k_min", "k_max", "interpolation_method", "extrapolation", "spline_reg_weight",
    "calibrate",
)  # fmt: skip
MOST_KNOTS = 100  # more only cost: each has a gradient of its own
STEEP = 4e-3  # learning_rate · scale: figures/spline_ablation_runs.jsonl, GRPO and SFT at 2e-3 · 2
LOUD = 0.3  # es.perturb_scale above which there is a notice
ABOUT = {
    "alpha": "scale = alpha / rank, or alpha / sqrt(rank) with rslora",
    "sigma": "Both are the size of a perturbation",
    "epochs": "Both are the length of the run",
}


def conflicts(raw: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """(path, problem) for keys that contradict each other.

    Looks at unchecked values, so that these are listed together with wrong keys and types.
    """
    top = given(raw)
    blocks: dict[str, dict[str, Any]] = {
        name: given(raw.get(name))
        for name in ("lora_parameters", "rollout", "quantize", "grpo", "es")
    }
    for path, block in [((), top), *(((name,), block) for name, block in blocks.items())]:
        for new, old in INSTEAD.items():
            if new in block and old in block:
                yield (*path, new), f"stands in place of {old}: give one of them. {ABOUT[new]}."
    lora, method = blocks["lora_parameters"], top.get("method", "sft")
    if lora.get("rslora") is True and "alpha" not in lora:
        yield ("lora_parameters", "rslora"), "divides alpha, not scale, by sqrt(rank): give alpha"
    if "alpha" in lora and lora.get("rank_pattern"):
        yield (
            ("lora_parameters", "alpha"),
            "does not go with rank_pattern: alpha / rank is another scale for each rank, "
            "and an adapter has one. Give scale",
        )
    yield from spline_conflicts(lora, top.get("fine_tune_type"))
    if method in RL:
        yield from rl_conflicts(method, top, blocks)
    if "rejection_sampling" in top:
        yield from sampling_conflicts(method, top)
    yield from data_conflicts(top)
    if top.get("train") is False and top.get("test") is not True:
        yield ("train",), "train and test are both false: nothing to do"
    if top.get("test") is True and top.get("test_batches") == 0:
        yield ("test_batches",), "0 batches are no test: give -1 for all, or leave test out"
    if top.get("fine_tune_type") == "full":
        unfit = [k for k in ("scale_schedule", "quantize") if k in top]
        unfit += ["method"] if method in RL else []
        unfit += ["init"] if top.get("init", "zero") != "zero" else []
        for key in unfit:
            yield (key,), "does not go with fine_tune_type: full, which trains no adapter"
    yield from quantize_conflicts(blocks["quantize"])


OF_SFT = (
    "data", "hf_dataset", "prompt_feature", "completion_feature", "chat_feature", "text_feature",
    "mask_prompt", "max_seq_length", "steps_per_eval", "val_batches", "test_batches", "sft",
)  # fmt: skip
FEATURES = ("prompt_feature", "completion_feature", "chat_feature", "text_feature")


def data_conflicts(top: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Keys that mlx-lm would pass over in silence, because another one decides."""
    if top.get("hf_dataset"):
        for key in changed(top, (*FEATURES, "data")):
            where = "give it inside of it" if key != "data" else "give one of them"
            yield (key,), f"is not read where there is hf_dataset: {where}"
    usual = "sgd" if top.get("method") == "es" else "adam"
    options, optimizer = top.get("optimizer_config"), top.get("optimizer", usual)
    if isinstance(options, dict) and isinstance(optimizer, str):
        for name, given_options in options.items():
            if given_options and str(name).lower() != optimizer.lower():
                yield ("optimizer_config", name), f"is not used: the optimizer is {optimizer}"
    sft = given(top.get("sft"))
    if sft.get("packing") is True:
        for key in ("order", "first_padding"):
            if sft.get(key) in ("mlx_lm", True):
                yield ("sft", key), f"{sft[key]} does not go with packing, which mlx-lm has not"
    if top.get("train") is False and top.get("stages"):
        yield ("train",), "does not go with stages"


def spline_conflicts(lora: Mapping[str, Any], kind: Any) -> Iterator[tuple[KeyPath, str]]:
    """Keys of the curve without one, a grid that runs backwards, and a curve in DoRA."""
    if lora.get("type") != "spline":
        fields = LoraParameters.model_fields
        for key in (k for k in SPLINE if k in lora and lora[k] != fields[k].default):
            yield ("lora_parameters", key), "is of splines only: give type: spline"
        return
    if kind == "dora":
        yield ("fine_tune_type",), "dora does not go with lora_parameters.type spline"
    low, high = (lora.get(k, d) for k, d in (("k_min", -3.0), ("k_max", 3.0)))
    if isinstance(low, int | float) and isinstance(high, int | float) and low >= high:
        yield ("lora_parameters", "k_min"), f"{low:g} is not below k_max {high:g}"
    count = lora.get("num_knots")
    if isinstance(count, int) and count > MOST_KNOTS:
        yield ("lora_parameters", "num_knots"), f"a curve has at most {MOST_KNOTS}, got {count}"
    if lora.get("interpolation_method") == "soft" and isinstance(count, int) and count > MOST_SOFT:
        yield ("lora_parameters", "num_knots"), f"a soft curve has at most {MOST_SOFT}, got {count}"


def changed(top: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Those of the keys that are given, and not with their default."""
    return [k for k in keys if k in top and top[k] != Stage.model_fields[k].default]


def rl_conflicts(
    method: str, top: Mapping[str, Any], blocks: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    if "task" not in top:
        yield ("method",), f"{method} needs a task, like `task: countdown` (`mlx-lora ls tasks`)"
    if "epochs" in top:
        yield ("epochs",), f"{method} draws problems without end: give iters"
    for key, greedy in (("temperature", 0), ("top_k", 1)):
        if method == "grpo" and blocks["rollout"].get(key) == greedy:
            equal = f"at {greedy} all rollouts of a group are equal: nothing to learn"
            yield ("rollout", key), equal
    if method == "grpo":
        yield from update_conflicts(top, blocks["grpo"], blocks["rollout"])
    population = blocks["es"].get("population")
    paired = blocks["es"].get("antithetic") is not False
    if method == "es" and paired and isinstance(population, int) and population % 2:
        yield ("es", "population"), "should be even: members come in pairs (or antithetic: false)"


def update_conflicts(
    top: Mapping[str, Any], grpo: Mapping[str, Any], rollout: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    """Parts of an update that would be empty, and a penalty that begins before the first token."""
    prompts = top.get("batch_size", Stage.model_fields["batch_size"].default)
    group = grpo.get("group_size", Grpo.model_fields["group_size"].default)
    minibatches, parts = grpo.get("minibatches", 1), top.get("grad_accumulation_steps", 1)
    numbers = (prompts, group, minibatches, parts)
    if all(isinstance(n, int) for n in numbers) and minibatches * parts > prompts * group:
        key: KeyPath = ("grpo", "minibatches") if minibatches > 1 else ("grad_accumulation_steps",)
        times = f" · grad_accumulation_steps {parts}" if minibatches > 1 and parts > 1 else ""
        rows = f"{prompts * group} rollouts of a step (batch_size · grpo.group_size)"
        yield key, f"{minibatches if minibatches > 1 else parts}{times} is more than the {rows}"
    buffer = grpo.get("overlong_buffer", 0)
    longest = rollout.get("max_tokens", RolloutOptions.model_fields["max_tokens"].default)
    if isinstance(buffer, int) and isinstance(longest, int) and buffer > longest:
        yield ("grpo", "overlong_buffer"), f"{buffer} is more than rollout.max_tokens {longest}"


def sampling_conflicts(method: str, top: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    path = ("rejection_sampling",)
    if method != "sft":
        yield path, f"makes the data of method sft; {method} samples by itself"
    if "task" not in top:
        yield path, "needs a task, like `task: countdown` (`mlx-lora ls tasks`)"
    for key in changed(top, FEATURES):
        yield (key,), "is not read where there is rejection_sampling"
    for key in ("data", "hf_dataset"):
        if top.get(key) and top[key] != Stage.model_fields[key].default:
            yield (key,), "stands in place of rejection_sampling: give one of them"


def quantize_conflicts(quantize: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    mode = quantize.get("mode", "affine")
    if mode == "affine":
        if quantize.get("group_size") == 16:
            yield ("quantize", "group_size"), "should be 32, 64 or 128 with mode affine"
    elif isinstance(mode, str) and mode in QUANTIZATION:
        for key, only in zip(("bits", "group_size"), QUANTIZATION[mode], strict=True):
            if quantize.get(key, only) != only:
                yield ("quantize", key), f"should be {only} with mode {mode}"


def given(block: Any) -> dict[str, Any]:
    """What a block says, nulls aside."""
    return {k: v for k, v in block.items() if v is not None} if isinstance(block, dict) else {}


def notices(experiment: Experiment) -> list[str]:
    """Sentences to print before a run: what was asked for and will not happen as written."""
    found = []
    for loop in experiment.loops:
        dropout, schedule = loop.lora_parameters.dropout, loop.lr_schedule
        if loop.scale_schedule and loop.scale_schedule.options.get("start") == 0:
            found.append(
                "scale_schedule starts at 0: no gradient reaches the adapter until the scale rises"
            )
        if loop.method == "es" and loop.lora_parameters.type == "spline":
            found.append(
                "method es perturbs A or B: curves stay what they were, straight in a fresh adapter"
            )
        if loop.is_rl and loop.init.name == "pissa":
            found.append(
                "init pissa is known to collapse under RL (PeRL, arXiv 2512.23165); ours does at "
                "rates that suit the other inits: lower learning_rate by 4, or use zero"
            )
        if loop.method == "es" and loop.es.sigma is None and loop.es.perturb_scale > LOUD:
            found.append(
                f"es.perturb_scale {loop.es.perturb_scale:g} is a size relative to the weights: "
                f"each member's are moved by {loop.es.perturb_scale:.0%} of their rms, where about "
                "3 % is usual and most models write garble above 30 %. In some notes and scripts "
                "1.0 of a key of this name multiplied a noise that was small already"
            )
        if dropout != loop.dropout:
            found.append(
                f"LoRA dropout {dropout:g} is set to 0: {loop.method} learns from its own rollouts"
            )
        if (
            schedule
            and schedule.arguments[0] != loop.learning_rate
            and "learning_rate" in loop.model_fields_set
        ):
            found.append(
                f"learning_rate {loop.learning_rate:g} is not used: lr_schedule starts at "
                f"{schedule.arguments[0]:g}"
            )
        adafactor = loop.optimizer_config.get("adafactor", {})
        if loop.optimizer == "adafactor" and adafactor.get("relative_step", True):
            found.append(
                "adafactor steps by its own rate and does not look at learning_rate, as in mlx-lm: "
                "optimizer_config: {adafactor: {relative_step: false}} makes it"
            )
        parts = loop.grad_accumulation_steps
        if not loop.is_rl and loop.epochs is None and loop.iters % parts:
            found.append(
                f"iters {loop.iters} is no multiple of grad_accumulation_steps {parts}: the "
                f"gradients of the last {loop.iters % parts} batches move nothing, as in mlx-lm"
            )
        if loop.config is not None:
            found.append("config: means nothing inside an experiment file")
        found += [*steep(loop), *moot(loop)]
    loops = experiment.loops
    methods = sorted({loop.method for loop in loops})
    for method, keys in {"grpo": ("grpo",), "es": ("es",), "sft": OF_SFT}.items():
        idle = [k for k in keys if any(changed(dict(loop), [k]) for loop in loops)]
        if idle and method not in methods:
            found.append(f"{', '.join(idle)}: is not used by method {' or '.join(methods)}")
    return list(dict.fromkeys(found))


def steep(e: Stage) -> Iterator[str]:
    """A step of Adam that has ruined what it was measured on, in a sentence."""
    scale = e.lora_parameters.effective_scale
    if e.method == "es" or not e.optimizer.startswith("adam"):
        return
    if e.learning_rate * scale > STEEP:
        yield (
            f"learning_rate {e.learning_rate:g} at scale {scale:g} is a long step: the embedded "
            f"model loses most of its gain where their product is {STEEP:g}, and is ruined where "
            "it is twice that. mlx-lm's default scale, 20, is for rates near 1e-5"
        )


def moot(e: Stage) -> Iterator[str]:
    """What keys ask for and another key leaves without effect, in sentences."""
    r, g, es, m = e.rollout, e.grpo, e.es, e.monitor
    evolves, greedy = e.method == "es", e.is_rl and r.temperature == 0
    unweighted = e.method == "grpo" and g.importance_sampling == "none"
    if greedy and (r.top_p < 1 or r.top_k):
        yield "rollout.top_p and top_k are not used: at temperature 0 rollouts are greedy"
    if unweighted and g.is_cap != Grpo().is_cap:
        yield "grpo.is_cap is not used: importance_sampling is none"
    if evolves and es.factor == "b" and es.turn != Es().turn:
        yield "es.turn is not used: factor is b"
    if not m.check_every and m.policy != Monitor().policy:
        yield "monitor.policy is not used: check_every is 0"
