"""Why a VM entry of a live machine failed: the rules that its VMCS breaks, with the memory as it is then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmxlab.console.run import Run
    from vmxlab.image.compiler import CompiledCase
    from vmxlab.oracle.entry import Broken


def broken_rules(
    run: Run,
    compiled: CompiledCase,
    current_vmcs: int | None,
    read: Callable[[int, int], bytes | None],
) -> tuple[Broken, ...]:
    """The rules of VM entry that the VMCS in the run's records breaks; none where the records hold none."""
    from vmxlab.oracle.entry import check_entry
    from vmxlab.oracle.entry.of_case import environment_of

    if not run.failed_vmcs:
        return ()
    environment = replace(environment_of(compiled), current_vmcs=current_vmcs, read=read)
    return check_entry(run.failed_vmcs, environment).broken
