"""The examples run as they are written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import REPOSITORY
from PIL import Image

from scq.data.stream import iterate_once

EXAMPLES = REPOSITORY / "examples"


def run(name: str, *arguments: object, **variables: str) -> str:
    program = [sys.executable] if name.endswith(".py") else ["sh"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [*program, str(EXAMPLES / name), *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PATH": path, **variables},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_every_example_is_run_here() -> None:
    named = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        assert f'run("{path.name}"' in named or path.is_dir(), path.name


def test_the_quantizer_in_another_autoencoder_learns(emoji: dict[str, Path], tmp_path: Path) -> None:
    images = next(iterate_once(emoji["train"], batch_size=512)).images
    np.save(tmp_path / "images.npy", images.numpy())
    said = run("quantizer_in_your_autoencoder.py", tmp_path / "images.npy", 150).splitlines()
    errors = [float(line.split("error ")[1].split(",")[0]) for line in said]
    assert len(errors) == 3
    scaled = images.float() / 127.5 - 1
    about_mean = float((scaled - scaled.mean(0)).square().mean())  # the error of always showing the mean image
    assert errors[-1] < errors[0]
    assert errors[-1] < about_mean / 3  # of six seeds none was above 0.29 of it


def test_photos_become_new_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(20):
        picture = Image.linear_gradient("L").rotate(18 * number).resize((80, 60)).convert("RGB")
        picture.save(tmp_path / "photos" / f"{number}.jpg")
    run("train_on_your_photos.py", tmp_path / "photos", tmp_path / "run", 3)
    with Image.open(tmp_path / "run" / "sample_3.png") as sample:
        assert sample.size == (32, 32)


def test_sampling_and_inpainting_with_the_model_that_comes_with_the_package(tmp_path: Path) -> None:
    run("sample_and_inpaint.py", tmp_path)
    image, first, second = (
        np.asarray(Image.open(tmp_path / name)) for name in ("image.png", "inpainted_0.png", "inpainted_1.png")
    )
    half = image.shape[1] // 2
    assert (first[:, :half] == image[:, :half]).all()
    assert (first[:, half:] != second[:, half:]).any()
    with Image.open(tmp_path / "outpainted.png") as wide:
        assert wide.size == (image.shape[1] + half, image.shape[0])


def test_two_processes_train_together(emoji: dict[str, Path], tmp_path: Path) -> None:
    steps = ["training.steps=2", "training.batch_size=8", "training.precision=fp32"]
    run("several_processes.sh", emoji["train"], tmp_path / "run", *steps, CPU="1", OMP_NUM_THREADS="1")
    assert (tmp_path / "run" / "model" / "config.json").is_file()
