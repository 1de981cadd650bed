"""`harmless.json`: a proof, beside an adapter, that it leaves its base's logits as they were.

It holds no date and no path: the same files on the same machine give the same bytes. Only a check
that passes under `expect same` with logits equal to the bit is certified.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import bases, models
from mlx_lora.adapter import files
from mlx_lora.check.gate import Report
from mlx_lora.check.machine import machine
from mlx_lora.errors import AdapterError, ConfigError, RunError
from mlx_lora.models import Loaded
from mlx_lora.runlog import atomically, json_safe, occupied

NAME = "harmless.json"
FORMAT = 1  # of the file; another one is refused, not guessed at
CHUNK = 1 << 20  # bytes read at a time

ANYWHERE = {  # compared on every machine: where it is in the file -> what a sentence calls it
    "base.revision": "the base's revision on the hub",
    "base.weights_hash": "the base's weights",
    "base.config_hash": "the base's config.json",
    "base.quantization": "the base's quantization",
    "base.quantized_on_load": "whether the base is quantized on load",
    "adapter.weights_hash": f"the adapter's {files.WEIGHTS}",
    "adapter.config_hash": f"the adapter's {files.CONFIG}",
    "probes_hash": "the texts and prompts of the check",
    "verdict": "the verdict",
}
HERE = {  # compared where the environment is the recorded one
    "dtype": "the type that is computed in",
    "bitwise_identical": "whether logits are equal to the bit",
    "logits_base_hash": "the base's logits",
    "logits_adapted_hash": "the logits with the adapter",
}


def contents(loaded: Loaded, report: Report, folder: Path) -> dict[str, Any]:
    """What the certificate of this adapter folder says, after this report on it."""
    config = models.read_json(folder / files.CONFIG)
    init = dict(config.get("init") or {})
    about_init = {k: v for k, v in init.items() if k not in ("name", "measured")}
    measured = report.measured
    return json_safe(
        {
            "format": FORMAT,
            "verdict": report.verdict,
            "reasons": list(report.reasons),
            "expect": report.expect,
            "bitwise_identical": measured.bitwise_identical,
            "kl_mean": measured.kl_mean,
            "base": base(loaded),
            "adapter": {
                "weights_hash": digest_files([folder / files.WEIGHTS]),
                "config_hash": digest_files([folder / files.CONFIG]),
                "init": {"name": init.get("name"), "options": about_init},
            },
            "dtype": dtype_of(loaded.model),
            "probes_hash": measured.probes_hash,
            "logits_base_hash": measured.logits_base_hash,
            "logits_adapted_hash": measured.logits_adapted_hash,
            "environment": machine(),
        }
    )


def base(loaded: Loaded) -> dict[str, Any]:
    """Which base it is. A hub snapshot is known by its revision, other weights by their hash."""
    folder = loaded.folder.resolve()
    revision = folder.name if is_snapshot(folder) else None
    weights = sorted(folder.glob("*.safetensors"))
    about = bases.identity(loaded)
    return {
        "model": about["model"],
        "revision": revision,
        "weights_hash": None if revision else digest_files(weights),
        "config_hash": digest_files([folder / "config.json"]),
        "quantization": about["quantization"],
        "quantized_on_load": loaded.quantized_here,
    }


def is_snapshot(folder: Path) -> bool:
    """models--owner--name/snapshots/<commit>: the hub's cache, where a commit names the content."""
    return folder.parent.name == "snapshots" and bool(re.fullmatch("[0-9a-f]{40}", folder.name))


