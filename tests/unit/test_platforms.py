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
# Windows has none of these but the last; bitsandbytes has no build for every system.
ABSENT = ("resource", "fcntl", "pwd", "grp", "termios", "bitsandbytes")


def test_our_modules_import_nothing_that_a_platform_lacks() -> None:
    code = f"""
import builtins, importlib, pkgutil
there = builtins.__import__
def here(name, globals=None, *rest, **more):
    if name.partition(".")[0] in {ABSENT!r} and (globals or dict()).get("__name__", "").startswith("trl_ext"):
        raise ImportError(name + " is not on this platform")
    return there(name, globals, *rest, **more)
builtins.__import__ = here
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
    elsewhere = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=45))
    monkeypatch.setattr(psutil, "Process", lambda: elsewhere)
    assert peak_memory(torch.device("cpu")) == 45, "a figure stops no run"
