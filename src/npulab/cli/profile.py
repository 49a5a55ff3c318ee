"""npulab profile: where the time of one inference goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npulab.cli.options import Json, Plan
from npulab.cli.plan_options import (
    Channels,
    ChannelsOption,
    Features,
    NoImageCache,
    NoKernelCache,
    NoZeroRuns,
    SettingsOption,
    parse_settings,
    plan_options,
)

if TYPE_CHECKING:
    from npulab.profiling.types import Profile
    from npulab.targets.target import PlanOptions


MODELS = (".tflite", ".npu", ".onnx")
"""Names that a report cannot be meant to have."""


def profile(
    model: Annotated[Path, typer.Argument(metavar="MODEL", show_default=False,
                                          help="A .tflite file, or a .npu program.")],
    target: Annotated[str | None, typer.Option("--target", metavar="NAME", show_default=False,
                                               help="The chip; a .npu program knows its own.")] = None,
    plan: Annotated[Plan | None, typer.Option(
        "--plan", show_default=False,
        help="best, the default: npulab's own; reference: what the open driver does.")] = None,
    no_zero_runs: NoZeroRuns = False,
    channels: ChannelsOption = Channels.ANY,
    no_kernel_cache: NoKernelCache = False,
    no_image_cache: NoImageCache = False,
    feature: Features = None,
    settings: SettingsOption = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE.html", show_default=False,
                                              help="Write a page with charts, for any browser.")] = None,
    trace: Annotated[Path | None, typer.Option(
        "--trace", metavar="FILE.json", show_default=False,
        help="Write a trace for Perfetto or chrome://tracing.")] = None,
    measure_host: Annotated[bool, typer.Option(
        "--measure-host", help="Run the host's operators here and take their time; otherwise it is modelled.")] = False,
    all_: Annotated[bool, typer.Option("--all", help="Show every operator, not only 95 % of the time.")] = False,
    json: Json = False,
) -> None:
    """Say where the time of one inference goes, by the timing model."""
    from npulab.cli.printing import write_json
    from npulab.errors import UsageError
    from npulab.profiling.join import as_data
    from npulab.program.files import write_atomically
    from npulab.report.terminal import print_profile

    for path, option, suffix in ((html, "--html", ".html"), (trace, "--trace", ".json")):
        if path is not None and path.suffix.lower() in MODELS:
            raise UsageError(f"{option} does not write {path}", want=f"a name like {path.stem}{suffix}")
        if path is not None and path.exists() and model.exists() and path.samefile(model):
            raise UsageError(f"{option} would write over the model", where=path, try_="another name")
    options = plan_options(no_zero_runs, channels, no_kernel_cache, no_image_cache, feature)
    found = _profile(model, target, plan, options, parse_settings(settings or []), measure_host)
    if html is not None:
        from npulab.report.html import to_html

        write_atomically(html, to_html(found).encode())
    if trace is not None:
        from npulab.report.chrome_trace import to_json

        write_atomically(trace, to_json(found))
    if json:
        write_json(as_data(found))
        return
    print_profile(found, all_)
    for path in (html, trace):
        if path is not None:
            print(f"\nwrote {path} ({path.stat().st_size} bytes)")


def _profile(path: Path, target: str | None, plan: Plan | None, options: PlanOptions,
             settings: dict[str, float | int], measure_host: bool) -> Profile:
    from npulab import api
    from npulab.cli.printing import progress
    from npulab.errors import UsageError
    from npulab.program.container import is_program
    from npulab.targets.target import PlanOptions, all_targets

    if is_program(path):
        program = api.read_program(path)
        if target is not None and target != program.target:
            raise UsageError(f"{path} is for another target", want=program.target, got=target)
        if options != PlanOptions() or plan not in (None, program.plan):
            raise UsageError(f"{path} is compiled already; options of the plan come too late",
                             try_="profile the .tflite file with them")
        return api.profile(program, program.target, what_if=settings, measure_host=measure_host)
    if target is None:
        raise UsageError("a model needs a target", want=", ".join(sorted(all_targets())),
                         try_=f"--target {min(all_targets())}")
    progress(f"compiling {path} for {target}")
    return api.profile(path, target, (plan or Plan.BEST).plan_name, options, settings, measure_host)
