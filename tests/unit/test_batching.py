"""Which rows are trained on when: everything once, nothing twice, and the same again after a restart."""

from collections import Counter

import pytest
import torch

from trl_ext.ppo.batches import RolloutSampler, micro_batches, mini_batch, permutation
from trl_ext.tokens import padded_by_length


def epoch_of(sampler: RolloutSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


# RolloutSampler ------------------------------------------------------------------------------------------------------


def test_in_order_repeated_and_the_rest_dropped() -> None:
    sampler = RolloutSampler(num_rows=7, rollout_size=3, repeats=2, shuffle=False, seed=0)
    assert list(sampler) == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert len(sampler) == 12
    assert epoch_of(sampler, 1) == epoch_of(sampler, 0)


@pytest.mark.parametrize(("rows", "size", "repeats"), [(10, 5, 4), (11, 4, 1), (5, 5, 3), (9, 1, 2)])
def test_each_rollout_is_repeated_as_a_whole(rows: int, size: int, repeats: int) -> None:
    sampler = RolloutSampler(rows, size, repeats, shuffle=True, seed=3)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == (rows // size) * size * repeats
    seen: list[int] = []
    for start in range(0, len(drawn), size * repeats):
        blocks = [drawn[start + i * size : start + (i + 1) * size] for i in range(repeats)]
        assert all(block == blocks[0] for block in blocks)
        seen += blocks[0]
    assert len(set(seen)) == len(seen)  # no prompt twice in an epoch
    assert set(seen) <= set(range(rows))


def test_epochs_differ_seeds_differ_and_both_repeat() -> None:
    sampler = RolloutSampler(50, 10, 2, shuffle=True, seed=42)
    first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
    assert first != second
    assert first != sorted(first)
    assert epoch_of(sampler, 0) == first
    assert epoch_of(RolloutSampler(50, 10, 2, shuffle=True, seed=42), 1) == second  # as in a resumed run
    assert epoch_of(RolloutSampler(50, 10, 2, shuffle=True, seed=43), 0) != first


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_rollout_is_known_by_its_number(shuffle: bool) -> None:
    """Before it is drawn, also where it is in a later epoch."""
    sampler = RolloutSampler(11, 4, 3, shuffle, seed=5, num_generations=2)  # five rollouts an epoch
    drawn = [row for epoch in range(3) for row in epoch_of(sampler, epoch)]
    assert [sampler.rollout(number) for number in range(15)] == [drawn[i : i + 4] for i in range(0, len(drawn), 12)]


def test_what_one_epoch_drops_another_takes() -> None:
    sampler = RolloutSampler(7, 3, 1, shuffle=True, seed=0)
    assert set().union(*(epoch_of(sampler, epoch) for epoch in range(20))) == set(range(7))


def test_the_order_ignores_torchs_generator_and_leaves_it_alone() -> None:
    torch.manual_seed(1)
    expected = list(RolloutSampler(20, 5, 1, shuffle=True, seed=0))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert list(RolloutSampler(20, 5, 1, shuffle=True, seed=0)) == expected
    torch.set_rng_state(state)
    list(RolloutSampler(20, 5, 1, shuffle=True, seed=0))
    assert torch.equal(torch.get_rng_state(), state)


# Permutations and minibatches ----------------------------------------------------------------------------------------


def test_permutation_is_one_and_depends_on_every_seed() -> None:
    assert sorted(permutation(30, 1, 2, 3).tolist()) == list(range(30))
    orders = {tuple(permutation(30, *seeds).tolist()) for seeds in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2))}
    assert len(orders) == 5
    assert torch.equal(permutation(30, 1, 2, 3), permutation(30, 1, 2, 3))


def test_first_places_are_fair() -> None:
    """Consecutive seeds give unrelated orders: each row comes first about as often (900 draws of 9, +-4 sigma)."""
    firsts = Counter(permutation(9, 42, step).tolist()[0] for step in range(900))
    assert all(60 < firsts[row] < 140 for row in range(9))


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_minibatches_of_an_epoch_are_disjoint_and_cover_it(parts: int) -> None:
    orders = []
    for epoch in range(3):
        batches = [mini_batch(12, part, parts, 42, 7, epoch).tolist() for part in range(parts)]
        assert [len(batch) for batch in batches] == [12 // parts] * parts
        orders.append([row for batch in batches for row in batch])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2] != orders[0]  # each epoch draws anew


def test_minibatches_of_another_update_differ_and_each_repeats() -> None:
    assert torch.equal(mini_batch(12, 1, 2, 42, 7, 0), mini_batch(12, 1, 2, 42, 7, 0))
    assert not torch.equal(mini_batch(12, 1, 2, 42, 7, 0), mini_batch(12, 1, 2, 42, 8, 0))


# Micro-batches -------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([5, 9, 1, 7, 3, 8, 2, 6, 4, 10, 12, 11])


def test_by_hand() -> None:
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])  # lengths 5 9 1 7 3 8 2 6
    # Longest first: rows 1 (9), 5 (8), 3 (7), 7 (6) | 0 (5), 4 (3), 6 (2), 2 (1).
    assert [part.tolist() for part in micro_batches(rows, LENGTHS, 2, 1, 0)] == [[1, 5, 3, 7], [0, 4, 6, 2]]
    assert [part.tolist() for part in micro_batches(rows, LENGTHS, 2, 2, 0)] == [[1, 5], [0, 4]]
    assert [part.tolist() for part in micro_batches(rows, LENGTHS, 2, 2, 1)] == [[3, 7], [6, 2]]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_processes_share_the_rows_of_one(processes: int, count: int) -> None:
    rows = mini_batch(12, 0, 1, 42)
    alone = micro_batches(rows, LENGTHS, count, 1, 0)
    shared = [micro_batches(rows, LENGTHS, count, processes, process) for process in range(processes)]
    for i, whole in enumerate(alone):
        parts = [share[i].tolist() for share in shared]
        assert {len(part) for part in parts} == {12 // count // processes}
        assert sorted(row for part in parts for row in part) == sorted(whole.tolist())
    assert sorted(torch.cat(alone).tolist()) == list(range(12))


def test_like_lengths_travel_together() -> None:
    batches = micro_batches(torch.arange(12), LENGTHS, 4, 1, 0)
    assert [LENGTHS[batch].tolist() for batch in batches] == [[12, 11, 10], [9, 8, 7], [6, 5, 4], [3, 2, 1]]


def test_ties_keep_the_drawn_order() -> None:
    rows = torch.tensor([3, 0, 2, 1])
    assert torch.cat(micro_batches(rows, torch.full((4,), 5), 2, 1, 0)).tolist() == [3, 0, 2, 1]


# padded_by_length ----------------------------------------------------------------------------------------------------


def test_sequences_of_like_length_are_padded_together() -> None:
    sequences = [[5, 6, 7], [1], [2, 3], [4, 0, 4, 4]]
    first, second = padded_by_length(sequences, 2)
    assert first[0] == [1, 2] and first[1].tolist() == [[1, 0], [2, 3]]
    assert first[2].tolist() == [[True, False], [True, True]]
    assert second[0] == [0, 3] and second[1].tolist() == [[5, 6, 7, 0], [4, 0, 4, 4]]
    assert second[2].sum(1).tolist() == [3, 4]
    assert list(padded_by_length([], 2)) == []
