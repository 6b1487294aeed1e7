"""Prints a schedule as a grid, with the delay, staleness and memory counted from it.

python -m fdg_jax.schedule --name=fdg --stages=4 --ticks=14
"""

from __future__ import annotations

import argparse
import sys

from fdg_jax import schedule


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fdg_jax.schedule", description="Prints a schedule."
    )
    parser.add_argument("--name", default="fdg", help=", ".join(schedule.NAMED))
    parser.add_argument("--stages", type=int, default=3, help="K")
    parser.add_argument("--ticks", type=int, help="rows of the grid; 2K unless given")
    parser.add_argument("--order", help="of fdg and adl: forward_first or backward_first")
    parser.add_argument("--microbatches", type=int, help="of gpipe, one_f_one_b, zero_bubble")
    parser.add_argument("--accumulate", type=int, help="of adl and pipedream_2bw")
    given = parser.parse_args()
    try:
        plan = schedule.create(
            given.name,
            given.stages,
            order=given.order,
            microbatches=given.microbatches,
            accumulate=given.accumulate,
        )
        if given.ticks is not None and given.ticks < 0:
            raise ValueError(f"ticks={given.ticks}: must be 0 or more")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(plan if given.ticks is None else plan.grid(given.ticks))
    print()
    stages = range(plan.num_stages)
    rows = {
        "stage": stages,
        "delay": [plan.delay(k) for k in stages],
        "staleness": [plan.staleness(k) for k in stages],
        "mean staleness": [f"{plan.mean_staleness(k):.3g}" for k in stages],
        "in flight": [plan.in_flight(k) for k in stages],
    }
    for name, values in rows.items():
        print(f"{name:14} |" + "".join(f"{value!s:>6}" for value in values))
    print(f"\n{schedule.LEGEND}")


if __name__ == "__main__":
    main()
