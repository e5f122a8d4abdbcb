"""Two serial logs beside each other: what `vmxlab diff` shows."""

from __future__ import annotations

from vmxlab.reports.log_diff.compare import ComparedCase, LogDiff, LogDifference, compare_logs
from vmxlab.reports.log_diff.may_differ import MayDiffer

__all__ = ["ComparedCase", "LogDiff", "LogDifference", "MayDiffer", "compare_logs"]
