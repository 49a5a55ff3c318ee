"""Functions of one number as table jobs, and tensors joined along outer axes: against LiteRT's reference kernels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npulab
from layers import Layers, litert
from npulab import PlanOptions, api
from npulab.cli import run_arguments
from npulab.ir.ops import Elementwise
from npulab.program.types import HostStep, NpuStep
from npulab.targets.vivante import family
from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.jobs import requantization
from npulab.targets.vivante.layout import through_table
from npulab.targets.vivante.machine import VirtualNPU
from npulab.targets.vivante.tables import Function, steps_off
from npulab.targets.vivante.tp import TPDescriptor
from shared import SHARED, needs_shared

pytest.importorskip("ai_edge_litert", reason="LiteRT is the oracle: pip install 'npulab[litert]'")
TABLES = PlanOptions(features=frozenset({"tp-table"}))


@pytest.fixture(autouse=True, scope="module")
def averages_stay_on_the_npu():
    """Small ones go to the host where that is faster, which is not what is tested here."""
    kept, family.SMALL = family.SMALL, 0
    yield
    family.SMALL = kept


class Network(Layers):
    """Layers, and functions of one number."""

    def every_byte(self, *shape: int, scale: float, zero: int) -> int:
        """A tensor that the NPU computes, with any of the 256 bytes in it: averages over one pixel."""
        return self.pool(self.input(*shape, scale=scale, zero=zero), (1, 1))

    def function(self, name, x, scale, zero, **options):
        out = self._tensor(self.shapes[x], scale, zero)
        self.model.op(name, [x], [out], **options)
        return out

    def join(self, axis, *parts, scale=None):
        shape = list(self.shapes[parts[0]])
        shape[axis] = sum(self.shapes[p][axis] for p in parts)
        out = self._tensor(tuple(shape), scale or self.scales[parts[0]], self.zeros[parts[0]])
        self.model.op("CONCATENATION", list(parts), [out], axis=axis, fused_activation_function="NONE")
        return out


def bytes_of_all_values(n):
    low = -128 if n.signed else 0
    return {f"t{v}": np.resize(np.arange(low, low + 256), n.shapes[v]).astype(n.dtype) for v in n.inputs}


def on_npu(model, inputs, options=TABLES):
    program = api.compile(npulab.load(model), options=options)
    assert not [s for s in program.steps if isinstance(s, HostStep)], program.host_nodes
    return npulab.open_session(program).run(inputs)


def worst(want, got):
    assert want.keys() == got.keys()
    return max(int(np.abs(want[k].astype(int) - got[k].astype(int)).max()) for k in want)


# functions

OUTPUTS = {"LOGISTIC": (1 / 256, 0), "TANH": (1 / 128, 128)}
"""(scale, unsigned zero point) that TFLite asks of a function's result."""


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["LOGISTIC", "TANH"]), st.booleans(), st.floats(0.001, 0.4), st.integers(0, 255))
def test_a_saturating_function_is_within_one_of_litert_for_every_byte(name, signed, scale, zero):
    n = Network(0, signed)
    shift = 128 if signed else 0
    x = n.every_byte(1, 8, 8, 4, scale=float(np.float32(scale)), zero=zero - shift)
    out_scale, out_zero = OUTPUTS[name]
    model = n.build(n.function(name, x, out_scale, out_zero - shift))

    assert worst(litert(model, bytes_of_all_values(n)), on_npu(model, bytes_of_all_values(n))) <= 1


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("name", "options"), [
    ("RELU", {}), ("LEAKY_RELU", {"alpha": 0.1}), ("LEAKY_RELU", {"alpha": 0.3}), ("HARD_SWISH", {})])
@pytest.mark.parametrize("seed", range(4))
def test_a_function_with_a_scale_of_its_own_is_within_one_of_litert(name, options, signed, seed):
    n = Network(seed, signed)
    low = 0.1 if name == "HARD_SWISH" else 0.02  # so that the kink at 3 is in the dense part of the table
    scale, zero = float(np.float32(n.rng.uniform(low, 2 * low))), n.zero()
    x = n.every_byte(1, 8, 8, 4, scale=scale, zero=zero)
    model = n.build(n.function(name, x, float(np.float32(scale * n.rng.uniform(0.6, 1.0))), n.zero(), **options))

    assert worst(litert(model, bytes_of_all_values(n)), on_npu(model, bytes_of_all_values(n))) <= 1


