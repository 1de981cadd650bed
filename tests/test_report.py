"""The page of a run: answers right, hostile text harmless, missing parts named, read aloud."""

import copy
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import LAYERS, SUMMARY, Seen, adapter, changed, documents, save
from typer.testing import CliRunner

from mlx_lora.cli import app
from mlx_lora.errors import RunError
from mlx_lora.report import chart, page, style
from mlx_lora.report.answers import Share, difference
from mlx_lora.report.markup import visible

PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></style></title><svg onload=alert(1)>",
    "javascript:alert(1)",
    "a\x00\x07\x1b[31mb\u202eevil\u2066\ud800\U000e0041",
    "x" * 10_000,
    "&lt;b&gt; {{7*7}} ${HOME} %s",
    "\u00b2",
)
TAGS = "html head meta title link style body header h1 h2 h3 p nav ul li a main section div footer"
TAGS += " details summary table thead tbody tr th td figure figcaption svg line text polyline path"
TAGS += " circle rect i span strong dl dt dd pre code"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return save(folder, documents(folder))


def seen(folder: Path) -> Seen:
    return Seen(page.render(page.of(folder)))


# What it says


def test_a_whole_run_has_every_part_and_its_answers(run):
    found = page.of(run)
    assert not found.missing and not page.problems(found.folder)
    assert list(found.parts) == list(page.PARTS)
    verdicts = {name: answer.verdict for name, answer in found.answers.items()}
    assert verdicts == {
        "finished": "finished", "learned": "yes", "harmless": "pass", "moved": "moved",
        "rank": "trained", "alerts": "some",
    }  # fmt: skip
    text = " ".join(Seen(page.render(found)).text)
    for words in (
        "after 1_sft",
        "accuracy 0.65 after step 5",
        "2.25",
        "37.0%",
        "63.0%",
        "kl is 3",
        "loud",
        "equal to the bit",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("after", "verdict"),
    [((0.63, 0.58, 0.67), "yes"), ((0.40, 0.36, 0.44), "unclear"), ((0.2, 0.17, 0.24), "worse")],
)
def test_learned_is_said_where_the_interval_of_the_gain_says_so(run, tmp_path, after, verdict):
    keys = ("accuracy_after", "accuracy_after_low", "accuracy_after_high")
    summary = {**SUMMARY, **dict(zip(keys, after, strict=True))}
    folder = changed(run, tmp_path / "r", **{"summary.json": summary})
    assert page.of(folder).answers["learned"].verdict == verdict


def test_the_interval_of_a_difference_is_newcombes():
    """56/70 against 48/80, Newcombe 1998, table II, method 10: 0.0524 to 0.3339."""
    found = difference(wilson(48, 80), wilson(56, 70))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def wilson(k: int, n: int) -> Share:
    z, p = 1.959964, k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"state": "running", "step": 4}, "It has not finished"),
        ({"state": "failed", "detail": "OSError: disk full", "step": 4}, "It failed"),
        ({"state": "interrupted", "detail": "stopped by Ctrl-C", "step": 4}, "stopped before"),
        (None, "not known"),
    ],
)
def test_a_run_that_did_not_finish_says_so(run, tmp_path, status, words):
    folder = changed(run, tmp_path / "r", **{"status.json": status, "summary.json": None})
    found = page.of(folder).answers
    assert words in found["finished"].sentence and found["finished"].tone != "good"
    assert found["learned"].sentence.endswith("37.0% to 50.0% at step 5")


def test_supervised_and_unmeasured_runs_say_what_they_know(run, tmp_path):
    losses = {
        "summary.json": {"valid_loss_before": 3.0, "valid_loss": 2.0},
        "eval_before.json": None,
    }
    found = page.of(changed(run, tmp_path / "a", **losses, **{"evals.jsonl": None}))
    assert found.answers["learned"].sentence.startswith("Held-out loss fell: 3 to 2")
    bare = {"summary.json": {}, "eval_before.json": None, "evals.jsonl": None}
    found = page.of(changed(run, tmp_path / "b", **bare))
    assert found.answers["learned"].verdict == "unclear"
    assert "not measured on held-out" in found.answers["learned"].detail


def test_a_check_that_failed_in_training_is_not_harmless(run, tmp_path):
    alert = {"step": 3, "name": "unhealthy", "message": "perplexity", "action": "stop"}
    folder = changed(run, tmp_path / "r", **{"alerts.jsonl": alert})
    found = page.of(folder).answers
    assert (found["moved"].verdict, found["moved"].tone) == ("fail", "bad")
    assert found["harmless"].sentence == "Before training: pass", "which it was"


def test_what_is_not_there_is_named_and_nothing_is_made_up(run, tmp_path):
    for name in documents(tmp_path / "d"):
        if (run / name).is_file() and name not in ("metrics.jsonl",):
            folder = changed(run, tmp_path / name.replace("/", "_"), **{name: None})
            Seen(page.render(page.of(folder)))
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(run / "metrics.jsonl", only)
    found = page.of(only)
    assert set(found.parts) == {"training", "alerts"}
    assert {"The check", "The adapter", "Time", "Settings"} <= set(found.missing)
    assert found.answers["harmless"].verdict == found.answers["rank"].verdict == "unknown"
    text = " ".join(Seen(page.render(found)).text)
    assert all(why in text for why in found.missing.values())


