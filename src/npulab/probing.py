"""A device measured from a process of its own: one that hangs, or dies with its driver, costs a finding and not all."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

import npulab
from npulab.errors import DeviceError, ModelError, NpulabError
from npulab.gpu.types import Identity, Limits, Quantity
from npulab.program.files import read_bounded, write_atomically

PATIENCE = 240.0
"""Seconds that one finding may take; those of a quick run take QUICK_PATIENCE."""
QUICK_PATIENCE = 60.0
STARTED = "starting"
RESULT_MAX = 1 << 24
Work = Callable[[Connection, str, bool, bool, list[Quantity]], None]
Tell = Callable[[str, float], None]
"""Called with what is measured and the share that is done."""


def probe(device: int | str = 0, quick: bool = False, tell: Tell | None = None, save: Path | None = None,
          patience: float | None = None, work: Work | None = None, trust_source: bool = False) -> dict[str, Any]:
    """What a device is made of: plain data, as `npulab probe --json` writes it.

    device    its number in the list of all, or "opencl:N", "vulkan:N".
    save      a file that the findings go to, one by one, and that an interrupted run on the same device goes on from.
    patience  seconds for a finding.      work  what the process does; for tests.
    trust_source  work that cannot be counted in compiled code is taken as the source states it, and `why` says so;
              else what rests on such is refused.

    Raises: DeviceError without that device; UsageError without the package that reaches it.
    """
    from npulab.gpu.devices import find

    found_device = find(device)
    who = found_device.identity
    patience = patience or (QUICK_PATIENCE if quick else PATIENCE)
    result: dict[str, Any] = {"npulab": npulab.__version__, "quick": quick, "trust_source": trust_source,
                              "identity": asdict(who), "limits": None, "quantities": []}
    found = known(save, result) if save is not None else []
    _save(save, result, found)  # whether it can be written is to be known at once
    context = multiprocessing.get_context("spawn")  # a driver does not survive a fork
    failures = 0
    while True:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_process, daemon=True,
                                  args=(work or _work, theirs, found_device.name, quick, trust_source, found))
        process.start()
        theirs.close()
        ended = _listen(ours, patience, found, result, tell, save)
        process.kill()
        process.join()
        if ended is None:
            break
        now, why = ended
        failures += now == STARTED
        if failures > 2 or len(found) > 1000:
            raise DeviceError(f"{who.name} fails before anything is measured", got=why,
                              try_="restart the device or its driver")
        if now != STARTED:
            found.append(Quantity(now, None, "", None, "refused", why))
            _save(save, result, found)
    result["quantities"] = [asdict(q) for q in found]
    return result


def _listen(ours: Connection, patience: float, found: list[Quantity], result: dict[str, Any], tell: Tell | None,
            save: Path | None) -> tuple[str, str] | None:
    """Findings until the process is done: None; or what it was at when it went silent or died, and how."""
    now = STARTED
    while True:
        try:
            if not ours.poll(patience):
                return now, f"the device did not answer for {patience:g} s"
            kind, content = ours.recv()
        except (EOFError, OSError):
            return now, "the process that measured died: the driver, as a rule"
        if kind == "limits":
            result["limits"] = content
        elif kind == "now":
            now, share = content
            if tell:
                tell(now, share)
        elif kind == "found":
            found.extend(Quantity(**q) for q in content)
            _save(save, result, found)
        elif kind == "died":
            return now, content
        elif kind == "failed":
            message, facts = content
            raise DeviceError(message, **facts)
        else:
            return None


def _save(save: Path | None, result: Mapping[str, Any], found: Sequence[Quantity]) -> None:
    if save is not None:
        write_atomically(save, msgspec.json.encode({**result, "quantities": [asdict(q) for q in found]}))


def known(path: Path, result: Mapping[str, Any]) -> list[Quantity]:
    """Findings of an interrupted run on the same device with the same version and options of npulab; none if there is
    no such."""
    if not path.exists():
        return []
    try:
        data = msgspec.json.decode(read_bounded(path, "the findings of an earlier run", RESULT_MAX))
        same = all(data[key] == result[key] for key in ("npulab", "quick", "trust_source", "identity"))
        return [Quantity(**{**q, "interval": tuple(q["interval"]) if q["interval"] else None})
                for q in data["quantities"]] if same else []
    except (ValueError, KeyError, TypeError, ModelError):
        return []


def _process(work: Work, pipe: Connection, device: str, quick: bool, trust_source: bool, known: list[Quantity]
             ) -> None:
    try:
        work(pipe, device, quick, trust_source, known)
    except NpulabError as e:
        pipe.send(("failed", (e.message, e.facts)))
    except Exception as e:  # a driver's own, or a defect: what it was at is refused, and the others go on
        if os.environ.get("NPULAB_TRACEBACK"):
            traceback.print_exc()
        pipe.send(("died", f"{type(e).__name__}: {e} (NPULAB_TRACEBACK=1 shows where)"))


def _work(pipe: Connection, device: str, quick: bool, trust_source: bool, known: list[Quantity]) -> None:
    """In the process of its own."""
    from npulab.gpu.analysis.conclude import conclude
    from npulab.gpu.devices import find, open_device

    bench = open_device(find(device))
    pipe.send(("limits", plain(bench.limits)))
    conclude(bench, lambda name, share: pipe.send(("now", (name, share))), quick, known,
             lambda found: pipe.send(("found", [asdict(q) for q in found])), trust_source)
    pipe.send(("done", None))


def plain(limits: Limits) -> dict[str, Any]:
    return {**asdict(limits), "elements": sorted(limits.elements)}


def identity(result: Mapping[str, Any]) -> Identity:
    return Identity(**result["identity"])
