"""How training scales over processes and hosts, and how it would over more of them than there are here.

    sudo make scale                                                all of it: 40 minutes, on a quiet machine
    .venv/bin/python -m benchmarks.scale --rounds 1 --steps 4      a trial; with --output DIR, to look at only

Root is needed, for hosts: network namespaces that send at a limited rate over a wire of some length. Every
round measures every configuration once, so that whatever else the machine does falls on all alike. A model
of the time of a step is fitted to what was seen, and tried on what it was not shown. The results go to
scale.json, scale.png and, between two marks, README.md.

More hosts than cores cannot compute side by side, but they can wait: there, computing is replaced by
sleeping for as long as it takes one undisturbed process, in the places where a step computes.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.reporting import processor, replace_between
from benchmarks.scale.measure import measure
from benchmarks.scale.report import draw, report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", metavar="N", type=int, default=5)
    parser.add_argument("--steps", metavar="N", type=int, default=10, help="in a row (default: 10)")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path(__file__).parent)
    parser.add_argument("--again", action="store_true", help="measure nothing, read DIR/scale.json")
    args = parser.parse_args()
    raw, page = args.output / "scale.json", args.output / "README.md"
    if args.again:
        results = json.loads(raw.read_text())
    else:
        about = {
            "torch": torch.__version__,
            "cpu": f"{os.cpu_count()} cores of {processor()}",
            "steps": args.steps,
            "tcp": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        }
        results = {"about": about, "rounds": []}
        args.output.mkdir(parents=True, exist_ok=True)
        for number in range(1, args.rounds + 1):
            print(f"round {number} of {args.rounds}")
            with tempfile.TemporaryDirectory() as folder:
                results["rounds"].append(measure(args.steps, folder))
            raw.write_text(json.dumps(results, indent=1) + "\n")  # now, lest a later round should fail
    draw(results["rounds"], args.output / "scale.png")
    text = page.read_text() if page.exists() else "<!-- scale -->\n<!-- /scale -->\n"
    page.write_text(replace_between(text, "scale", report(results["rounds"], results["about"])))


if __name__ == "__main__":
    main()
