"""The rFID that chooses a tokenizer's best checkpoint, and what it needs."""

import pytest

from scq.engine.errors import UserError
from scq.evaluation.score import rfid_scorer
from scq.stage1_tokenizer.stage import ScoreConfig


def test_nothing_is_scored_unless_somebody_asks() -> None:
    assert rfid_scorer("", ScoreConfig()) is None


def test_scores_need_held_out_images() -> None:
    with pytest.raises(UserError, match=r"score\.images needs held-out images: set data\.validation"):
        rfid_scorer("", ScoreConfig(images=9))
