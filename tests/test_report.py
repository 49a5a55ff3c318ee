"""Reports of a profile: the numbers add up, strangers' strings are shown and not obeyed, a browser has no complaint."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from npulab import api, cli
from npulab.cli.plan_options import Channels, parse_settings, plan_options
from npulab.cli.profile import profile as profile_verb
from npulab.errors import UsageError
from npulab.profiling.join import as_data
from npulab.profiling.types import TERMS, Span, span_ns
from npulab.report import figures
from npulab.report.chrome_trace import CHIP, PROGRAM, to_json, to_trace
from npulab.report.html import to_html
from npulab.report.terminal import print_profile
from npulab.targets.target import PlanOptions
from profiles import CONSTANTS, profile, row
from shared import MODELS, needs_shared

DIGITS = Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples" / "digits.tflite"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium on the path")

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e\ud800\n`${1}"
EMPTY = profile(spans=(), rows=(), interval_ns=(0, 0), decisions=(), features={})
TIMES = st.dictionaries(st.sampled_from(TERMS), st.integers(0, 10**9))


# figures


@given(TIMES)
def test_what_a_span_is_charged_for_adds_up_to_its_time(terms):
    assert sum(figures.charged(terms).values()) == span_ns(terms)


def test_of_what_overlaps_the_longest_is_charged_for_and_weights_share_dram_with_activations():
    terms = {"macs": 7, "weights": 5, "activations": 4, "sram": 8, "launch": 3}

    assert figures.charged(terms) == {"weights": 5, "activations": 4, "launch": 3}
    assert figures.charged(terms | {"macs": 10}) == {"macs": 10, "launch": 3}


@given(st.lists(st.integers(0, 10**12), max_size=30), st.integers(0, 10**7))
def test_apportioned_parts_add_up_and_none_is_off_by_one(parts, whole):
    found = figures.apportion(parts, whole)

    assert sum(found) == (whole if sum(parts) else 0)
    assert all(abs(f - Fraction(p * whole, sum(parts))) < 1 for f, p in zip(found, parts, strict=True) if sum(parts))


@given(st.integers(0, 10**14), st.integers(0, 3))
def test_milliseconds_are_rounded_half_up(ns, digits):
    exact = (Decimal(ns) / 10**6).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)

    assert figures.ms(ns, digits) == str(exact)


@pytest.mark.parametrize(("value", "unit", "text"), [
    (4e9, "B/s", "4 GB/s"), (8e8, "Hz", "800 MHz"), (5.5e-6, "s", "5.5 us"), (0.44, "", "0.44"), (90, "s", "90 s"),
    (2500, "s", "2500 s"), (0, "B/s", "0 B/s"), (999.99, "B", "1 kB"), (3072, "MAC", "3072 MAC"), (2e-9, "s", "2 ns"),
    (6.35e9, "MAC/s", "6.35 GMAC/s"), (3.9356e9, "B/s", "3.936 GB/s"), (1e-12, "s", "0.001 ns"),
])
def test_quantities_are_said_in_the_unit_a_person_would_take(value, unit, text):
    assert figures.quantity(value, unit) == text


def test_the_parts_of_a_row_add_up_to_it_and_the_rows_to_the_program():
    p = profile()
    parts = figures.row_parts(p)

    assert [sum(x.values()) for x in parts] == [r.ns for r in p.rows]
    assert parts[0] == {"activations": 75_000 + 138_250, "tp": 0, "launch": 11_000} | {
        "tp": 90_000, "activations": 137_500, "weights": 750}, "a TP job that TP bounds and an NN job that DRAM bounds"
    assert sum(figures.by_cost(p).values()) == p.total_ns
    assert figures.by_cost(p) == figures.total(parts)


def test_a_row_without_spans_of_its_own_is_charged_by_its_terms():
    span = Span("nn", "shared", (0, 1), 0, 0, {"macs": 10, "launch": 4})
    half = replace(row(1, "ADD", [span]), ns=7, terms={"macs": 5, "launch": 2})

    assert figures.row_parts(profile(spans=(span,), rows=(half,))) == [{"macs": 5, "launch": 2}]
    more = replace(half, ns=9)
    assert figures.row_parts(profile(spans=(span,), rows=(more,))) == [{"macs": 7, "launch": 2}]


def test_the_first_rows_are_the_fewest_that_make_their_share():
    p = profile()
    chosen = figures.first_rows(p)
    ns = sorted((p.rows[i].ns for i in chosen), reverse=True)

    assert sum(ns) >= 0.95 * p.total_ns > sum(ns) - ns[-1]
    assert min(ns) >= max(r.ns for i, r in enumerate(p.rows) if i not in chosen)
    assert figures.first_rows(EMPTY) == set()


@given(st.lists(TIMES, max_size=12))
def test_a_resource_is_busy_for_its_terms_within_the_span_and_does_one_thing_at_a_time(terms):
    p = profile(spans=tuple(Span("nn", str(i), (0,), 0, i, t) for i, t in enumerate(terms)))
    found = list(figures.busy(p))
    starts = [sum(s.ns for s in p.spans[:i]) for i in range(len(p.spans))]

    for b in found:
        i = int(b.span.name)
        assert b.ns == b.span.terms[b.term]
        assert starts[i] <= b.start
        assert b.start + b.ns <= starts[i] + b.span.ns
    assert len(found) == sum(n > 0 for t in terms for n in t.values())
    for lane in figures.LANES:
        mine = sorted((b.start, b.start + b.ns) for b in found if b.lane == lane)
        assert all(a[1] <= b[0] for a, b in pairwise(mine))


# terminal


def said(capsys, p, everything=False):
    print_profile(p, everything)
    return capsys.readouterr().out


def rows_of(text):
    """(operator, ms, %) of the main table's lines, without the continuations of long names."""
    body = text.split("  use\n")[1].split("\n\n")[0]
    found = re.findall(r"^ {0,4}\d* *(\S.*?)  +(?:[a-z+]+ +)?(\d+\.\d+) +(\d+\.\d)(?= |$)", body, re.M)
    return [(name, Decimal(ms), Decimal(share)) for name, ms, share in found]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 13, 60])
