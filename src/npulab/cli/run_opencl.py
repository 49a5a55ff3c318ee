"""npulab run on an OpenCL device: the network with npulab's own kernels, and where its time goes."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from npulab.cli.run import Fit
    from npulab.gpu.compute.device import Device
    from npulab.gpu.compute.layers import Network
    from npulab.gpu.compute.network import Session
    from npulab.gpu.compute.profiling import Profile, Roof
    from npulab.gpu.compute.types import Number, Traits


TRIED = 8.0
"""Seconds for a problem: a tuner's process starts in one or two, PoCL compiles a candidate in one."""
PATIENCE = 60.0
"""Seconds that one launch may take, unless told. Source: assumed."""


def run_opencl(model: Path, number: int, given: list[str], output: Path | None, labels: Path | None, top: int,
               score: float, fit: Fit, normalize: str | None, repeat: int, probe: Path | None,
               tuned: Path | None, tune: float, patience: float, stored: Number | None, json: bool) -> None:
    """The verb, as `npulab run` gives it its options."""
    from npulab import api
    from npulab.cli.printing import progress, say, write_json
    from npulab.cli.run import _check_output, _inputs, _print_answer, _write_outputs
    from npulab.cli.run_onnx import answer_of, as_data, inputs_of
    from npulab.gpu.ceilings import read_result
    from npulab.gpu.compute.device import Device
    from npulab.gpu.compute.network import layers_of, on_halves, planned, tunable
    from npulab.gpu.compute.profiling import roof_of
    from npulab.gpu.compute.traits import traits_of
    from npulab.gpu.compute.tuner import best, default_store
    from npulab.gpu.compute.watch import watched
    from npulab.postprocess import apply
    from npulab.runtime import answers
    from npulab.runtime.objects import answer_with, post_beside

    post = post_beside(model)
    graph = api.convert(model, "onnx", keep_layout=True)
    if output is not None:
        _check_output(output, len(post.outputs if post else graph.outputs))
    roof = roof_of(read_result(probe)) if probe is not None else None
    device = Device(number)
    found = labels or answers.labels_beside(model)
    names = answers.read_labels(found) if found else None
    wanted = inputs_of(graph)
    arrays, _, notes = _inputs(wanted, given, fit, normalize)
    traits = traits_of(device, json_of(probe) if probe is not None else None)
    network = layers_of(graph, number=stored)
    store = tuned or default_store()
    if tune:
        tune_all(network, device, traits, store, tune, progress)
    kept = {what: best(store, device, traits, what, on_halves(what.number, traits))
            for what in tunable(network)} if store.is_dir() else {}
    choices = {what: choice for what, choice in kept.items() if choice is not None}
    with watched(device.doing, patience, lambda what: end(device.identity.name, what, patience)):
        session = planned(network, traits, choices.get).open(device)
        progress(f"running {graph.name} on {device.identity.name}")
        outputs, profile = session.profile({str(name): a for name, a in arrays.items()}, repeat)
    answer = answer_with(post, outputs, names, score) if post else answer_of(graph, outputs, names, top)
    if output is not None:
        _write_outputs(output, apply(post, outputs) if post else outputs)
    if json:
        write_json(as_data(graph, notes, names, answer, profile.wall) | {"where": f"opencl:{number}"}
                   | details(session, profile, roof) | {"tuned": len(choices)})
        return
    say(f"{graph.name} on opencl:{number}, {device.identity.name}{', with its post-processing' if post else ''}")
    _print_answer(notes, answer)
    print_profile(session, profile, roof)
    if choices:
        say(f"{len(choices)} problems have kernels as tuned in {store}.")
    if output is not None:
        print(f"\nwrote {output}")


def end(name: str, what: str, patience: float) -> NoReturn:
    """The process: what waits for a device that hangs cannot be called off, and leaving in order would wait, too.
    Nothing is being written while a device is at work."""
    from npulab.cli.printing import fail
    from npulab.errors import DeviceError

    error = DeviceError(f"{name} did not answer for {patience:g} s", where=what,
                        try_="restart the device or its driver; --patience SECONDS gives a slow one more time")
    os._exit(fail(str(error), error.exit_code))


