"""What generated cases are made of, and what a failure shows."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings

from vmxlab import Case, Mode
from vmxlab.cases.program import Request, assemble, assemble_many
from vmxlab.oracle.rules import io_instructions
from vmxlab.sdm.registers import GENERAL_REGISTERS

from .drawing import MODES, Drawn, hlt, mov, plain
from .exploring import Plan, Tally, explore
from .strategies_io import io_cases
from .strategies_mixed import mixed_cases

VALUES = (0, 0x1234_5678, 0xFFFF_FFFF, 1 << 32, (1 << 64) - 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", VALUES)
def test_mov_is_what_the_assembler_makes_of_its_text(mode, value):
    names = [name for name in GENERAL_REGISTERS if mode is Mode.LONG or not name[1:].isdigit()]
    snippets = [mov(mode, name, value) for name in names]
    programs = assemble_many([Request(snippet.text, mode=mode) for snippet in snippets])
    assert [program.code for program in programs] == [snippet.code for snippet in snippets]


def test_shown_program_is_the_one_that_runs(processors):
    """Of the texts, each was assembled alone: together they are the same code."""

    @settings(max_examples=10, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(mixed_cases(processors["skylake"]))
    def same(drawn: Drawn) -> None:
        shown = drawn.shown
        assert isinstance(shown.program, str)
        assert assemble(shown.program, mode=drawn.mode).code == drawn.case.program

    same()


def test_source_runs_the_case():
    drawn = Drawn(Mode.LONG, (plain(Mode.LONG, "cpuid"), hlt(Mode.LONG)))
    assert drawn.source("test_cpuid") == (
        "from vmxlab import Case\n"
        "\n"
        "\n"
        "def test_cpuid(vmxlab):\n"
        "    run = vmxlab.run(Case(program='cpuid; hlt'))\n"
        "    assert not run.check()\n"
    )


def test_wrong_oracle_is_found_and_the_case_made_small(vmxlab, monkeypatch):
    """An oracle that takes OUT for IN is refuted by one OUT."""

    def wrong(port: int, size: int, *, is_in: bool, **more: bool) -> int:
        return right(port, size, is_in=True, **more)

    right = io_instructions.io_qualification
    monkeypatch.setattr(io_instructions, "io_qualification", wrong)
    tally = Tally()
    info = vmxlab.lab.info
    with pytest.raises(AssertionError, match=r"def test_case\(vmxlab\)"):
        explore(
            io_cases(vmxlab.capabilities),
            lambda drawn: vmxlab.lab.run(drawn.case),
            Plan(examples=50),
            info.name,
            info.version,
            tally,
        )
    assert tally.failed is not None
    assert len([line for line in tally.failed.lines if "out" in line.text]) == 1
    assert len(tally.failed.lines) <= 5
    assert isinstance(tally.failed.case, Case)
