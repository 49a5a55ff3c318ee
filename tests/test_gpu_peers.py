"""What bench/gpu_peers.py reads of clpeak and says of both."""

import pytest

from scripts import loaded

XML = """<clpeak><platform name="PoCL"><device name="cpu">
<global_memory_bandwidth unit="gbps"><float>9.5</float><float16>14.7</float16></global_memory_bandwidth>
<single_precision_compute unit="gflops"><float>3</float><float2>30.5</float2></single_precision_compute>
<transfer_bandwidth unit="gbps"><enqueuewritebuffer>11</enqueuewritebuffer><enqueuereadbuffer>10</enqueuereadbuffer>
<memcpy_from_mapped_ptr>99</memcpy_from_mapped_ptr></transfer_bandwidth>
<kernel_launch_latency unit="us">8.25</kernel_launch_latency></device></platform></clpeak>"""


@pytest.fixture(scope="module")
def bench():
    with loaded("bench/gpu_peers.py") as program:
        yield program


def test_clpeaks_best_figures_are_read(bench):
    assert bench.parsed(XML) == dict(zip(bench.ROWS, (30.5, 14.7, 11, 10, 8.25), strict=True))
    assert bench.parsed("<clpeak><platform/></clpeak>") == {}


def test_what_is_apart_is_explained_and_what_is_near_is_not(bench):
    compute, memory, to, back, _ = bench.ROWS
    lines = bench.compared({compute: [280, 283, 290], memory: [14, 15, 13], to: [16, None, None], back: [None]},
                           {compute: [30, None, 29], memory: [14.5], to: [11], back: [10]}, {back: "it is slow"})
    text = "\n".join(lines)
    assert lines[1].split()[-6:] == ["283", "29.5", "9.59", "9.33", "to", "10.00"]
    assert bench.WHY[compute] in text
    assert bench.WHY[to] in text
    assert bench.WHY[memory] not in text
    assert lines[lines.index("    it is slow") - 1].split()[-2:] == ["refused", "10"]
    assert lines[-1].split()[-2:] == ["refused", "-"]
