"""Training on several hosts, each with its own address and name: they train as one process does."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch.distributed.run

from rig.hosts import Host, PyTorchJob, end, ip
from rig.processes import clean_environment
from rig.training import OPTIONS, results, weights

pytestmark = pytest.mark.usefixtures("hosts")


# --- The hosts themselves -----------------------------------------------------------------------


def test_hosts_have_names_and_reach_each_other_until_a_cable_is_pulled(tmp_path):
    knock = "import socket, sys; socket.create_connection((sys.argv[1], 7), timeout=1)"
    with PyTorchJob(tmp_path) as job:
        master, worker, _ = job.hosts
        code, name = worker.start(tmp_path, "-c", "import socket; print(socket.gethostname())").end()
        assert (code, name) == (0, f"{worker.name}\n")

        def knocked():
            return worker.start(tmp_path, "-c", knock, master.name).end()[1].strip().splitlines()[-1]

        assert knocked().startswith("ConnectionRefusedError")  # somebody is there, and says no
        worker.cut()
        assert re.match("TimeoutError|OSError: .* No route", knocked())
        worker.restore()
        assert knocked().startswith("ConnectionRefusedError")
        worker.know([worker])
        assert knocked().startswith("socket.gaierror")


def test_a_pod_finds_what_the_operator_gives_it_and_nothing_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    with PyTorchJob(tmp_path) as job:
        _, printed = end(job.start("-c", show))
    found = [json.loads(text) for text in printed]
    for rank, environment in enumerate(found):
        master = f"{job.name}-master-0"
        for name in ("PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"):  # of the shell, and of Python itself
            environment.pop(name, None)
        assert environment == {
            "PATH": os.environ["PATH"],
            "HOME": "/root",
            "HOSTNAME": [master, f"{job.name}-worker-0", f"{job.name}-worker-1"][rank],
            "PYTHONUNBUFFERED": "1",
            "MASTER_ADDR": master,
            "MASTER_PORT": "23456",
            "WORLD_SIZE": "3",
            "RANK": str(rank),
            "PET_MASTER_ADDR": master,
            "PET_MASTER_PORT": "23456",
            "PET_NODE_RANK": str(rank),
            "PET_NPROC_PER_NODE": "auto",
            "PET_NNODES": "3",
            "OMP_NUM_THREADS": "1",  # as the manifest has it
        }


def in_a_namespace(folder, commands, *flags, **changes):
    """Run `mnist.py` in two processes of a network namespace, after commands. Returns (code, output)."""
    trainer = shlex.join([sys.executable, "mnist.py", "--num-processes", "2", "--dry-run", *flags])
    words = ["unshare", "--net", "--mount", "sh", "-ec", f"{commands}\n{trainer}"]
    environment = clean_environment(OMP_NUM_THREADS=1, **changes)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=folder, env=environment, timeout=120, **options)
    return done.returncode, done.stdout


def test_a_machine_that_does_not_reach_itself_is_told_so_at_once(small):
    code, log = in_a_namespace(small, "true")  # its loopback is down
    assert (code, log) == (
        1,
        "mnist.py: processes cannot meet: this machine does not reach itself as localhost\n",
    )


def test_processes_also_meet_where_loopback_has_no_ipv4_and_under_pytorchs_own_debugging(small, tmp_path):
    (tmp_path / "hosts").write_text("::1 localhost\n")
    commands = (
        f"ip link set lo up; ip address delete 127.0.0.1/8 dev lo; mount --bind {tmp_path}/hosts /etc/hosts"
    )
    code, log = in_a_namespace(small, commands, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert code == 0 and "rank 0 of 2" in log and "Test accuracy" in log, log


def test_nothing_of_a_job_is_left_even_after_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), PyTorchJob(tmp_path) as job:
        sleeper = job.hosts[1].start(tmp_path, "-c", "import time; time.sleep(600)")
        assert job.name in ip("netns")
        1 / 0  # noqa: B018
    assert sleeper.wait(5) == -9
    assert job.name not in ip("netns")
    assert not any(host.etc.exists() for host in job.hosts)


def test_a_job_of_which_one_host_cannot_be_made_leaves_nothing(tmp_path):
    job = PyTorchJob(tmp_path)
    job.hosts.append(Host(job.hosts[0].name, 9, job.bridge))  # this name is taken
    with pytest.raises(subprocess.CalledProcessError), job:
        pass
    assert job.name not in ip("netns")
    assert not any(host.etc.exists() for host in job.hosts)


# --- Training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("elastic", [None, (1, 3, 3)], ids=["static", "elastic"])
def test_torchrun_trains_on_three_hosts_as_the_operator_has_told_it(project, tmp_path, elastic):
    """It needs no arguments; where pods have no ranks of their own, the trainer starts it by itself."""
    command = () if elastic else (torch.distributed.run.__file__,)
    expected, lines = project.reference(3)
    workers = 3 if elastic else 2
    with PyTorchJob(project.folder, workers, elastic, processes_per_node="1") as job:
        codes, printed = end(job.fork(*command, "mnist.py", *OPTIONS, "--output-dir", tmp_path), 180)
    assert codes == [0, 0, 0], printed
    started = [text for text in printed if "Started by torchrun: rank 0 of 3" in text]
    assert len(started) == 1, printed
    assert results(started[0]) == lines  # as three processes of one machine do
    assert weights(tmp_path) == expected


def test_a_whole_job_killed_and_started_again_ends_with_the_same_bits(project, tmp_path):
    expected, lines = project.reference(3)
    options = ("mnist.py", *OPTIONS, "--resume", "--output-dir", tmp_path)
    with PyTorchJob(project.folder) as job:
        for steps in (7, 5):
            processes = job.fork(*options)
            assert processes[0].until(lambda p=processes, n=steps: p[0].output.count("- Loss: ") > n)
            for host in job.hosts:
                host.kill()
            assert end(processes)[0] == [-9, -9, -9]
        codes, printed = end(job.fork(*options))
    assert codes == [0, 0, 0]
    assert printed[0].startswith("Started in a pod of a PyTorchJob: rank 0 of 3, device cpu, backend gloo")
    assert "Using distributed PyTorch with gloo backend" in printed[0]
    assert "Resuming in epoch" in printed[0]
    assert printed[1:] == ["", ""]  # figures are printed once
    assert results(printed[0]) == lines[-len(results(printed[0])) :]
    assert weights(tmp_path) == expected


def test_one_pod_asked_to_stop_stops_the_whole_job_which_then_goes_on(project, tmp_path):
    expected, lines = project.reference(3)
    options = ("mnist.py", *OPTIONS, "--resume", "--output-dir", tmp_path)
    with PyTorchJob(project.folder) as job:
        processes = job.start(*options)
        assert processes[0].until(lambda: processes[0].output.count("- Loss: ") > 6)
        processes[2].terminate()
        codes, before = end(processes, 20)
        assert codes == [143, 143, 143]
        codes, after = end(job.fork(*options))
    assert codes == [0, 0, 0]
    assert results(before[0]) + results(after[0]) == lines
    assert weights(tmp_path) == expected
