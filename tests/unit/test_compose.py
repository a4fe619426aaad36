"""compose.yaml against what the code reads and accepts, since no engine runs it here."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from latentfarm.cli.main import app
from latentfarm_shared.settings import CLIENT_VARIABLES, VARIABLES, Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
TERMINALS = ("TERM", "TERM_PROGRAM", "COLORTERM", "KITTY_WINDOW_ID")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = dict(
    line.split("=", 1)
    for line in (ROOT / "deploy" / "farm.env.example").read_text().splitlines()
    if line and not line.startswith("#")
)
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def test_there_is_a_server_a_store_an_api_and_a_worker_for_each_profile() -> None:
    assert set(SERVICES) == {"redis", "s3", "api", "worker-cpu", "worker-gpu"}
    assert SERVICES["worker-cpu"]["profiles"] == ["cpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]


def test_every_variable_the_code_reads_is_in_the_example_and_the_reverse() -> None:
    assert set(EXAMPLE) == set(VARIABLES)


def test_example_is_accepted_by_the_code(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path, EXAMPLE)

    assert settings.s3_bucket == "latentfarm"


def test_every_variable_is_in_the_documentation() -> None:
    table = (ROOT / "docs" / "settings.md").read_text()

    assert [name for name in VARIABLES + CLIENT_VARIABLES if f"`{name}`" not in table] == []


def test_no_environment_is_read_elsewhere() -> None:
    pattern = re.compile(r"environ(?:\.get\(|\[)\s*[\"'](\w+)")
    for folder in ("producer", "worker", "shared"):
        for path in (ROOT / folder).rglob("*.py"):
            found = set(pattern.findall(path.read_text())) - {"PATH", *TERMINALS}
            assert found <= set(VARIABLES), path


@pytest.mark.parametrize("name", SERVICES)
def test_service_takes_its_secrets_from_the_env_file_and_is_watched(name: str) -> None:
    service = SERVICES[name]

    assert service["env_file"] == "deploy/farm.env"
    assert "environment" not in service
    assert service["healthcheck"]["test"]
    assert service["restart"] == "unless-stopped"


def test_variables_used_in_the_file_are_ones_the_example_sets() -> None:
    used = set(re.findall(r"\$\$(\w+)", (ROOT / "compose.yaml").read_text()))

    assert used <= set(EXAMPLE)
    assert not re.findall(r"(?<!\$)\$\{?[A-Z]", (ROOT / "compose.yaml").read_text())


def test_volumes_are_named_and_declared() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]}

    assert used == set(COMPOSE["volumes"])
    for service in OURS.values():
        assert service["volumes"][0].endswith(f":{EXAMPLE['LATENTFARM_DATA']}")


@pytest.mark.parametrize("name", OURS)
def test_command_is_one_the_command_line_accepts(name: str) -> None:
    health = OURS[name]["healthcheck"]["test"][1:]
    for command in (OURS[name]["command"], *([health] if health[0] == "latentfarm" else [])):
        program, *words = command
        assert program == "latentfarm"
        group: Any = typer.main.get_command(app)
        while words and words[0] in getattr(group, "commands", {}):
            group = group.commands[words.pop(0)]
        group.make_context(name, words, resilient_parsing=False)


@pytest.mark.parametrize("name", OURS)
def test_dockerfile_installs_an_extra_that_exists(name: str) -> None:
    build = OURS[name]["build"]
    text = (ROOT / build["dockerfile"]).read_text()
    extras = set(re.findall(r"'\.\[(\w+)\]'", text))
    declared = (ROOT / "pyproject.toml").read_text()

    assert extras
    assert all(f"\n{extra} = [" in declared for extra in extras)
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / part).exists() for part in source.split())


def test_ports_are_those_the_code_listens_on() -> None:
    port = EXAMPLE["LATENTFARM_API_PORT"]
    flags = [flag for flag in SERVICES["s3"]["command"] if flag.startswith("-s3.port=")]

    assert SERVICES["api"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert SERVICES["api"]["command"][-1] == port
    assert flags == [f"-s3.port={EXAMPLE['LATENTFARM_S3_ENDPOINT'].rpartition(':')[2]}"]
    assert [s for s in SERVICES if s != "api" and "ports" in SERVICES[s]] == []


def test_store_knows_every_flag() -> None:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    assert weed
    known = subprocess.run([weed, "mini", "-h"], capture_output=True, text=True, check=False)
    flags = [flag.split("=")[0] for flag in SERVICES["s3"]["command"][1:]]

    for flag in flags:
        assert re.search(rf"^\s+{re.escape(flag)}\b", known.stdout + known.stderr, re.MULTILINE), flag


def test_redis_password_stays_off_the_command_line() -> None:
    script = SERVICES["redis"]["command"][2]

    assert shlex.split(script)[-3:] == ["|", "exec", "valkey-server", "-"][1:]
    assert "requirepass %s" in script
