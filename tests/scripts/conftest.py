import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
# scripts are no part of the package: they import one another by name, from their own folder; and ranks are those of
# the mechanism's tests
sys.path[:0] = [str(TESTS.parent / "scripts"), str(TESTS / "parallel")]
