"""The container files, as far as they can be checked without an engine: they parse, and what they run exists."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in (text.strip() for text in lines)]


def headwater(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)


def test_image_is_multi_stage_non_root_and_healthy() -> None:
    found = instructions()
    stages = [rest for name, rest in found if name == "FROM"]
    assert [stage.split(" AS ")[1] for stage in stages] == ["build", "runtime"]
    after_runtime = found[[rest for _, rest in found].index(stages[1]) :]
    assert ("USER", "headwater") in after_runtime
    assert any(name == "HEALTHCHECK" for name, _ in after_runtime)
    assert {"VARIANT", "TORCH_INDEX_URL"} <= {rest.split("=")[0] for name, rest in found if name == "ARG"}


def test_everything_copied_into_the_image_exists() -> None:
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists(), source


@pytest.mark.parametrize("service", [name for name, spec in COMPOSE["services"].items() if "command" in spec])
def test_compose_commands_exist(service: str) -> None:
    command, *options = COMPOSE["services"][service]["command"]
    help_ = headwater(command, "--help")
    assert help_.returncode == 0, help_.stderr
    for option in options:
        if option.startswith("--"):
            assert option in help_.stdout


def test_compose_waits_on_health_and_migrations() -> None:
    services = COMPOSE["services"]
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert services["migrate"]["restart"] == "no"
    for name in ("api", "worker", "worker-gpu"):
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert services["worker-gpu"]["profiles"] == ["gpu"]


def test_compose_names_only_declared_volumes_secrets_and_settings() -> None:
    from app.settings import Settings

    for spec in COMPOSE["services"].values():
        for volume in spec.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or source.startswith("${")
        assert set(spec.get("secrets", [])) <= set(COMPOSE["secrets"])
        for variable in spec.get("environment", {}):
            if variable.startswith("HEADWATER_"):
                assert variable.removeprefix("HEADWATER_").split("__")[0].lower() in Settings.model_fields


def test_no_secret_is_written_in_the_compose_file() -> None:
    assert "password:" not in json.dumps(COMPOSE).lower().replace("postgres_password", "")
    assert all("file" in secret for secret in COMPOSE["secrets"].values())
