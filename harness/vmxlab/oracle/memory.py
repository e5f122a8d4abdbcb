"""The machine's memory as far as it is known: what the compiler laid out, and what was written since.

A byte is known or it is not; reading one that is not known answers None, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmxlab.oracle.values import Rule

PAGE = 4096


class MachineMemory:
    """Bytes by machine address, page by page."""

    def __init__(self, contents: Iterable[tuple[int, bytes]] = ()) -> None:
        self._bytes: dict[int, bytearray] = {}
        self._known: dict[int, bytearray] = {}
        self._tables: set[int] = set()
        self.rules: dict[int, Rule] = {}
        """By the address of 8 bytes: why the processor itself wrote there."""
        self.version = 0
        """Counts what is written."""
        self.tables_version = 0
        """Counts changes of pages that paging structures were read from."""
        self.tables_changed = False
        """Whether a page that paging structures were read from has been written since `tables_are_new`."""
        for address, content in contents:
            self.write(address, content)

    def write(self, address: int, content: bytes) -> None:
        """Bytes that are known from now on."""
        self.version += 1
        done = 0
        while done < len(content):
            page, offset = divmod(address + done, PAGE)
            count = min(PAGE - offset, len(content) - done)
            if page in self._tables:
                self.tables_changed = True
                self.tables_version += 1
            self._page(page)[offset : offset + count] = content[done : done + count]
            self._known[page][offset : offset + count] = b"\1" * count
            done += count

    def write_by(self, rule: Rule, address: int, content: bytes) -> None:
        """What the processor itself writes into a structure; the address is a multiple of 8."""
        self.write(address, content)
        for word in range(address, address + len(content), 8):
            self.rules[word] = rule

    def set_flags(self, address: int, content: bytes) -> None:
        """What the processor itself writes into an entry of a paging structure: it knows of it."""
        before = self.tables_changed
        self.write(address, content)
        self.tables_changed = before

    def forget_flags(self, address: int, length: int) -> None:
        """What the processor itself may have written there, or not: it knows of it."""
        before = self.tables_changed
        self.forget(address, length)
        self.tables_changed = before

    def read_table(self, address: int, size: int) -> int | None:
        """An entry of a paging structure, which may be cached from now on."""
        self._tables.add(address // PAGE)
        return self.read(address, size)

    def tables_are_new(self) -> None:
        """Nothing of any paging structure is cached."""
        self._tables.clear()
        self.tables_version += 1
        self.tables_changed = False

    def forget(self, address: int, length: int) -> None:
        """Bytes that nobody knows from now on."""
        self.version += 1
        done = 0
        while done < length:
            page, offset = divmod(address + done, PAGE)
            count = min(PAGE - offset, length - done)
            if page in self._tables:
                self.tables_changed = True
                self.tables_version += 1
            if page in self._known:
                self._known[page][offset : offset + count] = bytes(count)
            done += count

    def read(self, address: int, size: int) -> int | None:
        """A little-endian number of `size` bytes; None where one of them is not known."""
        content = self.read_bytes(address, size)
        return None if content is None else int.from_bytes(content, "little")

    def read_bytes(self, address: int, length: int) -> bytes | None:
        """`length` bytes; None where one of them is not known."""
        page, offset = divmod(address, PAGE)
        if offset + length <= PAGE:  # nearly always
            if page not in self._bytes or not all(self._known[page][offset : offset + length]):
                return None
            return bytes(self._bytes[page][offset : offset + length])
        parts = self.read_known(address, length)
        return None if None in parts else bytes(byte for byte in parts if byte is not None)

    def read_known(self, address: int, length: int) -> tuple[int | None, ...]:
        """`length` bytes, each one or None."""
        result: list[int | None] = []
        while len(result) < length:
            page, offset = divmod(address + len(result), PAGE)
            count = min(PAGE - offset, length - len(result))
            if page not in self._bytes:
                result += [None] * count
                continue
            content = self._bytes[page][offset : offset + count]
            known = self._known[page][offset : offset + count]
            result += [byte if is_known else None for byte, is_known in zip(content, known, strict=True)]
        return tuple(result)

    def _page(self, page: int) -> bytearray:
        if page not in self._bytes:
            self._bytes[page] = bytearray(PAGE)
            self._known[page] = bytearray(PAGE)
        return self._bytes[page]