def test_printed_rows_add_up_to_the_printed_total(capsys, blocks, everything):
    p = profile(blocks)
    text = said(capsys, p, everything)
    *rows, whole = rows_of(text)

    assert whole[0] == "all"
    assert sum(r[1] for r in rows) == whole[1]
    assert whole[1] == Decimal(figures.ms(p.total_ns, figures.digits_for(p.total_ns)))
    assert sum(r[2] for r in rows) == whole[2] == 100
    assert len(rows) == (len(p.rows) if everything else len(figures.first_rows(p)) + 1)
    assert any(name.startswith("and ") for name, *_ in rows) != everything


@pytest.mark.parametrize("p", [profile(), profile(60), EMPTY, profile(model=HOSTILE, witness="w " * 60, title=HOSTILE),
                               profile(options={"no-zero-runs": "on", "channels": "multiple-of-cores"})])
def test_text_fits_eighty_columns(capsys, p):
    assert max(len(line) for line in said(capsys, p, True).splitlines()) <= 80


def test_the_headline_says_time_interval_bounds_and_bytes(capsys):
    p = profile(options={"no-zero-runs": "on", "channels": "multiple-of-cores", "clock": "1e+09"},
                constants=(CONSTANTS[0], replace(CONSTANTS[1], value=1e9, state="set")))
    lines = said(capsys, p).splitlines()

    assert lines[0] == "hand for a311d, plan best (no-zero-runs, channels multiple-of-cores)"
    assert lines[1] == "what if   clock = 1 GHz"
    assert lines[2] == "time      9.095 ms, expected between 8.185 and 10.004 ms; modelled"
    assert lines[3].startswith("bound by  weight bytes from DRAM 46 %, activation bytes from DRAM 38 %, host CPU")


def test_the_host_is_marked_as_modelled_and_every_constant_says_what_stands_behind_it(capsys):
    text = said(capsys, profile())

    assert ("The host's 0.940 ms are modelled from a record of one Cortex-A73 core, a factor\nof two either way."
            in text)
    for line in ("dram_bandwidth     4 GB/s  fitted: published latencies, docs/timing.md",
                 "clock             800 MHz  inferred: the 5 TOPS that the chip is sold with",
                 "launch             5.5 us  fitted: published latencies",
                 "feature   tile-order: inferred; no recorded stream of a driver shows it",
                 "1      weights resident in SRAM"):
        assert line in text
    assert "host's" not in said(capsys, EMPTY)


