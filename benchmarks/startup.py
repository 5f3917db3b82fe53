"""How long the command line takes to answer, and what a start costs before the first import.

    python benchmarks/startup.py [--quick] [--json FILE]

Median, lowest and highest of 20 processes each (5 with --quick): `bigbatch --help`, with
`python -c pass` beside it as the floor, and the import of torch's elastic agent, which
`bigbatch train` with several ranks waits for before it starts them.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import benchmark_parser, machine, write_figures

BIGBATCH = Path(sys.executable).parent / "bigbatch"
CASES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "bigbatch --help": [str(BIGBATCH), "--help"],
    "bigbatch recipes": [str(BIGBATCH), "recipes"],
    "import of the elastic agent": [sys.executable, "-c", "import bigbatch.trainers.agent"],
}


def measure(command: list[str], repeats: int) -> list[float]:
    """Seconds of each run, after one that warms the page cache."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def main() -> None:
    parser = benchmark_parser(__doc__, quick="5 repeats instead of 20")
    options = parser.parse_args()
    repeats = 5 if options.quick else 20
    figures = {}
    print(f"{'seconds, of ' + str(repeats):30}{'median':>8}{'lowest':>8}{'highest':>8}")
    for name, command in CASES.items():
        found = measure(command, repeats)
        figures[name] = {
            "median_s": round(statistics.median(found), 4),
            "lowest_s": round(min(found), 4),
            "highest_s": round(max(found), 4),
        }
        print(f"{name:30}" + "".join(f"{value:8.3f}" for value in figures[name].values()))
    where = machine("bigbatch", repeats=repeats)
    write_figures(options.json, machine=where, figures=figures)


if __name__ == "__main__":
    main()
