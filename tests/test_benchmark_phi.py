"""The benchmark of detection: other tools give spans, what is missing is named, every tool and set has a row."""

import math
import sys

import pytest

from medai_nb.benchmark import (
    BASELINES,
    LONG_NOTES,
    benchmark_phi,
    installed_baselines,
    long_notes,
    phi_table,
    plot_phi,
    run_benchmark,
    speed_per_core,
)
from medai_nb.config import UserError
from medai_nb.demo_corpus import Passage
from medai_nb.phi.patterns import PHI_LABELS
from medai_nb.phi.score import EVALUATION_SETS
from medai_nb.phi.train import carriers

PACKAGES = ("presidio_analyzer", "scrubadub", "phileas", "philter_lite")
TEXT = "José Núñez wrote from j.roe@example.com on 3/14/2021; SSN 123-45-6789.\n\nCall 415-555-0134 — thanks."


@pytest.fixture
def nothing_installed(monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def few_texts(monkeypatch):
    """Two texts a set: what a score is made of is tested elsewhere."""
    texts = [
        Passage("Seen by Dr. Kumar on 3/14/2021.", ((12, 17, "NAME"), (21, 30, "DATE"))),
        Passage("No pain.", ()),
    ]
    monkeypatch.setattr("medai_nb.phi.score.evaluation_texts", lambda name: texts)


@pytest.mark.parametrize("tool", BASELINES)
def test_a_baseline_gives_spans_inside_the_text(tool):
    try:
        detect = BASELINES[tool]()
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed: the extra baselines brings it")
    spans = detect(TEXT)
    assert all(0 <= span.start < span.end <= len(TEXT) and span.label in PHI_LABELS for span in spans)
    covered = {offset for span in spans for offset in range(span.start, span.end)}
    address = TEXT.index("j.roe")
    assert {address, address + len("j.roe@")} <= covered
    assert detect("") == [] and detect(" \n ") == []


def test_philter_removes_what_its_own_writer_hides():
    philter_lite = pytest.importorskip("philter_lite", reason="the extra baselines is not installed")
    from importlib import resources
    from unittest import mock

    from textblob.en import parser

    detect = BASELINES["Philter with TextBlob"]()
    filters = philter_lite.load_filters(
        str(resources.files("philter_lite").joinpath("configs/philter_delta.toml"))
    )
    internals = sys.modules["philter_lite.philter"]
    with mock.patch.object(
        internals,
        "_get_pos",
        lambda text: [tuple(pair) for pair in parser.find_tags(internals._get_clean(text))],
    ):
        safe, _, _ = philter_lite.detect_phi(TEXT, filters)
    hidden = list(TEXT)
    for span in detect(TEXT):
        hidden[span.start : span.end] = "*" * (span.end - span.start)
    assert "".join(hidden) == philter_lite.transform_text_asterisk(TEXT, safe)


def test_presidio_asks_no_server_for_domains(monkeypatch):
    pytest.importorskip("presidio_analyzer", reason="the extra baselines is not installed")
    import requests

    def refuse(*args, **kwargs):
        raise AssertionError("a request left the machine")

    monkeypatch.setattr(requests.Session, "send", refuse)
    assert BASELINES["Presidio patterns"]()(TEXT)


def test_without_the_extra_each_tool_is_named_and_the_benchmark_goes_on(nothing_installed, few_texts, capsys):
    results = benchmark_phi(notes=1)
    assert list(results) == ["rules", "rules and model"]
    printed = capsys.readouterr().out
    assert printed.count("pip install 'medai_nb[baselines]'") == len(BASELINES)
    assert all(tool in printed for tool in BASELINES)
    assert all(f"{package} is not installed" in printed for package in PACKAGES)


def test_every_tool_and_set_has_a_row(nothing_installed, few_texts, monkeypatch, capsys):
    monkeypatch.setitem(BASELINES, "a tool", lambda: lambda text: [])
    monkeypatch.setattr("medai_nb.benchmark.long_notes", lambda count, sparse: [Passage("No pain.")] * count)
    lines = run_benchmark("phi")["phi"]
    printed = capsys.readouterr().out
    rows = [
        f"{name}, {tool}"
        for name in [*EVALUATION_SETS, *LONG_NOTES]
        for tool in ("rules", "rules and model", "a tool")
    ]
    header, *names = lines
    assert names == rows and all(row in printed for row in rows)
    assert len({len(line) for line in lines.values()}) == 1, "columns stand below each other"
    assert "0.000" in lines["hard, a tool"] and "[" not in lines["long notes, a tool"]
    # One text with an identifier, and it leaks; one clean text, and it stays as it is.
    assert lines["everyday, a tool"].split()[3:5] == ["1.00", "0.00"]


def test_torch_has_its_threads_back(nothing_installed, few_texts, monkeypatch):
    import torch

    seen = []
    monkeypatch.setattr("medai_nb.benchmark.speed_per_core", lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        benchmark_phi(notes=1)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sparse", LONG_NOTES.values())
def test_long_notes_are_long_and_differ(sparse):
    notes = long_notes(sparse=sparse)
    assert len(notes) == len({note.text for note in notes}) == 60
    assert all(1000 < len(note.text) < 5400 for note in notes)
    assert abs(sum(len(note.text) for note in notes) / 60 - 2700) < 150
    assert notes == long_notes(sparse=sparse), "the same notes for every tool and run"
    with pytest.raises(UserError, match="ask for fewer"):
        long_notes(count=10_000, sparse=sparse)


def test_joined_notes_keep_their_identifiers():
    values = {passage.text[start:end] for passage in carriers() for start, end, _ in passage.spans}
    for note in long_notes():
        assert {note.text[start:end] for start, end, _ in note.spans} <= values
    few, many = (sum(len(note.spans) for note in long_notes(sparse=sparse)) / 60 for sparse in (True, False))
    assert 1 < few < 10 < many


def test_speed_is_notes_and_bytes_over_the_same_time():
    speed = speed_per_core(["é" * 500] * 40, lambda text: [text.upper() for _ in range(2000)])
    assert speed["megabytes_per_second"] == pytest.approx(speed["notes_per_second"] * 1000 / 1e6)
    assert 0 < speed["notes_per_second"] < math.inf


def test_the_plot_has_a_panel_for_each_marked_set():
    share = {"value": 0.5, "low": 0.4, "high": 0.7}
    score = {
        "recall": share,
        "clean_touched": {"value": 1.0, "low": 0.9, "high": 1.0},
        "leaking_documents": share,
        "notes_per_second": 10.0,
        "megabytes_per_second": 0.1,
    }
    speed = {"notes_per_second": 10.0, "megabytes_per_second": 0.1}
    results = {
        tool: {"everyday": score, "hard": score, "long notes": speed} for tool in ("rules", *BASELINES)
    }
    figure = plot_phi(results)
    assert [axes.get_title() for axes in figure.axes] == ["everyday", "hard"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(results)
    assert len(phi_table(results)) == 1 + 3 * len(results)


def test_installed_baselines_are_some_of_all():
    assert set(installed_baselines()) <= set(BASELINES)