def test_what_each_resource_would_save_is_the_profile_without_its_term(capsys):
    p = profile()
    text = said(capsys, p).split("all else stayed:\n")[1]

    for term, name in (("weights", "weight bytes from DRAM"), ("launch", "starting the job"), ("tp", "TP cores")):
        shorter = sum(span_ns({t: n for t, n in s.terms.items() if t != term}) for s in p.spans)
        assert re.search(rf"^{name} +{re.escape(figures.ms(p.total_ns - shorter))} ", text, re.M)


def test_equal_decisions_are_one_line(capsys):
    first = replace(profile().decisions[0], choice="resident", instead="read again")
    text = said(capsys, profile(decisions=(first, replace(first, node=2), replace(first, node=9))))

    assert re.search(r"^1-2, 9 +resident +read again +0\.360  witnessed$", text, re.M)


# page


class Page(html.parser.HTMLParser):
    """Tags in order, checked to nest; the text of each table; every attribute."""

    VOID = frozenset({"meta", "link", "line", "path", "rect"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag == "td" or tag == "th":
            self.cells.append("")
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text += data
        if self.open and ("td" in self.open or "th" in self.open):
            self.cells[-1] += data


def hostile_profile():
    p = profile()
    return replace(
        p, model=HOSTILE, title=HOSTILE, witness=HOSTILE, host=HOSTILE, digest=HOSTILE, plan=HOSTILE, target=HOSTILE,
        options={HOSTILE: HOSTILE}, features={HOSTILE: "inferred"},
        spans=tuple(replace(s, name=HOSTILE) for s in p.spans),
        rows=tuple(replace(r, op=HOSTILE, shape=HOSTILE) for r in p.rows),
        constants=(*(replace(c, source=HOSTILE) for c in p.constants), replace(p.constants[0], name=HOSTILE)),
        decisions=tuple(replace(d, choice=HOSTILE, instead=HOSTILE, feature=HOSTILE) for d in p.decisions))


@pytest.mark.parametrize("p", [profile(), EMPTY, profile(0), profile(60), hostile_profile()])
def test_the_page_nests_and_asks_the_network_for_nothing(p):
    text = to_html(p)
    page = Page(text)

    assert page.tags.count("script") == page.tags.count("style") == 1
    assert {t for t, _, _ in page.attributes} <= {
        "html", "meta", "link", "section", "p", "b", "span", "i", "dl", "ul", "ol", "li", "svg", "line", "rect",
        "circle", "path", "text", "div", "table", "th", "td", "button", "tr"}
    loading = [a for a in page.attributes if a[1] in ("src", "href", "srcset", "action", "data", "xlink:href")]
    assert loading == [("link", "href", "data:,")]
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert ("meta", "content", policy) in page.attributes


def test_strings_of_strangers_are_shown_not_obeyed():
    text = to_html(hostile_profile())

    assert "<img" not in text
    assert not any(c in text for c in "\x1b\u202e\ud800")
    text.encode()
    assert "</script><img src=x onerror=alert(1)>\"'&\\x1b[31m\\u202e\\ud800\\n`${1}" in Page(text).text


def test_the_page_has_its_parts_and_its_table_adds_up():
    p = profile()
    text = to_html(p)
    page = Page(text)
    body = re.search(r'<table class="sortable">.*?<tbody>(.*?)</tbody>', text, re.S)[1]
    times = re.findall(r'<td class="n" data-v="(\d+)">(\d+\.\d+)</td>', body)

    sections = re.findall(r'<section id="(\w+)">', text)
    assert sections == ["costs", "layers", "timeline", "roofline", "rows", "decisions", "constants", "assumptions"]
    assert '<b id="total">9.095 ms</b><small>expected between 8.185 and 10.004 ms</small>' in text
    assert [int(ns) for ns, _ in times] == [r.ns for r in p.rows]
    assert sum(Decimal(t) for _, t in times) == Decimal("9.095")
    for r in p.rows:
        assert r.op in page.cells
    assert "one Cortex-A73 core, a factor of two either way" in page.text
    assert text.count("<circle") == sum(r.macs_useful > 0 for r in p.rows)
    assert text == to_html(p)


def test_the_timeline_and_the_bars_are_to_scale():
    p = profile()
    text = to_html(p)
    lanes = re.search(r'<svg id="lanes".*?</svg>', text, re.S)[0]
    blocks = [float(w) for w in re.findall(r'<rect class="op\d" x="[\d.]+%" width="([\d.]+)%"', lanes)]

    assert blocks == [pytest.approx(100 * s.ns / p.total_ns, abs=1e-3) for s in p.spans]
    for term in ("macs", "tp", "host"):
        widths = re.findall(rf'<rect class="t-{term}" x="[\d.]+%" width="([\d.]+)%"', lanes)
        assert sum(map(float, widths)) == pytest.approx(
            sum(100 * s.terms.get(term, 0) / p.total_ns for s in p.spans), abs=0.05)
    longest = re.search(r'<ol class="bars"><li.*?<span class="bar">(.*?)</span>', text)[1]
    assert sum(map(float, re.findall(r"width:([\d.]+)%", longest))) == pytest.approx(100, abs=0.05)


def test_points_of_the_roofline_lie_where_their_figures_say():
    p = profile()
    text = to_html(p)
    roof = re.search(r'<path class="roof" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)H', text)
    x0, y0, x1, y1 = map(float, roof.groups())
    found = [(float(x), float(y)) for x, y in re.findall(r'<circle class="t-\w+" cx="([\d.]+)" cy="([\d.]+)"', text)]
    points = sorted((r for r in p.rows if r.macs_useful), key=lambda r: -r.ns)
    ridge = p.peak_macs / 4e9
    a, b = points[0], points[-1]
    per_decade = (found[0][0] - found[-1][0]) / math.log10(
        (a.macs_useful / a.dram_bytes) / (b.macs_useful / b.dram_bytes))

    assert x1 - found[0][0] == pytest.approx(per_decade * math.log10(ridge / (a.macs_useful / a.dram_bytes)), abs=0.5)
    slope = (y0 - y1) / (x1 - x0)  # the DRAM line rises by as many decades as it goes right
    for (x, y), r in zip(found, points, strict=True):
        share = r.macs_useful / (r.ns * 1e-9) / (4e9 * r.macs_useful / r.dram_bytes)
        assert y - (y0 - slope * (x - x0)) == pytest.approx(-math.log10(share) * slope * per_decade, abs=0.7)
        assert y >= y0 - slope * (x - x0) - 0.7, "no point is above the roof"


def test_a_page_of_130_rows_takes_less_than_a_second():
    p = profile(63)
    start = time.perf_counter()
    to_html(p)

    assert len(p.rows) >= 130
    assert time.perf_counter() - start < 1


def test_without_a_known_bandwidth_there_is_no_roofline():
    assert 'id="roofline"' not in to_html(profile(constants=()))


def browse(folder, text):
    """(the page as it stands after its script ran, what Chromium has to say about it)."""
    (folder / "page.html").write_text(text)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'user'}", "--dump-dom", (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


@needs_chromium
def test_a_browser_has_no_complaint_and_the_script_runs(tmp_path):
    hand = ("document.querySelectorAll('.sortable th')[4].click();"
            "document.querySelectorAll('.zoom button')[1].click();"
            "document.querySelectorAll('#lanes rect')[2].dispatchEvent(new MouseEvent('mousemove', {bubbles: true}))")
    page = to_html(hostile_profile()).replace("</body>", f"<script>{hand}</script></body>")
    found, complaints = browse(tmp_path, page)
    body = re.search(r'<table class="sortable">.*?<tbody>(.*?)</tbody>', found, re.S)[1]
    times = [int(ns) for ns in re.findall(r'<td class="n" data-v="(\d+)">\d+\.\d+</td>', body)]

    assert complaints == []
    assert times == sorted(times, reverse=True) != [r.ns for r in profile().rows]
    assert sorted(times) == sorted(r.ns for r in profile().rows)
    assert '<p class="zoom">' in found, "the script shows the buttons"
    assert re.search(r'<svg id="lanes"[^>]* width="200%"', found)
    assert re.search(r'<div id="tip" style="[^"]*">0 &lt;/script&gt;&lt;img src=x', found), "shown, and as text"
    assert "<img" not in found


@needs_chromium
def test_a_browser_would_refuse_what_the_page_does_not_hold(tmp_path):
    _, complaints = browse(tmp_path, to_html(profile()).replace(
        "</main>", '<img src="http://127.0.0.1:9/x.png"><script src="http://127.0.0.1:9/x.js"></script></main>'))

    assert len(complaints) >= 2
    assert all("Content Security Policy" in c for c in complaints)


@needs_chromium
def test_the_page_is_whole_without_scripts(tmp_path):
    found, _ = browse(tmp_path, to_html(profile()).replace("script-src 'unsafe-inline'", "script-src 'none'"))

    assert '<p class="zoom" hidden' in found
    assert "<title>1 DEPTHWISE_CONV_2D, " in found


# trace


@pytest.mark.parametrize("p", [profile(), EMPTY, profile(60), hostile_profile()])
def test_a_trace_keeps_the_rules_of_its_format(p):
    trace = json.loads(to_json(p))
    threads = {}

    for event in trace["traceEvents"]:
        assert {"ph", "ts", "pid", "tid", "name"} <= set(event)
        assert event["ph"] in "XMC"
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ts"] >= 0
        if event["ph"] == "X":
            start, ns = (round(event[k] * 1000) for k in ("ts", "dur"))
            assert event["ts"] == start / 1000, "whole nanoseconds"
            threads.setdefault((event["pid"], event["tid"]), []).append((start, start + ns))
    for intervals in threads.values():
        intervals.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(intervals))
    named = {(x["pid"], x["tid"]) for x in trace["traceEvents"] if x["name"] == "thread_name"}
    assert set(threads) <= named
    assert trace["otherData"]["total_ns"] == p.total_ns


