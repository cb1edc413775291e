"""Try on a GPU what the trainer promises. Nine minutes later each promise has held, or you know what failed.

python benchmarks/gpu.py                              all, as `make gpu` does; writes benchmarks/gpu.json
python benchmarks/gpu.py --device cpu --images 1000   a trial without a GPU; trials write /tmp/gpu.json
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STREAMS = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
sys.path.insert(0, str(ROOT))
try:
    import torch

    import mnist
    from rig.project import make_small_project
except ImportError as missing:
    sys.exit(f"gpu.py: {missing.name} is missing here: python -m pip install {missing.name}")


class Checks(argparse.Namespace):
    """The flags, and the checks. Each says what must hold, has its own process, and returns what it saw."""

    def float32(self, *flags):
        """An epoch reaches 98.5 %, five reach 99.35 %."""
        lines = self._train("accuracy", "--epochs", 5, *flags)
        first, *_, fifth = (float(line[9:]) for line in lines if line.startswith("accuracy="))
        seen = f"{first:.2%} and {fifth:.2%}"
        assert self.images < 60_000 or (first >= 0.985 and fifth >= 0.9935), seen
        return seen if self.images == 60_000 else sys.exit(f"not tried: needs all images; here {seen}")

    def bf16(self):
        """The same with `--bf16`."""
        return self.float32("--bf16")

    def kills(self, number=signal.SIGKILL, code=-signal.SIGKILL, times=3):
        """Killed at three random instants and resumed: the same bits."""
        steps = self.images // mnist.Hyperparameters.batch_size  # in one of two epochs
        flags = ["--epochs", 2, "--log-interval", 1, "--checkpoint-interval", steps // 10, "--resume"]
        instants = [random.randrange(steps // 10 + 1, steps // 2) for _ in range(times)]
        for instant in instants:
            self._train(number.name, *flags, code=code, after=instant, number=number)
        self._train(number.name, *flags, says="Resuming in epoch")
        self._train("undisturbed", *flags)  # has nothing left to do if another check has been here
        files = [f"{folder}/checkpoint.pt" for folder in (number.name, "undisturbed")]
        states = [[saved[name] for name in mnist.STATES] for saved in map(torch.load, files)]
        torch.testing.assert_close(*states, rtol=0, atol=0, msg=lambda why: " ".join(why.split()))
        return f"the same bits, interrupted after {', '.join(map(str, instants))} steps"

    def sigterm(self):
        """SIGTERM at a random instant: exit code 143; resumed, the same bits."""
        return self.kills(signal.SIGTERM, 143, times=1)

    def devices(self):
        """A checkpoint from a CPU is taken up on the GPU, and the GPU's on a CPU."""
        self._train("devices", "--epochs", 1, "--no-cuda")
        self._train("devices", "--epochs", 2, "--resume", says="Resuming in epoch 2")
        flags = ["--epochs", 3, "--resume", "--no-cuda"]
        return self._on_gpu(self._train("devices", *flags, says="Resuming in epoch 3")[-1])

    def model(self):
        """`mnist_model.pt` loads on a machine without a GPU, and is right as often there."""
        there = float(self._train("model", "--epochs", 1, "--save-model")[-1][9:])
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        network, (_, test_set) = mnist.Net(), mnist.load_mnist("datasets")
        network.load_state_dict(torch.load("model/mnist_model.pt"))
        here = mnist.test(network, *test_set)[1] / len(test_set[0])
        seen = f"{here:.2%} without a GPU, {there:.2%} where it was trained"
        assert not torch.cuda.is_available() and abs(here - there) < 0.0015, seen
        return self._on_gpu(seen)

    def processes(self):
        """Two processes with one GPU: one sentence that says what to do. With `--no-cuda` they train."""
        flags = ["--epochs", 1, "--num-processes", 2]
        self._on_gpu(self._train("processes", *flags, "--no-cuda", says="gloo backend")[-1])
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        lines = self._train("processes", *flags, code=1, says="use --no-cuda")
        (sentence,) = (line for line in lines if not line.startswith("Started "))
        return sentence

    def nccl(self):
        """A process per GPU, connected by nccl: they train, and close the group without a warning."""
        if self.device == "cpu" or (count := torch.cuda.device_count()) < 2:
            sys.exit("not tried: needs two GPUs")
        lines = self._train("nccl", "--epochs", 1, "--num-processes", count, says="nccl backend")
        assert not any("ProcessGroup" in line for line in lines), lines
        return f"{count} GPUs, {lines[-1]}"

    def waits(self):
        """No step waits for the GPU: PyTorch's debug mode for that stays silent."""
        steps = self._steps()
        torch.cuda.set_sync_debug_mode("error")
        return f"{sum(1 for _ in steps)} steps"

    def speed(self):
        """Measured: an epoch's time, launches a step, the share in which the GPU computes, peak memory."""
        mnist.main(["--epochs", "2", "--output-dir", "speed", *["--no-cuda"] * (self.device == "cpu")])
        epoch = json.loads(Path("speed/metrics.jsonl").read_text().splitlines()[1])["seconds"]
        steps = self._steps(f"an epoch in {epoch:.2f} s")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            count = sum(1 for _ in steps)
        profile.export_chrome_trace("trace")
        events = json.loads(Path("trace").read_text())["traceEvents"]
        work = [e["dur"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        assert work, "the profiler saw nothing that the GPU did"
        share = sum(work) / 1e6 / count / (epoch * mnist.Hyperparameters.batch_size / self.images)
        memory = torch.cuda.max_memory_allocated() / 2**20
        return f"{epoch:.2f} s, {len(work) / count:.0f} launches, {share:.0%}, {memory:.0f} MiB"

    def peers(self):
        """Measured: seconds of an epoch, beside those of peers that use PyTorch, in three rounds."""
        if gone := [name for name in ("torchvision", "psutil") if not find_spec(name)]:
            sys.exit(f"not tried: needs {' and '.join(gone)}; install what fits torch {torch.__version__}")
        flags = ["--only", "ours", "pytorch_example", "lightning", "ignite", "--cap", 0]
        flags += ["--rounds", 3, "--epochs", 2, "--gpu"] if self.device == "cuda" else ["--rounds", 1]
        flags += ["--images", self.images] * (self.images < 60_000) + ["--results", Path("peers").resolve()]
        subprocess.run(map(str, ["timeout", 240, sys.executable, ROOT / "benchmarks" / "bench.py", *flags]))
        assert Path("peers").exists(), "bench.py ended, or took 240 s, without a result"
        runs = json.loads(Path("peers").read_text())["runs"]
        seen = [f"{r['contender']} {r['error'] or round(r['epochs'][-1]['seconds'], 2)}" for r in runs]
        return self._on_gpu(", ".join(seen))

    def _train(self, folder, *flags, code=0, says="", after=0, number=0):
        """Run mnist.py, and send it a signal after so many steps. Returns the lines that it printed."""
        flags = ["mnist.py", "--output-dir", folder, *flags, *["--no-cuda"] * (self.device == "cpu")]
        place = "device cpu" if "--no-cuda" in flags else "device cuda"
        process = subprocess.Popen(map(str, [sys.executable, *flags]), **STREAMS)
        text, steps = "", 0
        for line in process.stdout:
            text += line
            steps += (stepped := "- Loss: " in line)
            if stepped and steps == after:
                time.sleep(random.uniform(0, 0.01))  # anywhere in a step
                process.send_signal(number)
        assert process.wait() == code, f"exit code {process.returncode}, not {code}: {text[-200:]!r}"
        assert says in text and (code == 1 or place in text), f"no {says!r} or no {place!r}: {text[:200]!r}"
        return text.splitlines()

    def _steps(self, seen="nothing"):
        """Return 30 steps on the GPU, in this process, after a first one that loads the libraries."""
        self._on_gpu(seen)
        training_set, _ = mnist.load_mnist("datasets", device := mnist.choose_device(0))
        steps = mnist.Trainer(mnist.Hyperparameters(), mnist.Job(), device).train(*training_set)
        next(steps)
        return zip(range(30), steps, strict=False)

    def _on_gpu(self, seen="nothing"):
        return seen if self.device == "cuda" else sys.exit(f"not tried: needs a GPU; here {seen}")


def main():
    names = [name for name in vars(Checks) if not name.startswith("_")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial without a GPU")
    add("--images", type=int, default=60_000, metavar="N", help="a trial with fewer, at least 1000")
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"a trial of some of {', '.join(names)}")
    add("--check", choices=names, help=argparse.SUPPRESS)  # in this process, in the folder of a project
    args = parser.parse_args(namespace=Checks())
    if args.check:
        return print("held:", getattr(args, args.check)())
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: PyTorch finds no NVIDIA GPU here: --device cpu tries what can be tried without one")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    here = {"gpu": gpu, "torch": torch.__version__, "python": sys.version.split()[0], "images": args.images}
    results = Path(tempfile.gettempdir() if len(sys.argv) > 1 else ROOT / "benchmarks", "gpu.json")
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    print("\n| check | what must hold | seen | | seconds |\n|---|---|---|---|--:|")
    rows, failures, end = [], "", time.monotonic() + (540 if args.device == "cuda" else 36_000)
    with tempfile.TemporaryDirectory() as folder:
        make_small_project(Path(folder), args.images, min(args.images, 10_000))
        for name in args.only or names:
            begin = time.monotonic()
            limit = (end - begin) / (1 if name == "peers" else 4)
            check = [sys.executable, __file__, *sys.argv[1:], "--check", name]
            done = subprocess.run(["timeout", "-s", "KILL", str(limit), *check], cwd=folder, **STREAMS)
            state, _, seen = done.stdout.strip().rpartition("\n")[2].partition(": ")
            if (state, done.returncode) not in (("held", 0), ("not tried", 1)):
                failures += f"\n{name}: {done.stdout}"
                ended = f"exit code {done.returncode}, no result within {limit:.0f} s"
                state, seen = "failed", (seen or state) if done.returncode == 1 else ended
            row = [name, getattr(Checks, name).__doc__, seen, state, round(time.monotonic() - begin)]
            rows.append(dict(zip(("check", "must hold", "seen", "state", "seconds"), row, strict=True)))
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            results.write_text(json.dumps(here | {"checks": rows}, indent=1) + "\n")
    sys.exit(failures or 0)


if __name__ == "__main__":
    main()
