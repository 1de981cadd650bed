"""`mlx-lora check` from names: load, attach, judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora import bases, models
from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter import files
from mlx_lora.adapter.spline_math import asked as asked_curve
from mlx_lora.adapter.strength import refuse_strength, weaken_all
from mlx_lora.check import certificate
from mlx_lora.check.gate import Limits, Report, check, check_limits, compare, refuse_expectation
from mlx_lora.check.layers import drift
from mlx_lora.check.probes import foresee, read
from mlx_lora.check.sides import Side
from mlx_lora.errors import ConfigError
from mlx_lora.spectral import ci_files

if TYPE_CHECKING:
    from mlx_lora.schema import Stage

FRESH = "-o, --init, --keys, --rank, --scale"  # what only a fresh adapter takes


@dataclass(frozen=True)
class Request:
    """What to check, once it is clear where everything comes from."""

    model: str
    adapter: Path | None = None
    init: str = "zero"
    options: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    quantize: Mapping[str, Any] | None = None
    expect: str | None = None
    prompts: Path | None = None
    samples: int | None = None
    limits: Limits = field(default_factory=dict)
    seed: int = 0
    against: str | None = None  # another model, to compare with ...
    adapter2: Path | None = None  # ... and its adapter
    strength: float = 1.0  # of `adapter`
    trust_remote_code: bool = False
    stage: "Stage | None" = None  # the experiment, where `adapter` is one to go on training

    def load(
        self, name: str, adapter: Path | None, quantize: Mapping[str, Any] | None = None
    ) -> models.Loaded:
        """A model, quantized as asked, or else as the adapter's base was."""
        rebuild = bases.recorded(adapter).get("quantization") if adapter else None
        trust = self.trust_remote_code
        return models.load(name, quantize=quantize, rebuild=rebuild, trust_remote_code=trust)


def request(
    name: str,
    *,
    adapter: Path | None,
    init: str,
    option: Sequence[str],
    lora: Mapping[str, Any],
    bits: int | None,
    limit: Sequence[str] = (),
    seed: int | None = None,
    **rest: Any,
) -> Request:
    """The request behind a command line, where None stands for what was not given.

    ConfigError for options that exclude each other.
    """
    lora = {key: value for key, value in lora.items() if value is not None}
    found = Request(
        name,
        adapter,
        init,
        parse_options(option),
        lora,
        {"bits": bits, "group_size": 64, "mode": "affine"} if bits else None,
        limits=parse_limits(limit),
        seed=seed or 0,
        **rest,
    )
    fresh = bool(found.options) or init != "zero" or bool(lora)
    if name.endswith((".yaml", ".yml")):
        if fresh or adapter or bits or found.against or found.adapter2:
            raise ConfigError(
                "with an experiment file everything comes from it",
                f"Drop {FRESH}, --adapter, --against, --adapter2 and --bits, or edit {name}.",
            )
        return of_experiment(name, found, seed)
    if adapter and fresh:
        raise ConfigError(
            "an adapter from disk brings its own start, keys, rank and scale",
            f"Drop {FRESH}, or drop --adapter to check a fresh one.",
        )
    if found.against and fresh:
        raise ConfigError(
            "--against compares two models as they are, with --adapter and --adapter2 if given",
            f"Drop {FRESH}.",
        )
    if found.adapter2 and not found.against:
        raise ConfigError("--adapter2 belongs to the model of --against, which is not given")
    return found


