"""What every test shares: one thread, one seed, reference data, and how a script that is in no package is loaded."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _alike(monkeypatch):
    """Each test starts alike, whatever a command that an earlier one ran has left in this process.

    Tests that fork need the one thread: others are not in the child, which would wait for them. A seed that Lightning
    has put into the environment is taken again by the processes it starts, and by them alone.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shared_data() -> Path:
    """The folder of reference data beside the checkout, which is not part of the project."""
    folder = Path(os.environ.get("CRBP_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    if not folder.exists():
        pytest.skip("the reference data is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def load_script():
    """A function from a path within the checkout to the module there."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # A dataclass looks its module up while it is made.
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, spec.name, module)
            patch.syspath_prepend((ROOT / path).parent)  # as for a script that is run
            spec.loader.exec_module(module)
        return module

    return load
