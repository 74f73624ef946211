"""The table: figures with their units, ratios, and what was to reach. Markdown that reads as text.

Not here: the figures themselves (`measuring.py`) and the goals (`rows.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.benchmarks.measuring import Measured
from tests.benchmarks.rows import TITLES, Goal, Row, Unit

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def render(row: Row, title: str, found: Mapping[str, Measured]) -> str:
    """Write one row of the benchmark as a heading and a table of its peers."""
    main = row.columns[0]
    reference = found[row.against].median(main.key) if row.against in found else None
    head = ["", main.title, "spread", *(column.title for column in row.columns[1:])]
    head += [f"x {TITLES[row.against]}", "to reach"]
    lines = [head]
    for peer, measured in found.items():
        value = measured.median(main.key)
        if value is None:
            why = f"not available: {measured.error}"
            lines.append([TITLES[peer], *[""] * (len(head) - 2), why])
            continue
        cells = [TITLES[peer], figure(value, main.unit), _percent(measured.spread(main.key))]
        cells += [figure(measured.median(c.key), c.unit) for c in row.columns[1:]]
        cells.append(f"{value / reference:.2f}" if reference else "")
        cells.append("; ".join(verdict(goal, found) for goal in row.goals if goal.peer == peer))
        lines.append(cells)
    return f"### {title}\n\n{_aligned(lines)}\n"


_UNITS = {
    "ideal": " % of ideal",
    "memory_mb": " MB",
    "mb_per_call": " MB",
    "growth": " x 1,000 items",
}


def verdict(goal: Goal, found: Mapping[str, Measured]) -> str:
    """Say what was to reach and whether it was."""
    mine = found[goal.peer].median(goal.key)
    theirs = None
    what = f"{goal.relation} {goal.limit:g}"
    if goal.than is not None:
        what += f" x {TITLES[goal.than]}"
        theirs = found[goal.than].median(goal.key) if goal.than in found else None
    else:
        what += {
            "ideal": " % of ideal",
            "memory_mb": " MB",
            "mb_per_call": " MB",
            "growth": " x 1,000 items",
        }[goal.key]
    if mine is None or (goal.than is not None and not theirs):
        return f"{what}: not measured"
    value = mine / theirs if theirs else mine
    reached = value <= goal.limit if goal.relation == "<=" else value >= goal.limit
    return f"{what}: {'reached' if reached else 'MISSED'} ({value:.3g})"


def figure(value: float | None, unit: Unit) -> str:
    """Write a number with three digits and its unit."""
    if value is None:
        return ""
    match unit:
        case "seconds":
            scale, name = next((s for s in _TIMES if value >= s[0]), _TIMES[-1])
            return f"{value / scale:#.3g}".rstrip(".") + f" {name}"
        case "megabytes":
            return f"{value:.0f} MB" if abs(value) >= 1 else f"{1000 * value:.1f} kB"
        case "per second":
            return f"{value:,.0f}"
        case "percent":
            return f"{value:.0f} %"
        case "times":
            return f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Pad the cells of a Markdown table: names and verdicts to the left, figures to the right."""
    last = len(lines[0]) - 1
    widths = [max(len(line[i]) for line in lines) for i in range(last)]
    text = []
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
            for i, cell in enumerate(line[:last])
        ]
        text.append("| " + " | ".join([*cells, line[last]]).rstrip() + " |")
        if number == 0:
            rule = ["-" * (widths[0] or 3)]
            rule += ["-" * (max(width, 4) - 1) + ":" for width in widths[1:]]
            text.append("| " + " | ".join([*rule, "-" * len(line[last])]) + " |")
    return "\n".join(text)
