"""Everything that a benchmark needs, in parts for a machine without a network: ``scq benchmark bundle``.

The parts are tar files of at most so many bytes, for ways that limit what travels at once. What a file needs several
parts for is cut into pieces. `evaluation.bundle.run`, which lies beside the parts, puts them together again.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from scq.engine.config import PACKAGE, REVISION, git_revision, save_config
from scq.engine.errors import UserError
from scq.engine.files import make_folder, sha256_of, write_file, write_json
from scq.engine.progress import say
from scq.evaluation.benchmark.config import BenchmarkConfig, load_benchmark, load_recipes
from scq.evaluation.benchmark.phases import Job
from scq.evaluation.benchmark.plan import PLANNED, write_configs
from scq.evaluation.benchmark.run import benchmark_images, pack_phases
from scq.evaluation.bundle.wheels import download, lacking, read_packages
from scq.evaluation.metrics.inception import find_weights
from scq.stage1_tokenizer.perceptual import vgg16_features

MANIFEST = "manifest.json"
RUN = '#!/usr/bin/env bash\nexec python3 "$(dirname "$0")/run.py" "$@"\n'
INCEPTION, VGG16 = "weights/inception.safetensors", "weights/vgg16.safetensors"
# What is handed out after every call: all that is small, and the models.
_REPORT = (
    "run/phases/*", "run/pictures/*/*", "run/*.json", "run/*.md", "run/*.png", "run/config/*", "run/pilot/phases/*",
    "run/arms/*/*/metrics.jsonl", "run/arms/*/*/config.yaml", "logs/*", "speed/*",
)  # fmt: skip
_MODELS = ("run/arms/*/*/model", "run/arms/*/drawn.safetensors")
_KEPT = ("phases", "pictures", "config", "arms/*/*/model", "arms/*/drawn.safetensors", "plan.json")  # of an earlier run


@dataclass(frozen=True)
class Budget:
    """How a bundle's time is divided, in seconds.

    Attributes:
        arm: for one arm of the benchmark, see `evaluation.benchmark.plan`.
        longest: times the lengths in the configs of the trainings, at most.
        tests: for the tests that need an accelerator, at most.
        speed: for each measurement of speed, at most.
        cells: latents, channels and codes that the quantizers are timed with, see `evaluation.speed.quantizers`.
    """

    arm: float = 600.0
    longest: float = 3.0
    tests: float = 180.0
    speed: float = 120.0
    cells: tuple[tuple[int, int, int], ...] = ((65536, 8, 16384), (16384, 8, 1024))


def make_bundle(
    config_path: Path,
    out: Path,
    *,
    packages: Path,
    python: str = "3.12",
    part_bytes: int = 45 << 20,
    earlier: Path | None = None,
    budget: Budget | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a bundle: parts, ``manifest.json``, ``run.py`` and ``run.sh``.

    Args:
        config_path: of the benchmark; its dataset is packed here.
        out: folder for the bundle; ``content/`` in it keeps what the parts are made of.
        packages: file that lists the packages of the other machine, see `wheels.read_packages`.
        python: its version of Python.
        part_bytes: of a part at most.
        earlier: a benchmark's folder, or what `collect` wrote of one, to go on with; None to begin anew.
        budget: None for `Budget`'s defaults.
        overrides: ``section.key=value`` for the benchmark's config.

    Returns:
        the manifest.

    Raises:
        UserError, DataError: a config, the images, the weights or the list of packages is missing or unfit, or a
            package has no wheel.
    """
    budget, content = budget or Budget(), out / "content"
    config = load_benchmark(config_path, list(overrides))
    make_folder(content)
    _copy_code(content / "code" / "scq")
    needed = lacking(read_packages(packages), python)
    shutil.rmtree(content / "site", ignore_errors=True)
    wheels = download(needed, python, content / "site")
    say(f"wheels: {', '.join(f'{name} {version}' for name, version in needed.items())}")
    weights = _write_weights(content, config, config_path.parent)
    there = _config_for_there(config, weights)
    _pack_images(config, there, content / "run")
    if earlier is not None:
        _copy_earlier(earlier, content / "run")
    if not (content / "run" / "config" / PLANNED).is_file():
        write_configs(there, config_path.parent, content / "config", lambda training: training)
    _write_step_configs(there, config_path.parent, content / "config")
    _copy_tests(content / "tests")
    manifest = {
        "revision": git_revision(),
        "steps": _steps(content, config, weights, budget),
        "report": list(_REPORT),
        "models": list(_MODELS),
        **write_parts(content, _in_groups(content, wheels), out, part_bytes),
    }
    write_json(out / MANIFEST, manifest, indent=1)
    write_file(out / "run.py", (PACKAGE / "evaluation" / "bundle" / "run.py").read_bytes())
    write_file(out / "run.sh", RUN)
    return manifest


def _copy_code(target: Path) -> None:
    """The package as it is installed, without the embedded model."""
    shutil.rmtree(target, ignore_errors=True)
    rooms = [each.parent for each in PACKAGE.glob("*/__init__.py")]
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("py.typed"), *(PACKAGE / "configs").rglob("*.yaml")]
    for file in [*files, *(each for room in rooms for each in room.rglob("*.py"))]:
        make_folder((target / file.relative_to(PACKAGE)).parent)
        shutil.copyfile(file, target / file.relative_to(PACKAGE))
    write_file(target / REVISION, git_revision() + "\n")


