import subprocess
import sys
from importlib.metadata import requires

import pytest

HEAVY = ("torch", "diffusers", "transformers")


def test_gpu_stack_comes_with_extras_only() -> None:
    plain = [r for r in requires("latentfarm") or [] if "extra ==" not in r]

    assert not [r for r in plain if r.startswith(HEAVY)]
    assert plain


@pytest.mark.parametrize("statement", ["import latentfarm; latentfarm.Farm", "import latentfarm.cli.main"])
def test_producer_leaves_torch_alone(statement: str) -> None:
    code = f"import sys; {statement}; print([m for m in {HEAVY} if m in sys.modules])"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


def test_help_imports_neither_client_library() -> None:
    code = "import sys, latentfarm.cli.main; print([m for m in ('boto3', 'celery', 'redis') if m in sys.modules])"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
