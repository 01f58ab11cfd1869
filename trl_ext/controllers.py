"""KL controllers: they set the coefficient of the KL penalty by the KL that it led to.

Plain objects: `value` is the coefficient now, `update(kl, n)` takes in the mean KL (nats per completion) of `n` further
completions, `state_dict` and `load_state_dict` carry them over an interruption.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class KLController(Protocol):
    """Anything that turns observed KL into a coefficient."""

    @property
    def value(self) -> float:
        """The coefficient now, score units a nat."""
        ...

    def update(self, kl: float, n: int) -> None:
        """Take in the mean KL (nats per completion) of the last `n` completions."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that `update` changes, as plain numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        ...


class _Controller:
    """What all controllers share: they ignore a KL that is not finite, and save and load their state."""

    _state: tuple[str, ...] = ("value",)

    def __init__(self, value: float) -> None:
        self.value = _positive("the initial coefficient", value, zero=True)

    def update(self, kl: float, n: int) -> None:
        """Take in the mean KL (nats per completion) of the last `n` completions; one that is not finite changes
        nothing."""
        if math.isfinite(kl) and n > 0:
            self._update(kl, n)

    def _update(self, kl: float, n: int) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, float]:
        """Everything that `update` changes, as plain numbers."""
        return {name: getattr(self, name) for name in self._state}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: the state of another kind of controller.
        """
        if set(state) != set(self._state):
            raise ValueError(
                f"The saved state of the KL controller has {sorted(state)}, but a {type(self).__name__} needs "
                f"{sorted(self._state)}: resume with the controller that the run was started with."
            )
        for name in self._state:
            setattr(self, name, float(state[name]))


class FixedKLController(_Controller):
    """The coefficient never changes."""

    def _update(self, kl: float, n: int) -> None:
        pass


class AdaptiveKLController(_Controller):
    """A proportional controller in the coefficient's logarithm.

        error = clip(kl / target - 1, -0.2, 0.2)
        value = value * (1 + error * min(n / horizon, 1))

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, section 2.2;
    the defaults are those of its released code. It has no bound on n / horizon; above 5 the coefficient would turn
    negative, so n is limited to the horizon.

    Args:
        init: coefficient to start with; above 0, for a product never leaves 0.
        target: KL to hold, nats per completion.
        horizon: episodes (completions) over which a full error multiplies the coefficient by about e to its power. The
            default suits runs of a million episodes: a short run needs a few hundred.
    """

    CLIP = 0.2

    def __init__(self, init: float = 0.15, target: float = 6.0, horizon: float = 10_000) -> None:
        super().__init__(_positive("init", init))
        self.target, self.horizon = _positive("target", target), _positive("horizon", horizon)

    def _update(self, kl: float, n: int) -> None:
        error = min(max(kl / self.target - 1, -self.CLIP), self.CLIP)
        self.value *= 1 + error * min(n / self.horizon, 1.0)


class PIKLController(_Controller):
    """A proportional-integral controller, for a KL budget that must be kept.

        error    = clip(log(kl / target), -1, 1)
        integral = clip(integral + error * min(n / horizon, 1), -log 100, log 100)
        value    = init * exp(gain * error + integral)

    The integral removes the offset that a proportional term alone leaves, the proportional term reacts at once; both
    work on the logarithm, so the coefficient stays positive. (The textbook form, Åström and Hägglund 1995, "PID
    Controllers", with the error taken relative to the target.) The integral's bound keeps it from winding up while the
    KL is still on its way to the target, as it is at the start of every run.

    Args:
        init: coefficient to start with.
        target: KL to hold, nats per completion.
        gain: how strongly the coefficient follows the present error.
        horizon: episodes over which a full error multiplies the coefficient by e.
    """

    _state = ("value", "integral")
    MOST = math.log(100)

    def __init__(self, init: float = 0.15, target: float = 6.0, gain: float = 0.5, horizon: float = 1_000) -> None:
        super().__init__(_positive("init", init))
        self.init, self.target = init, _positive("target", target)
        self.gain, self.horizon = _positive("gain", gain, zero=True), _positive("horizon", horizon)
        self.integral = 0.0

    def _update(self, kl: float, n: int) -> None:
        # A KL estimate can be 0 or below at the start of a run: far under the target.
        error = max(-1.0, min(1.0, math.log(kl / self.target))) if kl > 0 else -1.0
        integral = self.integral + error * min(n / self.horizon, 1.0)
        self.integral = max(-self.MOST, min(self.MOST, integral))
        self.value = self.init * math.exp(self.gain * error + self.integral)


class PenaltyController(_Controller):
    """The coefficient of the penalty on the KL from the policy that sampled, for PPO's KL-penalty objective.

        kl < target / 1.5:  value = value / 2
        kl > target * 1.5:  value = value * 2

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, section 4.

    Args:
        init: beta to start with; it adapts quickly.
        target: KL between the policies before and after an update, nats a *token*.
    """

    def __init__(self, init: float = 1.0, target: float = 0.01) -> None:
        super().__init__(_positive("init", init))
        self.target = _positive("target", target)

    def _update(self, kl: float, n: int) -> None:
        if kl < self.target / 1.5:
            self.value /= 2
        elif kl > self.target * 1.5:
            self.value *= 2
        self.value = min(max(self.value, 1e-8), 1e8)  # 2**-1000 would be 0, which no doubling leaves


def _positive(name: str, value: float, zero: bool = False) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} is {value!r}: it must be a {'number, at least 0' if zero else 'positive number'}.")
    return float(value)
