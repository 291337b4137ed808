"""Write what was measured as a page of tables and one chart for each backend."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

_COLORS = ("#8c8c8c", "#c9a227", "#2a78d6", "#d65f5f", "#7a5fb0", "#4f9d69", "#b0743c", "#5b7c99")
_BACKENDS = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
Results = dict[str, dict[str, dict[str, dict[str, Any]]]]


def write_report(
    directory: Path, results: Results, scenarios: dict[str, str], titles: dict[str, str], about: dict[str, Any]
) -> None:
    """Write ``benchmarks.md``, ``benchmarks-<backend>.svg`` and the raw figures."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Benchmarks",
        "",
        "All figures are times as ratios to unversioned SQLAlchemy doing the same in the same run (median of "
        f"{about['rounds']} interleaved rounds, quartiles in brackets); reads, which unversioned SQLAlchemy has not, "
        "are in milliseconds. `S` is the number of statements, `R` that of history rows written. What a library does "
        "not record is marked ✗: its time is no win.",
        "",
        f"Measured on {about['date']}: {about['machine']}, Python {about['python']}. "
        "Run `hatch run bench:run` to measure again.",
    ]
    for backend, peers in results.items():
        chart = f"benchmarks-{backend}.svg"
        (directory / chart).write_text(_chart(peers, scenarios, titles), encoding="utf-8")
        shown = [scenario for scenario in scenarios if any(scenario in cells for cells in peers.values())]
        lines += ["", f"## {_BACKENDS[backend]}", "", f"![Ratios to unversioned SQLAlchemy]({chart})", ""]
        lines += ["| | " + " | ".join(titles[name] for name in peers) + " |", "|---" * (len(peers) + 1) + "|"]
        for scenario in shown:
            cells = (_cell(peers, name, scenario) for name in peers)
            lines.append(f"| {scenarios[scenario]} | " + " | ".join(cells) + " |")
        memory = (f"{max(cell.get('memory', 0) for cell in cells.values()) / 1024:.0f} MB" for cells in peers.values())
        lines.append("| peak memory | " + " | ".join(memory) + " |")
        lines += _reasons(peers, titles)
    (directory / "benchmarks.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "benchmarks.json").write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


def _ratio(peers: dict[str, dict[str, dict[str, Any]]], name: str, scenario: str) -> float | None:
    base = peers["unversioned"][scenario].get("seconds")
    seconds = peers[name][scenario].get("seconds")
    return None if base is None or seconds is None else seconds / base


def _cell(peers: dict[str, dict[str, dict[str, Any]]], name: str, scenario: str) -> str:
    cell = peers[name][scenario]
    if "seconds" not in cell:
        return "✗"
    ratio = _ratio(peers, name, scenario)
    mark = "✗ " if "does_not" in cell else ""
    counts = f"<br>S {cell['statements']}, R {cell['rows']}"
    if ratio is None:
        return f"{mark}{cell['seconds'] * 1000:.2f} ms{counts}"
    base = peers["unversioned"][scenario]["seconds"]
    spread = f"({cell['low'] / base:.2f}-{cell['high'] / base:.2f})"
    return f"{mark}{ratio:.2f} {spread}{counts}"


def _reasons(peers: dict[str, dict[str, dict[str, Any]]], titles: dict[str, str]) -> list[str]:
    reasons = {
        f"{titles[name]}, {scenario.replace('_', ' ')}: {cell['does_not']}"
        for name, cells in peers.items()
        for scenario, cell in cells.items()
        if "does_not" in cell and name != "unversioned"
    }
    return ["", "✗ " + "; ".join(sorted(reasons)) + "."] if reasons else []


def _chart(peers: dict[str, dict[str, dict[str, Any]]], scenarios: dict[str, str], titles: dict[str, str]) -> str:
    """Draw the writes: one group of bars a scenario, cut off where a bar would dwarf the others."""
    shown = [s for s in scenarios if any(_ratio(peers, name, s) is not None for name in peers if name != "unversioned")]
    names = [name for name in peers if name != "unversioned"]
    limit, left, width, bar, gap = 8.0, 250, 460, 12, 14
    parts, y = [], 40
    for scenario in shown:
        middle = y + len(names) * bar / 2
        parts.append(
            f'<text x="{left - 10}" y="{middle + 4}" text-anchor="end">{html.escape(scenarios[scenario])}</text>'
        )
        for number, name in enumerate(names):
            ratio = _ratio(peers, name, scenario)
            if ratio is None:
                continue
            is_marked = "does_not" in peers[name][scenario]
            length = min(ratio, limit) / limit * width
            opacity = 0.25 if is_marked else 1
            label = f"{ratio:.1f}" + (" ✗" if is_marked else "")
            parts.append(
                f'<rect x="{left}" y="{y + number * bar}" width="{length:.1f}" height="{bar - 2}" '
                f'fill="{_COLORS[number + 1]}" opacity="{opacity}"/>'
                f'<text x="{left + length + 4:.1f}" y="{y + number * bar + 9}" font-size="9">{label}</text>'
            )
        y += len(names) * bar + gap
    one = left + width / limit
    parts.append(f'<line x1="{one}" x2="{one}" y1="30" y2="{y}" stroke="#888" stroke-dasharray="3 3"/>')
    parts.append(f'<text x="{one}" y="26" text-anchor="middle" font-size="10">unversioned</text>')
    for number, name in enumerate(names):
        x, row = left + (number % 3) * 160, y + 14 + (number // 3) * 18
        parts.append(
            f'<rect x="{x}" y="{row - 9}" width="10" height="10" fill="{_COLORS[number + 1]}"/>'
            f'<text x="{x + 15}" y="{row}">{html.escape(titles[name])}</text>'
        )
    height = y + 30 + (len(names) // 3) * 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )
