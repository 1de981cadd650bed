"""Findings as the files that build servers read: SARIF 2.1.0 and JUnit XML."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from xml.etree import ElementTree

from mlx_lora import __version__
from mlx_lora.errors import ConfigError, RunError
from mlx_lora.registry import first_line
from mlx_lora.runlog import atomically
from mlx_lora.spectral.alerts import alerts
from mlx_lora.types import Finding

if TYPE_CHECKING:
    from mlx_lora.check.gate import Report
    from mlx_lora.spectral.metrics import LoRAReport

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {"warn": "warning", "fail": "error"}
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """One test of a JUnit suite. `failure` is its kind; empty: it passed."""

    name: str
    failure: str = ""
    said: Sequence[str] = ()


def sarif(findings: Sequence[Finding], adapter: str) -> dict[str, Any]:
    """A SARIF 2.1.0 log: every alert is a rule, every finding a result at its module."""
    names = list(alerts)
    rules = [{"id": name, "shortDescription": {"text": first_line(alerts[name])}} for name in names]
    driver = {"name": "mlx-lora", "version": __version__, "rules": rules}
    results = [
        {
            "ruleId": finding.name,
            "ruleIndex": names.index(finding.name),
            "level": LEVELS[finding.severity],
            "message": {"text": f"{finding.message}. {finding.action}"},
            "locations": [location(finding.module, adapter)],
        }
        for finding in findings
    ]
    runs = [{"tool": {"driver": driver}, "results": results}]
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": runs}


def location(module: str, adapter: str) -> dict[str, Any]:
    """The adapter as a file, and the module in it; the whole adapter has no module."""
    found: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": quote(adapter)}}}
    if module:
        found["logicalLocations"] = [{"fullyQualifiedName": module, "kind": "module"}]
    return found


def junit(suite: str, cases: Sequence[Case]) -> bytes:
    """A JUnit file of one suite. What passed may have something to say, too."""
    failures = str(sum(bool(case.failure) for case in cases))
    about = {"name": suite, "tests": str(len(cases)), "failures": failures}
    root = ElementTree.Element("testsuites", about)
    inside = ElementTree.SubElement(root, "testsuite", {**about, "errors": "0", "skipped": "0"})
    for case in cases:
        said = [NOT_XML.sub("\ufffd", line) for line in case.said]
        test = ElementTree.SubElement(inside, "testcase", name=case.name, classname=suite)
        if case.failure:
            given = {"type": case.failure, "message": said[0] if said else case.name}
            ElementTree.SubElement(test, "failure", given).text = "\n".join(said)
        elif said:
            ElementTree.SubElement(test, "system-out").text = "\n".join(said)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def alert_cases(findings: Sequence[Finding]) -> list[Case]:
    """An alert is a test that fails where it spoke, of the severity of its findings."""
    cases = []
    for name in alerts:
        mine = [finding for finding in findings if finding.name == name]
        said = [f"{f.module or 'the adapter'}: {f.message}. {f.action}" for f in mine]
        severity = "fail" if any(f.severity == "fail" for f in mine) else "warn"
        cases.append(Case(name, severity if mine else "", said))
    return cases


def gate_cases(report: "Report") -> list[Case]:
    """A gate is a test; one that only warns passes, as the exit code does."""
    cases = [
        Case(
            gate.name,
            "fail" if gate.verdict == "fail" else "",
            [f"{gate.verdict}: {gate.sentence}"],
        )
        for gate in report.gates
    ]
    status = (report.certificate or {}).get("status")
    if status:
        failed = status in ("refused", "invalid")
        cases.append(Case("certificate", "fail" if failed else "", [f"certificate: {status}"]))
    return cases


def write_alerts(
    report: "LoRAReport", adapter: Path, sarif_file: Path | None, junit_file: Path | None
) -> None:
    if sarif_file:
        log = sarif(report.alerts, adapter.as_posix())
        write(sarif_file, (json.dumps(log, indent=2, allow_nan=False) + "\n").encode())
    if junit_file:
        write(junit_file, junit("mlx-lora spectrum", alert_cases(report.alerts)))


def refuse(*files: Path | None) -> None:
    """ConfigError, before any work, for files that have no folder or are one file."""
    given = [file for file in files if file]
    problems = [f"{file} is a folder" for file in given if file.is_dir()]
    problems += [f"{file}: there is no such folder" for file in given if not file.parent.is_dir()]
    problems += [f"{given[0]} is named twice"] if len({*given}) < len(given) else []
    if problems:
        raise ConfigError("\n".join(problems), "Name a file in a folder that exists.")


def write(file: Path, content: bytes) -> None:
    try:
        with atomically(file) as part:
            part.write_bytes(content)
    except OSError as error:
        raise RunError(f"cannot write {file}: {error.strerror}") from error
