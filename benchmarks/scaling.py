"""How a whole EK-FAC fit's cost grows with examples, parameters and sequence length: `benchmarks/results/scaling.json` and `docs/scaling.svg`."""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from attribution_core.methods.fit import fit
from attribution_core.progress import NoProgress
from benchmarks.cost import plain_passes
from benchmarks.ours import dataset_of, fit_spec
from benchmarks.workloads import WORKLOADS, Workload

_HERE = Path(__file__).parent
_METHOD = {"type": "ekfac", "fisher": "sampled"}
_PANELS = {"examples": (250, 500, 1000, 2000), "parameters": (16, 64, 256, 1024), "tokens": (16, 32, 64)}


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


def measured(what: str, size: int) -> dict[str, float]:
    """Return CPU seconds of a fit and of a plain forward and backward pass over the same training set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload, data, place = _made(folder, what, size)
        spec = fit_spec(workload, dataset_of(workload, data), 1, method=_METHOD)
        began = time.process_time()
        fit(spec, folder / "work", folder / "index", NoProgress())
        return {"size": place, "fit": time.process_time() - began, "plain": plain_passes(workload, data).train}


def drawn(found: dict[str, list[dict[str, float]]]) -> str:
    """Return a picture of double-logarithmic panels, one per quantity."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="950" height="300" font-family="sans-serif" font-size="12">'
    ]
    for place, (what, rows) in enumerate(found.items()):
        left = 80 + 310 * place
        x = np.log10([row["size"] for row in rows])
        y = np.log10([[row["fit"], row["plain"]] for row in rows])
        across = left + 220 * (x - x.min()) / np.ptp(x)
        up = 240 - 200 * (y - y.min()) / np.ptp(y)
        parts.append(f'<rect x="{left - 8}" y="32" width="236" height="216" fill="none" stroke="#999"/>')
        parts.append(f'<text x="{left + 110}" y="285" text-anchor="middle">{what}</text>')
        parts += [
            f'<text x="{left - 10}" y="{level}" text-anchor="end">{value:.2g} s</text>'
            for level, value in ((45, 10 ** y.max()), (245, 10 ** y.min()))
        ]
        parts += [
            f'<text x="{at:.0f}" y="264" text-anchor="middle">{row["size"]:.0f}</text>'
            for at, row in zip(across, rows, strict=True)
        ]
        for column, (colour, label) in enumerate((("#c33", "EK-FAC fit"), ("#36c", "forward + backward"))):
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up[:, column], strict=True))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<text x="{left + 120 * column}" y="22" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Measure, write the numbers and the picture."""
    torch.set_num_threads(1)
    measured("examples", 250)  # the first fit of a process pays for imports
    found = {what: [measured(what, size) for size in sizes] for what, sizes in _PANELS.items()}
    (_HERE / "results" / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (_HERE.parent / "docs" / "scaling.svg").write_text(drawn(found))


if __name__ == "__main__":
    main()
