"""CIFAR-10 from torchvision's download, the binary version, or an image folder with splits."""

import io
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scq.data.source import Entry, FolderSource, Source, existing_directory, read_file
from scq.data.storage import with_retries
from scq.engine.errors import DataError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = 3 * 32 * 32
LARGEST_BATCH = 2**25  # bytes; 10,000 images take 31 million


class _Inert:
    """Stands in for numpy's classes while a batch file is read: it stores its arguments and does nothing else."""

    def __init__(self, *arguments: Any):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _BatchReader(pickle._Unpickler):
    """Reads the pickled batches without running any code that a file may name: every class becomes an inert record.

    It is pickle's reader in Python. Six bytes of a file make the one in C take 32 GiB, for a memo of that many places.
    """

    ALLOWED = frozenset(("_reconstruct", "ndarray", "dtype"))

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return _Inert
        if (module, name) == ("_codecs", "encode"):  # how Python 3 stores bytes in the old protocol of these files
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"the file refers to {module}.{name}, which no CIFAR-10 batch does")


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Read one batch file.

    Returns:
        pixels uint8 (n, 3, 32, 32), and n labels in 0..9.

    Raises:
        DataError: the file is not a CIFAR-10 batch.
    """
    encoded = with_retries(lambda: read_file(path), f"'{path}'")
    if len(encoded) > LARGEST_BATCH:
        raise DataError(f"'{path}' is not a CIFAR-10 batch: it has {len(encoded):,} bytes")
    try:
        if path.suffix == ".bin":
            rows = np.frombuffer(encoded, np.uint8).reshape(-1, 1 + PIXELS)  # (n, label + pixels)
            pixels, labels = rows[:, 1:], rows[:, 0].tolist()
        else:
            batch = _BatchReader(io.BytesIO(encoded), encoding="latin1").load()
            raw = batch["data"].state[-1]
            raw = raw.encode("latin1") if isinstance(raw, str) else raw
            pixels, labels = np.frombuffer(raw, np.uint8).reshape(-1, PIXELS), [int(x) for x in batch["labels"]]
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise DataError(f"'{path}' is not a CIFAR-10 batch: {type(error).__name__}: {error}") from error
    if len(pixels) != len(labels) or any(not 0 <= label < 10 for label in labels):
        raise DataError(f"'{path}' is not a CIFAR-10 batch: {len(pixels)} images, {len(labels)} labels")
    return pixels.reshape(-1, 3, 32, 32), labels


class Cifar10Source(Source):
    """CIFAR-10 (Krizhevsky, 2009): 32x32 pixels, 10 classes.

    Args:
        path: torchvision's download (cifar-10-batches-py), the binary version (cifar-10-batches-bin), a folder around
            either, or an image folder <split>/<class>/<name>.png.
        split: 'train' (the default, 50,000 images) or 'test' (10,000).

    Raises:
        DataError: there is no such folder or split, or a batch is missing.
    """

    format, default_crop = "cifar10", "none"

    def __init__(self, path: str, split: str | None = None):
        super().__init__(path, split or "train")
        if self.split not in ("train", "test"):
            raise DataError(f"CIFAR-10 has the splits 'train' and 'test', not '{split}'")
        root = existing_directory(path)
        self.folder: FolderSource | None = None
        self.batches = self._batch_files(root)
        self.class_names = CLASS_NAMES
        if not self.batches:
            if not (root / self.split).is_dir():
                raise DataError(
                    f"'{path}' holds neither CIFAR-10 batches (data_batch_1 ...) nor a folder '{self.split}': "
                    f"fetch them with torchvision.datasets.CIFAR10('{path}', download=True)"
                )
            self.folder = FolderSource(path, self.split)
            self.class_names = self.folder.class_names

    def _batch_files(self, root: Path) -> list[Path]:
        stems = [f"data_batch_{i}" for i in range(1, 6)] if self.split == "train" else ["test_batch"]
        for directory in (root, root / "cifar-10-batches-py", root / "cifar-10-batches-bin"):
            for suffix in ("", ".bin"):
                files = [directory / f"{stem}{suffix}" for stem in stems]
                present = [file for file in files if file.is_file()]
                if present and len(present) < len(files):
                    missing = next(file for file in files if file not in present)
                    raise DataError(f"CIFAR-10 is incomplete: '{missing}' is missing; download it again")
                if present:
                    return present
        return []

    def __len__(self) -> int:
        return len(self.folder) if self.folder is not None else sum(len(read_batch(file)[1]) for file in self.batches)

    def files(self) -> Iterator[tuple[str, Path]]:
        yield from self.folder.files() if self.folder is not None else ((file.name, file) for file in self.batches)

    def passed_over(self) -> Counter[str]:
        return self.folder.passed_over() if self.folder is not None else Counter()

    def entries(self) -> Iterator[Entry]:
        if self.folder is not None:
            yield from self.folder.entries()
            return
        for file in self.batches:
            pixels, labels = read_batch(file)
            for i, label in enumerate(labels):
                yield Entry(f"{file.stem}/{i:05d}", label, pixels[i].tobytes())

    def load(self, entry: Entry) -> bytes | Image.Image:
        if self.folder is not None:
            return self.folder.load(entry)
        return Image.fromarray(np.frombuffer(entry.where, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0).copy())
