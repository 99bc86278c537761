"""The German Traffic Sign Recognition Benchmark as its archives unpack, by hand or by torchvision."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scq.data.source import Entry, Source, existing_directory, list_folder, read_file
from scq.data.storage import with_retries
from scq.engine.errors import DataError
from scq.engine.files import read_plain

CLASSES = 43
TEST_TABLE = "GT-final_test.csv"


def read_table(table: Path) -> list[tuple[str, int]]:
    """The file names and the classes of a table GT-*.csv; its other columns are not used.

    Raises:
        DataError: it has no such columns, or a row with a wrong name or class.
    """

    def read() -> str:
        # Names are whatever bytes the archive has, as they are for the file system.
        return read_plain(table).decode("utf-8-sig", "surrogateescape")

    named: list[tuple[str, int]] = []
    try:
        rows = csv.DictReader(with_retries(read, f"'{table}'").splitlines(), delimiter=";", skipinitialspace=True)
        if missing := {"Filename", "ClassId"} - set(rows.fieldnames or ()):
            raise DataError(f"'{table}' has no column {' and '.join(sorted(missing))}: its columns are divided by ';'")
        for row in rows:
            name, label = ((row[column] or "").strip() for column in ("Filename", "ClassId"))
            if not re.fullmatch("[0-9]{1,5}", label) or int(label) >= CLASSES:
                raise DataError(f"'{table}' has no class 0..{CLASSES - 1} for '{name}': ClassId is '{label[:20]}'")
            if not name or Path(name).name != name or name == ".." or "\0" in name:
                raise DataError(f"'{table}' names the file '{name}', which is not a plain file name")
            named.append((name, int(label)))
    except csv.Error as error:
        raise DataError(f"'{table}' is damaged: {error}") from error
    return named


class GtsrbSource(Source):
    """The German Traffic Sign Recognition Benchmark: 43 classes, .ppm images, GT-*.csv tables.

    Whole images are used, not the box of the sign. Source: benchmark.ini.rub.de.

    Args:
        path: the folder of the unpacked archives, or the root that torchvision.datasets.GTSRB downloaded into.
        split: 'train' (the default) for Final_Training/Images/<class>/ or torchvision's Training/<class>/, with
            GT-<class>.csv in each; 'test' for Final_Test/Images/ with GT-final_test.csv, beside the images or in a
            folder above. In a training folder without a table, the class is the folder's name.

    Raises:
        DataError: there is no such folder or split, or a table is missing or wrong.
    """

    format, default_crop = "gtsrb", "stretch"

    def __init__(self, path: str, split: str | None = None):
        super().__init__(path, split or "train")
        root = existing_directory(path)
        if self.split not in ("train", "test"):
            raise DataError(f"GTSRB has the splits 'train' and 'test', not '{split}'")
        parts = ("Final_Training/Images", "Training") if self.split == "train" else ("Final_Test/Images",)
        places = [place / part for part in parts for place in (root, root / "GTSRB", root / "gtsrb" / "GTSRB")]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            wanted = " or ".join(parts)
            raise DataError(f"'{path}' has no folder {wanted}: give the folder of the unpacked GTSRB archives")
        self.images = found
        self.class_names = tuple(f"{label:05d}" for label in range(CLASSES))

    def _folders(self) -> Iterator[tuple[Path, list[tuple[str, int]]]]:
        """Every folder of images, with the names and the labels of those that belong to the set."""
        if self.split == "test":
            places = (self.images, *self.images.parents[:3])
            table = next((place / TEST_TABLE for place in places if (place / TEST_TABLE).is_file()), None)
            if table is None:
                raise DataError(
                    f"{TEST_TABLE} with the test labels is missing beside '{self.images}': "
                    "it comes in GTSRB_Final_Test_GT.zip (the image archive has a table without labels)"
                )
            yield self.images, read_table(table)
            return
        for folder in list_folder(self.images).folders:
            if table := next((each for each in sorted(folder.glob("GT-*.csv")) if each.is_file()), None):
                yield folder, read_table(table)
            elif folder.name in self.class_names:
                label = self.class_names.index(folder.name)
                yield folder, [(image.name, label) for image in list_folder(folder).images]

    def __len__(self) -> int:
        return sum(len(named) for _, named in self._folders())

    def files(self) -> Iterator[tuple[str, Path]]:
        for entry in self.entries():
            yield entry.key, Path(entry.where)

    def passed_over(self) -> Counter[str]:
        passed: Counter[str] = Counter()
        for folder, named in self._folders():
            listing = list_folder(folder)
            names = {name for name, _ in named}
            passed += listing.passed_over
            passed["not in a table"] += sum(image.name not in names for image in listing.images)
            del passed[".csv"]
        return +passed

    def entries(self) -> Iterator[Entry]:
        for folder, named in self._folders():
            for name, label in named:
                yield Entry(f"{label:05d}/{name}", label, str(folder / name))

    def load(self, entry: Entry) -> bytes:
        return read_file(entry.where)
