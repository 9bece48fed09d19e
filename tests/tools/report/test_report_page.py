"""The page of the report: figures of the JSON, nothing loaded, no markup from a model's names; and stored reports."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import REASON, a_norm, a_result, a_step, printed_report

from browser import CHROMIUM, Browser, browser
from rmsnorm.patching.patch_report import Verdict
from rmsnorm.spec import Gate, Spec
from rmsnorm.tools.cli import main
from rmsnorm.tools.report import page
from rmsnorm.tools.report.norms import NormResult, Pair
from rmsnorm.tools.report.prediction import CopyLine
from rmsnorm.tools.report.result import Compilation, CompiledStep, ReportResult
from scripts import FOLDER

VOID = {"meta", "link", "br"}
TAGS = VOID | {
    "html", "head", "title", "style", "body", "main", "header", "section", "div", "h1", "h2", "h3", "p", "span", "b", "i",
    "u", "s", "data", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "details", "summary", "svg", "line",
    "text", "polyline", "circle", "rect",
}  # fmt: skip
H200 = {"name": "NVIDIA H200", "driver": "580"}
COPIES = CopyLine(((1 << 16, 9e-6), (1 << 20, 4e-5), (1 << 24, 5e-4)))


class Parsed(HTMLParser):
    """The elements of a page: tags and attributes, the text of each `data` element, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.figures: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag == "data":
            self.figures.append((found["data-path"], found["data-as"], ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] == "data":
            path, as_, text = self.figures[-1]
            self.figures[-1] = (path, as_, text + data)


def check_figures(content: Any, figures: list[tuple[str, str, str]]) -> None:
    """Each figure is the value of the JSON at its path, and each value of the JSON is there."""
    for path, as_, text in figures:
        assert text == page.FORMATS[as_](page.at(content, path)), path
    assert {path for path, *_ in figures} == set(page.leaves(content))


def times(forward: float = 5e-5) -> dict[Any, Pair]:
    return {"forward": Pair(6 * forward, forward), "training": Pair(3e-3, 4e-4), "token": Pair(3e-5, 2e-6)}


def a_timed_norm(name: str, **more: Any) -> NormResult:
    return a_norm(
        name, times(), **{"rows": 2048, "width": 1280, "dtype": "bfloat16", "weight_dtype": "bfloat16"} | more
    )


def a_measured_result(**changes: Any) -> ReportResult:
    gated = replace(a_timed_norm("gated"), verdict=Verdict("AGatedNorm", Spec(gate=Gate(), groups=2), name="gated"))
    norms = (*(a_timed_norm(f"layers.{i}.norm", changed=i, ulp=2) for i in range(5)), gated, *a_result().norms)
    return a_result(**{"norms": norms, "copy": COPIES} | changes)


def a_compiled_result() -> ReportResult:
    step = a_step(*(0.01 * i for i in range(9)))
    steps = tuple(CompiledStep("forward", side, 12.5, 1) for side in ("before", "after", "unfused"))
    return a_measured_result(compilation=Compilation(steps, {"forward": step}))


def of_the_h200() -> ReportResult:
    """A stored report of an older version."""
    file = FOLDER / "results" / "report-cuda.json"
    if not file.exists():
        pytest.skip("benchmarks/results/ is not here: this is not the repository")
    return ReportResult.from_json(json.loads(file.read_text()))


def unmeasured() -> ReportResult:
    nothing = dict.fromkeys(("forward", "training", "saved", "peak", "peak_bytes"))
    return a_result(norms=a_result().norms[2:], **nothing)


def without_norms() -> ReportResult:
    return replace(unmeasured(), norms=())


RESULTS = [a_measured_result, a_compiled_result, of_the_h200, unmeasured, without_norms]


@pytest.mark.parametrize("make", RESULTS, ids=lambda make: make.__name__)
def test_every_value_of_the_json_is_on_the_page_as_it_is(make: Callable[[], ReportResult]) -> None:
    result = make()
    check_figures(result.to_json(), Parsed(page.html(result)).figures)


@pytest.mark.parametrize("make", RESULTS, ids=lambda make: make.__name__)
def test_the_page_loads_nothing_and_runs_nothing(make: Callable[[], ReportResult]) -> None:
    text = page.html(make())
    assert len(text.encode()) < 1_000_000
    assert text.startswith("<!doctype html>")
    for tag, attributes in Parsed(text).elements:
        assert tag in TAGS | {"circle", "rect"}, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "action", "poster"), name
            assert name != "href" or value == "data:,", value
    assert not re.search(r"url\(|@import|expression\(", text)
    assert "default-src 'none'" in text


