"""The test suite as people run it, `make test` and `make test-fast`: wall and CPU seconds, and how many tests passed.

Measure on a quiet machine: seconds are those of two workers that have a core each. With ``--only PATH ...`` a part of
the suite is run and nothing is written, to try this script.

    python benchmarks/suite.py [--only tests/numerics tests/units]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from record import ROOT, stopwatch, write_result

# The line with which each call of pytest ends.
SUMMARY = re.compile(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """One target of the Makefile, run from its beginning to its end."""

    seconds: float
    cpu_seconds: float
    tests: int  # passed


def passed_tests(output: str) -> int:
    """How many tests passed, over all calls of pytest of one target.

    Raises ``SystemExit`` where the output shows none, or shows failures or errors.
    """
    found = [{word: int(count) for count, word in re.findall(r"(\d+) (\w+)", line)} for line in SUMMARY.findall(output)]
    bad = [counts for counts in found if any(word.startswith(("fail", "error")) for word in counts)]
    passed = sum(counts.get("passed", 0) for counts in found)
    if bad or not passed:
        sys.exit(f"Not a suite that passes: {bad or 'no test ran'}. Look at its output above and mend it first.")
    return passed


def timed(target: str, only: Sequence[str]) -> Suite:
    """Run a target of the Makefile in this environment, which is taken as it is: nothing is installed.

    Raises ``SystemExit`` where it fails.
    """
    command = ["make", target, f"VENV={sys.prefix}", f"--assume-old={sys.prefix}/.installed-test"]
    if only:
        command.append(f"PYTEST_ARGS={' '.join(only)}")
    with stopwatch() as spent:
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout)
    if done.returncode != 0:
        sys.exit(f"`make {target}` ended with code {done.returncode}; its output is above.")
    return Suite(spent.wall, spent.cpu, passed_tests(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PATH", help="a part of the suite; nothing is written")
    only = parser.parse_args().only
    whole, fast = timed("test", only), timed("test-fast", only)
    if only:
        print(whole, fast, sep="\n")
        return
    write_result(
        "suite",
        {
            "seconds": (whole.seconds, "s, make test"),
            "fast_seconds": (fast.seconds, "s, make test-fast"),
            "tests": (whole.tests, "passed by make test"),
            "fast_tests": (fast.tests, "passed by make test-fast"),
            "cpu_seconds": (whole.cpu_seconds, "CPU s, make test, all processes"),
        },
        title="The test suite as people run it, on two workers.",
    )


if __name__ == "__main__":
    main()