def test_the_spans_of_a_trace_add_up_and_follow_each_other():
    p = profile()
    events = [x for x in to_trace(p)["traceEvents"] if x["ph"] == "X" and x["pid"] == PROGRAM]
    ends = [round((x["ts"] + x["dur"]) * 1000) for x in events]

    assert sum(round(x["dur"] * 1000) for x in events) == p.total_ns == ends[-1]
    assert [round(x["ts"] * 1000) for x in events] == [0, *ends[:-1]]
    assert [x["args"]["terms_ns"] for x in events] == [dict(s.terms) for s in p.spans]
    assert events[3]["args"] == {
        "nodes": [0], "ops": ["CONV_2D"], "step": 0, "job": 0, "bound": "activations", "macs": 30_000_000,
        "macs_useful": 10_838_016, "dram_bytes": 553_000, "sram_bytes": 0,
        "terms_ns": {"macs": 15_000, "weights": 750, "activations": 137_500, "launch": 5_500}}


def test_the_bandwidth_counter_holds_every_byte_of_dram():
    p = profile()
    counts = [(x["ts"] * 1000, x["args"]["B/s"]) for x in to_trace(p)["traceEvents"] if x["ph"] == "C"]
    moved = sum(rate * (later - now) / 1e9 for (now, rate), (later, _) in pairwise(counts))

    assert counts[-1] == (p.total_ns, 0)
    assert moved == pytest.approx(p.dram_bytes, rel=1e-6)
    assert {x["pid"] for x in to_trace(p)["traceEvents"] if x["ph"] == "C"} == {CHIP}


