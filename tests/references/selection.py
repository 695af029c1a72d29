"""Tests that are repeated for many cases: CI runs a few, `-m campaign` runs the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_campaign(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Parameters of a test: all cases, those not in `kept` marked as a campaign."""
    return [case if case in kept else pytest.param(case, marks=pytest.mark.campaign) for case in cases]
