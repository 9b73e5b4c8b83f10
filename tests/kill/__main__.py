"""
Kill processes at random instants, and check after each kill what they left behind.

python -m tests.kill --rounds 2000 --seed 7
python -m tests.kill --rounds 100 --only publication
python -m tests.kill --rounds 100 --store postgres
"""

# ruff: noqa: T201 - a program prints

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections import Counter

from tests.kill.data import STORES
from tests.kill.run import OF_SERVERS, SCENES, run


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description="Kill processes at random instants.")
    parser.add_argument("--rounds", type=int, default=100, help="of each scene (default 100)")
    parser.add_argument("--seed", type=int, default=1, help="of the dice (default 1)")
    parser.add_argument("--only", choices=sorted(SCENES), action="append", help="a scene; may be repeated")
    parser.add_argument("--store", choices=STORES, default="lmdb", help="where servers keep their data (default lmdb)")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # each request to the stand-in for S3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # no child is left behind
    for name in options.only or (SCENES if options.store == "lmdb" else OF_SERVERS):
        began = time.monotonic()

        def tell(done: int, kills: Counter[str], name: str = name, began: float = began) -> None:
            told = ", ".join(f"{count} of {kind}" for kind, count in sorted(kills.items()))
            print(f"{name}: {done} rounds, kills: {told}; {time.monotonic() - began:.0f} s", flush=True)

        run(name, rounds=options.rounds, seed=options.seed, store=options.store, on_world=tell)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
