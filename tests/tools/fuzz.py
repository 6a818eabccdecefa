"""Fuzzing for as long as you like: ``python tests/tools/fuzz.py --minutes 30``, or ``make fuzz``.

Every round draws new cases from a new seed for each property in turn. A case that fails is shrunk
and kept in tests/regressions, where the ordinary tests find it for ever after.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.monotonic()  # imports count
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), *(str(TESTS / name) for name in ("", "support", "formats"))]

import conftest  # noqa: E402, F401  switches Triton's interpreter on before triton is imported
import fuzz_graphs  # noqa: E402
import test_files_fuzz  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis.stateful import invariant, run_state_machine_as_test  # noqa: E402
from stateful import Pair  # noqa: E402

from fastres.files import atomic_write  # noqa: E402

REGRESSIONS = TESTS / "regressions"
EXAMPLES = {"conv2d": 40, "graph_triton": 20, "resnet_triton": 20, "resnet": 60, "life": 10}
"""Cases of a round; of the others 100."""
Property = tuple[Any, Callable[[Any], None]]


def properties() -> dict[str, Property]:
    """All of them: cases that are plain data, and the check that a case must pass."""
    found: dict[str, Property] = {
        "files": (test_files_fuzz.damage, test_files_fuzz.check_damage),
        **fuzz_graphs.PROPERTIES,
    }
    try:
        import fuzz_kernels
    except ImportError:  # no Triton on this machine
        return {name: value for name, value in found.items() if not name.endswith("_triton")}
    return {**fuzz_kernels.PROPERTIES, **found}


def options(name: str) -> settings:
    return settings(
        max_examples=EXAMPLES.get(name, 100),
        stateful_step_count=25,
        derandomize=False,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


class TimeIsUp(BaseException):
    """Passes through Hypothesis, which takes an Exception for a finding."""


def stop_after(end: float) -> None:
    if time.monotonic() >= end:
        raise TimeIsUp


def run_round(name: str, found: Property, number: int, end: float) -> Any:
    """Draw and check cases from seed ``number`` until ``end``; None, or a failing case, as far
    shrunk as there was time for."""
    cases, check = found
    last: list[Any] = []
    failing: list[Any] = []

    @seed(number)
    @options(name)
    @given(cases)
    def fuzz(case: Any) -> None:
        stop_after(end)
        last[:] = [case]
        try:
            check(case)
        except Exception:
            failing[:] = [case]
            raise

    try:
        fuzz()
    except TimeIsUp:
        if failing:
            print(f"{name}, seed {number}: a case that failed, not shrunk to the end")
    except Exception as error:  # whatever went wrong is the finding
        print(f"{name}, seed {number}: {type(error).__name__}: {error}")
        return (failing or last)[0]
    return failing[0] if failing else None


def run_life(number: int, end: float) -> bool:
    """Random lives of a network and its twin until ``end``; whether all were the same."""
    in_time = invariant(check_during_init=True)(lambda _: stop_after(end))
    machine = seed(number)(type("Pair", (Pair,), {"in_time": in_time}))
    try:
        run_state_machine_as_test(machine, settings=options("life"))
    except TimeIsUp:
        return True
    except Exception as error:  # the steps are in the notes of the error
        print(f"life, seed {number}: {type(error).__name__}: {error}", *error.__notes__, sep="\n")
        return False
    return True


def keep(name: str, case: Any) -> Path:
    """Add a failing case to those that the ordinary tests repeat."""
    path = REGRESSIONS / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    if case not in kept:
        REGRESSIONS.mkdir(exist_ok=True)
        atomic_write(path, (json.dumps([*kept, case], indent=1) + "\n").encode())
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--only", default="", help="names of properties, separated by commas")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = properties()
    names = arguments.only.split(",") if arguments.only else [*chosen, "life"]
    end = START + 60 * arguments.minutes
    failures = rounds = cases = 0
    number = arguments.seed
    while time.monotonic() < end:
        for name in names:
            if time.monotonic() >= end:
                break
            if name == "life":
                failures += not run_life(number, end)
            elif (case := run_round(name, chosen[name], number, end)) is not None:
                failures += 1
                print(f"kept in {keep(name, case)}")
            rounds += 1
            cases += EXAMPLES.get(name, 100)
        print(f"seed {number}: {cases} cases so far, {failures} failures", flush=True)
        number += 1
    print(
        f"{rounds} rounds, seeds {arguments.seed} to {number - 1}, about {cases} cases, "
        f"{failures} failures"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
