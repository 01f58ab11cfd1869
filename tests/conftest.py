"""The environment every test runs in: offline, quiet, one thread. Set before anything imports transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.reward_server import Server

# The demo of this tree, not of whoever runs the tests; git does not see it.
os.environ["TRL_EXT_CACHE"] = str(Path(__file__).parents[1] / ".ci" / "cache")
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose a lot on a busy machine


@pytest.fixture
def reward_server() -> Iterator[Server]:
    """A running one; its `url` takes what `trl_ext.rewards.remote` sends."""
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked sampled(every=n), whose cases are alike and slow, each nth is run; -m long runs the others."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is None:
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % marker.kwargs["every"]:
            item.add_marker("long")
        seen[test] += 1


def pytest_collection_finish() -> None:
    """What the imports and the collection made stays: no collection of garbage looks at it again, which takes 0.7 s."""
    gc.collect()
    gc.freeze()
