"""What a platform lacks, simulated: the package is imported without it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from trl_ext.ppo.metrics import peak_memory

ROOT = Path(__file__).parents[2]
# Windows has no `resource`; bitsandbytes has no build for every system.
ABSENT = ("resource", "bitsandbytes")


def test_every_module_is_imported_without_what_windows_and_macos_lack() -> None:
    code = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
import trl_ext
for module in pkgutil.walk_packages(trl_ext.__path__, "trl_ext."):
    importlib.import_module(module.name)
print(trl_ext.PPOTrainer.__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "PPOTrainer", run.stderr[-2000:]


def test_peak_memory_without_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows psutil knows the peak; here it is made to."""
    known = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil, "Process", lambda: known)
    assert peak_memory(torch.device("cpu")) == 123
