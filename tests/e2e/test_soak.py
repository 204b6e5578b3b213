import pytest

from tests.e2e.processes import ROOT, running


@pytest.mark.timeout(240)
def test_mixed_load_leaves_nothing_behind_and_no_byte_is_wrong() -> None:
    """The soak of `benchmarks/`, for some seconds: the minutes are for `docs/performance.md`."""
    program = str(ROOT / "benchmarks" / "soak.py")
    with running(program, "--seconds", "5") as soak:
        told, problems = soak.communicate(timeout=200)
    assert soak.returncode == 0, told + problems
    assert "wrong: 0" in told
