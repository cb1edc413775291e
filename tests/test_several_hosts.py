"""Training on several hosts, each with its own address and name: they train as one process does."""

import shlex
import signal
import subprocess
import sys

import pytest
import torch.distributed.run

from rig.hosts import PyTorchJob, end
from rig.processes import clean_environment
from rig.training import OPTIONS, results, weights

pytestmark = pytest.mark.usefixtures("hosts")


def in_a_namespace(folder, commands, **changes):
    """Run `mnist.py` in two processes of a network namespace, after commands. Returns (code, output)."""
    trainer = shlex.join([sys.executable, "mnist.py", "--num-processes", "2", "--dry-run"])
    words = ["unshare", "--net", "--mount", "sh", "-ec", f"{commands}\n{trainer}"]
    environment = clean_environment(OMP_NUM_THREADS=1, **changes)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=folder, env=environment, timeout=120, **options)
    return done.returncode, done.stdout


def test_a_machine_that_does_not_reach_itself_is_told_so_at_once(small):
    code, log = in_a_namespace(small, "true")  # its loopback is down
    said = "processes cannot meet: this machine does not reach itself as localhost"
    assert (code, log) == (1, f"mnist.py: {said}\n")


def test_processes_also_meet_where_loopback_has_no_ipv4_and_under_pytorchs_own_debugging(small, tmp_path):
    (tmp_path / "hosts").write_text("::1 localhost\n")
    commands = "ip link set lo up; ip address delete 127.0.0.1/8 dev lo"
    commands += f"; mount --bind {tmp_path}/hosts /etc/hosts"
    code, log = in_a_namespace(small, commands, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert code == 0 and "rank 0 of 2" in log and "Test accuracy" in log, log


def test_a_job_that_is_stopped_and_then_killed_goes_on_to_the_same_bits(project, tmp_path):
    """The bits are those of three processes of one machine, also under torchrun, which needs no arguments."""
    expected, lines = project.reference(3)
    options = ("mnist.py", *OPTIONS, "--resume", "--output-dir", tmp_path)
    with PyTorchJob(project.folder, processes_per_node="1") as job:

        def train(steps):
            processes = job.fork(*options)
            assert processes[0].until(lambda: processes[0].output.count("- Loss: ") > steps)
            return processes

        processes = train(6)
        processes[2].send_signal(signal.SIGTERM)
        codes, stopped = end(processes, 20)
        assert codes == [143, 143, 143], stopped
        processes = train(5)
        for process in processes:
            process.kill()  # at once: who misses another leaves soon
        assert end(processes)[0] == [-9, -9, -9]
        codes, printed = end(job.fork(torch.distributed.run.__file__, *options), 180)
    assert codes == [0, 0, 0], printed
    assert stopped[0].startswith("Started in a pod of a PyTorchJob: rank 0 of 3, device cpu, backend gloo")
    assert stopped[1:] == ["", ""] and not any(map(results, printed[1:]))  # figures are printed once
    assert printed[0].startswith("Started by torchrun: rank 0 of 3") and "Resuming in epoch" in printed[0]
    before, after = results(stopped[0]), results(printed[0])
    assert before == lines[: len(before)] and after == lines[-len(after) :]
    assert weights(tmp_path) == expected
