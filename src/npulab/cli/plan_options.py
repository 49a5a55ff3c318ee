"""Options of verbs that compile: what the plan may use, and what-if settings of the chip."""

from __future__ import annotations

import decimal
import enum
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from npulab.errors import UsageError

if TYPE_CHECKING:
    from npulab.targets.target import PlanOptions


class Channels(enum.StrEnum):
    ANY = "any"
    MULTIPLE = "multiple-of-cores"


NoZeroRuns = Annotated[bool, typer.Option("--no-zero-runs", help="Do not compress runs of zero weights.")]
ChannelsOption = Annotated[Channels, typer.Option(
    "--channels", help="Output channels of convolutions that the NPU takes; the host runs the others.")]
NoKernelCache = Annotated[bool, typer.Option("--no-kernel-cache", help="Do not keep weights in on-chip SRAM.")]
NoImageCache = Annotated[bool, typer.Option("--no-image-cache", help="Do not keep input tiles in on-chip SRAM.")]
Features = Annotated[list[str] | None, typer.Option(
    "--feature", metavar="NAME", show_default=False,
    help="Allow a feature that no recorded stream shows; once for each.")]
SettingsOption = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", show_default=False,
    help="What if: dram_bandwidth=8GB/s, clock=1GHz, sram=512KiB, nn_cores=4; once for each.")]


def plan_options(no_zero_runs: bool = False, channels: Channels = Channels.ANY, no_kernel_cache: bool = False,
                 no_image_cache: bool = False, features: Iterable[str] | None = None) -> PlanOptions:
    """The PlanOptions that the options above ask for."""
    from npulab.targets.target import PlanOptions

    return PlanOptions(
        zero_runs=not no_zero_runs, channels="any" if channels is Channels.ANY else "multiple-of-cores",
        kernel_cache=not no_kernel_cache, image_cache=not no_image_cache, features=frozenset(features or ()),
    )


def in_words(options: PlanOptions) -> str:
    """', no-zero-runs, features axi-sram' after a plan's name; '' for the default."""
    return "".join(f", {name}" if value == "on" else f", {name} {value}" for name, value in options.as_text().items())


class Setting(NamedTuple):
    """A number of the chip that can be set. `units`: suffix -> factor; the first is what a bare number means.

    `low`..`high` in that unit, both allowed: wider than any chip, so that what comes of it stays a number.
    """

    units: Mapping[str, int]
    low: int
    high: int
    whole: bool


SETTINGS: Mapping[str, Setting] = {
    "dram_bandwidth": Setting({"B/s": 1, "kB/s": 10**3, "MB/s": 10**6, "GB/s": 10**9, "KiB/s": 2**10, "MiB/s": 2**20,
                               "GiB/s": 2**30}, 10**6, 10**14, False),
    "clock": Setting({"Hz": 1, "kHz": 10**3, "MHz": 10**6, "GHz": 10**9}, 10**6, 10**11, False),
    "sram": Setting({"B": 1, "kB": 10**3, "MB": 10**6, "KiB": 2**10, "MiB": 2**20}, 0, 2**30, True),
    "nn_cores": Setting({"": 1}, 1, 64, True),
}

_NUMBER = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+|nan|inf(?:inity)?)(?:[eE][+-]?[0-9]{1,4})?) ?([A-Za-z/]*)")


def parse_settings(texts: Iterable[str]) -> dict[str, float | int]:
    """['dram_bandwidth=8GB/s', 'nn_cores=4'] -> {'dram_bandwidth': 8e9, 'nn_cores': 4}, in B/s, Hz, bytes, cores.

    Raises: UsageError for an unknown key or unit, a value out of range, or two values for one key.
    """
    found: dict[str, float | int] = {}
    for text in texts:
        key, equals, value_text = text.partition("=")
        if not equals or key not in SETTINGS:
            raise UsageError(f"--set does not know '{key}'" if equals else f"--set {text}: there is no value",
                             want=", ".join(f"{k}=NUMBER{_units(s)}" for k, s in SETTINGS.items()))
        value = _value(text, value_text, SETTINGS[key])
        if found.get(key, value) != value:
            raise UsageError(f"--set gives {key} two values", got=f"{found[key]:g} and {value:g}")
        found[key] = value
    return found


def _value(text: str, value: str, setting: Setting) -> float | int:
    match = _NUMBER.fullmatch(value)
    default = next(iter(setting.units))
    if not match or (match[2] or default) not in setting.units:
        raise UsageError(f"--set {text} is not a number{' and a unit' if default else ''}",
                         want=f"NUMBER{_units(setting)}", got=value or "nothing")
    try:
        n = decimal.Decimal(match[1]) * setting.units[match[2] or default]
        inside = setting.low <= n <= setting.high
    except ArithmeticError:  # nan; powers of ten that no number has
        inside = False
    if not inside:
        raise UsageError(f"--set {text} is out of range", got=value,
                         want=f"{setting.low:g} to {setting.high:g} {default}".rstrip())
    if not setting.whole:
        return float(n)
    if n != n.to_integral_value():
        raise UsageError(f"--set {text} is not a whole number{' of bytes' if default == 'B' else ''}", got=value)
    return int(n)


def _units(setting: Setting) -> str:
    names = [u for u in setting.units if u]
    return f"[{'|'.join(names)}]" if names else ""
