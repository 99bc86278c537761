"""The German Traffic Sign Recognition Benchmark as its archives unpack."""

import csv
from collections.abc import Iterator
from pathlib import Path

from scq.data.source import Entry, Source, existing_directory
from scq.engine.errors import DataError


class GtsrbSource(Source):
    """The German Traffic Sign Recognition Benchmark in its official layout: 43 classes, .ppm images, GT-*.csv tables.

    Whole images are used, not the box of the sign. Source: benchmark.ini.rub.de.

    Args:
        path: the folder of the unpacked archives.
        split: 'train' (the default) for Final_Training/Images/<class>/ with GT-<class>.csv in each; 'test' for
            Final_Test/Images/ with GT-final_test.csv, beside the images or in a folder above.

    Raises:
        DataError: there is no such folder or split, or, when the entries are read, a table is missing or wrong.
    """

    format, default_crop = "gtsrb", "stretch"

    def __init__(self, path: str, split: str | None = None):
        super().__init__(path, split or "train")
        root = existing_directory(path)
        if self.split not in ("train", "test"):
            raise DataError(f"GTSRB has the splits 'train' and 'test', not '{split}'")
        part = "Final_Training" if self.split == "train" else "Final_Test"
        self.images = next(
            (d / part / "Images" for d in (root, root / "GTSRB") if (d / part / "Images").is_dir()), None
        )
        if self.images is None:
            raise DataError(f"'{path}' has no folder {part}/Images: give the folder of the unpacked GTSRB archives")
        self.class_names = tuple(f"{label:05d}" for label in range(43))

    def _tables(self) -> list[Path]:
        if self.split == "train":
            tables = sorted(self.images.glob("*/GT-*.csv"))
            if not tables:
                raise DataError(f"no GT-*.csv below '{self.images}': these files hold the labels")
            return tables
        beside = (self.images, *self.images.parents[:3])
        table = next((d / "GT-final_test.csv" for d in beside if (d / "GT-final_test.csv").is_file()), None)
        if table is None:
            raise DataError(
                f"GT-final_test.csv with the test labels is missing beside '{self.images}': "
                "it comes in GTSRB_Final_Test_GT.zip (the image archive has a table without labels)"
            )
        return [table]

    def __len__(self) -> int:
        return sum(1 for _ in self.entries())

    def entries(self) -> Iterator[Entry]:
        for table in self._tables():
            directory = table.parent if self.split == "train" else self.images
            with table.open(newline="", encoding="utf-8-sig") as lines:
                for row in csv.DictReader(lines, delimiter=";"):
                    label = (row.get("ClassId") or "").strip()
                    name = (row.get("Filename") or "").strip()
                    if not label.isdecimal() or int(label) >= len(self.class_names):
                        raise DataError(f"'{table}' has no class 0..42 for '{name}': ClassId is '{label}'")
                    if not name or Path(name).name != name:
                        raise DataError(f"'{table}' names the file '{name}', which is not a plain file name")
                    yield Entry(f"{int(label):05d}/{name}", int(label), str(directory / name))

    def load(self, entry: Entry) -> bytes:
        return Path(entry.where).read_bytes()