def _copy_tests(target: Path) -> None:
    """The tests and what they share, where scq runs from its repository."""
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted((PACKAGE / "tests").glob("*.py")):
        make_folder(target)
        shutil.copyfile(file, target / file.name)
    if target.is_dir():
        write_file(target / "pytest.ini", "[pytest]\nmarkers =\n    gpu: needs a GPU\n    slow: takes long\n")


def _write_weights(content: Path, config: BenchmarkConfig, beside: Path) -> list[str]:
    """The networks that measure and train; their names.

    Inception is written as it is, because half precision moves FID. VGG16 is halved, which hardly moves LPIPS;
    docs/gpu.md has both. It is left out where no loss and no measure asks for it.
    """
    _write(find_weights(config.measure.inception_weights or None)[0], content / INCEPTION)
    losses = [load_recipes(config, beside, arm).tokenizer.config.loss for arm in config.arms.values()]
    if not config.measure.lpips_weights and not any(loss.perceptual > 0 for loss in losses):
        return [INCEPTION]
    vgg16 = vgg16_features(config.measure.lpips_weights)
    _write({name: value.half() for name, value in vgg16.items() if name.startswith("features.")}, content / VGG16)
    return [INCEPTION, VGG16]


def _write(weights: dict[str, Tensor], path: Path) -> None:
    write_file(path, save({name: value.contiguous() for name, value in weights.items()}))


def _config_for_there(config: BenchmarkConfig, weights: Sequence[str]) -> BenchmarkConfig:
    """The config with the names that images and weights have in the bundle, none of which is a path of this machine."""
    dataset = replace(
        config.dataset, source=Path(config.dataset.source).name, test_source=Path(config.dataset.test_source).name
    )
    lpips = VGG16 if VGG16 in weights else ""
    measure = replace(config.measure, lpips_weights=lpips, inception_weights=INCEPTION)
    return replace(config, dataset=dataset, measure=measure)


def _pack_images(config: BenchmarkConfig, there: BenchmarkConfig, run: Path) -> None:
    """Pack the images here, and remember that as phases that are done there."""
    images = benchmark_images(run)
    phases = pack_phases(there.dataset, images)
    job = Job(phases, run / "phases")
    for phase, source in zip(phases, pack_phases(config.dataset, images), strict=True):
        job.supply(phase, source.work(**source.inputs))


def _copy_earlier(earlier: Path, run: Path) -> None:
    for pattern in _KEPT:
        for path in sorted(earlier.glob(pattern)):
            target = run / path.relative_to(earlier)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                make_folder(target.parent)
                shutil.copyfile(path, target)


def _write_step_configs(config: BenchmarkConfig, beside: Path, folder: Path) -> None:
    """The tokenizers of the first two arms, for `scq benchmark step`, with every loss switched on."""
    for name, arm in list(config.arms.items())[:2]:
        found = load_recipes(config, beside, arm).tokenizer.config
        loss = replace(found.loss, adversarial_start=0, adversarial_ramp=0, discriminator_lead=0)
        save_config(replace(found, loss=loss), folder / f"step_{name}.yaml")


def _steps(content: Path, config: BenchmarkConfig, weights: Sequence[str], budget: Budget) -> list[dict[str, Any]]:
    """What is run there, in this order."""
    scq = ["{python}", "-m", "scq"]
    code = ["code/scq/__init__.py", *(str(path.relative_to(content)) for path in (content / "site").glob("*.whl"))]
    train, test = (
        [f"run/shards/{split}/{path.name}" for path in _shards(content, split)] for split in ("train", "test")
    )

    def step(name: str, command: Iterable[str], needs: list[str], least: float, most: float | None) -> dict[str, Any]:
        return {
            "name": name,
            "command": list(command),
            "needs": needs,
            "required": most is None,
            "least_seconds": least,
            "most_seconds": most or 1e9,
        }

    steps = []
    if (content / "tests").is_dir():
        pytest = ["{python}", "-m", "pytest", "-q", "-m", "gpu and not slow", "--maxfail", "12"]
        pytest += ["-p", "no:cacheprovider", "--rootdir", "tests", "-c", "tests/pytest.ini", "tests/test_gpu.py"]
        steps.append(step("tests", pytest, [*code, "tests/conftest.py"], 60.0, budget.tests))
    cells = [word for cell in budget.cells for word in ("--cell", ",".join(map(str, cell)))]
    steps.append(step("speed", [*scq, "benchmark", "speed", *cells, "--out", "speed"], code, 40.0, budget.speed))
    names = list(config.arms)[:2]
    configs = [word for name in reversed(names) for word in ("--config", f"config/step_{name}.yaml")]
    timed = [*scq, "benchmark", "step", *configs, "--data", "run/shards/test"]
    steps.append(step("step", timed, [*code, *test, *(each for each in weights if each == VGG16)], 60.0, budget.speed))
    needs = [*code, *weights, *train, *test]
    plan = [*scq, "benchmark", "plan", "--config", f"config/{PLANNED}", "--out", "run", "--seconds", f"{budget.arm:g}"]
    plan += ["--longest", f"{budget.longest:g}"]
    steps.append(step("plan", plan, needs, 60.0, None))
    quality = [*scq, "benchmark", "quality", "--config", f"run/config/{PLANNED}", "--out", "run"]
    steps.append(step("quality", quality, needs, 20.0, None))
    return steps