def json_of(probe: Path) -> Any:
    """The file as plain data. `read_result` has looked at it."""
    import json

    from npulab.gpu.ceilings import LIMIT
    from npulab.program.files import read_bounded

    return json.loads(bytes(read_bounded(probe, "a probe's result", LIMIT)))


def tune_all(network: Network, device: Device, traits: Traits, store: Path, seconds: float,
             tell: Callable[[str], None]) -> None:
    """Each problem that has candidates, those with most to do first; each gets a fair part of the time that is left,
    and enough to try some."""
    import time

    from npulab.gpu.compute.network import on_halves, tunable
    from npulab.gpu.compute.tuner import tune

    end = time.monotonic() + seconds
    todo = sorted(tunable(network), key=lambda w: -w.operations)
    for i, what in enumerate(todo):
        left = end - time.monotonic()
        if left <= 0:
            break
        tell(f"tuning {i + 1} of {len(todo)}: {what}")
        tune(device, traits, what, store, min(left, max(left / (len(todo) - i), TRIED)), tell,
             halves=on_halves(what.number, traits))


def details(session: Session, profile: Profile, roof: Roof | None) -> dict[str, Any]:
    """Device, memory and layers, for programs."""
    arenas = session.arenas
    return {
        "stored_as": stored_as(session),
        "device": asdict(session.device.identity),
        "seconds_are": "wall time of this machine from the first launch to the end of the last",
        "device_seconds": profile.seconds, "device_seconds_are": "by the device's own clock, launches only",
        "runs": profile.runs, "opening_seconds": session.opened,
        "memory": {"tensors_bytes": arenas.bytes, "tensors_apart_bytes": arenas.apart, "least_bytes": arenas.bound,
                   "weights_bytes": session.plan.weights},
        "layers": [
            {**asdict(x), "operations_per_second": rate(x.operations, x.seconds),
             "bytes_per_second": rate(x.traffic, x.seconds),
             **({} if roof is None else dict(zip(("least_seconds", "bound"), roof.floor(x), strict=True)))}
            for x in profile.layers],
    }


def stored_as(session: Session) -> list[str]:
    """Tensors, inputs and outputs among them."""
    return sorted({t.number for t in session.plan.network.tensors if t.constant is None})


def rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None


def print_profile(session: Session, profile: Profile, roof: Roof | None) -> None:
    from npulab.cli.printing import amount, say, table

    total = sum(x.seconds for x in profile.layers)

    def giga(n: float, seconds: float) -> str:
        found = rate(n, seconds)
        return "" if not n or found is None else f"{found / 1e9:.3g}"

    def share(part: float, whole: float) -> str:
        return f"{100 * part / whole:.1f} %" if whole > 0 else ""

    missing = () if roof is None else roof.missing
    if len(missing) == 2:  # nothing to compare with
        roof = None
    columns = ["layer+", "kernel+", ">ms", ">share", ">GFLOP/s", ">GB/s"]
    table(columns if roof is None else [*columns, ">of roof", "bound"], [
        (x.title, x.kernel, f"{1000 * x.seconds:.3f}", share(x.seconds, total), giga(x.operations, x.seconds),
         giga(x.traffic, x.seconds),
         *(() if roof is None else (share(roof.floor(x)[0], x.seconds), roof.floor(x)[1])))
        for x in profile.layers])
    arenas = session.arenas
    say()
    say(f"Device's clock: {1000 * profile.seconds:.3f} ms in {len(session.plan.steps)} launches, the median of "
        f"{profile.runs} run{'s' if profile.runs > 1 else ''}; {1000 * profile.wall:.3f} ms by this machine's.")
    if roof is not None:
        least = sum(roof.floor(x)[0] for x in profile.layers)
        say(f"Of roof: the least time that the probe's rates allow, over the time taken; {share(least, total)} of all.")
    for each in missing:
        say(f"{'No roof' if roof is None else 'Not in the roof'}: the probe's {each}.")
    stored = " and ".join(stored_as(session))
    say(f"Memory: {amount(arenas.bytes)}B for tensors of {stored}, {amount(arenas.apart)}B if none were used again; "
        f"{amount(session.plan.weights)}B of weights, uploaded once.")
    say(f"Opened in {session.opened:.1f} s: kernels compiled, weights uploaded.")
