"""A passage as lines of styled words: as wide as a terminal, or as it needs to be."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from vmxlab.reports.story.passage import Kind, Passage

Words = list[tuple[str, str]]
"""One line: texts, each with rich's style."""

_LABEL = 9
"""Columns of what stands to the left of a text."""
_PLACE = 30
_NARROWEST = 24
"""A column of text is never made narrower than this."""

_STYLES: Mapping[Kind, tuple[str, str]] = {
    Kind.ENGINE: ("bold", ""),
    Kind.REMARK: ("dim", "dim"),
    Kind.TEXT: ("dim", "dim"),
    Kind.BOOT: ("bold", ""),
    Kind.CAPABILITIES: ("bold", ""),
    Kind.CASE: ("bold cyan", "bold cyan"),
    Kind.FAILURE: ("bold red", "bold red"),
    Kind.FAULT: ("bold red", "red"),
    Kind.TROUBLE: ("bold yellow", "yellow"),
    Kind.DEATH: ("bold red", "red"),
    Kind.DONE: ("bold green", ""),
}
_CLOSE_STYLES = {"whole": "bold green", "died": "bold red"}
_IN_A_CASE = frozenset(
    {Kind.OUTCOME, Kind.FAILURE, Kind.RULES, Kind.MEMORY, Kind.SWEEP, Kind.END, Kind.FAULT, Kind.EXIT}
)


def lay_out(passage: Passage, width: int | None) -> Iterator[Words]:
    """The lines of a passage; `width` None: no line is folded."""
    head, text = _STYLES.get(passage.kind, ("bold", ""))
    match passage.kind:
        case Kind.EXIT:
            yield from _exit(passage, width)
            return
        case Kind.CASE:
            yield []
            label = f"{passage.head}  "
        case Kind.CLOSE:
            yield []
            head = _CLOSE_STYLES.get(passage.head, "bold yellow")
            label = f"{passage.head}  "
        case Kind.REMARK:
            label = "# "
        case Kind.TEXT:
            label = "| " + (f"{passage.head}  " if passage.head else "")
        case _:
            label = f"{passage.head}  " if passage.head else ""
            if passage.kind not in _IN_A_CASE:
                label = label.ljust(_LABEL)
    indent = "  " if passage.kind in _IN_A_CASE else ""
    yield from _folded([(indent + label, head)], passage.text, text, width)
    margin = " " * (len(indent) + 2)
    for note in passage.notes:
        style = "red" if passage.kind is Kind.RULES else ""
        yield from _folded([(margin, "")], note, style, width, hanging=2)


def _exit(passage: Passage, width: int | None) -> Iterator[Words]:
    """The exit's number, RIP and the instruction there; then the reason, and what there is to say of it."""
    _, number, reason = passage.head.split(" ", 2)
    first: Words = [(f"{number:>5}  ", "dim"), (passage.place.ljust(_PLACE), "green"), ("  ", "")]
    margin = " " * (5 + 2 + _PLACE + 2)
    if width is not None and width < len(margin) + _NARROWEST:
        margin = " " * 7
    if len(passage.place) > _PLACE or len(margin) == 7:
        yield first[:-1]
        first = [(margin, "")]
    if passage.text:
        yield from _folded(
            [*first, (reason, "bold"), ("  ", "")], passage.text, "", width, indent=len(margin)
        )
    else:
        yield [*first, (reason, "bold")]
    for note in passage.notes:
        yield from _folded([(margin, "")], note, "dim", width)


def _folded(
    first: Words, text: str, style: str, width: int | None, *, indent: int | None = None, hanging: int = 0
) -> Iterator[Words]:
    """`first`, and a text behind it that goes on under itself, or from column `indent` on."""
    used = sum(len(word) for word, _ in first)
    if width is None:
        yield [*first, (text, style)]
        return
    margin = used if indent is None else indent
    margin = min(margin + hanging, max(0, width - _NARROWEST))
    if used > max(margin, width - _NARROWEST):
        yield first
        first, used = [(" " * margin, "")], margin
    lines = textwrap.wrap(
        text,
        width=max(width, margin + _NARROWEST),
        initial_indent=" " * used,
        subsequent_indent=" " * margin,
        break_on_hyphens=False,
    )
    yield [*first, (lines[0][used:] if lines else "", style)]
    for line in lines[1:]:
        yield [(line, style)]
