"""A float network made into an integer one for a target: the whole way, in stages that can be gone on with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from npulab import quantizing_budget
from npulab.dialects import from_onnx, from_tflite
from npulab.errors import InvariantError, ModelError, UsageError
from npulab.importers.onnx import read_onnx
from npulab.ir import Graph
from npulab.program.pages import Buffer
from npulab.quantization import datafree, precision, trained
from npulab.quantization.compare import SILENCE, FirstSamples, Noise, by_tensor, noise
from npulab.quantization.emit import float_model, integer_model
from npulab.quantization.gram import Reference, reference
from npulab.quantization.job import Budget, Job, Measured, Options, Tell
from npulab.quantization.limits import obey
from npulab.quantization.network import Layer, Network, Point, network
from npulab.quantization.observe import Statistics, observe
from npulab.quantization.parts import each
from npulab.quantization.recipes import AUTO, Recipe, parse_recipe
from npulab.quantization.sampling import taken
from npulab.quantization.session import give_back, share_heap
from npulab.quantization.types import Feeds, Rules, Samples
from npulab.reference.execute import prepare
from npulab.targets.facts.quantization import GENERIC, entry_of, names

EXAMINED = 4
"""Samples that each tensor is compared on."""
BARS = 64
"""Of the histograms in reports."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """The integer network.

    graph    in the dialect of the target's file; `data` its bytes.    reference  writes the float network's, in ONNX.
    network  layers and points with what was chosen for them; `qdq` the ONNX form that all simulation in floats uses.
    aim      the float network that ranges were chosen for: with what repairs made of weights and biases before that.
    stages   what was done, and what each brought.
    tensors  noise of each quantized tensor and of the outputs, by name; `shapes` their histograms in the float network.
    exact    noise of the outputs as the target's own integer arithmetic computes them; None: how it rounds is not
             published.
    """

    graph: Graph
    data: bytes
    qdq: Buffer
    reference: Callable[[], Buffer]
    network: Network
    aim: Reference
    rules: Rules
    recipe: Recipe
    samples: Samples
    stages: Sequence[Measured]
    tensors: dict[str, Noise]
    shapes: dict[str, Statistics]
    exact: dict[str, Noise] | None
    notes: Sequence[str] = field(default=())


class Turned:
    """Samples of a network whose pictures lie in another order of axes: new axis i is old axis order[i]."""

    def __init__(self, samples: Samples, orders: dict[str, tuple[int, ...]]) -> None:
        self.samples, self.orders = samples, orders
        self.origin = samples.origin

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Feeds]:
        for feeds in self.samples:
            yield {k: np.ascontiguousarray(x.transpose(self.orders[k])) if k in self.orders else x
                   for k, x in feeds.items()}

    def take(self, positions: Sequence[int]) -> Turned:
        return Turned(taken(self.samples, positions), self.orders)


def quantize(graph: Graph, samples: Samples | None, rules: Rules, options: Options | None = None,
             tell: Tell | None = None, resume: Path | None = None) -> Quantized:
    """The float network `graph`, TFLite or ONNX, in integers as the rules have them.

    A graph that is quantized already, TFLite or ONNX, keeps the scales and integers that it was trained with as far as
    the target takes them (quantization.trained); what it has none for is calibrated.

    samples  inputs as the graph itself takes them; None: made up from its own statistics, and said so, unless nothing
             is to be calibrated.
    resume   a file that the state goes to after each stage, and that an interrupted run with the same model, samples
             and options goes on from; whoever keeps the outcome removes it then.

    Raises: UsageError for options that the target does not take; UnsupportedError for a network that cannot be
    quantized; ModelError for weights or samples that are no numbers.
    """
    share_heap()
    options = options or Options()
    recipe = parse_recipe(options.recipe)
    rules = precision.chosen(rules, options.weights, options.per_channel, options.activations)
    source = from_tflite(graph) if graph.format == "tflite" else None
    float_graph = source.graph if source else graph
    found: trained.Trained | None = None
    if trained.is_trained(float_graph):
        float_graph, found = trained.as_trained(float_graph)
    if not float_graph.outputs:
        raise ModelError(f"'{graph.name}' has no outputs", try_="export it with those that are wanted")
    net = network(float_graph, rules)
    notes: list[str] = _own_tools(rules)
    kept = trained.apply(net, found, options.activations, options.weights, options.per_channel) if found else None
    if kept is not None:
        notes += kept.notes
        resume = None  # there is little to be gone on with
    complete = kept is not None and kept.is_complete(net) and not options.wide
    if complete and recipe.name == AUTO.name:
        recipe = Recipe("as trained")
    needless = complete and not recipe.steps
    made_up = samples is None and not needless
    if samples is None and needless:
        samples = trained.probes(net, options.seed)
    elif samples is None:
        samples, said = datafree.made_up(net, options.seed)
        notes += said
    elif source is not None:
        samples = Turned(samples, source.inputs)
    if found is not None:
        samples = trained.Dequantized(samples, found.inputs)
    if not len(samples):
        raise UsageError("there are no samples to calibrate with", got=samples.origin)
    _fits(net, samples)
    job = Job(net, recipe, options, samples, tell, made_up, kept, _budget(options, net, tell))
    if found is not None and not recipe.steps:
        job.reference = partial(trained.as_it_was, float_graph, found)
    stages = job.run(resume)
    notes += obey(net)
    few = FirstSamples(job.check, EXAMINED)
    floats = job.aim.model() if job.aim else float_model(net)
    tensors = by_tensor(net, few, floats)
    shapes = observe(floats, [net.name(p.value) for p in net.quantized_points()],
                     few, histograms=True, sizes={v.name: v.elements for v in net.graph.values})
    ends = options.integer_ends if options.integer_ends is not None else rules.file == "tflite"
    del floats
    qdq = integer_model(net)
    made = read_onnx(integer_model(net, ends, packed=True), graph.name)
    orders: dict[str, tuple[int, ...]] = {}
    if rules.file == "tflite":
        converted = from_onnx(made)
        made, orders = converted.graph, converted.inputs | converted.outputs
        notes += converted.notes
        del converted
    exact = simulated(net, made, orders, job.reference(), job.check)
    return Quantized(made, bytes(made.source), qdq, job.reference, net, job.aim or reference(net), rules, job.recipe,
                     samples, stages, tensors, shapes, exact, (*net.notes, *notes))


def _own_tools(rules: Rules) -> list[str]:
    """What a user should know of a target whose tools take floats."""
    if rules.name in GENERIC or rules.name not in names():  # the names of all targets take a while to be read
        return []
    entry = entry_of(rules.name)
    if entry.imports != "no":
        return []
    return [f"the tools of {rules.title} quantize floats themselves and take no integers: this file shows what that "
            f"costs, and runs elsewhere{f' ({entry.note})' if entry.note else ''}"]


def _budget(options: Options, net: Network, tell: Tell | None) -> Budget | None:
    """What keeps the budget that is asked for; None if none is."""
    asked = quantizing_budget.Asked(options.size, options.latency, options.min_decibels, options.min_agreement)
    if not asked:
        return None
    quantizing_budget.check(asked, net)
    came = float_model(net, changed=False)

    def keep(net: Network, samples: Samples, seen: Mapping[int, Statistics], how: str, clip: str) -> list[str]:
        progress = (lambda done, total: tell("sensitivities", done, total)) if tell else None
        return quantizing_budget.keep(net, samples, seen, asked, how, clip, came, progress)
    return keep


def simulated(net: Network, made: Graph, orders: dict[str, tuple[int, ...]], reference: Buffer, samples: Samples
              ) -> dict[str, Noise] | None:
    """Noise of the outputs of the finished file, in the exact integer arithmetic of its target, against the float
    network. `orders`: of inputs and outputs whose axes lie otherwise in the file, new axis i is old axis order[i].
    """
    if net.rules.arithmetic is None:
        return None
    names = [net.name(v) for v in net.graph.outputs]
    total = dict.fromkeys(names, SILENCE)
    params = {net.name(v): net.of[v].params for v in (*net.graph.inputs, *net.graph.outputs) if v in net.of}
    ends = {v.name: v for v in (made.values[i] for i in (*made.inputs, *made.outputs))}
    if made.format == "onnx" and net.rules.arithmetic != "onnx":  # those arithmetics are told by TFLite's operators
        converted = from_onnx(made)
        made, orders = converted.graph, converted.inputs | converted.outputs
        ends = {v.name: v for v in (made.values[i] for i in (*made.inputs, *made.outputs))}
    wanted = list(each(reference, names, samples, list))
    give_back()  # before the exact arithmetic takes its own room
    machine = prepare(made, net.rules.arithmetic)
    for feeds, floats in zip(samples, wanted, strict=True):
        stored = {}
        for name, x in feeds.items():
            p = params.get(name)
            whole = p.codes(x) if p is not None and ends[name].dtype.value != "float32" else np.asarray(x)
            stored[name] = np.ascontiguousarray(whole.transpose(orders[name])) if name in orders else whole
        found = machine.run(stored)
        for name, want in zip(names, floats, strict=True):
            y, p = found[name], params.get(name)
            y = y.transpose(np.argsort(orders[name])) if name in orders else y
            total[name] += noise(want, p.real(y) if p is not None and ends[name].dtype.value != "float32" else y)
        give_back()
    return total


def _fits(net: Network, samples: Samples) -> None:
    """Raises UsageError if the first sample is none for this network."""
    first = next(iter(samples))
    for v in net.graph.inputs:
        value = net.graph.values[v]
        if value.name not in first:
            raise UsageError(f"the samples have nothing for the input '{value.name}'", got=", ".join(first),
                             want=", ".join(net.name(i) for i in net.graph.inputs))
        if tuple(np.shape(first[value.name])) != value.shape:
            raise UsageError(f"the samples do not fit the input '{value.name}'", want=list(value.shape),
                             got=list(np.shape(first[value.name])))


def checked(made: Quantized) -> None:
    """Raises InvariantError if the file breaks a rule of its target, by code that the quantizer has no part in."""
    from npulab.validation import violations

    found = [v for v in violations(made.graph, made.rules) if v.kind == "integers"]
    if found:
        first = found[0]
        raise InvariantError(f"npulab made a file that {made.rules.title} rejects: {first}",
                             got=f"{len(found)} violations")


def report(graph: Graph, made: Quantized) -> dict[str, Any]:
    """All that is known of a run, as plain data: what `--report` writes."""
    net = made.network
    by_name = {net.name(p.value): p for p in net.points}
    return {
        "model": graph.name, "target": made.rules.name, "title": made.rules.title, "recipe": made.recipe.text,
        "searched": made.recipe.name == AUTO.name,
        "samples": len(made.samples), "origin": made.samples.origin,
        "bytes": len(made.data), "float_bytes": len(graph.source), "sha256": hashlib.sha256(made.data).hexdigest(),
        "layers": len(net.layers), "integer_layers": sum(layer.params is not None for layer in net.layers),
        "assumed": sorted(f for f in ("activations", "weights", "arithmetic") if f not in made.rules.sources),
        "stages": [{"name": s.name, "title": s.title, "paper": s.paper, "seconds": round(s.seconds, 3),
                    "decibels": s.decibels, "kept": s.kept, "notes": list(s.notes)} for s in made.stages],
        "weights": [_weights_row(layer) for layer in net.layers],
        "tensors": [_tensor_row(net, name, found, by_name.get(name), made.shapes.get(name))
                    for name, found in made.tensors.items()],
        "floats": [{"name": net.name(p.value), "why": p.why or "no integer kernel makes or reads it"}
                   for p in net.points if p.params is None],
        "exact": None if made.exact is None else {"arithmetic": made.rules.arithmetic, "outputs": {
            name: {"decibels": n.decibels, "cosine": n.cosine} for name, n in made.exact.items()}},
        "notes": list(made.notes),
    }


def _weights_row(layer: Layer) -> dict[str, Any]:
    kept = layer.scheme is None or layer.params is None
    return {"layer": layer.name, "op": layer.kind if not layer.is_depthwise else "depthwise", "shape":
            list(layer.weight.shape), "stored": "float32" if kept else str(layer.scheme),
            "decibels": noise(layer.weight, layer.seen).decibels, "rounding": "chosen" if layer.codes is not None
            else "nearest"}


def _tensor_row(net: Network, name: str, found: Noise, p: Point | None, seen: Statistics | None) -> dict[str, Any]:
    """A tensor: its range in integers, what the float network puts there (BARS bins from `bars_low` to `bars_high`),
    and the share of that which the range leaves out."""
    row: dict[str, Any] = {"name": name, "made_by": "", "stored": p.scheme.dtype if p and p.scheme else "float32",
                           "low": None, "high": None, "decibels": found.decibels, "cosine": found.cosine}
    if p is None:
        return row
    made = net.graph.producer.get(p.value)
    row["made_by"] = (made.name or f"{made.op.name}_{made.index}") if made else "input"
    if p.params is not None:
        s, zero = p.params.scheme, int(p.params.zeros[0])
        row["low"], row["high"] = (float(p.params.scales[0]) * (code - zero) for code in (s.low, s.high))
    if seen is not None and seen.bins is not None and p.params is not None:
        edges, half = seen.edges, float(p.params.scales[0]) / 2
        middles = (edges[:-1] + edges[1:]) / 2
        outside = (middles < row["low"] - half) | (middles > row["high"] + half)
        counts, bars = np.histogram(middles, BARS, (seen.low, max(seen.high, seen.low + 1e-9)), weights=seen.bins)
        row |= {"clipped": float(seen.bins[outside].sum() / max(1, seen.bins.sum())), "seen_low": seen.low,
                "seen_high": seen.high, "bars": [int(n) for n in counts], "bars_low": float(bars[0]),
                "bars_high": float(bars[-1])}
    return row
