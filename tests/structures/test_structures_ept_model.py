"""EPT paging structures under any changes in any order, against a model that is a dict of pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.errors import CaseError, OverlappingPages
from vmxlab.structures import Ept

from .conftest import walk

K4, M2 = 0x1000, 0x20_0000
BASE = 0x20_0000
properties = settings(derandomize=True, max_examples=30, deadline=None)


class Model:
    """Guest-physical pages of 4 KiB, each with where it goes, its rights, and the size of its page."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, int, int]] = {}

    def split_at(self, page: int) -> None:
        if page in self.pages and self.pages[page][2] == M2 and page % 512:
            for part in range(page // 512 * 512, page // 512 * 512 + 512):
                hpa, rights, _ = self.pages[part]
                self.pages[part] = hpa, rights, K4


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["map", "map 2M", "replace", "replace 2M", "unmap", "protect", "split"]),
        st.integers(0, 0x7FF),
        st.sampled_from([1, 2, 7, 511, 512, 600]),
        st.sampled_from([0b111, 0b101, 0b001, 0b011]),
    ),
    max_size=12,
)


@given(STEPS)
@properties
def test_any_changes_in_any_order_follow_the_model(steps: list[tuple[str, int, int, int]]) -> None:
    ept, model = Ept(), Model()
    change_both(ept, model, "map 2M", 0x200, 0x400, 0b111)  # so that there is something to change
    for what, page, count, rights in steps:
        change_both(ept, model, what, page, count, rights)
    image = ept.tables(BASE)
    assert len(image) == ept.table_count
    for page in range(0x800 + 1200):
        walked = walk(image, page * K4)
        expected = model.pages.get(page)
        if expected is None:
            assert walked is None, hex(page * K4)
        else:
            assert walked is not None, hex(page * K4)
            assert (walked.hpa, walked.rights & 7, walked.size) == expected, hex(page * K4)
    assert sum(size for _, size in ((gpa, 1 << 12 + 9 * (level - 1)) for gpa, level, _ in ept.leaves())) == (
        len(model.pages) * K4
    )


def change_both(ept: Ept, model: Model, what: str, page: int, count: int, rights: int) -> None:
    flags = {"read": bool(rights & 1), "write": bool(rights & 2), "execute": bool(rights & 4)}
    if what.startswith(("map", "replace")):
        replace, size = what.startswith("replace"), M2 if what.endswith("2M") else K4
        if size == M2:
            page, count = page // 512 * 512, (count + 511) // 512 * 512
        touched = range(page, page + count)
        hpa = (page + 0x10000) * K4
        larger = any(model.pages.get(p, (0, 0, 0))[2] > size for p in touched)
        if larger or (not replace and any(p in model.pages for p in touched)):
            with pytest.raises(OverlappingPages):
                ept.map(page * K4, hpa, size, count * K4, replace=replace, **flags)
            return
        ept.map(page * K4, hpa, size, count * K4, replace=replace, **flags)
        for p in touched:
            model.pages[p] = (p + 0x10000) * K4, rights, size
    elif what == "split":
        if model.pages.get(page, (0, 0, 0))[2] == M2:
            ept.split(page * K4)
            model.split_at(page // 512 * 512 + 1)
        else:
            with pytest.raises(CaseError):
                ept.split(page * K4)
    else:
        touched = range(page, page + count)
        if any(p not in model.pages for p in touched):
            with pytest.raises(CaseError):
                ept.unmap(page * K4, count * K4)
            return
        model.split_at(page)
        model.split_at(page + count)
        if what == "unmap":
            ept.unmap(page * K4, count * K4)
            for p in touched:
                del model.pages[p]
        else:
            ept.protect(page * K4, count * K4, **flags)
            for p in touched:
                model.pages[p] = model.pages[p][0], rights, model.pages[p][2]
