"""`mlx-lora check` from names: load, attach, judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lora import models
from mlx_lora.adapter import attach as attaching
from mlx_lora.adapter.files import folder_of
from mlx_lora.check import certificate
from mlx_lora.check.gate import Report, check
from mlx_lora.errors import ConfigError


def check_named(
    name: str,
    *,
    adapter: Path | None,
    init: str,
    option: Sequence[str],
    lora: Mapping[str, Any],
    expect: str | None,
    prompts: Path | None,
    bits: int | None,
    seed: int,
    certify: bool = False,
    verify: bool = False,
    out: Path | None = None,
) -> Report:
    """Check a model, or everything an experiment file names. Names are judged before loading."""
    quantize = {"bits": bits, "group_size": 64, "mode": "affine"} if bits else None
    given = parse_options(option)
    if name.endswith((".yaml", ".yml")):
        if given or adapter or bits or init != "zero" or lora.get("keys") is not None:
            raise ConfigError(
                "with an experiment file everything comes from it",
                f"Drop -o, --init, --keys, --adapter and --bits, or edit {name}.",
            )
        from mlx_lora import config

        e = config.load(config.find(name), [])
        name, init, given, seed = e.model, e.init.name, dict(e.init.options), e.seed
        quantize = e.quantize.model_dump() if e.quantize else None
        asked = e.lora_parameters
        lora = {
            "dora": e.fine_tune_type == "dora",
            "rows": attaching.calibration_rows(e),
            "rank": asked.rank,
            "scale": asked.effective_scale,
            "keys": asked.keys,
            "num_layers": e.num_layers,
        }
        if e.resume_adapter_file:
            adapter = folder_of(e.resume_adapter_file)
    elif adapter and (given or init != "zero" or lora.get("keys") is not None):
        raise ConfigError(
            "an adapter from disk brings its own start, keys and rank",
            "Drop --init, -o and --keys, or drop --adapter to check a fresh one.",
        )
    if adapter is None:
        attaching.foresee(init, given, lora.get("rows"))
    expect = certificate.foresee(adapter, expect, certify=certify, verify=verify, out=out)
    recorded = certificate.read(adapter) if adapter and verify else None
    if recorded and quantize is None:
        quantize = certificate.quantization(recorded)
    loaded = models.load(name, quantize=quantize)
    report = check(
        loaded,
        adapter=adapter,
        init=init,
        init_options=given,
        lora=lora,
        expect=expect,
        prompts=prompts,
        seed=seed,
    )
    if certify:
        return certificate.certify(loaded, report, adapter, out)
    return certificate.verify(loaded, report, recorded, adapter) if recorded and adapter else report


def parse_options(option: Sequence[str]) -> dict[str, Any]:
    """Options as given with -o. The config machinery is loaded only where there are any."""
    if not option:
        return {}
    from mlx_lora import config

    return config.parse_options(list(option))
