from collections.abc import Iterator

import pytest

from tests.vllm_server import StandIn, served


@pytest.fixture
def server() -> Iterator[StandIn]:
    """A stand-in for `vllm serve`."""
    with served() as server:
        yield server