# what-ifs


@pytest.mark.parametrize(("texts", "found"), [
    ([], {}),
    (["dram_bandwidth=8e9"], {"dram_bandwidth": 8e9}),
    (["dram_bandwidth=8GB/s", "clock=1GHz"], {"dram_bandwidth": 8e9, "clock": 1e9}),
    (["dram_bandwidth=2.5 GiB/s", "clock=800MHz"], {"dram_bandwidth": 2.5 * 2**30, "clock": 8e8}),
    (["sram=512KiB", "nn_cores=4"], {"sram": 524288, "nn_cores": 4}),
    (["sram=0"], {"sram": 0}), (["sram=.5kB"], {"sram": 500}), (["nn_cores=4", "nn_cores=4.0"], {"nn_cores": 4}),
])
def test_settings_are_read_with_their_units(texts, found):
    assert parse_settings(texts) == found
    assert all(type(parse_settings(texts)[k]) is (float if k in ("dram_bandwidth", "clock") else int) for k in found)


KEYS = ("dram_bandwidth=NUMBER[B/s|kB/s|MB/s|GB/s|KiB/s|MiB/s|GiB/s], clock=NUMBER[Hz|kHz|MHz|GHz], "
        "sram=NUMBER[B|kB|MB|KiB|MiB], nn_cores=NUMBER")


