"""A Profile as text of 80 columns."""

from __future__ import annotations

from npulab.cli.printing import amount, clean, ranges, say, table
from npulab.profiling.join import gains
from npulab.profiling.types import BOUND_NAMES, Profile, Row
from npulab.report.figures import (
    ENOUGH,
    PLACES,
    SHORT,
    apportion,
    asked_options,
    behind,
    by_cost,
    data,
    digits_for,
    find_constant,
    first_rows,
    grouped,
    ms,
    printed,
    quantity,
    set_by_user,
    waste_by_cause,
    wasted,
)


def print_profile(profile: Profile, everything: bool = False) -> None:
    """Print the profile: the total and what costs it, the rows that make most of it, what stands behind the numbers.

    The times printed in the rows add up to the total printed. `everything`: all rows, not only 95 % of the time.
    """
    _headline(profile)
    say()
    _rows(profile, everything)
    _gains(profile)
    _decisions(profile)
    _footing(profile)


def _headline(profile: Profile) -> None:
    low, high = profile.interval_ns
    whole, at = profile.total_ns, digits_for(profile.total_ns)
    options = ", ".join(asked_options(profile))
    say(f"{profile.model} for {profile.target}, plan {profile.plan}" + (f" ({options})" if options else ""))
    if changed := set_by_user(profile):
        say("what if   " + ", ".join(f"{c.name} = {quantity(c.value, c.unit)}" for c in changed))
    say(f"time      {ms(whole, at)} ms, expected between {ms(low, at)} and {ms(high, at)} ms; {profile.witness}")
    cost = by_cost(profile)
    shares = apportion(list(cost.values()), 100)
    parts = [f"{BOUND_NAMES[t]} {share} %" for t, share in zip(cost, shares, strict=True) if share]
    say("bound by  " + (", ".join(parts) or "nothing"))
    bandwidth = find_constant(profile, "dram_bandwidth")
    rate = f", {quantity(profile.dram_bytes / (whole * 1e-9), 'B/s')} on average" if whole else ""
    of = f" of {quantity(bandwidth.value, bandwidth.unit)}" if rate and bandwidth else ""
    say(f"bytes     {data(profile.dram_bytes)} to and from DRAM{rate}{of}; {data(profile.sram_bytes)} of on-chip SRAM")
    useful, macs = sum(r.macs_useful for r in profile.rows), sum(r.macs for r in profile.rows)
    if (waste := wasted(useful, macs)) is not None:
        why = ", ".join(f"{cause} {100 * n / macs:.0f} %" for cause, n in waste_by_cause(profile).items())
        say(f"MACs      {amount(useful)} useful in {amount(macs)} slots, {100 * waste:.0f} % of them for nothing"
            + (f": {why}" if why else ""))


def _rows(profile: Profile, everything: bool) -> None:
    shown = set(range(len(profile.rows))) if everything else first_rows(profile)
    rest = [r for i, r in enumerate(profile.rows) if i not in shown]
    picked = [r for i, r in enumerate(profile.rows) if i in shown]
    times = [r.ns for r in picked] + [sum(r.ns for r in rest)] * bool(rest)
    at = digits_for(profile.total_ns)
    shown_ms = printed(times, at)
    shares = [f"{n // 10}.{n % 10}" for n in apportion(times, 1000 if profile.total_ns else 0)]
    lines: list[tuple[object, ...]] = [
        ("" if r.node is None else r.node, clean(r.op), PLACES.get(r.unit, r.unit), shown_ms[i], shares[i],
         SHORT[r.bound], *_figures(r))
        for i, r in enumerate(picked)]
    if rest:
        lines.append(("", f"and {len(rest)} more", "", shown_ms[-1], shares[-1], "", "", "",
                      _compact(sum(r.dram_bytes for r in rest)), ""))
    lines.append(("", "all", "", ms(profile.total_ns, at), "100.0" if profile.total_ns else "0.0", "",
                  _compact(sum(r.macs_useful for r in profile.rows)), "", _compact(profile.dram_bytes), ""))
    table([">node", "operator+", "where", ">ms", ">%", "bound", ">MACs", ">idle", ">DRAM", ">use"], lines)
    say()
    say("MACs: those that the operator asks for. idle: % of the multiplier slots of its time that do other than that. "
        "DRAM: bytes. use: % of the NN cores' peak.")
    if rest:
        say(f"The rows make {float(100 * ENOUGH):.0f} % of the time; --all shows all {len(profile.rows)}.")


def _figures(row: Row) -> tuple[str, str, str, str]:
    waste = wasted(row.macs_useful, row.macs)
    return (_compact(row.macs_useful), "" if waste is None else f"{100 * waste:.0f}", _compact(row.dram_bytes),
            f"{100 * row.utilisation:.0f}" if row.macs_useful else "")


def _compact(n: int) -> str:
    return amount(n).replace(" ", "") if n else ""


def _gains(profile: Profile) -> None:
    found = sorted(((t, ns) for t, ns in gains(profile).items() if ns), key=lambda item: -item[1])
    if not found:
        return
    say()
    say("If one of these cost nothing, and all else stayed:")
    at = digits_for(profile.total_ns)
    table(["free", ">saves ms", ">%"], [(BOUND_NAMES[t], ms(ns, at), f"{100 * ns / profile.total_ns:.1f}")
                                        for t, ns in found])


def _decisions(profile: Profile) -> None:
    if not profile.decisions:
        return
    say()
    say("Decisions of the search, and what each saves by the model:")
    table(["nodes+", "choice+", "instead of+", ">saves ms", "state"], [
        (ranges(nodes), d.choice + (f" ({d.feature})" if d.feature else ""), d.instead, ms(saved), d.state)
        for nodes, d, saved in grouped(profile.decisions)])


def _footing(profile: Profile) -> None:
    say()
    table(["constant", ">value", "what stands behind it+"],
          [(c.name, quantity(c.value, c.unit), behind(c)) for c in profile.constants])
    for name, state in profile.features.items():
        say(f"feature   {name}: {state}; no recorded stream of a driver shows it")
    host = sum(r.ns for r in profile.rows if "host" in r.unit.split("+"))
    if host:
        say()
        say(f"The host's {ms(host, digits_for(profile.total_ns))} ms are modelled from a record of {profile.host}, "
            "a factor of two either way.")
