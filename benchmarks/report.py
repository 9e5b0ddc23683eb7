"""From `benchmarks/results/*.json` to `docs/benchmarks.md`, without measuring: `python -m benchmarks.report`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.plan import ENTRIES
from benchmarks.workloads import WORKLOADS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
_INTRODUCTION = Path(__file__).parent / "protocol.md"
NOT_MEASURED = "not measured yet"
_HEAD = (
    "| library | method | checkpoints | LDS, default damping | slope | LDS, best damping | slope | damping chosen on other queries | "
    "features, s (× f+b) | query, s (× f+b) | peak MB | bytes per example |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
_ANY_OTHERS = "; if overlap meant a tie, the others would be ties"


def write_report(results: Path) -> None:
    """Write the page: protocol, where we win and lose, one table per workload."""
    found = [json.loads(path.read_text()) for name in WORKLOADS if (path := results / f"{name}.json").exists()]
    parts = [_INTRODUCTION.read_text().rstrip(), _summary(found), *map(_workload, found), _grids()]
    PAGE.write_text("\n\n".join(parts) + "\n")


def _summary(found: list[dict[str, Any]]) -> str:
    lines = [
        "## Against the best peer",
        "",
        "Both at their best damping. The interval of the difference is the paired bootstrap's over queries; it decides the verdict. The next column is whether "
        "the 95 % intervals of the two LDS, each for itself, are disjoint. The moonshot is half of the way from the best peer to the noise ceiling.",
        "",
        "| workload | checkpoints | ours | best peer | difference | verdict | intervals | moonshot |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pairs = [(workload, count, pair) for workload in found for count, pair in workload["compared"].items() if pair]
    lines += [
        f"| {workload['workload']} | {count} | {_pair(pair, workload['ceiling'])} |" for workload, count, pair in pairs
    ]
    apart = sum(_disjoint(pair) for _, _, pair in pairs)
    return "\n".join(
        [
            *lines,
            "",
            f"{apart} of {len(pairs)} pairs of intervals are disjoint{_ANY_OTHERS if apart < len(pairs) else ''}.",
        ]
    )


def _pair(pair: dict[str, Any], ceiling: float) -> str:
    """Return the cells of our best row and the best peer's."""
    ours, peer, difference = pair["ours"], pair["peer"], pair["difference"]
    verdict = "win" if difference["low"] > 0 else "loss" if difference["high"] < 0 else "tie"
    moonshot = (peer["lds"] + ceiling) / 2
    reached = "reached" if ours["lds"] >= moonshot else f"{moonshot - ours['lds']:.3f} short"
    return (
        f"{ours['method']} {_interval(ours)} | {peer['peer']} {peer['method']} {_interval(peer)} | "
        f"{difference['lds']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}] | {verdict} | "
        f"{'disjoint' if _disjoint(pair) else 'overlap'} | {moonshot:.3f}: {reached}"
    )


def _disjoint(pair: dict[str, Any]) -> bool:
    ours, peer = pair["ours"], pair["peer"]
    return bool(ours["low"] > peer["high"] or ours["high"] < peer["low"])


def _workload(found: dict[str, Any]) -> str:
    truth = f"{found['subsets']} random halves × {found['seeds']} seeds retrained, {found['n']} examples, {found['queries']} queries"
    lines = [f"## {found['workload']}", "", f"{truth}. Noise ceiling {found['ceiling']:.3f}.", "", _HEAD]
    lines += [_row(row) for row in found["rows"]]
    return "\n".join([*lines, "", *_losses(found)])


def _row(row: dict[str, Any]) -> str:
    named = f"| {row['peer']} | {row['method']} | {row['checkpoints']} |"
    if row.get("error") == NOT_MEASURED:
        return f"{named} {NOT_MEASURED} | | | | | | | | |"
    if "error" in row:
        return f"{named} fails: `{row['error'][:160].replace('|', '/')}` | | | | | | | | |"
    default = next(iter(row["dampings"].values()))
    features = f"{row['feature_seconds']:.3g} ({row['feature_seconds'] / row['plain_train'] / row['checkpoints']:.3g})"
    queries = f"{row['query_seconds']:.3g} ({row['query_seconds'] / row['plain_query'] / row['checkpoints']:.3g})"
    size = "none" if row["bytes_per_example"] is None else f"{row['bytes_per_example']:.0f}"
    best, held = "– | –", "–"
    if "best" in row:
        quality, slope = _quality(row["dampings"][row["best"]])
        best = f"{quality} at {row['best']} | {slope}"
        held = f"{row['held_out_lds']:.3f}"
    return f"{named} {' | '.join(_quality(default))} | {best} | {held} | {features} | {queries} | {row['peak_memory_mb']:.0f} | {size} |"


def _quality(found: dict[str, Any]) -> tuple[str, str]:
    """Return the cells of LDS and slope."""
    if "error" in found:
        return found["error"], "–"
    return _interval(found), f"{found['slope']:.3g}"


def _interval(found: dict[str, Any]) -> str:
    return f"{found['lds']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _losses(found: dict[str, Any]) -> list[str]:
    """Name every peer's row that is better than ours in LDS, time or memory: than our default, EK-FAC, and than our row of the best LDS."""
    usable = [row for row in found["rows"] if "best" in row]
    lines = []
    for checkpoints in sorted({row["checkpoints"] for row in usable}):
        ours, peers = (
            [row for row in usable if row["checkpoints"] == checkpoints and (row["peer"] == "headwater") is side]
            for side in (True, False)
        )
        if not ours or not peers:
            continue
        references = {row["method"]: row for row in (ours[0], max(ours, key=_best_lds))}
        lines += [f"* {checkpoints} checkpoint(s): {line}" for row in references.values() for line in _lost(row, peers)]
    incomplete = any(row.get("error") == NOT_MEASURED for row in found["rows"])
    if not lines:
        return [
            "Where we lose: unknown before all is measured." if incomplete else "Where we lose: nowhere in this table."
        ]
    return ["Where we lose, of what is measured:" if incomplete else "Where we lose:", "", *lines]


def _lost(ours: dict[str, Any], peers: list[dict[str, Any]]) -> list[str]:
    """Return a line per measure in which peers' rows of as many checkpoints are better than a row of ours."""
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "LDS at its default damping": lambda row: -next(iter(row["dampings"].values())).get("lds", 0.0),
        "LDS at its best damping": lambda row: -_best_lds(row),
        "feature seconds": lambda row: row["feature_seconds"],
        "query seconds": lambda row: row["query_seconds"],
        "peak memory": lambda row: row["peak_memory_mb"],
    }
    lines = []
    for name, value in measures.items():
        better = [f"{row['peer']} {row['method']}" for row in peers if value(row) < value(ours)]
        if better:
            lines.append(f"our {ours['method']} loses in {name} to {', '.join(better)}.")
    return lines


def _best_lds(row: dict[str, Any]) -> float:
    found: float = row["dampings"][row["best"]]["lds"]
    return found


def _grids() -> str:
    lines = ["## Damping grids", "", "| library | method | options | dampings |", "|---|---|---|---|"]
    for entry in ENTRIES:
        grid = ", ".join("default" if damping is None else f"{damping:g}" for damping in entry.dampings)
        lines.append(f"| {entry.peer} | {entry.label} | `{json.dumps(entry.method)}` | {grid} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_report(Path(__file__).parent / "results")
