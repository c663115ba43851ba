"""The examples run, learn, and keep as much memory as they say; the answers they train on are right."""

from __future__ import annotations

from collections import deque
from statistics import fmean

import pytest
import torch

NAMES = ("graph_shortest_path", "sequence_gru", "transformer_layer", "mazes")
UNREACHED, EVEN, ODD = range(3)


@pytest.fixture(scope="module", params=NAMES)
def outcomes(request, load_script):
    """What an example returns at its small size, by gradient."""
    return load_script(f"examples/{request.param}.py").main(["--small"])


@pytest.mark.parametrize("gradient", ["C-RBP", "BPTT"])
def test_the_loss_falls(outcomes, gradient):
    losses = outcomes[gradient].losses
    assert fmean(losses[-5:]) < 0.85 * fmean(losses[:5])


def test_memory_is_the_same_at_four_times_the_steps_for_crbp_and_grows_for_bptt(outcomes):
    near, far = outcomes["C-RBP"].kept
    assert near == far
    near, far = outcomes["BPTT"].kept
    assert far > 3 * near


def distances(linked: torch.Tensor, source: int) -> dict[int, int]:
    """Length of the shortest path to each node that the source reaches."""
    found, waiting = {source: 0}, deque([source])
    while waiting:
        node = waiting.popleft()
        for other in linked[node].nonzero().flatten().tolist():
            if other not in found:
                found[other] = found[node] + 1
                waiting.append(other)
    return found


def test_labels_of_nodes_are_those_of_a_breadth_first_search(load_script):
    draw = load_script("examples/graph_shortest_path.py").draw
    (edges, source), labels = draw(16, 12, torch.Generator().manual_seed(0))
    assert set(labels.flatten().tolist()) == {UNREACHED, EVEN, ODD}
    for linked, start, label in zip(edges, source, labels, strict=True):
        length = distances(linked, int(start.argmax()))
        assert label.tolist() == [1 + length[node] % 2 if node in length else UNREACHED for node in range(12)]


def test_running_parity_is_that_of_the_ones_so_far(load_script):
    (bits,), labels = load_script("examples/sequence_gru.py").draw(16, 9, torch.Generator().manual_seed(0))
    for sequence, label in zip(bits.int().tolist(), labels.tolist(), strict=True):
        assert label == [sum(sequence[: end + 1]) % 2 for end in range(9)]


def test_every_token_is_labelled_as_the_root_that_its_pointers_lead_to(load_script):
    draw = load_script("examples/transformer_layer.py").draw
    (names, parents, shown), labels = draw(16, 8, torch.Generator().manual_seed(0))
    for row in range(16):
        parent = dict(zip(names[row].tolist(), parents[row].tolist(), strict=True))
        label = dict(zip(names[row].tolist(), shown[row].tolist(), strict=True))
        assert len(parent) == 8
        for name, wanted in zip(names[row].tolist(), labels[row].tolist(), strict=True):
            while parent[name] != name:
                name = parent[name]
            assert label[name] == wanted


def test_a_maze_is_a_tree_and_its_answer_the_only_way_between_the_ends(load_script):
    (free, ends), ways = load_script("examples/mazes.py").draw(16, 5, torch.Generator().manual_seed(0))
    for row in range(16):
        pixels = [tuple(pixel) for pixel in free[row].nonzero().tolist()]
        linked = torch.tensor([[abs(a - c) + abs(b - d) == 1 for c, d in pixels] for a, b in pixels])
        assert int(linked.sum()) // 2 == len(pixels) - 1
        start, end = (pixels.index(tuple(pixel)) for pixel in ends[row].nonzero().tolist())
        from_start, from_end = distances(linked, start), distances(linked, end)
        assert len(from_start) == len(pixels)
        on_way = {pixels[i] for i in range(len(pixels)) if from_start[i] + from_end[i] == from_start[end]}
        assert {tuple(pixel) for pixel in ways[row].nonzero().tolist()} == on_way
