"""SARIF and JUnit hold what their readers demand, whatever the findings say."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_lora.adapter import files
from mlx_lora.adapter.attach import attach, lora_layers
from mlx_lora.cli import app
from mlx_lora.errors import ConfigError, RunError
from mlx_lora.spectral import ci_files
from mlx_lora.spectral.alerts import alerts
from mlx_lora.spectral.ci_files import Case, junit, sarif
from mlx_lora.types import Finding
from tests.tiny import tiny

MODULE = "model.layers.0.self_attn.q_proj"
FINDINGS = [
    Finding("dominance_warning", MODULE, 'dominance 0.40, "above" <0.30> & more', "Watch it."),
    Finding("non_finite", "", "NaN \x18 in it", "Go back.", "fail"),
]


def parsed(data: bytes) -> ElementTree.Element:
    root = ElementTree.fromstring(data)
    assert data.startswith(b"<?xml") and root.tag == "testsuites"
    (suite,) = root
    tests = suite.findall("testcase")
    assert int(suite.attrib["tests"]) == len(tests) == int(root.attrib["tests"])
    failed = [test for test in tests if test.find("failure") is not None]
    assert int(suite.attrib["failures"]) == len(failed) == int(root.attrib["failures"])
    assert all({"name", "classname"} <= test.attrib.keys() for test in tests)
    return suite


def test_a_sarif_log_has_what_the_standard_requires():
    log = json.loads(json.dumps(sarif(FINDINGS, "runs/my run/adapters"), allow_nan=False))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("/sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] == "mlx-lora"
    assert [rule["id"] for rule in rules] == list(alerts)
    assert all(rule["shortDescription"]["text"].endswith(".") for rule in rules)
    for result, finding in zip(run["results"], FINDINGS, strict=True):
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == finding.name
        assert finding.message in result["message"]["text"]
        (where,) = result["locations"]
        assert where["physicalLocation"]["artifactLocation"]["uri"] == "runs/my%20run/adapters"
    first, second = run["results"]
    assert (first["level"], second["level"]) == ("warning", "error")
    (place,) = first["locations"][0]["logicalLocations"]
    assert place == {"fullyQualifiedName": MODULE, "kind": "module"}
    assert "logicalLocations" not in second["locations"][0]


def test_a_log_without_findings_says_that_there_were_none():
    assert sarif([], "a")["runs"][0]["results"] == []


def test_a_junit_file_is_sound_xml_whatever_is_said():
    suite = parsed(junit("s", ci_files.alert_cases(FINDINGS)))
    assert [test.attrib["name"] for test in suite] == list(alerts)
    told = {t.attrib["name"]: f for t in suite if (f := t.find("failure")) is not None}
    assert told.keys() == {"dominance_warning", "non_finite"}
    assert told["dominance_warning"].attrib["type"] == "warn"
    assert told["non_finite"].attrib["type"] == "fail"
    assert f'{MODULE}: dominance 0.40, "above" <0.30> & more' in told["dominance_warning"].text
    assert "NaN \ufffd in it" in told["non_finite"].text, "what XML cannot hold is replaced"
    (passed,) = parsed(junit("s", [Case("a", "", ["all is well"])]))
    assert passed.find("system-out").text == "all is well"


def test_check_writes_its_gates(tmp_path):
    wrong = ["--init", "gaussian", "-o", "std=0.3", "--keys", "q_proj,v_proj"]
    file = tmp_path / "check.xml"
    done = CliRunner().invoke(app, ["check", "demo", *wrong, "--junit", str(file), "--json"])
    verdicts = {gate["name"]: gate["verdict"] for gate in json.loads(done.stdout)["gates"]}
    suite = parsed(file.read_bytes())
    failed = {t.attrib["name"] for t in suite if t.find("failure") is not None}
    assert done.exit_code == 1
    assert failed == {name for name, verdict in verdicts.items() if verdict == "fail"} != set()
    assert [test.attrib["name"] for test in suite] == list(verdicts)


def test_a_certificate_is_a_case(monkeypatch):
    class Checked:
        gates = ()
        certificate = {"status": "invalid"}  # noqa: RUF012

    assert [(c.name, c.failure) for c in ci_files.gate_cases(Checked())] == [
        ("certificate", "fail")
    ]


@pytest.fixture
def narrow(tmp_path):
    """An adapter that uses one of its 8 ranks."""
    model = tiny()
    config = attach(model, keys=["q_proj"], init="gaussian")
    for layer in lora_layers(model).values():
        b = np.array(layer.lora_b)
        b[1:] *= 1e-3
        layer.lora_b = type(layer.lora_b)(b)
    files.save(model, config, tmp_path / "narrow")
    return tmp_path / "narrow"


def test_spectrum_writes_its_alerts(narrow, tmp_path):
    out = {kind: tmp_path / f"a.{kind}" for kind in ("sarif", "junit")}
    options = [text for kind, file in out.items() for text in (f"--{kind}", str(file))]
    done = CliRunner().invoke(app, ["spectrum", str(narrow), *options, "--json"])
    assert done.exit_code == 0
    told = [(a["name"], a["module"]) for a in json.loads(done.stdout)["alerts"]]
    (run,) = json.loads(out["sarif"].read_text())["runs"]
    places = [r["locations"][0]["logicalLocations"][0] for r in run["results"]]
    found = [r["ruleId"] for r in run["results"]]
    assert list(zip(found, [p["fullyQualifiedName"] for p in places], strict=True)) == told != []
    suite = parsed(out["junit"].read_bytes())
    assert {t.attrib["name"] for t in suite if t.find("failure") is not None} == set(found)


def test_files_that_cannot_be_are_refused_before_any_work(narrow, tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        ci_files.refuse(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        ci_files.refuse(tmp_path / "x" / "y", None)
    with pytest.raises(ConfigError, match="twice"):
        ci_files.refuse(tmp_path / "y", tmp_path / "y")
    done = CliRunner().invoke(app, ["spectrum", str(narrow), "--sarif", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    done = CliRunner().invoke(app, ["check", "nowhere", "--junit", str(tmp_path)])
    assert isinstance(done.exception, ConfigError)
    with pytest.raises(RunError, match="cannot write"):
        ci_files.write(tmp_path / "gone" / "f", b"")


def test_spectrum_says_what_it_wrote_and_how_to_learn_dominance(narrow, tmp_path):
    done = CliRunner().invoke(
        app, ["spectrum", str(narrow), "--out", str(tmp_path / "o"), "--no-plots"]
    )
    assert f"Wrote spectrum.json to {tmp_path / 'o'}." in done.stdout
    assert "give --model" in done.stdout