@settings(max_examples=300, deadline=None)
@given(st.floats(2.0**-12, 2.0), st.integers(0, 255))
def test_the_driver_s_logistic_is_within_three_quarters_of_a_step_for_any_scale(scale, zero):
    assert steps_off(Elementwise("LOGISTIC"), scale, 1 / 256, zero, 0) <= 0.75


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (1, 13, 11, 70), (1, 40, 65, 3), (1, 2000, 17), (1, 9000), (5000,)])
def test_a_table_job_covers_any_shape(shape):
    n = Network(1, False)
    flat = int(np.prod(shape))
    wide = next(d for d in range(8000, 0, -1) if flat % d == 0)
    x = n.every_byte(1, flat // wide, wide, 1, scale=0.04, zero=100)
    model = n.build(n.function("LOGISTIC", n.reshape(x, *shape), 1 / 256, 0))

    assert worst(litert(model, bytes_of_all_values(n)), on_npu(model, bytes_of_all_values(n))) <= 1


def test_a_function_between_convolutions_keeps_their_layout():
    n = Network(2, False)
    h = n.conv(n.input(1, 12, 10, 8), 16, (3, 3))
    h = n.function("LOGISTIC", h, 1 / 256, 0)
    model = n.build(n.conv(h, 8, (3, 3)))

    program = api.compile(npulab.load(model), options=TABLES)
    roles = [j.role for s in program.steps if isinstance(s, NpuStep) for j in s.jobs]
    inputs = n.samples()
    assert roles == ["transpose", "convolution", "table", "convolution", "detranspose"]
    assert worst(litert(model, inputs), on_npu(model, inputs)) <= 2


def test_the_descriptor_is_that_of_the_driver_that_has_table_jobs():
    """Mesa 26 for RELU over x = 100, y = 20, one slice of three; the vector is that of the project's TP notes 2.8."""
    multiplier, shift = requantization(2.0)
    share = through_table((1, 6, 20, 100), 128, 0, multiplier, shift - 15, 6)[0]
    want = ("64 10014 64 7d0 0 130063 e8000018 0 100040 100040 1000 0 9000000e 8000 0 1 1 64 40 20000 640 0 10002 7d0 "
            "c007c0a 0 3ffffff 0 3ffffff 80000000 0")

    d = TPDescriptor(**share.fields, in_image_base_address=0x1000, out_image_base_address=0x8000)
    assert " ".join(f"{w:x}" for w in d.encode()) == want


def test_the_table_of_relu_is_that_driver_s():
    """TP notes 2.5: 16 zeros, then the keys, 16 times the largest number, then minus zero."""
    want = [0] * 16 + [0x8000 + i * 0x800 for i in range(480)] + [0xF7FFF] * 16
    words = np.frombuffer(Function.of(Elementwise("RELU"), 0.1, 0.2).words, "<u4").tolist()

    assert words[16:512] == want[16:]
    assert not any(w & 0xFFFFF for w in words[512:])


def test_a_table_s_bytes_are_those_the_virtual_npu_reads():
    n = Network(3, False)
    h = n.conv(n.input(1, 40, 40, 8), 32, (3, 3))
    program = api.compile(npulab.load(n.build(n.function("TANH", n.function("LOGISTIC", h, 1 / 256, 0), 1 / 128, 128))),
                          options=TABLES)

    device = VirtualNPU(A311D)
    npulab.open_session(program, device=device).run(n.samples())
    spans = [s for s in api.profile(program).spans if s.job is not None]
    traced = [t.work for t in device.trace]
    assert sum(w.weights for w in traced) == sum(s.touched.get("weights", 0) for s in spans)
    assert sum(w.read for w in traced) == sum(s.touched.get("input", 0) for s in spans)
    assert len([s for s in program.sections if s.name.startswith("table")]) == 2


# where they run, and what is said of it


def verdicts(model, options=None):
    return api.check(npulab.load(model), options=options or PlanOptions())


def test_a_function_is_left_to_the_host_unless_asked_for():
    n = Network(4, False)
    model = n.build(n.function("LOGISTIC", n.conv(n.input(1, 8, 8, 8), 16, (3, 3)), 1 / 256, 0))

    plain, asked = verdicts(model), verdicts(model, TABLES)
    assert [v.where for v in plain] == ["npu", "host"]
    assert "Found: LOGISTIC, and no feature tp-table. Try: --feature tp-table." in str(plain[1].reasons[0])
    assert [v.where for v in asked] == ["npu", "npu"]
    faster = api.profile(npulab.load(model), options=TABLES)
    assert faster.total_ns < api.profile(npulab.load(model)).total_ns
    assert faster.features == {"tp-table": "inferred"}
    assert [(d.choice, d.instead) for d in faster.decisions if d.feature] == [("LOGISTIC as a table", "on the host")]


def test_the_remedy_that_check_names_is_one_it_takes(tmp_path, capsys):
    n = Network(4, False)
    path = tmp_path / "m.tflite"
    path.write_bytes(n.build(n.function("LOGISTIC", n.conv(n.input(1, 8, 8, 8), 16, (3, 3)), 1 / 256, 0)))

    assert run_arguments(["check", str(path), "--target", "a311d"]) == 0
    assert "Try: --feature tp-table" in " ".join(capsys.readouterr().out.split())
    assert run_arguments(["check", str(path), "--target", "a311d", "--feature", "tp-table"]) == 0
    assert "2 of 2 operators" in capsys.readouterr().out


def test_a_kink_between_the_table_s_entries_is_refused_with_its_error():
    n = Network(5, False)
    x = n.every_byte(1, 8, 8, 4, scale=6 / 132, zero=0)
    model = n.build(n.function("RELU6", x, 6 / 255, 0))

    reason = verdicts(model, TABLES)[1].reasons[0]
    assert "within three quarters of a step" in reason.rule
    assert "steps at scales 0.0454545 and 0.0235294" in reason.found
    assert worst(litert(model, bytes_of_all_values(n)), npulab.open_session(
        api.compile(npulab.load(model), options=TABLES)).run(bytes_of_all_values(n))) == 0


def test_a_function_of_what_the_host_has_stays_there():
    n = Network(6, False)
    f = n.function("LOGISTIC", n.input(1, 8, 8, 8), 1 / 256, 0)
    model = n.build(n.conv(f, 16, (3, 3)))

    reasons = verdicts(model, TABLES)[0].reasons
    assert "LOGISTIC of what the host has" in reasons[0].found


# joined along outer axes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from([(1, None, 7), (1, None, 5, 3), (None, 4),
                                                                              (1, 1, None, 6), (None,)]))
