"""Publishing the groups of retrainings that a job adds to its banks."""

import shutil
from collections.abc import Sequence
from typing import Any

from app.banks.service import GROUP_FILE
from app.worker.runner import Runner, Running, own_folder
from attribution_core.methods.bank import NewGroup


def published_groups(
    runner: Runner, running: Running, banks: Sequence[tuple[str, str]], groups: Sequence[NewGroup]
) -> list[tuple[str, dict[str, Any]]]:
    """Publish retrained groups of banks, given as (id, folder); return the rows that name them, each with its bank's id.

    Another evaluation may have published the same group: its bytes are the same.
    """
    rows = []
    work = own_folder(runner, running, "groups")
    for group in groups:
        bank_id, base = banks[group.bank]
        folder = work / f"{group.bank}-{group.group}"
        folder.mkdir()
        shutil.copyfile(group.path, folder / GROUP_FILE)
        published = runner.artifacts.publish(folder, f"{base}/{group.group:06d}")
        row = {
            "ordinal": group.group,
            "artifact": published.name,
            "bytes": published.bytes,
            "retrainings": group.retrainings,
            "diverged": group.diverged,
        }
        rows.append((bank_id, row))
    return rows