@pytest.mark.parametrize(("texts", "message"), [
    (["speed=4"], f"--set does not know 'speed'\n  want    {KEYS}"),
    (["clock"], f"--set clock: there is no value\n  want    {KEYS}"),
    (["=4"], f"--set does not know ''\n  want    {KEYS}"),
    (["clock="], "--set clock= is not a number and a unit\n  want    NUMBER[Hz|kHz|MHz|GHz]\n  got     nothing"),
    (["clock=800mhz"], "--set clock=800mhz is not a number and a unit\n  want    NUMBER[Hz|kHz|MHz|GHz]\n"
                       "  got     800mhz"),
    (["dram_bandwidth=8GB"], "--set dram_bandwidth=8GB is not a number and a unit\n"
                             "  want    NUMBER[B/s|kB/s|MB/s|GB/s|KiB/s|MiB/s|GiB/s]\n  got     8GB"),
    (["nn_cores=4cores"], "--set nn_cores=4cores is not a number\n  want    NUMBER\n  got     4cores"),
    (["clock=0"], "--set clock=0 is out of range\n  got     0\n  want    1e+06 to 1e+11 Hz"),
    (["clock=nan"], "--set clock=nan is out of range\n  got     nan\n  want    1e+06 to 1e+11 Hz"),
    (["nn_cores=0"], "--set nn_cores=0 is out of range\n  got     0\n  want    1 to 64"),
    (["sram=1.5"], "--set sram=1.5 is not a whole number of bytes\n  got     1.5"),
    (["nn_cores=2.5"], "--set nn_cores=2.5 is not a whole number\n  got     2.5"),
    (["nn_cores=2", "nn_cores=4"], "--set gives nn_cores two values\n  got     2 and 4"),
])
def test_a_setting_that_is_none_is_refused_with_what_is_known(texts, message):
    with pytest.raises(UsageError) as e:
        parse_settings(texts)

    assert str(e.value) == message


@pytest.mark.parametrize("value", ["inf", "-inf", "-1", "1e9999", "1e-9999", "0.0", "1e99999999999", "٣", "0x10", "1_0",
                                   "1e", "--4", "4 4", "4  GB/s", "NaN", "\n4", "4\n", "²"])
@pytest.mark.parametrize("key", ["dram_bandwidth", "clock", "nn_cores", "sram"])
def test_no_strange_number_is_taken(key, value):
    if key == "sram" and value == "0.0":
        assert parse_settings(["sram=0.0"]) == {"sram": 0}
        return
    with pytest.raises(UsageError):
        parse_settings([f"{key}={value}"])


def test_switches_become_plan_options():
    assert plan_options() == PlanOptions()
    assert plan_options(True, Channels.MULTIPLE, True, True, ["a", "b", "a"]) == PlanOptions(
        False, "multiple-of-cores", False, False, frozenset({"a", "b"}))


# the verb


