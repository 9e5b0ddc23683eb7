"""What extensions and deletions survive: the worker killed with -9 at random moments, and the whole service restarted."""

import random
import time
from pathlib import Path

from tests.app.test_incremental import EKFAC, FIRST, appended, base, done, pages, scores
from tests.conftest import Loaded
from tests.e2e.test_faults import kill
from tests.service import TERMINAL


def hashes(loaded: Loaded, index: str, generation: int) -> dict[str, bytes]:
    name = f"{loaded.service.get(f'/v1/indexes/{index}')['id']}.{generation}"
    folder = loaded.service.data / "artifacts" / "indexes" / name
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_worker_killed_during_an_extension_leaves_the_old_generation_until_the_new_is_whole(
    fragile: Loaded, tmp_path: Path
) -> None:
    service, moments = fragile.service, random.Random(3)
    base(fragile, tmp_path, "growing")
    version = appended(fragile, tmp_path, "growing")
    for name in ("undisturbed", "disturbed"):
        done(fragile, fragile.fit(name, EKFAC, dataset="growing"))
    old = scores(service, "disturbed")
    began = time.monotonic()
    done(fragile, service.post("/v1/indexes/undisturbed/extensions", {"dataset": version["id"]}, 202))
    usual = time.monotonic() - began
    new = scores(service, "undisturbed")
    job, kills = service.post("/v1/indexes/disturbed/extensions", {"dataset": version["id"]}, 202), 0
    while kills < 5 and service.get(f"/v1/jobs/{job['id']}")["state"] not in TERMINAL:
        time.sleep(moments.uniform(0.0, usual / 3))
        kill(service, "app.worker.main")
        kills += 1
        answer = scores(service, "disturbed")
        assert answer in (old, new), "one generation, never some of both"
    done(fragile, job)
    assert kills >= 1
    assert scores(service, "disturbed") == new
    assert hashes(fragile, "disturbed", 2) == hashes(fragile, "undisturbed", 2)


def test_deleted_examples_stay_deleted_after_a_restart(fragile: Loaded, tmp_path: Path) -> None:
    service = fragile.service
    base(fragile, tmp_path, "shrinking")
    done(fragile, fragile.fit("shrinking", EKFAC, dataset="shrinking"))
    gone = list(scores(service, "shrinking")[0])[:10]
    service.post("/v1/datasets/shrinking/deletions", {"selector": {"rows": gone}})
    expected = scores(service, "shrinking")
    assert not set(gone) & set(expected[0])
    service.process.terminate()
    assert service.process.wait(timeout=40) == 0
    service.log.close()
    service.start()
    assert scores(service, "shrinking") == expected
    assert service.get("/v1/datasets/shrinking")["deleted"] == 10
    listed = {item["row"] for item in pages(service, "/v1/datasets/shrinking/examples")}
    assert listed == set(range(FIRST)) - set(gone)