def test_torn_and_foreign_files_are_named(run, tmp_path):
    torn = (run / "metrics.jsonl").read_text() + '{"step": 12, "rew'
    files = {"metrics.jsonl": torn, "check.json": "[1, 2]", "spectrum.json": {"adapters": {"q": 3}}}
    found = page.of(changed(run, tmp_path / "r", **files))
    assert page.problems(found.folder) == [
        "check.json is no JSON object",
        "metrics.jsonl: 1 of 13 lines are torn and left out",
    ]
    assert "not as this version writes it" in found.missing["The adapter"]
    assert found.answers["rank"].verdict == "unknown"


def test_an_adapter_that_is_cut_off_is_named(tmp_path):
    whole, cut = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    file = cut / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert not page.problems(page.of(whole).folder)
    (problem,) = page.problems(page.of(cut).folder)
    assert problem.startswith("adapters.safetensors cannot be read") and "1 bytes after" in problem


def test_an_adapter_is_measured_where_it_has_no_spectrum(tmp_path):
    found = page.of(adapter(tmp_path / "a"))
    assert found.folder.kind == "adapter" and {"ranks", "config"} <= set(found.parts)
    assert "finished" not in found.answers and found.answers["rank"].verdict == "trained"
    assert "base is not known" in found.missing["Against the base"]


def test_an_adapter_that_wastes_rank_is_told_how_to_shrink(tmp_path):
    """Width 8 holds 8 directions, whatever rank was paid for."""
    for rank, told in ((64, True), (8, False)):
        found = page.of(adapter(tmp_path / str(rank), rank=rank, width=8))
        assert ("mlx-lora shrink" in found.parts["ranks"][1]) == told


def test_a_check_alone_is_a_page(run, tmp_path):
    shutil.copy(run / "check.json", tmp_path)
    found = page.of(tmp_path)
    assert found.folder.kind == "check" and list(found.parts) == ["check"]
    assert found.answers["check"].sentence == "The check says: pass"


def test_stages_have_their_curves_under_their_names(run, tmp_path):
    folder = tmp_path / "staged"
    for name in ("2_grpo", "10_es"):
        shutil.copytree(run, folder / "stages" / name)
    (folder / "status.json").write_text('{"state": "finished"}')
    text = Seen(page.render(page.of(folder))).text
    assert text.index("2_grpo") < text.index("10_es")


@pytest.mark.parametrize("given", ["nothing", "empty", "file"])
def test_what_is_no_folder_to_report_on_is_an_error(tmp_path, given):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"no folder|nothing to report"):
        page.of(tmp_path / given)


# Hostile text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_of_models_and_files_stays_text(tmp_path, payload):
    folder = tmp_path / named("run", payload)
    folder.mkdir()
    planted = poisoned(documents(folder), payload)
    for i, row in enumerate(planted["metrics.jsonl"]):
        row[payload] = 0.5 * i
    stage = named("stages/1_sft", payload)
    planted |= {f"{stage}/{name}": rows for name, rows in planted.items() if "jsonl" in name}
    planted[f"{named('eval_after_1_sft', payload)}.json"] = planted["eval_before.json"]
    save(folder, planted, f"model: {json.dumps(payload)}\nmethod: grpo\n")
    found = page.of(folder)
    written = page.render(found)
    refuse_anything_but_our_own(written)
    assert not page.problems(found.folder) and {"ranks", "dynamics", "held-out"} <= set(found.parts)
    shown = "".join(Seen(written).text)
    keys = [payload, *(f"{key}{payload}" for key in ("q_proj", "wrong_value", "mlx"))]
    assert all(visible(key) in shown for key in keys)
    assert len(written.encode("utf-8")) < 2_000_000


def named(path: str, payload: str) -> str:
    """A path whose last part says the payload as far as a file system lets it."""
    kept = payload.replace("/", "∕").replace("\0", "").encode("utf-8", "ignore")[:100]
    return path + kept.decode("utf-8", "ignore")


def hostile(key: str, payload: str) -> str:
    """Names of things are keys too: of modules, of reasons, of versions."""
    if key == LAYERS[-1]:
        return payload
    return f"{key}{payload}" if key in (*LAYERS, "correct", "wrong_value", "mlx") else key


def poisoned(value, payload: str):
    """Every text and every key that is a name of a thing, replaced."""
    if isinstance(value, dict):
        return {hostile(k, payload): poisoned(v, payload) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v, payload) for v in value]
    keep = ("pass", "finished", "trained", "step", "unaccounted", "exact")
    return payload if isinstance(value, str) and value not in keep else value


