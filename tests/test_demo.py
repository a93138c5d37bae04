"""The demo says so when a proof of its own does not pass."""

import pytest

from wherry.demo import refuse
from wherry.errors import Diverged
from wherry.report import Report


def test_a_proof_that_failed_ends_the_demo() -> None:
    good, bad = Report("good"), Report("bad")
    good.add("verdict", "", "PASS", note="36 checks passed")
    refuse({"W4": good})
    bad.add("verdict", "", "FAIL", note="1 failed: finite outputs; 3 checks passed")
    with pytest.raises(Diverged, match="W8: 1 failed: finite outputs"):
        refuse({"W4": good, "W8": bad})
