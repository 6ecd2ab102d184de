"""Memory is used again when, and only when, nothing holds it any more."""

import torch

from data_pipeline.buffers import Buffers


def test_memory_that_nobody_holds_is_used_again() -> None:
    buffers = Buffers()
    first = buffers.take((4, 5))
    place = first.data_ptr()
    second = buffers.take((4, 5))
    assert second.data_ptr() != place
    del first
    assert buffers.take((4, 5)).data_ptr() == place


def test_a_view_or_a_graph_that_needs_it_keeps_it() -> None:
    buffers = Buffers()
    images = buffers.take((2, 3)).fill_(2.0)
    view = images[1:]
    weight = torch.ones(2, 3, requires_grad=True)
    loss = (weight * buffers.take((2, 3)).fill_(3.0)).sum()  # the graph alone holds the second
    del images
    for _ in range(3):
        buffers.take((2, 3)).zero_()
    assert view.tolist() == [[2.0, 2.0, 2.0]]
    loss.backward()
    assert weight.grad is not None and weight.grad.unique().tolist() == [3.0]
    del view, loss
    places = {buffers.take((2, 3)).data_ptr() for _ in range(5)}
    assert len(places) == 1


def test_other_shapes_are_forgotten_and_never_mixed_up() -> None:
    buffers = Buffers()
    small, large = buffers.take((2, 2)).fill_(1.0), buffers.take((3, 3)).fill_(2.0)
    again = buffers.take((2, 2)).fill_(5.0)
    assert small.unique().tolist() == [1.0] and large.unique().tolist() == [2.0] and again.shape == (2, 2)
