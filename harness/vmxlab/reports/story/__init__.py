"""A serial log as a readable story: what `vmxlab decode` tells."""

from __future__ import annotations

from vmxlab.reports.story.last_words import State
from vmxlab.reports.story.passage import Kind, Passage
from vmxlab.reports.story.teller import Storyteller, Told

__all__ = ["Kind", "Passage", "State", "Storyteller", "Told"]
