"""EPT paging structures as a person reads them: runs of alike entries, and drawn as text (`Ept.tree`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmxlab.structures.ept_entry import (
    ADDRESS,
    LEVEL_NAMES,
    USER_EXECUTE,
    PageSize,
    describe_bits,
    describe_rights,
    is_page,
    is_present,
    misconfigurations,
    shift_of,
)
from vmxlab.structures.ept_table import EptTable


@dataclass(frozen=True, slots=True)
class EntryRun:
    """Entries of one table that differ in nothing but that each maps the page behind the one before.

    `index` and `gpa` (the first address it controls) are of the first one, `entry` is its value: without the
    address where it leads to a table of these structures, and such a one stands alone. `step` is the
    difference from entry to entry: the size of a page, or 0 where all are the same.
    """

    level: int
    index: int
    gpa: int
    entry: int
    count: int = 1
    step: int = 0
    leads_to_table: bool = False

    @property
    def name(self) -> str:
        """ "PTE[3]"; of several the first one and the last, "PTE[3-34]"."""
        last = f"-{self.index + self.count - 1}" if self.count > 1 else ""
        return f"{LEVEL_NAMES[self.level]}[{self.index}{last}]"

    @property
    def last(self) -> int:
        """The last guest-physical address that it controls."""
        return self.gpa + (self.count << shift_of(self.level)) - 1

    @property
    def size(self) -> PageSize | None:
        """The size of the page that each maps; None where none does."""
        maps = not self.leads_to_table and is_page(self.entry, self.level)
        return PageSize(1 << shift_of(self.level)) if maps else None

    @property
    def target(self) -> str:
        """Where the (first) page lies; "" where none is mapped."""
        if self.size is None:
            return ""
        return f"{self.entry & ADDRESS & -self.size:#x}{' each' if self.count > 1 and not self.step else ''}"

    @property
    def attributes(self) -> str:
        """Rights and memory type in short words; the rights alone where it leads to a table."""
        if self.leads_to_table:
            return describe_rights(self.entry)
        return f"raw {self.entry:#x}" if self.size is None else describe_bits(self.entry)

    @property
    def is_absent(self) -> bool:
        """Whether it maps a page and grants nothing: the processor takes it for not present."""
        return self.size is not None and not (is_present(self.entry) or self.entry & USER_EXECUTE)

    @property
    def fault(self) -> str:
        """The rules that it breaks on any processor (29.3.3.1); "" where it breaks none."""
        return "; ".join(fault.rule for fault in misconfigurations(self.entry, self.level))


def runs_below(table: EptTable, gpa: int = 0) -> Iterator[EntryRun]:
    """All of a table and of those below it, each run before what it leads to."""
    for run in runs_of(table, gpa):
        yield run
        if run.leads_to_table:
            yield from runs_below(table.children[run.index], run.gpa)


def runs_of(table: EptTable, gpa: int) -> Iterator[EntryRun]:
    """The entries of one table, whose first address is `gpa`."""
    # A run goes on while the difference is that of neighbouring pages, or while all entries are the same.
    indexes = sorted(table.entries)
    shift = shift_of(table.level)
    position = 0
    while position < len(indexes):
        first = indexes[position]
        is_table = first in table.children
        count, step = 1, 0
        while not is_table and position + count < len(indexes):
            following = indexes[position + count]
            difference = (
                table.entries[following] - table.entries[following - 1] if following == first + count else -1
            )
            if following in table.children or difference not in ((0, 1 << shift) if count == 1 else (step,)):
                break
            count, step = count + 1, difference
        start = gpa + (first << shift)
        yield EntryRun(table.level, first, start, table.entries[first], count, step, is_table)
        position += count


def draw(root: EptTable) -> str:
    """The tables as a tree: a line for each that leads to another, a line for each run of alike pages."""
    count = sum(1 for _ in root.place(0))
    lines = [f"EPT, 4 levels, {count} table{'s' if count != 1 else ''}"]
    lines += _draw(root, 0, "") or ["└── nothing is mapped"]
    return "\n".join(lines)


def _draw(table: EptTable, gpa: int, indent: str) -> list[str]:
    lines: list[str] = []
    runs = list(runs_of(table, gpa))
    for number, run in enumerate(runs):
        last = number == len(runs) - 1
        lines.append(f"{indent}{'└── ' if last else '├── '}{_text(run)}")
        if run.leads_to_table:
            lines += _draw(table.children[run.index], run.gpa, indent + ("    " if last else "│   "))
    return lines


def _text(run: EntryRun) -> str:
    fault = f"  <- misconfigured: {run.fault}" if run.fault else ""
    if run.leads_to_table:
        return f"{run.name} {run.attributes}{fault}"
    where = f"{run.gpa:#06x}-{run.last:#x}"
    times = f" x{run.count}" if run.count > 1 else ""
    if run.size is None:
        return f"{where} -> raw {LEVEL_NAMES[run.level]} {run.entry:#x}{times}{fault}"
    absent = " (not present)" if run.is_absent else ""
    return f"{where} -> {run.target} {run.attributes} {run.size.label}{times}{absent}{fault}"
