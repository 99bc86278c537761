"""LMDB files without liblmdb, which trusts its file: over a damaged page it ends the whole process by a signal.

Here every number of the file is checked before it is used. Format: lmdb.h and mdb.c of OpenLDAP, data version 1, which
all of LSUN's archives have.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scq.data.storage import LocalStorage
from scq.engine.errors import BadImage, DataError

MAGIC, VERSION = 0xBEEFC0DE, 1
NO_PAGE = 2**64 - 1
BRANCH, LEAF, OVERFLOW = 0x01, 0x02, 0x04  # flags of a page
BIG = 0x01  # flag of a node whose value has pages of its own
PAGE = struct.Struct("<QHHHH")  # its number, unused, flags, end of the pointers to nodes, start of the nodes
DATABASE = "IHHQQQQQ"  # page size (of the first database), flags, depth, branch, leaf and overflow pages, entries, root
META = struct.Struct(f"<IIQQ{DATABASE}{DATABASE}QQ")  # magic, version, address, map size, both, last page, transaction
NODE = struct.Struct("<HHHH")  # low and high half of the size, flags, length of the key; in a branch, of a page number


class Value(NamedTuple):
    """Where a value lies: the offset and the length of its bytes, and the first of its own pages, if it has any."""

    offset: int
    length: int
    page: int | None


class LmdbFile:
    """The main database of an LMDB file, read-only. It may be copied into other processes.

    Raises:
        DataError: the file is not LMDB's, or uses what no set of images uses.
    """

    def __init__(self, path: Path):
        self.path = path
        self._storage = LocalStorage(path.parent)
        self._bytes = path.stat().st_size
        self._page_bytes = 4096
        metas = [self._meta(0)]
        self._page_bytes = metas[0][4]
        if not 512 <= self._page_bytes <= 32768 or self._page_bytes & (self._page_bytes - 1):
            raise self._unreadable(f"its pages would have {self._page_bytes} bytes")
        metas.append(self._meta(self._page_bytes))
        newest = max(metas, key=lambda meta: meta[-1])  # LMDB writes the two in turn
        _, flags, _, _, _, _, self._entries, self._root = newest[12:20]
        if flags:
            raise self._unreadable(f"its keys are ordered in an unusual way (flags {flags})")

    def _meta(self, offset: int) -> tuple[int, ...]:
        if offset + PAGE.size + META.size > self._bytes:
            raise self._unreadable(f"it has {self._bytes} bytes")
        meta = META.unpack(self._storage.read_range(self.path.name, offset + PAGE.size, META.size))
        if meta[0] != MAGIC:
            raise self._unreadable("it does not begin as one")
        if meta[1] != VERSION:
            raise self._unreadable(f"it has version {meta[1]}, not {VERSION}")
        return meta

    def items(self) -> Iterator[tuple[bytes, Value]]:
        """Every key, in ascending order, and where its value lies.

        Raises:
            DataError: a page is damaged, or the file is shorter than its entries say.
        """
        waiting = [] if self._root == NO_PAGE else [self._root]
        pages, count, last = 0, 0, b""
        while waiting:
            number = waiting.pop()
            pages += 1
            if pages > self._bytes // self._page_bytes:
                raise self._damaged("its pages lead in a circle")
            page, flags = self._page(number)
            nodes = self._nodes(number, page)
            if flags == BRANCH:
                waiting += [low | high << 16 | more << 32 for low, high, more, _, _ in reversed(nodes)]
            elif flags == LEAF:
                for low, high, kind, key_bytes, start in nodes:
                    key = page[start : start + key_bytes]
                    if count and key <= last:
                        raise self._damaged(f"the keys of page {number} are out of order")
                    yield key, self._value(number, page, kind, low | high << 16, start + key_bytes)
                    count, last = count + 1, key
            else:
                raise self._damaged(f"page {number} has the unknown kind {flags}")
        if count != self._entries:
            raise self._damaged(f"it holds {count} entries, but says that they are {self._entries}")

    def read(self, value: Value) -> bytes:
        """The bytes of a value.

        Raises:
            BadImage: its own pages were overwritten.
        """
        if value.page is None:
            return self._storage.read_range(self.path.name, value.offset, value.length)
        data = self._storage.read_range(self.path.name, value.offset - PAGE.size, PAGE.size + value.length)
        number, _, flags, _, _ = PAGE.unpack_from(data)
        if (number, flags) != (value.page, OVERFLOW):
            raise BadImage(f"page {value.page} of '{self.path}' was overwritten")
        return data[PAGE.size :]

    def _page(self, number: int) -> tuple[bytes, int]:
        """A page of the tree, and its flags."""
        offset = number * self._page_bytes
        if offset + self._page_bytes > self._bytes:
            raise self._damaged(f"page {number} is beyond its end: the file is truncated")
        page = self._storage.read_range(self.path.name, offset, self._page_bytes)
        found, _, flags, _, _ = PAGE.unpack_from(page)
        if found != number:
            raise self._damaged(f"page {number} was overwritten")
        return page, flags

    def _nodes(self, number: int, page: bytes) -> list[tuple[int, int, int, int, int]]:
        """The nodes of a page: its four numbers, and where its key starts."""
        end = PAGE.unpack_from(page)[3]
        if not PAGE.size <= end <= len(page) or end % 2:
            raise self._damaged(f"page {number} was overwritten")
        nodes = []
        for (at,) in struct.iter_unpack("<H", page[PAGE.size : end]):
            if not end <= at <= len(page) - NODE.size:
                raise self._damaged(f"page {number} was overwritten")
            node = NODE.unpack_from(page, at)
            if at + NODE.size + node[3] > len(page):
                raise self._damaged(f"page {number} was overwritten")
            nodes.append((*node, at + NODE.size))
        return nodes

    def _value(self, number: int, page: bytes, kind: int, length: int, start: int) -> Value:
        """The value of a node of a leaf, whose data starts there."""
        if kind not in (0, BIG):
            raise self._unreadable("it holds further databases")
        if start + (8 if kind == BIG else length) > len(page):
            raise self._damaged(f"page {number} was overwritten")
        if kind == BIG:
            (own,) = struct.unpack_from("<Q", page, start)
            value = Value(own * self._page_bytes + PAGE.size, length, own)
        else:
            value = Value(number * self._page_bytes + start, length, None)
        if value.offset + length > self._bytes:
            raise self._damaged(f"a value ends at byte {value.offset + length}, but the file has {self._bytes}")
        return value

    def _unreadable(self, why: str) -> DataError:
        return DataError(f"'{self.path}' is not a readable LMDB file: {why}")

    def _damaged(self, why: str) -> DataError:
        return DataError(f"'{self.path}' is damaged: {why}; download or unpack it again")
