"""What the solver's tests share: random problems, one thread, and both ways to the exact solution."""

import pytest
import torch

from scq.stage1_tokenizer.solver import batched
from scq.stage1_tokenizer.solver import solve as convex_solver


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Between its thousands of short operations the solver's threads spin, and starve whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, params=["compiled", "tensors"])
def path(request, monkeypatch):
    """Both ways to the exact solution, row by row in compiled code and all rows at once, face every oracle."""
    if request.param == "tensors":
        monkeypatch.setattr(convex_solver, "_implementation", lambda z: batched)


def make(n, f, k, *, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, f, generator=generator, dtype=torch.float64)
    codes = scale * torch.randn(k, f, generator=generator, dtype=torch.float64)
    return z.to(dtype), codes.to(dtype)
