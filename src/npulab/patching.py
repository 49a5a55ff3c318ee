"""A network rewritten for a board: passes in its own dialect, what they changed, and how to compare both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npulab.ir import Graph
from npulab.passes.pipeline import Change, find_passes
from npulab.targets.facts.board import Board, Check, find_board
from npulab.targets.facts.schema import load_one

if TYPE_CHECKING:
    from npulab.passes.certificate import Agreement
    from npulab.postprocess.types import Post

Feeds = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Patched:
    """The new network beside the old one.

    graph, data    the new network, and what gives its file.
    changes        what was done, in order.
    post           what gives the old outputs from those of a network whose head was cut off; None if none was.
    compare        runs both networks on these inputs and on random ones: how far each output is, and what ran them.
    notes          what was left out, and why.
    assume         the element type that the board was asked about in place of floats; "" for none.
    before, after  the board's verdicts; None without a board.
    """

    graph: Graph
    data: Callable[[], bytes]
    changes: Sequence[Change]
    post: Post | None
    compare: Callable[[Feeds | None], tuple[list[Agreement], str]]
    notes: Sequence[str] = ()
    assume: str = ""
    before: Check | None = None
    after: Check | None = None

    @property
    def exact(self) -> bool:
        """Whether all that was done calls itself exact."""
        return all(c.exact for c in self.changes)


def patch(graph: Graph, target: str | None = None, passes: Sequence[str] = (), assume: str | None = None) -> Patched:
    """`graph` made simpler, changed by `passes` ("cut-head", "pad-channels=16"), and by those exact ones with which
    the board `target` leaves fewer operators off its NPU.

    The board is asked about floats as `assume` ("int8", "" for as they are); None: as int8 if it takes more so.

    Raises: UsageError for an unknown pass, board or type; UnsupportedError where a pass that is asked for cannot work.
    """
    find_passes(passes)
    board = find_board(target) if target else None
    kind = assume if assume is not None else as_quantized(board, graph) if board else ""

    def check(g: Graph) -> Check | None:
        return board.check(g, kind) if board else None

    def off(g: Graph) -> set[int]:
        found = check(g)
        return off_npu(found) if found else set()

    made = (_tflite if graph.format == "tflite" else _onnx)(graph, passes, off if board else None, board)
    return Patched(made.graph, made.data, made.changes, made.post, made.compare, made.notes, kind, check(graph),
                   check(made.graph))


def off_npu(check: Check) -> set[int]:
    """The nodes that do not run on the NPU."""
    return {f.node for f in check.findings if f.where != "npu"}


def _onnx(graph: Graph, passes: Sequence[str], off: Callable[[Graph], set[int]] | None, board: Board | None) -> Patched:
    from npulab.exporters.onnx import to_onnx
    from npulab.passes.certificate import compared
    from npulab.passes.pipeline import patched, post_of

    after, changes = patched(graph, passes, off, _opset(board.name) if board else None)
    post = post_of(graph, after, changes)
    return Patched(after, lambda: to_onnx(after), changes, post, lambda feeds: (
        compared(graph, after, feeds, post), "ONNX Runtime, without its optimizations"))


def _tflite(graph: Graph, passes: Sequence[str], off: Callable[[Graph], set[int]] | None, _: Board | None) -> Patched:
    from npulab.passes.tflite_certificate import compared_tflite
    from npulab.passes.tflite_passes import patched_tflite

    made = patched_tflite(graph, passes, off)
    if not made.changes:  # the same bytes: LiteRT need not even run them
        return Patched(graph, lambda: made.data, [], None, lambda feeds: ([], "nothing: it is the same file"),
                       made.notes)
    return Patched(made.graph, lambda: made.data, made.changes, made.post,
                   lambda feeds: compared_tflite(graph, made, feeds), made.notes)


def _opset(board: str) -> int | None:
    """The newest version of ONNX's operators that the board's tools read, if its facts say."""
    fact = load_one(board).facts.get("onnx_opset")
    return int(fact.value) if fact and isinstance(fact.value, int | float) else None


def as_quantized(board: Board, graph: Graph) -> str:
    """int8 if the board takes more of the network so, as its vendor's quantizer would make it; else nothing."""
    return "int8" if board.check(graph, "int8").count("npu") > board.check(graph).count("npu") else ""
