"""What becomes of a job on several hosts that loses one, waits for a late one, or is cut off from one.

How an operator then starts the pods again is in test_manifests_run.py.
"""

import random
import re
import time

import pytest

from rig.faults import OWN_STORE, lose_elastic_worker, lose_worker
from rig.hosts import PyTorchJob, end
from rig.training import OPTIONS, TEST, results, weights

pytestmark = pytest.mark.usefixtures("hosts")


@pytest.mark.parametrize("fault", ["kill", "link", "stop"])
def test_who_loses_a_worker_leaves_in_time_and_names_the_place_where_they_met(project, fault):
    lose_worker(project, fault, random.Random(fault))


@pytest.mark.parametrize("missing", ["name", "host", "trainer"])
def test_a_master_that_never_appears_is_named(project, missing):
    with PyTorchJob(project.folder) as job:
        master, worker, _ = job.hosts
        if missing == "name":
            worker.know([worker])
        elif missing == "host":
            master.cut()
        process = worker.fork(project.folder, "mnist.py", "--timeout", 1, OMP_NUM_THREADS=1)
        time.sleep(5)
        assert process.poll() is None  # it has patience: masters may come later
        # Python's start, and 10 x --timeout. Should that end a moment early, PyTorch pauses and tries again.
        code, printed = process.end(10 + 10 + 30 + 10)
    assert code == 1
    assert f"mnist.py: rank 1 of 3 (meeting at {master.name}:23456)" in printed
    assert "Traceback" not in printed


def test_a_worker_that_never_appears_is_missed(project):
    with PyTorchJob(project.folder) as job:
        master, worker, _ = job.hosts
        processes = [host.fork(project.folder, "mnist.py", "--timeout", 1, OMP_NUM_THREADS=1)
                     for host in (master, worker)]  # fmt: skip
        codes, printed = end(processes, 10 + 10 + 10)
    assert codes == [1, 1]
    for rank, text in enumerate(printed):
        assert f"mnist.py: rank {rank} of 3 (meeting at {master.name}:23456)" in text
        assert "Traceback" not in text
        assert text.count(f"Waiting for 2 other processes at {master.name}:23456") == 1
    assert "2/3" in printed[0]  # who has come


def test_a_master_whose_name_and_host_come_late_is_waited_for(project, tmp_path):
    options = ("mnist.py", "--epochs", 1, "--timeout", 10, "--output-dir", tmp_path)
    with PyTorchJob(project.folder) as job:
        master, *workers = job.hosts
        for worker in workers:
            worker.know([worker])
        processes = [worker.fork(project.folder, *options, OMP_NUM_THREADS=1) for worker in workers]
        time.sleep(12)
        assert all(process.poll() is None for process in processes)
        for worker in workers:
            worker.know(job.hosts)
        processes.insert(0, master.fork(project.folder, *options, OMP_NUM_THREADS=1))
        codes, printed = end(processes)
    assert codes == [0, 0, 0], printed
    assert f"/{TEST} (" in printed[0]


def test_a_worker_that_comes_late_is_waited_for_by_all(project, tmp_path):
    options = ("mnist.py", "--epochs", 1, "--timeout", 5, "--output-dir", tmp_path)
    with PyTorchJob(project.folder) as job:
        *early, late = job.hosts
        processes = [host.fork(project.folder, *options, OMP_NUM_THREADS=1) for host in early]
        assert processes[0].until("Started ")
        time.sleep(15)
        assert all(process.poll() is None for process in processes)
        processes.append(late.fork(project.folder, *options, OMP_NUM_THREADS=1))
        codes, printed = end(processes)
    assert codes == [0, 0, 0], printed
    assert f"/{TEST} (" in printed[0]


def test_a_link_that_comes_back_within_the_time_limit_does_no_harm(project, tmp_path):
    expected, lines = project.reference(3)
    with PyTorchJob(project.folder) as job:
        processes = job.fork("mnist.py", *OPTIONS, "--timeout", 60, "--output-dir", tmp_path)
        assert processes[0].until(lambda: processes[0].output.count("- Loss: ") > 3)
        job.hosts[1].cut()
        time.sleep(3)
        job.hosts[1].restore()
        codes, printed = end(processes)
    assert codes == [0, 0, 0]
    assert results(printed[0]) == lines
    assert weights(tmp_path) == expected


@pytest.mark.parametrize("whole_host", [False, True], ids=["worker", "host"])
def test_an_elastic_job_goes_on_by_itself_without_whom_it_lost(project, whole_host):
    printed = lose_elastic_worker(project, whole_host, random.Random(1))
    worlds = re.findall(r"Started by torchrun: rank 0 of (\d)", printed)
    assert worlds[0] == "3"
    assert worlds[-1] == ("2" if whole_host else "3")  # the agent of a worker starts it again


def test_an_elastic_job_grows_when_a_host_comes_back(project, tmp_path):
    changes = {"OMP_NUM_THREADS": 1, **OWN_STORE}
    options = ("mnist.py", "--epochs", 30, "--timeout", 10, "--resume", "--output-dir", tmp_path)
    with PyTorchJob(project.folder, 3, (1, 3, 3), processes_per_node="1") as job:
        first = [host.start(project.folder, *options, **changes) for host in job.hosts[:2]]

        def started(world_size):
            return lambda: any(f"rank 0 of {world_size}" in process.output for process in first)

        assert first[0].until(started(2), 120)
        late = job.hosts[2].start(project.folder, *options, **changes)
        assert first[0].until(started(3), 120)
        codes, printed = end([*first, late], 240)
    assert codes == [0, 0, 0], printed
    assert any(re.search(r"\b2 .*\b3 now", text) for text in printed)
