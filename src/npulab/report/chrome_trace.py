"""A Profile as Chrome's trace events: for Perfetto and chrome://tracing.

Two processes. The first is the program: a thread a unit, one event a span; nothing overlaps, and the durations add up
to the total. The second is the chip: a thread a resource, busy for as long as its term says, and a counter of the
DRAM's bytes per second.
Format: "Trace Event Format" (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import json
from typing import Any, get_args

from npulab.cli.printing import clean
from npulab.profiling.join import charged
from npulab.profiling.types import BOUND_NAMES, Profile, Unit
from npulab.report.figures import LANES, busy

PROGRAM, CHIP = 1, 2
UNIT_NAMES = {"nn": "NN cores", "tp": "TP cores", "host": "host CPU", "transfer": "copies", "submit": "submissions"}


def to_trace(profile: Profile) -> dict[str, Any]:
    """The trace as JSON data. `ts` and `dur` are microseconds with three decimals: whole nanoseconds."""
    units = {u: i + 1 for i, u in enumerate(get_args(Unit))}
    lanes = {lane: i + 1 for i, lane in enumerate(LANES)}
    events = [
        *_names(PROGRAM, f"{clean(profile.model)} on {profile.target}, plan {profile.plan}",
                {i: UNIT_NAMES.get(u, u) for u, i in units.items()}),
        *_names(CHIP, f"{profile.target}: resources", {i: lane for lane, i in lanes.items()}),
        *_spans(profile, units),
        *({"name": BOUND_NAMES[b.term], "cat": "resource", "ph": "X", "ts": b.start / 1000, "dur": b.ns / 1000,
           "pid": CHIP, "tid": lanes[b.lane], "args": {"of": clean(b.span.name), "nodes": list(b.span.nodes)}}
          for b in busy(profile)),
        *_bandwidth(profile),
    ]
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {
        "model": clean(profile.model), "digest": profile.digest, "target": profile.target, "plan": profile.plan,
        "options": dict(profile.options), "witness": profile.witness, "total_ns": profile.total_ns}}


def to_json(profile: Profile) -> bytes:
    """The trace as a file's bytes, ASCII."""
    return json.dumps(to_trace(profile), separators=(",", ":")).encode("ascii")


def _names(pid: int, process: str, threads: dict[int, str]) -> list[dict[str, Any]]:
    common = {"ph": "M", "ts": 0, "pid": pid}
    return [
        {"name": "process_name", "tid": 0, "args": {"name": process}, **common},
        {"name": "process_sort_index", "tid": 0, "args": {"sort_index": pid}, **common},
        *({"name": "thread_name", "tid": tid, "args": {"name": name}, **common} for tid, name in threads.items()),
        *({"name": "thread_sort_index", "tid": tid, "args": {"sort_index": tid}, **common} for tid in threads),
    ]


def _spans(profile: Profile, units: dict[str, int]) -> list[dict[str, Any]]:
    ops = {r.node: clean(r.op) for r in profile.rows}
    out, now = [], 0
    for s in profile.spans:
        cost = charged(s.terms)
        args: dict[str, Any] = {
            "nodes": list(s.nodes), "ops": [ops[n] for n in s.nodes if n in ops], "step": s.step,
            "bound": max(cost, key=lambda t: cost[t], default="none"), "terms_ns": dict(s.terms),
            "macs": s.macs, "macs_useful": s.macs_useful, "dram_bytes": s.dram_bytes, "sram_bytes": s.sram_bytes,
        }
        if s.job is not None:
            args["job"] = s.job
        if s.touched:
            args["touched_bytes"] = dict(s.touched)
        out.append({"name": clean(s.name), "cat": s.unit, "ph": "X", "ts": now / 1000, "dur": s.ns / 1000,
                    "pid": PROGRAM, "tid": units[s.unit], "args": args})
        now += s.ns
    return out


def _bandwidth(profile: Profile) -> list[dict[str, Any]]:
    """A counter: bytes per second of DRAM, the average over each span."""
    out, now, last = [], 0, None
    for s in profile.spans:
        rate = s.dram_bytes * 10**9 // s.ns if s.ns else 0
        if s.ns and rate != last:
            out.append(_counter(now, rate))
            last = rate
        now += s.ns
    return [*out, _counter(now, 0)]


def _counter(now: int, rate: int) -> dict[str, Any]:
    return {"name": "DRAM bytes per second", "ph": "C", "ts": now / 1000, "pid": CHIP, "tid": 0, "args": {"B/s": rate}}
