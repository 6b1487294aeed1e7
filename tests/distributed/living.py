"""A process that joins a rendezvous and then ends as requested; for tests.

    python -m tests.distributed.living OWN COUNT HOST:PORT DEED

DEED: stay, leave (success), fail (uncaught exception), quit (status 3 by os._exit, after a notice
to the others).
"""

from __future__ import annotations

import os
import sys
import time

from fdg_jax.distributed import failure_detector, rendezvous


def main() -> None:
    own, count, coordinator, deed = sys.argv[1:]
    failure_detector.PROBES = dict.fromkeys(failure_detector.PROBES, 1)
    try:
        living, _ = rendezvous.roll_call(int(own), int(count), coordinator, 60)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("here", flush=True)
    if deed == "leave":
        return
    if deed == "fail":
        raise RuntimeError("as told")
    if deed == "quit":
        living.leave(failed=True)
        os._exit(3)
    time.sleep(600)


if __name__ == "__main__":
    main()
