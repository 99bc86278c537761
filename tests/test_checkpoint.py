"""What a checkpoint says when it cannot be written or read."""

import resource
from pathlib import Path

import pytest
from torch import nn

from scq.engine.checkpoint import Checkpoints
from scq.engine.errors import UserError


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", 2, {"model": nn.Linear(300, 300)}, {})


def test_a_full_disk_is_named_and_left_as_it_was(checkpoints: Checkpoints) -> None:
    checkpoints.save(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a third of what the weights need
    try:
        with pytest.raises(UserError, match=r"step_00000002 cannot be written .* resumes from .*step_00000001"):
            checkpoints.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000001"]
    assert checkpoints.restore()["step"] == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named(checkpoints: Checkpoints, content: bytes) -> None:
    checkpoints.save(1)
    (checkpoints.folder / "step_00000001" / "optimizers.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"step_00000001 cannot be restored \(.+\); delete that folder"):
        checkpoints.restore()
