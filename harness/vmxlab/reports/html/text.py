"""Text that any HTML document, and any address of one, may hold."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text with what no document can hold, lone surrogates and controls, spelled out: "\\\\x00"."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c >= " " or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
