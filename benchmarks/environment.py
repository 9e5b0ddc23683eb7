"""The environment that the peers, and readers of foreign formats, run in."""

import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_FOLDER = _HERE / ".cache" / "peers"


def build_peers() -> Path:
    """Return the peers' own python, made at the first call."""
    python, stamp = _FOLDER / "bin" / "python", _FOLDER / "installed.txt"
    requirements = _HERE / "peers" / "requirements.txt"
    wanted = requirements.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", _FOLDER], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", _HERE.parent / "constraints.txt"]
        # torch comes first and pinned, as in the Makefile.
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, "--requirement", requirements], check=True)
        stamp.write_text(wanted)
    return python