def test_tensors_joined_along_an_outer_axis_are_within_one_of_litert(seed, signed, same, shape):
    n = Network(seed, signed)
    axis = shape.index(None)
    rest = int(np.prod([s for s in shape if s]))
    parts = []
    scale = n.scale()
    same = same or signed  # TFLite joins int8 tensors of one scale only
    for count in n.rng.integers(1, 40, int(n.rng.integers(2, 5))):
        x = n.pool(n.input(1, int(count), rest, 1, scale=scale if same else None, zero=3 if same else None), (1, 1))
        parts.append(n.reshape(x, *(int(count) if s is None else s for s in shape)))
    model = n.build(n.join(axis, *parts))

    inputs = n.samples()
    assert worst(litert(model, inputs), on_npu(model, inputs, PlanOptions())) <= (0 if same else 1)


def test_a_transpose_scales_on_its_way_into_a_joined_tensor():
    n = Network(7, False)
    x = n.input(1, 10, 12, 8)
    parts = [n.reshape(n.conv(x, c, (3, 3)), 1, 60 * c, 2) for c in (6, 4)]
    model = n.build(n.join(1, *parts, scale=2 * max(n.scales[p] for p in parts)))

    program = api.compile(npulab.load(model))
    roles = [j.role for s in program.steps if isinstance(s, NpuStep) for j in s.jobs]
    inputs = n.samples()
    assert sorted(roles) == ["convolution", "convolution", "detranspose", "detranspose", "transpose"]
    assert worst(litert(model, inputs), on_npu(model, inputs, PlanOptions())) <= 2


def test_a_tensor_that_someone_else_reads_is_still_copied():
    n = Network(8, False)
    conv = n.conv(n.input(1, 10, 12, 8), 6, (3, 3))
    flat = n.reshape(conv, 1, 360, 2)
    model = n.build(n.join(1, flat, flat, scale=0.2), flat, conv)

    inputs = n.samples()
    assert worst(litert(model, inputs), on_npu(model, inputs, PlanOptions())) <= 2


@pytest.mark.parametrize(("axis", "where"), [(1, "host"), (2, "npu"), (-1, "npu"), (-2, "npu"), (-3, "host")])
def test_an_axis_behind_a_longer_one_is_refused(axis, where):
    """Behind axis 1 of two: only channels."""
    n = Network(9, False)
    shape = (1, 1, 4, 6) if where == "npu" else (1, 2, 4, 6)
    x = n.input(1, 4, 6, shape[1])
    a = n.reshape(n.conv(x, shape[1], (1, 1)), *shape)
    b = n.reshape(n.conv(x, shape[1], (1, 1)), *shape)
    out = n.join(axis if where == "npu" else 2, a, b)

    got = verdicts(n.build(out))[-1]
    assert got.where == where
    if where == "host":
        assert "axis 2 of [1, 2, 4, 6]" in got.reasons[0].found


# a real network


@needs_shared
def test_the_tail_of_a_detector_runs_on_the_npu():
    path = SHARED / "models/quantized/ssdlite_mobiledet_coco_qat_postprocess.tflite"
    graph = npulab.load(path)
    plain, tables = api.profile(graph), api.profile(graph, options=TABLES)

    assert [r.op for r in plain.rows if r.unit == "host"] == ["LOGISTIC", "TFLite_Detection_PostProcess"]
    assert [r.op for r in tables.rows if r.unit == "host"] == ["TFLite_Detection_PostProcess"]
    assert tables.total_ns < plain.total_ns
    image = np.random.default_rng(0).integers(0, 256, (1, 320, 320, 3)).astype(np.uint8)
    name = graph.values[graph.inputs[0]].name
    want = npulab.open_session(api.compile(graph)).run({name: image})
    got = npulab.open_session(api.compile(graph, options=TABLES)).run({name: image})
    scores = [k for k in want if want[k].shape == (1, 10) or want[k].ndim == 2][-1:]
    assert all(np.abs(want[k] - got[k]).max() <= 1 / 128 for k in scores)
