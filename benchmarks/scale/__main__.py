"""How training scales over processes and hosts, and how it would over more of them than there are here.

    sudo make scale                                    measures for ten minutes, on a quiet machine
    .venv/bin/python -m benchmarks.scale --again       makes tables and picture again, from scale.json

Every round measures every configuration once, so that whatever else the machine does falls on all alike.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.reporting import processor, replace_between
from benchmarks.scale.measure import measure
from benchmarks.scale.report import draw, evaluate, report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="a folder for the results")
    parser.add_argument("--again", action="store_true", help="measure nothing, read scale.json there")
    args = parser.parse_args()
    stored, page = args.output / "scale.json", args.output / "README.md"
    if not args.again:
        tcp = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        cpu = f"{os.cpu_count()} cores of {processor()}"
        about = {"torch": torch.__version__, "cpu": cpu, "steps": args.steps, "tcp": tcp}
        with tempfile.TemporaryDirectory() as folder:
            rounds = [measure(args.steps, folder) for _ in range(args.rounds)]
        args.output.mkdir(parents=True, exist_ok=True)
        stored.write_text(json.dumps({"about": about, "rounds": rounds}, indent=1) + "\n")
    results = json.loads(stored.read_text())
    seen, model = evaluate(results["rounds"])
    draw(args.output / "scale.png", seen, model)
    text = page.read_text() if page.exists() else "<!-- scale -->\n<!-- /scale -->\n"
    page.write_text(replace_between(text, "scale", report(results, seen, model)))


if __name__ == "__main__":
    main()
