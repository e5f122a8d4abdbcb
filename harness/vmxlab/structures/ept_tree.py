"""EPT paging structures drawn as text, for people: `Ept.tree`."""

from __future__ import annotations

from collections.abc import Iterator

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


def draw(root: EptTable) -> str:
    """The tables as a tree: a line for each that leads to another, a line for each run of alike pages."""
    count = sum(1 for _ in root.place(0))
    lines = [f"EPT, 4 levels, {count} table{'s' if count != 1 else ''}"]
    lines += _draw(root, 0, "") or ["└── nothing is mapped"]
    return "\n".join(lines)


def _draw(table: EptTable, gpa: int, indent: str) -> list[str]:
    lines: list[str] = []
    runs = list(_runs(table))
    for number, (index, count, step) in enumerate(runs):
        last = number == len(runs) - 1
        start = gpa + (index << shift_of(table.level))
        child = table.children.get(index)
        entry = table.entries[index]
        name = f"{LEVEL_NAMES[table.level]}[{index}]"
        if child is None:
            text = _run_text(entry, table.level, start, count, step)
        else:
            text = f"{name} {describe_rights(entry)}{_fault_text(entry, table.level)}"
        lines.append(f"{indent}{'└── ' if last else '├── '}{text}")
        if child is not None:
            lines += _draw(child, start, indent + ("    " if last else "│   "))
    return lines


def _runs(table: EptTable) -> Iterator[tuple[int, int, int]]:
    # (first index, how many, difference from entry to entry): a run goes on while the difference is that of
    # neighbouring pages, or while all entries are the same. An entry that leads to a table stands alone.
    indexes = sorted(table.entries)
    neighbours = 1 << shift_of(table.level)
    position = 0
    while position < len(indexes):
        first = indexes[position]
        count, step = 1, 0
        while first not in table.children and position + count < len(indexes):
            following = indexes[position + count]
            difference = (
                table.entries[following] - table.entries[following - 1] if following == first + count else -1
            )
            if following in table.children or difference not in ((0, neighbours) if count == 1 else (step,)):
                break
            count, step = count + 1, difference
        yield first, count, step
        position += count


def _run_text(entry: int, level: int, start: int, count: int, step: int) -> str:
    end = start + (count << shift_of(level)) - 1
    where = f"{start:#06x}-{end:#x}"
    times = f" x{count}" if count > 1 else ""
    if not is_page(entry, level):
        return f"{where} -> raw {LEVEL_NAMES[level]} {entry:#x}{times}{_fault_text(entry, level)}"
    size = PageSize(1 << shift_of(level))
    target = f"{entry & ADDRESS & -size:#x}{' each' if count > 1 and not step else ''}"
    state = "" if is_present(entry) or entry & USER_EXECUTE else " (not present)"
    return f"{where} -> {target} {describe_bits(entry)} {size.label}{times}{state}{_fault_text(entry, level)}"


def _fault_text(entry: int, level: int) -> str:
    faults = "; ".join(fault.rule for fault in misconfigurations(entry, level))
    return f"  <- misconfigured: {faults}" if faults else ""