def refuse_anything_but_our_own(written: str) -> None:
    found = Seen(written)
    assert set(found.tags) <= set(TAGS.split())
    assert not [n for _, n, _ in found.attributes if n.startswith("on") or n in ("src", "style")]
    assert all(v == "data:," or v.startswith("#") for v in found.values("href"))
    body = "".join(found.text)
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", body
    )
    assert not re.search(r"https?://|url\(|@import", written)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(PAYLOADS)
    | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=15)
@given(data=st.data())
def test_any_value_anywhere_makes_a_sound_page(made, data):
    folder, whole = made
    name = data.draw(st.sampled_from(sorted(whole)))
    document, path = copy.deepcopy(whole[name]), []
    spot = document
    while isinstance(spot, dict | list) and spot and (not path or data.draw(st.booleans())):
        key = data.draw(
            st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot)))
        )
        path.append((spot, key))
        spot = spot[key]
    owner, key = path[-1]
    owner[key] = data.draw(ANY)
    save(folder, {name: document})
    try:
        refuse_anything_but_our_own(page.render(page.of(folder)))
    finally:
        save(folder, {name: whole[name]})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    whole = documents(folder)
    return save(folder, whole), whole


def test_languages_that_need_their_marks_keep_them():
    family, persian = (
        "\U0001f469\u200d\U0001f467",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    )
    assert visible(family) == family and visible(persian) == persian


# For everybody


def test_headings_tables_and_pictures_can_be_read_aloud(run):
    found = seen(run)
    levels = [int(t[1]) for t in found.tags if re.fullmatch(r"h\d", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    by_tag = {t: [(n, v) for tag, n, v in found.attributes if tag == t] for t in ("svg", "th")}
    count = found.tags.count
    named = [v for n, v in by_tag["svg"] if n in ("aria-label", "aria-hidden")]
    assert len(named) == count("svg") and all(named)
    assert [n for n, _ in by_tag["th"]].count("scope") == count("th")
    ids = found.values("id")
    assert len(set(ids)) == len(ids)
    assert {v[1:] for v in found.values("href") if v.startswith("#")} <= set(ids)
    assert ("html", "lang", "en") in found.attributes


def test_the_page_forbids_scripts_and_the_network_by_itself(run):
    written = page.render(page.of(run))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', written)
    assert policy and policy[1].startswith("default-src &#x27;none&#x27;; style-src &#x27;sha256-")
    assert "unsafe" not in policy[1] and "script-src" not in policy[1]


@pytest.mark.parametrize("colours", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(colours):
    """WCAG 2 AA: a contrast of 4.5 for text, of 3 for lines."""
    behind = [colours[k] for k in ("page", "card", "warn-wash", "bad-wash")]
    assert min(contrast(colours["ink"], b) for b in [*behind, colours["heat"]]) >= 4.5
    for text in ("quiet", "accent", "good", "warn", "bad"):
        assert min(contrast(colours[text], colours[k]) for k in ("page", "card")) >= 4.5, text
    for i in range(8):
        assert contrast(colours[f"c{i}"], colours["card"]) >= 3


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# Charts


def test_a_spike_survives_the_thinning_of_a_long_run():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7_777] = (7_777.0, 9.0)
    kept = chart.thinned(points)
    assert len(kept) <= chart.MOST and (7_777.0, 9.0) in kept


def test_points_lie_where_their_numbers_are():
    frame = chart.Frame((0.0, 10.0), (1.0, 100.0), log=True)
    inner = chart.HEIGHT - chart.TOP - chart.BOTTOM
    assert frame.up(1.0) == chart.HEIGHT - chart.BOTTOM
    assert frame.up(10.0) == pytest.approx(chart.TOP + inner / 2)
    assert frame.across(5.0) == pytest.approx((chart.LEFT + chart.WIDTH - chart.RIGHT) / 2)


# The command


def test_the_command_writes_the_page_beside_the_run_and_one_document(run, tmp_path):
    done = CliRunner().invoke(
        app, ["report", str(run), "--out", str(tmp_path / "x.html"), "--json"]
    )
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["answers"]["learned"]["verdict"] == "yes"
    assert (tmp_path / "x.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0 and (run / "report.html").is_file() and "It learned" in done.stdout
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path)])
    assert done.exit_code == 0 and (tmp_path / "report.html").is_file()


def test_a_run_in_the_home_folder_has_its_page_there(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    changed(run, tmp_path / "r")
    assert CliRunner().invoke(app, ["report", "~/r"]).exit_code == 0
    assert (tmp_path / "r" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 420])
def test_chromium_shows_it_without_a_complaint(run, tmp_path, width):
    page.write(page.of(run), tmp_path / "page.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    size, picture = f"--window-size={width},3000", f"--screenshot={tmp_path / 'page.png'}"
    address = f"file://{tmp_path / 'page.html'}"
    done = subprocess.run(
        [*command, size, picture, address], capture_output=True, text=True, timeout=120
    )
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert not re.findall(r".*(?:CONSOLE|Content Security Policy|Refused).*", done.stderr)
