"""Plain `pip install .` into an empty environment."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = str(ROOT / "constraints.txt")
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--constraint", constraints, str(ROOT)]
    subprocess.run(pip, check=True, timeout=280)
    return folder / "bin"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_there_is_no_torch(empty_environment: Path) -> None:
    found = run([str(empty_environment / "pip"), "list", "--format", "freeze"]).stdout.lower()

    assert "latentfarm==" in found
    assert not [
        line for line in found.splitlines() if line.startswith(("torch", "diffusers", "transformers", "nvidia"))
    ]


def test_command_line_starts(empty_environment: Path) -> None:
    done = run([str(empty_environment / "latentfarm"), "--help"])

    assert done.returncode == 0
    assert "generate" in done.stdout


@pytest.mark.parametrize(
    ("command", "extra"), [("up", "local"), ("demo", "local"), ("worker", "worker"), ("serve", "api")]
)
def test_command_that_needs_more_says_what_to_install(empty_environment: Path, command: str, extra: str) -> None:
    done = run([str(empty_environment / "latentfarm"), command])

    assert done.returncode == 2
    assert "pip install 'latentfarm[" in done.stderr
    assert extra in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
