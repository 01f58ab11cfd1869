"""KL controllers: against hand arithmetic, and in a loop with a KL that answers."""

import math
import re
from typing import Any

import pytest

from trl_ext.controllers import (
    AdaptiveKLController,
    FixedKLController,
    KLController,
    PenaltyController,
    PIKLController,
)


def test_fixed() -> None:
    controller = FixedKLController(0.05)
    controller.update(100.0, 64)
    assert controller.value == 0.05


@pytest.mark.parametrize(
    ("kl", "n", "expected"),
    [
        (6.0, 256, 0.15),  # on target
        (6.6, 256, 0.15 * (1 + 0.1 * 256 / 10_000)),
        (60.0, 256, 0.15 * (1 + 0.2 * 256 / 10_000)),  # clipped
        (0.0, 256, 0.15 * (1 - 0.2 * 256 / 10_000)),
        (-1.0, 100, 0.15 * (1 - 0.2 * 100 / 10_000)),
    ],
)
def test_ziegler_by_hand(kl: float, n: int, expected: float) -> None:
    controller = AdaptiveKLController()
    controller.update(kl, n)
    assert controller.value == pytest.approx(expected, rel=1e-12)


def test_pi_by_hand() -> None:
    controller = PIKLController(init=0.1, target=2.0, gain=0.5, horizon=100)
    controller.update(4.0, 50)  # error log 2, integral log 2 / 2
    assert controller.value == pytest.approx(0.1 * math.exp(0.5 * math.log(2) + 0.5 * math.log(2)), rel=1e-12)
    controller.update(2.0, 50)  # on target: the integral stays
    assert controller.value == pytest.approx(0.1 * math.sqrt(2), rel=1e-12)
    controller.update(-3.0, 100)  # an estimate below 0 is far under the target
    assert controller.value == pytest.approx(0.1 * math.exp(-0.5 + 0.5 * math.log(2) - 1), rel=1e-12)


@pytest.mark.parametrize(("kl", "error"), [(200.0, 1.0), (0.01, -1.0), (0.0, -1.0), (1.0, math.log(0.5))])
def test_pi_s_error_is_clipped(kl: float, error: float) -> None:
    controller = PIKLController(init=0.1, target=2.0, gain=0.5, horizon=100)
    controller.update(kl, 100)
    assert controller.value == pytest.approx(0.1 * math.exp(1.5 * error), rel=1e-12)


def test_pi_without_a_proportional_term_and_by_default() -> None:
    integral, default = PIKLController(init=0.1, target=2.0, gain=0, horizon=100), PIKLController()
    integral.update(4.0, 100)
    assert integral.value == pytest.approx(0.2, rel=1e-12)
    default.update(6.6, 500)
    assert default.value == pytest.approx(0.15 * 1.1, rel=1e-12)  # gain 1/2 and half a horizon: once log 1.1


def test_pi_does_not_wind_up() -> None:
    """However long the KL is on its way, the coefficient is back within a few rollouts above the target."""
    controller = PIKLController(init=0.15, target=6.0)
    for _ in range(200):
        controller.update(0.0, 5000)
    assert controller.value == pytest.approx(0.15 * math.exp(-0.5) / 100, rel=1e-12)
    controller.update(100.0, 5000)  # five horizons count as one
    assert controller.value == pytest.approx(0.15 * math.exp(0.5 + 1) / 100, rel=1e-12)
    for _ in range(20):
        controller.update(100.0, 1000)
    assert controller.value == pytest.approx(0.15 * math.exp(0.5) * 100, rel=1e-12)


@pytest.mark.parametrize(("kl", "factor"), [(0.0, 0.8), (100.0, 1.2)])
def test_a_log_of_many_horizons_moves_the_coefficient_as_one_does(kl: float, factor: float) -> None:
    """Ziegler's product with n / horizon = 6 is negative, and would pay the policy for its KL."""
    controller = AdaptiveKLController(0.5, 3.0, 100)
    controller.update(kl, 600)
    assert controller.value == pytest.approx(0.5 * factor, rel=1e-12)