def test_the_page_gives_the_answer_first_and_draws_every_norm() -> None:
    result = a_measured_result()
    parsed = Parsed(page.html(result))
    text = " ".join(" ".join(parsed.texts).split())
    for line in printed_report(result).splitlines()[:3]:
        assert line in text
    assert REASON.strip() in text
    marks = [
        attributes for tag, attributes in parsed.elements if tag in ("circle", "rect") and "data-norm" in attributes
    ]
    # Two drawings, one for narrow windows; forward and forward with backward; before and after.
    assert len(marks) == 2 * 2 * 2 * 5
    assert {mark["data-norm"] for mark in marks} == set("01234")
    pairs = [attributes["data-pair"] for _, attributes in parsed.elements if "data-pair" in attributes]
    assert len(pairs) == 2 * 7
    assert "a copy of as many bytes" in text
    assert "No copy was measured" not in text
    assert "No copy was measured" in page.html(a_measured_result(copy=None, facts=result.facts | {"gpu": H200}))


def test_marks_of_the_roofline_are_where_bytes_and_times_put_them() -> None:
    result = a_measured_result()
    drawing = page.roofline(result.to_json(), 760, 420)
    assert drawing is not None
    one = {(m.side, m.mode): m for m in drawing.marks if m.norm == 0}
    ours, own = one["after", "forward"], one["before", "forward"]
    assert ours.x == own.x  # the same bytes
    # Six times as slow, and between two ticks of the speed that are ten times apart, on a logarithmic scale.
    ticks = {words: y for y, words in drawing.up}
    (slow, fast) = next((a, b) for a, b in (("10 GB/s", "100 GB/s"), ("1 GB/s", "10 GB/s")) if {a, b} <= set(ticks))
    decade = ticks[slow] - ticks[fast]
    assert (own.y - ours.y) / decade == pytest.approx(0.778, abs=0.002)
    assert all(0 < m.x < 760 and 0 < m.y < 420 for m in drawing.marks)


HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{ 7 * 7 }}\x00\x1b[31m\u202e&amp;"


def a_hostile_result() -> ReportResult:
    """A model whose names, classes and reasons are markup."""
    base = a_measured_result()
    left = NormResult(Verdict(f"{HOSTILE}Norm", reason=HOSTILE, name=HOSTILE), None)
    proven = replace(a_timed_norm("x"), verdict=Verdict(HOSTILE, Spec(), name=f"{HOSTILE}.norm"))
    facts = base.facts | {"cpu": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    return replace(
        base, target=HOSTILE, norms=(left, proven), notes=(HOSTILE,), facts=facts, model=base.model | {"class": HOSTILE}
    )


def test_names_of_a_model_are_text_and_never_markup() -> None:
    text = page.html(a_hostile_result())
    parsed = Parsed(text)
    assert {tag for tag, _ in parsed.elements} <= TAGS
    assert all(not name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    assert "{{ 7 * 7 }}" in text
    assert not any(character in text for character in "\x00\x1b\u202e")
    shown = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert sum(shown in data for data in parsed.texts) > 5


def test_a_page_of_very_many_norms_stays_below_a_megabyte() -> None:
    many = tuple(a_timed_norm(f"model.layers.{i}.self_attn.a_norm", rows=2048 + i % 3) for i in range(1500))
    text = page.html(a_measured_result(norms=many))
    assert len(text.encode()) < 1_000_000
    assert "There are 1500 norms: the table lists the first of each kind" in " ".join(text.split())
    few = tuple(a_timed_norm(f"model.layers.{i}.self_attn.a_norm") for i in range(page.LISTED))
    text = page.html(a_measured_result(norms=few))
    assert len(text.encode()) < 1_000_000
    assert text.count('class="name"') == page.LISTED
    drawn = tuple(a_timed_norm(f"model.layers.{i}.self_attn.a_norm") for i in range(1000))
    text = page.html(a_measured_result(norms=drawn))
    assert len(text.encode()) < 1_000_000
    assert text.count('data-norm="999"') == 2 * 4


# --- stored reports ------------------------------------------------------------------------------------------


def rounded(content: Any) -> Any:
    """The JSON with its floats to nine digits: what was divided by a million is multiplied by it again."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return float(f"{content:.9g}") if isinstance(content, float) else content


@pytest.mark.parametrize("make", RESULTS, ids=lambda make: make.__name__)
def test_a_stored_report_is_the_one_that_was_measured(make: Callable[[], ReportResult]) -> None:
    content = make().to_json()
    again = ReportResult.from_json(json.loads(json.dumps(content)))
    assert rounded(again.to_json()) == rounded(content)
    assert printed_report(again) == printed_report(make())


def test_from_prints_a_stored_report_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "report.json"
    stored.write_text(json.dumps(a_measured_result().to_json()))
    with pytest.raises(SystemExit) as end:
        main(["report", "--from", str(stored), "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "8 of 9 norms are proven and replaced" in printed
    assert printed.splitlines()[-1] == f"wrote {tmp_path / 'out' / 'report.html'}"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.html"]
    check_figures(
        ReportResult.from_json(json.loads(stored.read_text())).to_json(),
        Parsed((tmp_path / "out" / "report.html").read_text()).figures,
    )


def broken(**changes: Any) -> str:
    return json.dumps(a_measured_result().to_json() | changes)


def damaged(*path: str | int, **changes: Any) -> str:
    """A stored report with other values at this place."""
    content = json.loads(json.dumps(a_measured_result().to_json()))
    place: Any = content
    for key in path:
        place = place[key]
    place.update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "give the report.json of a run"),
        ("[]", "give the report.json of a run"),
        ('{"verb": "bench"}', "give the report.json of a run"),
        ("[" * 100_000, "give the report.json of a run"),
        (broken(norms=[{}]), "give the report.json of a run"),
        (broken(norms=None), "give the report.json of a run"),
        (broken(machine={}), "give the report.json of a run"),
        (broken(forward_step={"rounds_us": [["a", "b"]]}), "give the report.json of a run"),
        (damaged("machine", commit=-1), "give the report.json of a run"),
        (damaged("model", tokens="many"), "give the report.json of a run"),
        (damaged("model", parameters=[]), "give the report.json of a run"),
        (damaged("norms", 0, name=1.5), "give the report.json of a run"),
        (damaged("norms", 0, name=None), "give the report.json of a run"),
        (None, "No such file"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["report", "--from", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["deepseek-ocr"], ["--from", "x.json"]], ids=" ".join)
def test_a_missing_jinja2_is_reported_before_the_work(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("rmsnorm.tools.models.library.import_transformers", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments, "--out", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == "rmsnorm: report.html needs jinja2: pip install jinja2"


@pytest.mark.parametrize(
    "option", [["folder"], ["--device", "cpu"], ["--tokens", "5"], ["--seconds", "9"], ["--compile"]]
)
def test_from_takes_no_option_of_a_measurement(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", "--from", "x.json", *option])
    assert end.value.code == 2
    assert "--from measures nothing" in capsys.readouterr().err


# --- in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="chromium")
def chromium_fixture() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page is not opened in a browser")
    with browser() as found:
        yield found


def test_requests_and_messages_of_a_page_are_noticed(chromium: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<img src='missing.png'><script>console.error('x'); undefined_name()</script>")
    chromium.open(file, 1280)
    assert chromium.requests == [file.as_uri(), (tmp_path / "missing.png").as_uri()]
    assert len(chromium.console) >= 2


@pytest.mark.parametrize("make", [a_compiled_result, of_the_h200, a_hostile_result], ids=lambda make: make.__name__)
def test_a_browser_shows_the_figures_requests_nothing_and_has_nothing_to_say(
    make: Callable[[], ReportResult], chromium: Browser, tmp_path: Path
) -> None:
    result = make()
    file = tmp_path / "report.html"
    file.write_text(page.html(result), encoding="utf-8")
    content = result.to_json()
    for width, scheme, media in ((390, "light", "screen"), (1280, "dark", "screen"), (800, "dark", "print")):
        chromium.open(file, width, scheme=scheme, media=media)
        assert chromium.requests == [file.as_uri()]
        assert chromium.console == []
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width
        found = chromium.evaluate(
            "[...document.querySelectorAll('data')].map(e => [e.dataset.path, e.dataset.as, e.textContent])"
        )
        if make is not a_hostile_result:  # whose paths have control characters, which the page escapes
            check_figures(content, [tuple(figure) for figure in found])
        shown = chromium.evaluate(
            "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width).length"
        )
        assert shown == 1
        colors = chromium.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        light_text, light_page = (sum(map(int, re.findall(r"\d+", color))) > 3 * 128 for color in colors)
        assert (light_text, not light_page) == ((scheme, media) == ("dark", "screen"),) * 2  # paper is light
