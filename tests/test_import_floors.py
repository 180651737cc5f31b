"""Imports go down only: each floor imports in a fresh process in which everything above it is missing."""

import subprocess
import sys

import pytest

BLOCKED_IMPORT = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}")

blocked = set({blocked!r})
sys.meta_path.insert(0, Blocker())
for module in {modules!r}:
    importlib.import_module(module)
loaded = sorted(name for name in blocked if name in sys.modules)
assert not loaded, loaded
"""

APPLICATIONS = ["hydra", "omegaconf", "typer"]
INTEGRATIONS = ["lightning", "transformers"]
DATA = ["datasets", "tokenizers", "pyarrow", "matplotlib"]
FLOORS = [
    (["packflex.packing"], ["triton", *DATA, *INTEGRATIONS, *APPLICATIONS, "packflex.data", "packflex.integrations"]),
    (
        ["packflex", "packflex.layout", "packflex.losses", "packflex.masks", "packflex.attention",
         "packflex.testing.cases"],
        ["triton", *DATA, *INTEGRATIONS, *APPLICATIONS, "packflex.packing", "packflex.data", "packflex.integrations"],
    ),
    (["packflex.attention.triton.launch"], [*DATA, *INTEGRATIONS, *APPLICATIONS, "packflex.data"]),
    (["packflex.data.pack", "packflex.data.loader", "packflex.data.sources", "packflex.data.tokenize"],
     ["triton", *INTEGRATIONS, *APPLICATIONS, "packflex.integrations"]),
    (["packflex.integrations.transformers"], ["triton", "lightning", "datasets", *APPLICATIONS, "packflex.data"]),
    # lightning itself looks for omegaconf, so that this one cannot be missing
    (["packflex.integrations.lightning"], ["hydra", "typer", "triton"]),
    (["packflex.cli"], ["triton", "datasets", "matplotlib", "hydra", "omegaconf", *INTEGRATIONS]),
]  # fmt: skip


@pytest.mark.parametrize(("modules", "blocked"), FLOORS, ids=[floor[0][0] for floor in FLOORS])
def test_floor(modules, blocked):
    code = BLOCKED_IMPORT.replace("{blocked!r}", repr(blocked)).replace("{modules!r}", repr(modules))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks():
    code = BLOCKED_IMPORT.replace("{blocked!r}", "['json']").replace("{modules!r}", "['json.decoder']")
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert "blocked: json" in done.stderr
