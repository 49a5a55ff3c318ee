"""Profiles made by hand: no compiler, no timing model."""

from __future__ import annotations

from dataclasses import replace

from npulab.profiling.types import TERMS, Constant, Decision, Profile, Row, Span, span_ns

PEAK = 2.4576e12
CONSTANTS = (
    Constant("dram_bandwidth", 4e9, "B/s", "fitted", "published latencies, docs/timing.md"),
    Constant("clock", 800e6, "Hz", "inferred", "the 5 TOPS that the chip is sold with"),
    Constant("sram_bandwidth", 25.6e9, "B/s", "assumed", "32 bytes a cycle"),
    Constant("launch", 5.5e-6, "s", "fitted", "published latencies"),
    Constant("zero_cost", 0.44, "", "fitted", "published latencies"),
)


def job(node, name, macs=0, useful=0, weights=0, activations=0, sram=0, unit="nn", launch=5_500, index=0, **more):
    """A span of an NN job from its MACs and bytes, at round rates: 2 MACs and 4 bytes a nanosecond."""
    terms = {"macs": macs // 2000, "weights": weights // 4, "activations": activations // 4, "sram": sram // 25,
             "launch": launch, **more}
    return Span(unit, name, (node,), 0, index, {t: n for t, n in terms.items() if n}, macs, useful,
                {"slots": macs - useful} if macs > useful else {},
                {k: n for k, n in (("weights", weights), ("input", activations)) if n}, {"image": sram} if sram else {})


def row(node, op, spans):
    """The row that these spans add up to."""
    terms = {t: sum(s.terms.get(t, 0) for s in spans) for t in TERMS if any(t in s.terms for s in spans)}
    gains = {t: sum(s.ns - span_ns({k: n for k, n in s.terms.items() if k != t}) for s in spans) for t in terms}
    ns, useful = sum(s.ns for s in spans), sum(s.macs_useful for s in spans)

    def added(name):
        return {k: sum(getattr(s, name).get(k, 0) for s in spans) for s in spans for k in getattr(s, name)}

    return Row(node, op, spans[0].name if spans else "", "+".join(dict.fromkeys(s.unit for s in spans)) or "none", ns,
               max(terms, key=terms.get, default="none"), terms, gains, sum(s.macs for s in spans), useful,
               added("waste"), added("dram"), added("sram"), useful / (PEAK * ns * 1e-9) if ns else 0.0)


def profile(blocks=13, **changed):
    """A network like MobileNet: a submission, copies, `blocks` of depthwise and pointwise, a transpose, a host end."""
    spans = [Span("transfer", "copy in", (), 0, None, {"transfer": 150_000}),
             Span("submit", "submission", (), 0, None, {"launch": 100_000}),
             job(0, "transpose", unit="tp", activations=300_000, tp=90_000),
             job(0, "224x224x3 -> 112x112x32, 3x3/2", 30_000_000, 10_838_016, 3_000, 550_000)]
    ops = ["CONV_2D"]
    for i in range(blocks):
        k = i // 3
        spans.append(job(2 * i + 1, f"{112 >> k}x{112 >> k}x{32 << k}, 3x3/1", 40_000_000, 3_612_672, 9_000 << k,
                         1_200_000 >> k, 800_000 >> k, index=2 * i + 2))
        spans.append(job(2 * i + 2, f"{112 >> k}x{112 >> k}x{64 << k}, 1x1/1", 2_000_000 * (i + 1),
                         1_900_000 * (i + 1), 2_000 << min(i, 13), 1_600_000 >> i // 2, index=2 * i + 3))
        ops += ["DEPTHWISE_CONV_2D", "CONV_2D"]
    ops += ["RESHAPE", "SOFTMAX", "TFLite_Detection_PostProcess"]
    spans += [Span("transfer", "copy out", (), 0, None, {"transfer": 2_001}),
              Span("host", "SOFTMAX", (len(ops) - 2,), 1, None, {"host": 40_003}),
              Span("host", "TFLite_Detection_PostProcess", (len(ops) - 1,), 1, None, {"host": 900_000})]
    spans = tuple(replace(s, terms=dict(s.terms)) for s in spans)
    rows = tuple(row(n, op, [s for s in spans if s.nodes == (n,)]) for n, op in enumerate(ops))
    rows += tuple(row(None, f"({s.name})", [s]) for s in spans if not s.nodes)
    total = sum(s.ns for s in spans)
    fields = {
        "model": "hand", "digest": "ab" * 32, "target": "a311d", "title": "Amlogic A311D", "plan": "best",
        "options": {},
        "spans": spans, "rows": rows, "interval_ns": (total * 9 // 10, total * 11 // 10), "peak_macs": PEAK,
        "constants": CONSTANTS, "witness": "modelled", "host": "one Cortex-A73 core",
        "features": {"tile-order": "inferred"},
        "decisions": (Decision(1, "weights resident in SRAM", "weights read for each tile", 120_000, "", "witnessed"),
                      Decision(4, "tiles in columns", "tiles in rows", 45_000, "tile-order", "inferred")),
    }
    return Profile(**(fields | changed))
