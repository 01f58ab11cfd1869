"""Tiled log-probabilities against a softmax over the whole logits in float64, and what they keep in memory."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_ext.core import logprobs as module
from trl_ext.core import token_logprobs

TOKENS, HIDDEN, VOCABULARY = 23, 6, 17

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.25},
    "double": {"scale": 2.0},
    "all": {"bias": True, "softcap": 2.0, "scale": 1.75, "temperature": 0.7},
}


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def full(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The same with all logits at once, in the input's precision, for autograd to differentiate."""
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    total = torch.logsumexp(z, dim=-1)
    chosen = z[torch.arange(len(targets)), targets]
    mean = (torch.softmax(z, dim=-1) * z).sum(dim=-1)
    return chosen - total, total - mean  # entropy = log Z - E[z]


def arguments(name: str, bias: Tensor) -> dict[str, Any]:
    return {**SETTINGS[name], **({"bias": bias} if "bias" in SETTINGS[name] else {})}


@pytest.fixture(params=[1, 20, TOKENS * VOCABULARY, 2**20], ids=["number", "4 x 5", "19 x 20", "default"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Numbers in a tile: one, a few rows and columns that divide neither side, nearly all, the default."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", request.param)
    yield request.param


@pytest.mark.parametrize("name", SETTINGS)
def test_value_entropy_and_gradient(name: str, tile: int) -> None:
    hidden, weight, bias, targets = draw()
    reference = hidden.clone().requires_grad_()
    hidden = hidden.float().requires_grad_()
    settings = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments(name, bias).items()}
    logprobs, entropy = token_logprobs(hidden, weight.float(), targets, **settings)
    expected, expected_entropy = full(reference, weight, targets, **arguments(name, bias))
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.shape == entropy.shape == (TOKENS,)
    torch.testing.assert_close(logprobs.double(), expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=2e-5, atol=2e-6)

    upstream = torch.linspace(-2.0, 3.0, TOKENS, dtype=torch.float64)  # another factor for each token
    (gradient,) = torch.autograd.grad((logprobs * upstream.float()).sum(), hidden)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), reference)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-4, atol=2e-5)


def test_by_hand() -> None:
    # Logits 0 and log 3: probabilities 1/4 and 3/4. d log p_0 / d h = w_0 - (1/4 w_0 + 3/4 w_1) = -3/4 log 3.
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    assert logprobs.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], rel=1e-6)
    assert entropy.tolist() == pytest.approx([-0.25 * math.log(0.25) - 0.75 * math.log(0.75)] * 2, rel=1e-6)
    logprobs.sum().backward()
    assert hidden.grad is not None
    expected = [-0.75 * math.log(3), 0.25 * math.log(3)]
    assert hidden.grad.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_temperature_divides_the_logits() -> None:
    # Logits 0 and 2 log 3 at temperature 2: the distribution above.
    weight = torch.tensor([[0.0], [2 * math.log(3.0)]])
    logprobs, _ = token_logprobs(torch.ones(1, 1), weight, torch.tensor([0]), temperature=2.0)
    assert logprobs.item() == pytest.approx(math.log(1 / 4), rel=1e-6)


def test_a_uniform_distribution() -> None:
    logprobs, entropy = token_logprobs(torch.zeros(3, HIDDEN), torch.ones(VOCABULARY, HIDDEN), torch.tensor([0, 5, 16]))
    assert logprobs.tolist() == pytest.approx([-math.log(VOCABULARY)] * 3, rel=1e-6)
    assert entropy.tolist() == pytest.approx([math.log(VOCABULARY)] * 3, rel=1e-6)


def test_huge_logits_stay_finite() -> None:
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.tensor([[1e4], [-1e4]]), torch.tensor([0, 1]))
    assert logprobs.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == [0.0, -2e4]


@pytest.mark.parametrize("of_entropy", [False, True], ids=["logprob", "entropy"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_half_precision(hidden_dtype: torch.dtype, weight_dtype: torch.dtype, of_entropy: bool) -> None:
    """Sums over the vocabulary run in float32; the gradient comes back in the hidden states' type."""
    hidden, weight, _, targets = draw()
    hidden, weight = hidden.to(hidden_dtype), weight.to(weight_dtype)
    reference = hidden.double().requires_grad_()
    hidden.requires_grad_()
    result = token_logprobs(hidden, weight, targets, entropy_grad=of_entropy)[of_entropy]
    expected = full(reference, weight.double(), targets)[of_entropy]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=3e-2, atol=3e-2)
    (gradient,) = torch.autograd.grad(result.sum(), hidden)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), reference)
    assert gradient.dtype == hidden_dtype
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=5e-2, atol=5e-2)


def test_no_tokens() -> None:
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, torch.ones(VOCABULARY, HIDDEN), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_of_the_entropy(name: str, tile: int) -> None:
    hidden, weight, bias, targets = draw()
    reference = hidden.clone().requires_grad_()
    hidden = hidden.float().requires_grad_()
    settings = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments(name, bias).items()}
    upstream = torch.linspace(-2.0, 3.0, TOKENS, dtype=torch.float64)
    logprobs, entropy = token_logprobs(hidden, weight.float(), targets, **settings, entropy_grad=True)
    (gradient,) = torch.autograd.grad((entropy * upstream.float() + 0.5 * logprobs).sum(), hidden)
    expected, expected_entropy = full(reference, weight, targets, **arguments(name, bias))
    (expected_gradient,) = torch.autograd.grad((expected_entropy * upstream + 0.5 * expected).sum(), reference)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-4, atol=2e-5)


def test_entropy_takes_no_gradient_unless_asked() -> None:
    hidden, weight, _, targets = draw(torch.float32)
    logprobs, entropy = token_logprobs(hidden.requires_grad_(), weight, targets)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


def saved_for_backward(function: Any, *args: Any) -> list[tuple[int, ...]]:
    """Shapes of all that autograd keeps for the backward pass of `function`."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args)
    return shapes


def test_nothing_of_the_vocabularys_size_is_kept_for_backward() -> None:
    hidden, weight, _, targets = draw(torch.float32)
    hidden.requires_grad_()
    assert (TOKENS, VOCABULARY) in saved_for_backward(full, hidden, weight, targets)  # the hook sees what it should
    assert saved_for_backward(token_logprobs, hidden, weight, targets) == [(TOKENS, HIDDEN)]
    assert saved_for_backward(token_logprobs, hidden.detach(), weight, targets) == []


def test_no_tensor_is_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of all tokens would be 2000 x 500 numbers; with a tile of 5000 nothing may come near."""
    monkeypatch.setitem(module.TILE_ELEMENTS, "cpu", 5000)
    largest = LargestOutput()
    hidden = torch.randn(2000, 2, requires_grad=True)
    weight, targets = torch.randn(500, 2), torch.zeros(2000, dtype=torch.long)
    with largest:
        logprobs, _ = token_logprobs(hidden, weight, targets)
        logprobs.sum().backward()
    assert 4000 <= largest.numel <= 5000  # the hidden states themselves are 4000
    with largest:
        full(hidden, weight, targets)
    assert largest.numel == 2000 * 500


class LargestOutput(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches every operation, also those inside of autograd functions; `numel` of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made
