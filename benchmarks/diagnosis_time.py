"""How long a diagnosis takes: 1000 simulated individuals x 1000 draws of a network of the two-rate model.

The command scripts/diagnose.py as a user gives it, start-up and figures included: calibration over the prior, and the
exact posterior on 200 individuals with long chains for four of them.

    python benchmarks/diagnosis_time.py --posterior RUN [--data KEY=VALUE ...]

``RUN`` is a train_flow run of experiment mrna_two_rate; ``--data data=mrna_two_rate_cells`` adds the data's checks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from record import stopwatch, write_result
from stages import finished_run, run_stage

SIZES = ["diagnose.simulations=1000", "diagnose.draws=1000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True)
    parser.add_argument("--data", nargs="*", default=[])
    parser.add_argument("--show", action="store_true", help="print, and leave the results file alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with stopwatch() as spent:
            run_stage(
                "diagnose", f"posterior={options.posterior.resolve()}", *SIZES, *options.data, directory=directory
            )
        finished_run("diagnose", directory)
    figures = {
        "minutes": (spent.wall / 60, "min, the whole command"),
        "cpu_minutes": (spent.cpu / 60, "CPU min"),
    }
    if options.show:
        print(figures)
        return
    write_result("diagnosis_time", figures, title="Diagnosing 1000 simulated individuals x 1000 draws, two-rate model.")


if __name__ == "__main__":
    main()