def of_experiment(name: str, given: Request, seed: int | None = None) -> Request:
    """The request that an experiment file makes; what the command line gives goes first."""
    from mlx_lora import config
    from mlx_lora.adapter import warm
    from mlx_lora.progress import console

    experiment = config.load(config.find(name), [])
    config.check_names(experiment)
    e = warm.adopted(experiment, console()).first
    if e.fine_tune_type == "full":
        raise ConfigError(
            f"{name} says fine_tune_type: full, which attaches nothing that could be checked",
            "Use lora or dora.",
        )
    asked, own = e.lora_parameters, e.check
    return replace(
        given,
        model=e.model,
        init=e.init.name,
        options=dict(e.init.options),
        seed=e.seed if seed is None else seed,
        trust_remote_code=given.trust_remote_code or e.trust_remote_code,
        expect=given.expect or own.expect,
        prompts=given.prompts or (Path(own.prompts) if own.prompts else None),
        samples=given.samples or own.samples,
        limits={**own.limits, **given.limits},
        quantize=e.quantize.model_dump() if e.quantize else None,
        adapter=files.folder_of(e.resume_adapter_file) if e.resume_adapter_file else None,
        stage=e,
        lora={
            "dora": e.fine_tune_type == "dora",
            "rows": attaching.calibration_rows(e),
            "curve": asked_curve(asked.model_dump()),
            "rank": asked.rank,
            "scale": asked.effective_scale,
            "keys": asked.keys,
            "num_layers": e.num_layers,
            "rank_pattern": asked.rank_pattern,
            "dropout": max(loop.dropout for loop in experiment.loops),
        },
    )


def check_named(
    asked: Request,
    *,
    certify: bool = False,
    verify: bool = False,
    out: Path | None = None,
    layers: bool = False,
    picture: Path | None = None,
    junit: Path | None = None,
) -> Report:
    """Run it. Whatever can be wrong about names is judged before a model is loaded."""
    ci_files.refuse(junit)
    refuse_expectation(asked.expect)
    check_limits(asked.limits)
    foresee(asked.prompts)
    if asked.adapter is None and asked.against is None:
        attaching.foresee(asked.init, asked.options, asked.lora.get("rows"))
    adapter = asked.adapter
    refuse_strength(asked.strength, adapted=adapter is not None)
    if asked.strength != 1 and (certify or verify):
        raise ConfigError("a certificate is of the adapter as it was trained: leave --strength out")
    expect = certificate.foresee(
        adapter, asked.expect, certify=certify, verify=verify, out=out, against=asked.against
    )
    recorded = certificate.read(adapter) if adapter and verify else None
    quantize = asked.quantize or (certificate.quantization(recorded) if recorded else None)
    loaded = asked.load(asked.model, adapter, quantize)
    if asked.against is not None:
        other = asked.load(asked.against, asked.adapter2)
        for model, folder in ((loaded, adapter), (other, asked.adapter2)):
            if folder:
                files.load(model.model, folder)
        weaken_all(loaded.model, asked.strength)
        base = Side(other)
        report = compare(
            loaded,
            other,
            expect=expect,
            prompts=asked.prompts,
            samples=asked.samples,
            limits=asked.limits,
            seed=asked.seed,
        )
    else:
        base = Side(loaded, off=True)
        report = check(
            loaded,
            adapter=adapter,
            strength=asked.strength,
            stage=asked.stage,
            init=asked.init,
            init_options=asked.options,
            lora=asked.lora,
            expect=expect,
            prompts=asked.prompts,
            samples=asked.samples,
            limits=asked.limits,
            seed=asked.seed,
        )
    if layers:
        probes = read(base.loaded, asked.prompts)
        report = replace(report, layers=drift(base, Side(loaded), probes))
    if picture:
        from mlx_lora.check.plots import plot

        plot(report, picture)
    if certify:
        report = certificate.certify(loaded, report, adapter, out)
    elif recorded and adapter:
        report = certificate.verify(loaded, report, recorded, adapter)
    if junit:
        ci_files.write(junit, ci_files.junit("mlx-lora check", ci_files.gate_cases(report)))
    return report


def parse_options(option: Sequence[str]) -> dict[str, Any]:
    """Options as given with -o. The config machinery is loaded only where there are any."""
    if not option:
        return {}
    from mlx_lora import config

    return config.parse_options(list(option))


def parse_limits(limit: Sequence[str]) -> dict[str, dict[str, float]]:
    """`gate.threshold=number` texts as a mapping by gate."""
    found: dict[str, dict[str, float]] = {}
    for key, value in parse_options(limit).items():
        gate, dot, name = key.partition(".")
        if not dot:
            raise ConfigError(
                f"--limit {key}: should be gate.threshold=number, like divergence.fail=0.2"
            )
        found.setdefault(gate, {})[name] = value
    return found
