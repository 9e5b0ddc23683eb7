"""How a whole EK-FAC fit's time and memory grow with examples, parameters and sequence length: `benchmarks/results/scaling.json` and `docs/scaling.svg`.

Every point is measured in a process of its own; memory is the largest resident size during the fit. Linux only.
"""

import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from attribution_core.methods.fit import fit
from attribution_core.processor import set_up_processor
from attribution_core.progress import NoProgress
from benchmarks.cost import peak_megabytes, plain_passes
from benchmarks.ours import dataset_of, fit_spec
from benchmarks.workloads import WORKLOADS, Workload

_HERE = Path(__file__).parent
_METHOD = {"type": "ekfac", "fisher": "sampled"}
_PANELS = {"examples": (250, 500, 1000, 2000), "parameters": (16, 64, 256, 1024), "tokens": (16, 32, 64)}
_REPEATS = 3
Point = dict[str, float]


@dataclass(frozen=True)
class _Scale:
    """A row of panels: what is drawn, in colours, and how numbers become heights."""

    lines: dict[str, str]
    unit: str
    logarithmic: bool

    def heights(self, values: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Return heights between 0 and 1, and what 0 and 1 stand for."""
        if not self.logarithmic:
            return values / values.max(), 0.0, float(values.max())
        logarithms = np.log10(values)
        return (logarithms - logarithms.min()) / np.ptp(logarithms), float(values.min()), float(values.max())


_SCALES = (
    _Scale({"fit": "EK-FAC fit", "plain": "forward + backward"}, "s", logarithmic=True),
    _Scale({"peak": "peak of the fit", "before": "before the fit"}, "MB", logarithmic=False),
)
_COLOURS = ("#c33", "#36c")


def _made(folder: Path, what: str, size: int) -> tuple[Workload, dict[str, np.ndarray], int]:
    """Return a workload with random data and weights, and where it is on the panel's axis."""
    generator = np.random.default_rng(0)
    if what == "tokens":
        arguments: dict[str, Any] = {"vocab_size": 80, "width": 64, "depth": 2, "heads": 4, "max_length": size}
        base, architecture = WORKLOADS["austen-lm"], {"name": "transformer_lm", "arguments": arguments}
        data = {f"{part}_inputs": generator.integers(0, 80, (100, size)) for part in ("train", "query")}
    else:
        width, n = (size, 500) if what == "parameters" else (64, size)
        arguments = {"input_dim": 196, "hidden": [width], "output_dim": 10}
        base, architecture = WORKLOADS["mnist-mlp"], {"name": "mlp", "arguments": arguments}
        data = {f"{part}_inputs": generator.standard_normal((n, 196), np.float32) for part in ("train", "query")}
        data |= {f"{part}_targets": generator.integers(0, 10, n) for part in ("train", "query")}
    workload = _Elsewhere(**vars(replace(base, name=f"{what}-{size}", architecture=architecture)))
    object.__setattr__(workload, "root", folder)
    (workload.folder / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    module = workload.build()
    save_file(module.state_dict(), workload.folder / "checkpoints" / "0.safetensors")
    return workload, data, sum(p.numel() for p in module.parameters()) if what == "parameters" else size


class _Elsewhere(Workload):
    """A workload in a folder of its own."""

    root: Path

    @property
    def folder(self) -> Path:
        """Where data and checkpoints are."""
        return self.root / self.name


def measured(what: str, size: int) -> Point:
    """Return CPU seconds of a fit and of a plain forward and backward pass over the same training set, and the fit's peak memory in MB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload, data, place = _made(folder, what, size)
        spec = fit_spec(workload, dataset_of(workload, data), 1, method=_METHOD)
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident size is now the present one
        before, began = peak_megabytes(), time.process_time()
        fit(spec, folder / "work", folder / "index", NoProgress())
        found = {"size": place, "fit": time.process_time() - began, "before": before, "peak": peak_megabytes()}
        return {**found, "plain": plain_passes(workload, data).train}


def _alone(what: str, size: int) -> Point:
    """Measure in a process that has made a small fit before, as the first pays for imports; seconds are the fastest of a few."""
    set_up_processor(threads=1)
    measured(what, min(_PANELS[what]))
    points = [measured(what, size) for _ in range(_REPEATS)]
    return points[0] | {name: min(point[name] for point in points) for name in ("fit", "plain")}


def drawn(found: dict[str, list[Point]]) -> str:
    """Return a picture of panels, a row for time and one for memory, one column per quantity."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="950" height="580" font-family="sans-serif" font-size="12">'
    ]
    for row, scale in enumerate(_SCALES):
        for column, (what, points) in enumerate(found.items()):
            parts += _panel(80 + 310 * column, 280 * row, what, points, scale)
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, top: int, what: str, points: list[Point], scale: _Scale) -> list[str]:
    x = np.log10([point["size"] for point in points])
    across = left + 220 * (x - x.min()) / np.ptp(x)
    heights, low, high = scale.heights(np.array([[point[name] for name in scale.lines] for point in points]))
    up = top + 240 - 200 * heights
    parts = [
        f'<rect x="{left - 8}" y="{top + 32}" width="236" height="216" fill="none" stroke="#999"/>',
        f'<text x="{left + 110}" y="{top + 285}" text-anchor="middle">{what}</text>',
        f'<text x="{left - 10}" y="{top + 45}" text-anchor="end">{high:.3g} {scale.unit}</text>',
        f'<text x="{left - 10}" y="{top + 245}" text-anchor="end">{low:.2g} {scale.unit}</text>',
    ]
    parts += [
        f'<text x="{at:.0f}" y="{top + 264}" text-anchor="middle">{point["size"]:.0f}</text>'
        for at, point in zip(across, points, strict=True)
    ]
    for number, (colour, label) in enumerate(zip(_COLOURS, scale.lines.values(), strict=True)):
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up[:, number], strict=True))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 120 * number}" y="{top + 22}" fill="{colour}">{label}</text>')
    return parts


def main() -> None:
    """Measure, write the numbers and the picture."""
    places = [(what, size) for what, sizes in _PANELS.items() for size in sizes]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        points = pool.starmap(_alone, places, chunksize=1)
    found = {what: [point for (name, _), point in zip(places, points, strict=True) if name == what] for what in _PANELS}
    (_HERE / "results" / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (_HERE.parent / "docs" / "scaling.svg").write_text(drawn(found))


if __name__ == "__main__":
    main()
