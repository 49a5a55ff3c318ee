"""One model on several targets and plans: the columns are what the timing model says, mistakes are told."""

import json
import re
from pathlib import Path

import pytest

from npulab import PlanOptions, api
from npulab.cli.compare import Variant, parse_variants
from npulab.errors import CapacityError, UsageError

DIGITS = str(Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples" / "digits.tflite")


def test_variants_are_targets_with_settings_times_plans():
    found = parse_variants("a311d, a311d:clock=1GHz+dram_bandwidth=8GB/s", "best,reference")

    assert found == [
        Variant("a311d", {}, "best", "a311d"), Variant("a311d", {}, "reference", "a311d"),
        Variant("a311d", {"clock": 1e9, "dram_bandwidth": 8e9}, "best", ""),
        Variant("a311d", {"clock": 1e9, "dram_bandwidth": 8e9}, "reference", "")]
    assert str(found[3]) == "a311d:clock=1GHz+dram_bandwidth=8GB/s, plan reference"


@pytest.mark.parametrize(("targets", "plans", "text"), [
    ("", "best", "--targets names no target"),
    ("a311d,,a311d", "best", "--targets: '' is no target\n  want    NAME or NAME:KEY=VALUE+KEY=VALUE"),
    ("a311d,a311d:", "best", "--targets: 'a311d:' is no target"),
    ("a311d:clock=1GHz,a311d:clock=1000MHz", "best",
     "--targets and --plans give one column twice\n  got     a311d:clock=1000MHz, plan best"),
    ("a311d", "best,best", "--targets and --plans give one column twice"),
    ("a311d", "best", "there is nothing to compare\n  got     a311d, plan best"),
    ("a311d", "fast", "there is no plan 'fast'\n  want    best, reference"),
    ("a311d", "", "there is no plan ''"),
    ("a311d,a311d:x=1", "best", "in 'a311d:x=1': there is no setting 'x'"),
    ("a311d,a311d:clock=fast", "best", "in 'a311d:clock=fast': clock=fast is not a number and a unit"),
])
def test_variants_that_make_no_sense_are_refused(targets, plans, text):
    with pytest.raises(UsageError) as e:
        parse_variants(targets, plans)
    assert text in str(e.value)


def test_each_column_is_a_profile(npulab):
    code, out, err = npulab("compare", DIGITS, "--targets", "a311d,a311d:nn_cores=4+clock=400MHz", "--plans",
                            "best,reference", "--json")
    data = json.loads(out)

    assert (code, err, data["model"]) == (0, "", "digits")
    assert [(v["settings"], v["plan"]) for v in data["variants"]] == [
        (s, p) for s in ({}, {"nn_cores": 4, "clock": 4e8}) for p in ("best", "reference")]
    for v in data["variants"]:
        profile = api.profile(DIGITS, v["target"], v["plan"], what_if=v["settings"])
        assert v["total_ms"] == profile.total_ns / 1e6
        assert v["interval_ms"] == [t / 1e6 for t in profile.interval_ns]
        assert v["dram_bytes"] == profile.dram_bytes
        assert sum(n["ms"] for n in v["nodes"]) == pytest.approx(v["total_ms"])
    best, reference = data["variants"][:2]
    assert (best["npu"], best["host"]) == (18, 1)
    assert (reference["npu"], reference["host"]) == (16, 3)


def test_the_tables_fit_the_terminal_and_show_what_differs_most_first(npulab):
    code, out, err = npulab("compare", DIGITS, "--targets", "a311d,a311d:dram_bandwidth=1GB/s", "--rows", "4")
    a, b = api.profile(DIGITS), api.profile(DIGITS, what_if={"dram_bandwidth": 1e9})
    spread = {r.node: abs(r.ns - s.ns) for r, s in zip(a.rows, b.rows, strict=True) if r.ns != s.ns}

    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "\nA  a311d, plan best\nB  a311d:dram_bandwidth=1GB/s, plan best\n" in out
    assert re.search(rf"^total ms +{a.total_ns / 1e6:.3f} +{b.total_ns / 1e6:.3f}$", out, re.M)
    shown = [int(n) for n in re.findall(r"^ +(\d+)  [A-Z_0-9]+_2D|^ +(\d+)  ADD", out, re.M) for n in n if n]
    assert shown == sorted(spread, key=lambda n: -spread[n])[:4]
    assert out.endswith(f"\n{len(spread) - 4} more rows differ, each by less.\n")


def test_many_columns_are_shown_five_at_a_time(npulab):
    targets = ",".join(f"a311d:clock={n}MHz" for n in range(300, 1000, 100))
    code, out, _ = npulab("compare", DIGITS, "--targets", targets, "--rows", "2")

    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert [line.split() for line in out.splitlines() if re.fullmatch(r" +[A-Z]( +[A-Z])*", line)] == \
        [["A", "B", "C", "D", "E"], ["F", "G"]]


def test_columns_that_are_alike_say_so(npulab):
    code, out, _ = npulab("compare", DIGITS, "--targets", "a311d,a311d:nn_cores=8")

    assert code == 0
    assert out.endswith("\nNo operator differs.\n")


def test_options_of_the_plan_are_for_every_column_and_features_for_best(npulab):
    arguments = "compare", DIGITS, "--targets", "a311d", "--no-kernel-cache", "--feature", "axi-sram"
    code, out, _ = npulab(*arguments, "--plans", "best,reference")
    _, text, _ = npulab(*arguments, "--plans", "best,reference", "--json")
    refused, _, err = npulab(*arguments[:3], "a311d,a311d:clock=1GHz", *arguments[4:], "--plans", "reference")

    assert code == 0
    assert "A  a311d, plan best, no-kernel-cache, features axi-sram\n" in out
    assert "B  a311d, plan reference, no-kernel-cache\n" in out
    best, reference = json.loads(text)["variants"]
    options = PlanOptions(kernel_cache=False, features=frozenset({"axi-sram"}))
    assert best["options"] == {"no-kernel-cache": "on", "features": "axi-sram"}
    assert best["total_ms"] == api.profile(DIGITS, options=options).total_ns / 1e6
    assert reference["options"] == {"no-kernel-cache": "on"}
    assert (refused, "features are for plan best" in err) == (2, True)


def test_a_column_that_does_not_compile_says_why_and_the_exit_code_is_1(npulab, monkeypatch):
    real = api.profile

    def profile(graph, target, plan, *rest):
        if plan == "reference":
            raise CapacityError("'digits' does not fit the engine", got="too much")
        return real(graph, target, plan, *rest)

    monkeypatch.setattr(api, "profile", profile)
    code, out, err = npulab("compare", DIGITS, "--targets", "a311d", "--plans", "best,reference")
    assert (code, err) == (1, "")
    assert "B  a311d, plan reference: does not compile: 'digits' does not fit the engine\n" in out
    assert re.search(r"^total ms +0\.\d+$", out, re.M)
    _, out, _ = npulab("compare", DIGITS, "--targets", "a311d", "--plans", "best,reference", "--json")
    assert json.loads(out)["variants"][1]["error"] == "'digits' does not fit the engine\n  got     too much"


@pytest.mark.parametrize(("arguments", "code", "text"), [
    ((DIGITS, "--targets", "a311d,z80"), 2, "there is no target 'z80'\n  want    a311d"),
    ((DIGITS, "--targets", "a311d,a311d:nn_cores=0"), 2, "in 'a311d:nn_cores=0': nn_cores=0 is out of range"),
    ((DIGITS,), 2, "missing option '--targets'"),
    ((DIGITS, "--targets", "a311d", "--plans", "best,reference", "--rows", "-1"), 2, "--rows is a number of operators"),
    (("no.tflite", "--targets", "a311d", "--plans", "best,reference"), 3, "no.tflite does not exist"),
])
def test_mistakes_are_told(npulab, arguments, code, text):
    got, out, err = npulab("compare", *arguments)

    assert (got, out) == (code, "")
    assert text in err
    assert "Traceback" not in err