@pytest.fixture
def npulab(capsys, monkeypatch):
    """Runs `npulab profile ...` in this process: (exit code, stdout, stderr)."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command()(profile_verb)
    monkeypatch.setattr(cli, "app", app)

    def call(*arguments):
        code = cli.run_arguments(["profile", *map(str, arguments)])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def asked(monkeypatch):
    """What the verb asks the API for; the answer is a profile made by hand."""
    calls = []

    def answer(*arguments, **named):
        calls.append((*arguments, *named.values()))
        return profile()

    monkeypatch.setattr(api, "profile", answer)
    return calls


def test_the_verb_asks_for_what_it_is_told(npulab, asked):
    code, out, err = npulab(
        DIGITS, "--target", "a311d", "--plan", "reference", "--no-zero-runs", "--channels", "multiple-of-cores",
        "--no-kernel-cache", "--no-image-cache", "--feature", "x", "--feature", "y", "--set", "clock=1GHz", "--all")

    assert (code, err) == (0, "")
    assert asked == [(DIGITS, "a311d", "reference", PlanOptions(False, "multiple-of-cores", False, False,
                                                                frozenset({"x", "y"})), {"clock": 1e9}, False)]
    assert "and 8 more" not in out
    assert "and 8 more" in npulab(DIGITS, "--target", "a311d")[1]
    assert asked[1] == (DIGITS, "a311d", "best", PlanOptions(), {}, False)


def test_json_is_the_profile_as_data(npulab, asked):
    code, out, _ = npulab(DIGITS, "--target", "a311d", "--json")

    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(as_data(profile())))


def test_files_are_written_whole_and_said(npulab, asked, tmp_path):
    code, out, _ = npulab(DIGITS, "--target", "a311d", "--html", tmp_path / "a.html", "--trace", tmp_path / "b.json")

    assert code == 0
    assert (tmp_path / "a.html").read_text() == to_html(profile())
    assert (tmp_path / "b.json").read_bytes() == to_json(profile())
    assert out.endswith(f"wrote {tmp_path / 'a.html'} ({(tmp_path / 'a.html').stat().st_size} bytes)\n\n"
                        f"wrote {tmp_path / 'b.json'} ({(tmp_path / 'b.json').stat().st_size} bytes)\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.json"]


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (("--target", "a311d", "--html", "x.tflite"), 2,
     "npulab: error: --html does not write x.tflite\n  want    a name like x.html\n"),
    (("--target", "a311d", "--trace", "x.npu"), 2,
     "npulab: error: --trace does not write x.npu\n  want    a name like x.json\n"),
    ((), 2, "npulab: error: a model needs a target\n  want    a311d\n  try     --target a311d\n"),
    (("--target", "a311d", "--set", "clock=1"), 2,
     "npulab: error: --set clock=1 is out of range\n  got     1\n  want    1e+06 to 1e+11 Hz\n"),
    (("--target", "z80"), 2, "npulab: error: there is no target 'z80'\n  want    a311d\n"),
    (("--target", "a311d", "--html", "no/such/folder/x.html"), 2,
     "npulab: error: cannot write no/such/folder/x.html\n  got     No such file or directory\n"
     "  try     name a file in a folder you may write to\n"),
])
def test_wrong_usage_is_said_and_nothing_written(npulab, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)

    assert npulab(DIGITS, *arguments) == (code, "", message)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_never_written_over(npulab, asked, tmp_path):
    model, link = tmp_path / "model.html", tmp_path / "link.json"
    shutil.copy(DIGITS, model)
    link.symlink_to(model)

    assert npulab(model, "--target", "a311d", "--html", model) == (
        2, "", f"npulab: error: --html would write over the model\n  where   {model}\n  try     another name\n")
    assert npulab(model, "--target", "a311d", "--trace", link)[0] == 2
    assert model.read_bytes() == DIGITS.read_bytes()
    assert asked == []


def test_a_program_is_profiled_as_it_was_compiled(npulab, tmp_path):
    path = tmp_path / "digits.npu"
    api.write_program(api.compile(DIGITS), path)

    _, model, _ = npulab(DIGITS, "--target", "a311d", "--json", "--set", "clock=1GHz")
    code, program, err = npulab(path, "--json", "--set", "clock=1GHz")
    assert (code, err, program) == (0, "", model)
    late = (f"npulab: error: {path} is compiled already; options of the plan come too late\n"
            "  try     profile the .tflite file with them\n")
    assert npulab(path, "--no-zero-runs") == (2, "", late)
    assert npulab(path, "--plan", "reference") == (2, "", late)
    assert npulab(path, "--plan", "best")[0] == 0
    assert npulab(path, "--target", "z80") == (
        2, "", f"npulab: error: {path} is for another target\n  want    a311d\n  got     z80\n")


def test_the_sample_is_profiled_and_adds_up(npulab, tmp_path):
    code, out, err = npulab(DIGITS, "--target", "a311d", "--all", "--html", tmp_path / "x.html")
    *rows, whole = rows_of(out)

    assert (code, err) == (0, "")
    assert sum(r[1] for r in rows) == whole[1] > 0
    assert max(map(len, out.split("\nwrote")[0].splitlines())) <= 80
    Page((tmp_path / "x.html").read_text())


def test_help_loads_nothing_heavy():
    code = ("import sys, npulab.cli.profile; heavy = {'numpy', 'msgspec', 'npulab.report'} & set(sys.modules); "
            "assert not heavy, heavy")

    subprocess.run([sys.executable, "-c", code], check=True)


@needs_shared
@pytest.mark.parametrize("name", ["mobilenet_v1_1.0_224_quant", "ssdlite_mobiledet_coco_qat_postprocess"])
def test_real_networks_are_reported(capsys, name):
    p = api.profile(MODELS / "quantized" / f"{name}.tflite")
    text = said(capsys, p, True)
    *rows, whole = rows_of(text)

    assert max(len(line) for line in text.splitlines()) <= 80
    assert sum(r[1] for r in rows) == whole[1]
    assert len(rows) == len(p.rows)
    assert [sum(x.values()) for x in figures.row_parts(p)] == [r.ns for r in p.rows]
    Page(to_html(p))
    events = [x for x in json.loads(to_json(p))["traceEvents"] if x["ph"] == "X" and x["pid"] == PROGRAM]
    assert sum(round(x["dur"] * 1000) for x in events) == p.total_ns
