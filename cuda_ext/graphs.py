"""Capturing launches in a CUDA graph."""

from collections.abc import Callable

import torch


def capture(step: Callable[[], None], times: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of `times` calls of `step` on the current device. One call comes before: it loads the kernels.

    The stream is made here, as torch's own for captures belongs to the device that first captured anything.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, stream=side):
        for _ in range(times):
            step()
    return graph
