"""The oracle's translation agrees with the processor on entries and accesses chosen at random.

Each example is one case: registers, and some accesses with paging structures of their own, in which a few
bits differ from such as allow everything.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from vmxlab import EntryControls, SecondaryControls
from vmxlab.oracle.accesses import AccessKind
from vmxlab.sdm.registers import CR0, CR4, EFER, RFLAGS

pytestmark = pytest.mark.vmx_needs(SecondaryControls.ENABLE_EPT, EntryControls.LOAD_IA32_EFER)

EXAMPLES = 100
KINDS = [AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH, AccessKind.READ_MODIFY_WRITE]

GUEST_BITS = [0, 1, 1, 2, 2, 5, 5, 6, 6, 7, 8, 9, 12, 13, 50, 52, 59, 63, 63]
"""Bits of L2's entries that may be turned over; those named twice more often."""
EPT_BITS = [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 50, 52, 57, 60, 63]

guest_changes = st.tuples(st.integers(1, 4), st.sampled_from(GUEST_BITS))
ept_changes = st.tuples(st.integers(0, 3), st.integers(1, 3), st.sampled_from(EPT_BITS))
probes = st.tuples(
    st.sampled_from(KINDS), st.lists(guest_changes, max_size=3), st.lists(ept_changes, max_size=2)
)
registers = st.fixed_dictionaries(
    {
        "user": st.booleans(),
        "cr0": st.sampled_from([0, CR0.WP]),
        "cr4": st.sampled_from([0, CR4.SMEP, CR4.SMAP, CR4.SMEP | CR4.SMAP]),
        "efer": st.sampled_from([0, EFER.NXE, EFER.NXE]),
        "rflags": st.sampled_from([0, RFLAGS.AC]),
        "ept_flags": st.booleans(),
    }
)

PS = 1 << 7


def build(agreement, probe):
    """A probe from the bits that are turned over."""
    kind, of_l2, of_ept = probe
    result = agreement.Probe(kind)
    for level, bit in of_l2:
        value = result.guest[4 - level]
        if bit in (12, 13) and not (level in (2, 3) and value & PS):
            continue  # there it is part of an address
        result = result.with_guest(level, value ^ 1 << bit)
    for page, level, bit in of_ept:
        if (level, bit) == (3, 7):
            continue  # a page of 1 GiB at an address where the monitor lies
        result = result.with_ept(page, level, result.ept[3 - page][3 - level] ^ 1 << bit)
    return result


@pytest.mark.slow
def test_random_entries_and_accesses(agreement):
    """Vol. 3A, chapter 4; Vol. 3C, 29.3: what happens, what is recorded, which flags are set."""
    total = Counter()

    @seed(20240325)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(registers, st.lists(probes, min_size=4, max_size=12))
    def compare(setting, chosen):
        lacking = setting["cr4"] & ~agreement.vmxlab.capabilities.cr4_fixed1
        setting = agreement.Setting(**{**setting, "cr4": setting["cr4"] & ~lacking})
        if setting.ept_flags and not agreement.vmxlab.capabilities.ept_vpid.accessed_dirty:
            return
        result = agreement.compare(setting, [build(agreement, probe) for probe in chosen], flags=True)
        total.update(compared=result.compared, unknown=result.unknown, excused=result.excused)
        total.update(result.kinds)
        assert not result.differences, "\n".join(result.differences)

    compare()
    assert total["compared"] > 20 * total["unknown"]
    for ending in ("Translated", "PageFault", "EptViolation", "EptMisconfiguration"):
        assert total[ending] > EXAMPLES / 4, total