def digest_files(paths: Sequence[Path]) -> str:
    """blake2b over the files one after the other, 1 MB at a time."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def dtype_of(model: nn.Module) -> str:
    """The type of the frozen floating-point weights, like float32; several joined by a plus."""
    found = {
        str(value.dtype).removeprefix("mlx.core.")
        for name, value in tree_flatten(model.parameters())
        if name.rpartition(".")[2] not in files.FACTORS and mx.issubdtype(value.dtype, mx.floating)
    }
    return "+".join(sorted(found))


def refusal(report: Report) -> str | None:
    """Why this report proves no harmless start; None where it does."""
    if report.expect != "same":
        return f"the check expected {report.expect}, and harmless means the same"
    if not report.measured.bitwise_identical:
        kl = report.measured.kl_mean
        return f"the logits are not equal to the base's to the bit (KL {kl:.2g} nats per token)"
    if report.verdict != "pass":
        return f"the check says {report.verdict}: {'; '.join(report.reasons)}"
    return None


def write(loaded: Loaded, report: Report, folder: Path) -> dict[str, Any]:
    """Certify the adapter files in `folder`, which `report` is about, or say why not.

    Returns {status: written | refused, file, sentence}. A refusal leaves no certificate behind: one
    that is there is renamed to harmless.json.invalid. RunError where the folder is read-only.
    """
    path = folder / NAME
    try:
        if why := refusal(report):
            return refused(why, set_aside(path))
        text = json.dumps(contents(loaded, report, folder), indent=2, allow_nan=False) + "\n"
        with atomically(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error
    return {"status": "written", "file": str(path), "sentence": f"certified in {path}"}


def refused(why: str, consequence: str) -> dict[str, Any]:
    return {"status": "refused", "file": None, "sentence": f"not certified: {why}{consequence}"}


def set_aside(path: Path) -> str:
    """Rename a certificate that no longer holds. Returns what to say about it, if anything."""
    if not path.exists():
        return ""
    aside = path.with_name(f"{NAME}.invalid")
    os.replace(path, aside)
    return f". The certificate that was there is now {aside.name}"


def read(folder: Path) -> dict[str, Any]:
    """The certificate in an adapter folder. AdapterError where there is none, or it is no such."""
    path = folder / NAME
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {NAME}", "Make one: mlx-lora check MODEL --adapter DIR --certify."
        )
    try:
        found = models.read_json(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise AdapterError(f"{path} is no certificate of format {FORMAT} but of {version!r}")
    wanted = {**ANYWHERE, **HERE, "expect": "", "environment": ""}
    missing = [item for item in wanted if at(found, item) is ABSENT]
    if missing or not isinstance(found["environment"], dict):
        raise AdapterError(f"{path} is incomplete: no {', '.join(missing) or 'environment'}")
    return found


ABSENT = object()


def at(tree: Any, item: str) -> Any:
    """What a dotted name leads to; ABSENT where it leads nowhere."""
    for part in item.split("."):
        tree = tree.get(part, ABSENT) if isinstance(tree, Mapping) else ABSENT
    return tree


def compare(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Two certificates: {status: valid | invalid | other_environment, compared, differences}.

    Logits are compared only where the environment is the recorded one: elsewhere they may differ
    in their last bits. Files, probes and the verdict are compared everywhere.
    """
    differences = [
        {"item": item, "recorded": a, "found": b}
        for item, a, b in leaves(recorded["environment"], found["environment"])
        if a != b
    ]
    pairs = [
        (item, at(recorded, item), at(found, item))
        for item in (ANYWHERE if differences else {**ANYWHERE, **HERE})
    ]
    compared = [
        {"item": item, "recorded": a, "found": b, "equal": a == b}
        for item, a, b in pairs
        if (a, b) != (None, None)
    ]
    equal = all(row["equal"] for row in compared)
    status = "invalid" if not equal else "other_environment" if differences else "valid"
    return {"status": status, "compared": compared, "environment_differences": differences}


def leaves(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in a, value in b) of everything that either holds."""
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from ((f"{key}.{inside}", *values) for inside, *values in leaves(x, y))
        else:
            yield key, x, y


def foresee(
    adapter: Path | None,
    expect: str | None,
    *,
    certify: bool,
    verify: bool,
    out: Path | None,
    against: str | None = None,
) -> str | None:
    """The expectation, once the options have been judged. ConfigError before a model is loaded."""
    problems = []
    if certify and verify:
        problems.append("--certify writes a certificate and --verify reads one: give one of them")
    if (certify or verify) and against is not None:
        problems.append("a certificate is about an adapter and its own base: leave --against out")
    if certify and adapter is not None and adapter.exists() and not holds_ours(adapter):
        problems.append(
            f"--certify writes beside {files.WEIGHTS} and {files.CONFIG}: give the folder that "
            f"holds both, not {adapter} (`mlx-lora import` makes one of PEFT's)"
        )
    if (certify or verify) and expect not in (None, "same"):
        problems.append(f"a certificate is about --expect same, not {expect}")
    if verify and adapter is None:
        problems.append("--verify needs --adapter, the folder that holds the certificate")
    if certify and adapter is None and out is None:
        problems.append("--certify needs --out, a folder for the fresh adapter, or --adapter")
    if out is not None and (adapter is not None or not certify):
        problems.append("--out is where --certify saves a fresh adapter: drop it here")
    if out is not None and occupied(out):
        problems.append(f"--out {out} exists already and is not an empty folder")
    if problems:
        raise ConfigError("\n".join(problems))
    return "same" if certify or verify else expect


def holds_ours(folder: Path) -> bool:
    """Whether a certificate can stand here: what PEFT wrote, and lone files, have other names."""
    return all((folder / name).is_file() for name in (files.WEIGHTS, files.CONFIG))


def certify(loaded: Loaded, report: Report, adapter: Path | None, out: Path | None) -> Report:
    """The report with what `write` did. A fresh adapter is saved to `out` if it passed."""
    if adapter is not None:
        return replace(report, certificate=write(loaded, report, adapter))
    assert out is not None and report.config is not None
    if why := refusal(report):
        return replace(report, certificate=refused(why, ". Nothing was saved"))
    config = {**report.config, "base": bases.identity(loaded)}
    try:
        files.save(loaded.model, config, out)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror}") from error
    return replace(report, certificate=write(loaded, report, out))


def verify(loaded: Loaded, report: Report, recorded: Mapping[str, Any], folder: Path) -> Report:
    """The report with the comparison of the recorded certificate and what holds now."""
    return replace(report, certificate=compare(recorded, contents(loaded, report, folder)))


def quantization(recorded: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the recorded base was quantized on load, so that it is loaded in the same way."""
    found = recorded["base"]["quantization"] if recorded["base"]["quantized_on_load"] else None
    return dict(found) if isinstance(found, Mapping) else None
