"""Migrations, on the embedded server and on one over TCP with a password."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import psycopg
import pytest
from alembic import command

from app.db.embedded import start_embedded
from app.db.migrate import alembic_config, upgrade
from app.db.session import create_engine, database_url
from app.settings import DatabaseSettings
from tests.service import Service, free_port

PASSWORD = "p@ss/w:rd%1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatabaseSettings]:
    """A second embedded server, made to listen on TCP and to ask for a password."""
    handle, url = start_embedded(tmp_path_factory.mktemp("tcp"))
    port = free_port()
    folder = handle.pgdata
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE ROLE headwater LOGIN PASSWORD 'p@ss/w:rd%1'")
        connection.execute("CREATE DATABASE headwater OWNER headwater")
        connection.execute("CREATE DATABASE scratch OWNER headwater")
    (folder / "pg_hba.conf").write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    with (folder / "postgresql.conf").open("a") as config:
        config.write(f"\nlisten_addresses = '127.0.0.1'\nport = {port}\n")
    handle.stop()
    pg_ctl = [
        str(handle.bin_path / "pg_ctl"),
        "-w",
        "-D",
        str(folder),
        "-l",
        str(folder / "tcp.log"),
        "-o",
        f"-k {folder}",
    ]
    subprocess.run([*pg_ctl, "start"], check=True, user=handle.system_user, stdout=subprocess.DEVNULL)
    secret = folder.parent / "password"
    secret.write_text(f"{PASSWORD}\n")
    yield DatabaseSettings(url=f"postgresql://headwater@127.0.0.1:{port}/headwater", password_file=secret)
    subprocess.run([*pg_ctl, "-m", "fast", "stop"], check=True, user=handle.system_user, stdout=subprocess.DEVNULL)


def scratch(server: DatabaseSettings) -> DatabaseSettings:
    assert server.url is not None
    return server.model_copy(update={"url": server.url.rpartition("/")[0] + "/scratch"})


@pytest.mark.tcp
def test_migrations_go_up_down_and_up_and_match_the_tables(server: DatabaseSettings) -> None:
    settings = scratch(server)
    upgrade(settings)
    config = alembic_config(settings)
    command.check(config)
    command.downgrade(config, "base")
    with psycopg.connect(database_url(settings).set(drivername="postgresql").render_as_string(False)) as connection:
        left = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert [name for (name,) in left] == ["alembic_version"]
    command.upgrade(config, "head")
    command.check(config)


@pytest.mark.tcp
def test_checkpoints_get_the_source_that_replays_tell(server: DatabaseSettings) -> None:
    settings = scratch(server)
    config = alembic_config(settings)
    upgrade(settings)
    command.downgrade(config, "0003")
    results = {
        "trn_1": ("training", '{"runs": [{"checkpoints": ["ckpt_1"]}]}'),
        "unl_1": ("unlearning", '{"checkpoints": [{"checkpoint": "ckpt_2"}]}'),
        "eval_1": ("evaluation", '{"lds": 0.5}'),
    }
    with psycopg.connect(database_url(settings).set(drivername="postgresql").render_as_string(False)) as connection:
        connection.execute(
            "INSERT INTO model (id, name, architecture, task, parameters, num_parameters) VALUES ('mdl_1', 'm', '{}', '{}', '{}', 1)"
        )
        for number in range(3):
            connection.execute(
                "INSERT INTO checkpoint (id, model_id, run, step, final, sha256, bytes, dtype, artifact) "
                "VALUES (%s, 'mdl_1', 'r', %s, true, '', 1, '', '')",
                (f"ckpt_{number}", number),
            )
        for replay, (kind, result) in results.items():
            connection.execute(
                "INSERT INTO replay (id, kind, model_id, request, left_out, status, result) VALUES (%s, %s, 'mdl_1', '{}', '[]', 'succeeded', %s)",
                (replay, kind, result),
            )
    command.upgrade(config, "head")
    with psycopg.connect(database_url(settings).set(drivername="postgresql").render_as_string(False)) as connection:
        found = connection.execute("SELECT source FROM checkpoint ORDER BY id").fetchall()
        connection.execute("DELETE FROM model")
    assert [source for (source,) in found] == ["uploaded", "trained", "unlearned"]


@pytest.mark.tcp
def test_a_wrong_password_is_refused(server: DatabaseSettings) -> None:
    wrong = server.model_copy(update={"password_file": None})

    async def connect() -> None:
        database = create_engine(wrong)
        try:
            async with database.connect():
                pass
        finally:
            await database.dispose()

    with pytest.raises(Exception, match="password"):
        asyncio.run(connect())


@pytest.mark.tcp
def test_the_service_runs_on_a_server_over_tcp(server: DatabaseSettings, tmp_path: Path) -> None:
    service = Service(
        tmp_path / "data",
        HEADWATER_DATABASE__URL=server.url or "",
        HEADWATER_DATABASE__PASSWORD_FILE=str(server.password_file),
    ).start()
    try:
        file = tmp_path / "rows.csv"
        file.write_text("a,b,label\n1,2,0\n3,4,1\n")
        spec = {"name": "rows", "kind": "tabular", "input": ["a", "b"], "target": "label"}
        job = service.upload("/v1/datasets", file, 202, spec=spec)
        assert service.finished(job)["state"] == "succeeded"
        assert service.get("/v1/datasets/rows")["num_examples"] == 2
        assert not (service.data / "postgres").exists()
        assert PASSWORD not in (tmp_path / "data.log").read_text()
    finally:
        assert service.stop() == 0


def test_the_api_starts_without_a_database_and_says_so(tmp_path: Path) -> None:
    import os
    import sys

    from tests.service import ROOT, wait_for

    port = free_port()
    environment = {
        **os.environ,
        "HEADWATER_DATA_DIR": str(tmp_path),
        "HEADWATER_DATABASE__URL": f"postgresql://nobody@127.0.0.1:{free_port()}/none",
    }
    command_ = [sys.executable, "-m", "app.cli", "api", "--port", str(port)]
    api = subprocess.Popen(command_, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:

            def alive() -> bool:
                try:
                    return http.get("/livez").status_code == 200
                except httpx.HTTPError:
                    return False

            wait_for(alive, 30, "the api")
            ready = http.get("/readyz")
            assert (ready.status_code, ready.json()["checks"]["database"]) == (503, "not reachable")
            answer = http.get("/v1/models")
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/database-unavailable")
            assert answer.headers["retry-after"]
    finally:
        api.terminate()
        assert api.wait(20) == 0
