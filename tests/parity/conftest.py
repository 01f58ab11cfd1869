"""What the tests of this folder share: one thread (tiny models lose more than they gain by two), roles on disk."""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import models_on_device
from tests.parity import tiny


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def on_device() -> Iterator[None]:
    """Models on the device that the tests run on."""
    with models_on_device():
        yield


@pytest.fixture(scope="module", params=[(f, tied) for f in tiny.FAMILIES for tied in (False, True)], ids=str)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Home:
    family, tied = request.param
    return tiny.build(tmp_path_factory.mktemp(family), tiny.config_of(family, tied))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tiny.Home:
    return tiny.build(tmp_path_factory.mktemp("llama"), tiny.config_of("llama"))
