"""The memory table of docs/scaling.md: what it is computed from, and what was measured."""

from pathlib import Path

import pytest

from tests.benchmarks import scaling

EIGHT = scaling.MODELS["8B (Llama 3)"]


def test_parameters_are_those_of_the_published_models() -> None:
    """Billions, without norms and biases: Llama 3 8B and 70B, Qwen2.5 14B and 32B."""
    published = {"8B": 8.03, "14B": 14.77, "32B": 32.76, "70B": 70.55}
    for name, shape in scaling.MODELS.items():
        weights = (shape.layers * shape.layer + shape.ends) / 1e9
        assert weights == pytest.approx(published[name.split()[0]], rel=1e-3)


def test_an_adapter_by_hand() -> None:
    """q and o 2 x 8,192, k and v 2 x 5,120, gate, up and down 3 x 18,432: 81,920 inputs and outputs a layer."""
    assert EIGHT.adapter == 16 * 32 * 81_920
    assert scaling.role_bytes(EIGHT) == 16 * 32 * 81_920 * 36


@pytest.mark.parametrize(("rows", "measured"), [(8, 10.85), (1, 7.09)])
def test_the_formula_is_near_what_was_measured(rows: int, measured: float) -> None:
    """docs/benchmarks.md, "A large model": an H100, scales in float32."""
    estimate = scaling.each_whole(EIGHT, scaling.NF4_PLAIN, rows) / scaling.GIB
    assert estimate == pytest.approx(measured, rel=0.1)


def test_one_gpu_shares_out_nothing() -> None:
    assert scaling.shared_out(EIGHT, scaling.NF4, 1) == scaling.each_whole(EIGHT, scaling.NF4)


def test_the_page_has_these_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in scaling.tables().strip().split("\n\n"):
        assert table in page