def _shards(content: Path, split: str) -> list[Path]:
    return sorted(path for path in (content / "run" / "shards" / split).iterdir() if path.is_file())


def _in_groups(content: Path, wheels: Sequence[Path]) -> list[list[Path]]:
    """All files in two groups: what is ours, and what is large; in the second those first that the first steps need."""
    folders = [content / name for name in ("code", "tests", "config")]
    ours = dict.fromkeys(path for folder in folders for path in sorted(folder.rglob("*")))
    then = [*wheels, content / VGG16, *_shards(content, "test"), *sorted(content.rglob("*"))]
    large = dict.fromkeys(path for path in then if path.is_file() and path not in ours)
    return [[path for path in ours if path.is_file()], list(large)]


def write_parts(content: Path, groups: Sequence[Sequence[Path]], out: Path, part_bytes: int) -> dict[str, Any]:
    """Write ``part-01.tar`` and so on, each of at most ``part_bytes``.

    Args:
        groups: of files below ``content``, in this order. Each begins a new part, so that a change in one group leaves
            the parts of the others as they are.

    Returns:
        ``parts`` (name, bytes, sha256) and ``files`` (path, bytes, sha256, compressed, pieces as (part, member)).

    Raises:
        UserError: a part has not even room for one piece.
    """
    if part_bytes < 1 << 16:
        raise UserError(f"a part of {part_bytes} bytes is too small for anything")
    for old in out.glob("part-*.tar"):
        old.unlink()
    entries = []
    with _Parts(out, part_bytes) as parts:
        for group in groups:
            parts.begin()
            for path in group:
                compressed, data = _shortest(path.read_bytes())
                entries.append(
                    {
                        "path": str(path.relative_to(content)),
                        "bytes": path.stat().st_size,
                        "sha256": sha256_of(path),
                        "compressed": compressed,
                        "pieces": parts.add(data),
                    }
                )
    made = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in parts.written]
    return {"parts": made, "files": entries}


class _Parts:
    """The part that is being filled, in memory, and those before it, on disk."""

    _OVERHEAD = 3 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE  # of a piece's header and padding, and of the end

    def __init__(self, out: Path, part_bytes: int):
        self.out, self.part_bytes, self.written = out, part_bytes, list[Path]()
        self._buffer = io.BytesIO()
        self._archive: tarfile.TarFile | None = None
        self._filled, self._members = 0, 0

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()

    def begin(self) -> tarfile.TarFile:
        """Write the part that was filled, and begin a new one."""
        self._finish()
        self.written.append(self.out / f"part-{len(self.written) + 1:02d}.tar")
        self._buffer, self._filled, self._members = io.BytesIO(), 0, 0
        self._archive = tarfile.open(fileobj=self._buffer, mode="w")  # noqa: SIM115, closed by _finish
        return self._archive

    def _finish(self) -> None:
        if self._archive is not None:
            self._archive.close()
            write_file(self.written[-1], self._buffer.getvalue())

    def add(self, data: bytes) -> list[tuple[str, str]]:
        """Write data in as many pieces as it takes: the part and the member that each of them is."""
        pieces, start = [], 0
        while start < len(data) or not pieces:
            room = self.part_bytes - self._filled - self._OVERHEAD
            archive = self._archive
            if archive is None or room < min(1 << 16, self.part_bytes // 4):  # next to nothing fits
                archive, room = self.begin(), self.part_bytes - self._OVERHEAD
            piece = data[start : start + room]
            member = tarfile.TarInfo(f"{self._members:06d}")
            member.size = len(piece)
            archive.addfile(member, io.BytesIO(piece))
            pieces.append((self.written[-1].name, member.name))
            self._filled += 2 * tarfile.BLOCKSIZE + len(piece)
            self._members, start = self._members + 1, start + room
        return pieces


def _shortest(data: bytes) -> tuple[bool, bytes]:
    """The data compressed where that is shorter, and whether it is."""
    shorter = zlib.compress(data, 6)  # a twentieth of lzma's time, for a fiftieth more of what are mostly images
    return (True, shorter) if len(shorter) < len(data) else (False, data)


def parts_and_sizes(manifest: dict[str, Any]) -> Iterator[str]:
    """A line for each part: its size, and what begins in it."""
    for part in manifest["parts"]:
        inside = [file["path"] for file in manifest["files"] if file["pieces"][0][0] == part["name"]]
        tops = dict.fromkeys("/".join(path.split("/")[: 3 if path.startswith("run/") else 1]) for path in inside)
        yield f"{part['name']}  {part['bytes'] / 2**20:5.1f} MiB  {len(inside)} files: {', '.join(tops)}"