@pytest.mark.parametrize(("kl", "expected"), [(0.01, 1.0), (0.006, 0.5), (0.007, 1.0), (0.014, 1.0), (0.016, 2.0)])
def test_penalty_by_hand(kl: float, expected: float) -> None:
    controller = PenaltyController(1.0, 0.01)
    controller.update(kl, 1)
    assert controller.value == expected


def test_the_penalty_goes_on_from_where_it_is() -> None:
    controller = PenaltyController(3.0, 1.5)
    for kl, expected in ((1.0, 3.0), (2.25, 3.0), (2.26, 6.0), (2.26, 12.0), (0.99, 6.0)):  # at the bounds it stays
        controller.update(kl, 1)
        assert controller.value == expected


def test_the_penalty_has_bounds_and_defaults() -> None:
    largest, default = PenaltyController(6e7), PenaltyController()
    largest.update(1.0, 1)
    assert largest.value == 1e8
    assert (default.value, default.target) == (1.0, 0.01)


def test_the_penalty_never_becomes_0() -> None:
    controller = PenaltyController()
    for _ in range(2000):
        controller.update(0.0, 1)
    assert controller.value == 1e-8


def make(name: str) -> Any:
    return {
        "adaptive": AdaptiveKLController(0.1, 3.0, 300),
        "pi": PIKLController(0.1, 3.0),
        "penalty": PenaltyController(),
        "fixed": FixedKLController(0.1),
    }[name]


NAMES = ["fixed", "adaptive", "pi", "penalty"]


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_on(name: str) -> None:
    first, uninterrupted = make(name), make(name)
    for kl in (1.0, 5.0, 4.0):
        first.update(kl, 64)
        uninterrupted.update(kl, 64)
    second = make(name)
    second.load_state_dict(first.state_dict())
    for controller in (second, uninterrupted):
        controller.update(7.0, 64)
    assert second.state_dict() == uninterrupted.state_dict()
    assert isinstance(second, KLController)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kl", [float("nan"), float("inf"), -float("inf")])
def test_a_kl_that_is_no_number_changes_nothing(name: str, kl: float) -> None:
    controller = make(name)
    before = controller.state_dict()
    controller.update(kl, 64)
    controller.update(1.0, 0)
    assert controller.state_dict() == before


@pytest.mark.parametrize("name", ["adaptive", "pi"])
def test_holds_its_target(name: str) -> None:
    """A policy whose KL is 0.6 / coefficient, reached with a lag."""
    controller, kl = make(name), 0.0
    for _ in range(200):
        kl += 0.3 * (0.6 / controller.value - kl)
        controller.update(kl, 64)
    assert kl == pytest.approx(3.0, rel=0.02)


def test_another_controllers_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has \['value'\], but a PIKLController needs \['integral', 'value'\]"):
        PIKLController().load_state_dict(FixedKLController(0.1).state_dict())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdaptiveKLController(init=0.0), "init is 0.0: it must be a positive number."),
        (lambda: AdaptiveKLController(target=-1.0), "target is -1.0: it must be a positive number."),
        (lambda: AdaptiveKLController(horizon=0), "horizon is 0: it must be a positive number."),
        (lambda: FixedKLController(-0.1), "the initial coefficient is -0.1: it must be a number, at least 0."),
        (lambda: FixedKLController(math.nan), "the initial coefficient is nan: it must be a number, at least 0."),
        (lambda: FixedKLController("0.1"), "the initial coefficient is '0.1': it must be a number, at least 0."),
        (lambda: PIKLController(init=-1), "init is -1: it must be a positive number."),
        (lambda: PIKLController(target=math.inf), "target is inf: it must be a positive number."),
        (lambda: PIKLController(gain=-1.0), "gain is -1.0: it must be a number, at least 0."),
        (lambda: PIKLController(horizon=0.0), "horizon is 0.0: it must be a positive number."),
        (lambda: PenaltyController(init=0), "init is 0: it must be a positive number."),
        (lambda: PenaltyController(target=0.0), "target is 0.0: it must be a positive number."),
    ],
)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


def test_a_coefficient_of_0_stays_0() -> None:
    assert FixedKLController(0).value == 0.0
