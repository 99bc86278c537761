"""Networks computed in chunks of a fixed size: bounded for large canvases, and each image's own result."""

import pytest
import torch

from scq.sampling.chunks import CHUNK, MOST, chunk_size, in_equal_chunks


@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ((5, 4, 4), 8),  # tokens of a small model
        ((5, 64), 8),  # the same for a prior, in a row
        ((5, 16, 16), 8),  # tokens of 256 pixels at factor 16
        ((5, 32, 16, 16), 8),  # their latents
        ((5, 3, 256, 256), 8),  # their pixels
        ((5, 48, 48), 1),  # a canvas of nine such images
        ((5, 32, 48, 16), 2),
        ((5, 3, 512, 512), 2),
        ((5, 200, 200), 1),
    ],
)
def test_the_chunk_follows_from_the_canvas_alone(shape: tuple[int, ...], images: int) -> None:
    assert chunk_size(torch.empty(shape)) == images
    assert chunk_size(torch.empty(99, *shape[1:])) == images, "whatever is asked for together"
    seen = []

    def network(inputs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        seen.append(len(inputs))
        return inputs.flatten(1)[:, 0] + others

    inputs = torch.zeros(shape)
    inputs.flatten(1)[:, 0] = torch.arange(5)
    assert in_equal_chunks(network, inputs, 10 * torch.arange(5)).tolist() == [0, 11, 22, 33, 44]
    assert set(seen) == {images}


def test_a_gpu_takes_more_but_not_of_a_large_canvas() -> None:
    """No GPU is needed: shapes are enough."""
    assert chunk_size(torch.empty(1, 16, 16, device="meta")) == CHUNK["cuda"]
    assert chunk_size(torch.empty(1, 48, 48, device="meta")) == CHUNK["cuda"] // 9
    assert chunk_size(torch.empty(1, 8, 8, device="meta")) == 4 * CHUNK["cuda"], "a quarter of the tokens"
    assert chunk_size(torch.empty(1, 4, device="meta")) == MOST["cuda"]
