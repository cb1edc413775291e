"""What becomes of a job on several hosts that loses one, waits for a late one, or is cut off from one.

How an operator then starts the pods again is in test_manifests_run.py.
"""

import random
import signal
import time

import pytest

from rig.faults import ELASTIC, lose_worker
from rig.hosts import PyTorchJob, end
from rig.training import TEST, TIMEOUT, slowed

pytestmark = pytest.mark.usefixtures("hosts")


@pytest.mark.parametrize("fault", ["kill", "link", "stop"])
def test_who_loses_a_worker_leaves_in_time_and_names_the_place_where_they_met(project, fault):
    lose_worker(project, fault, random.Random(fault))


def test_whoever_never_appears_is_missed_with_the_place_where_they_were_to_meet(project, tmp_path):
    """No master: its name is unknown, no link goes there, or it runs no trainer. And no second worker."""
    with PyTorchJob(project.folder, workers=3) as headless, PyTorchJob(project.folder) as incomplete:
        _, nameless, cut_off, alone = headless.hosts
        nameless.know([nameless])
        cut_off.cut()
        hosts = [nameless, cut_off, alone, *incomplete.hosts[:2]]
        options = ("mnist.py", "--timeout", 1, "--output-dir", tmp_path)
        processes = [host.fork(project.folder, *options) for host in hosts]
        time.sleep(5)
        assert all(process.poll() is None for process in processes)  # they have patience
        # 10 x --timeout. Should that end a moment early, PyTorch pauses and tries again.
        codes, printed = end(processes, 10 + 30 + 10)
    assert codes == [1] * 5
    places = [(rank, 4, headless) for rank in (1, 2, 3)] + [(rank, 3, incomplete) for rank in (0, 1)]
    for (rank, world_size, job), text in zip(places, printed, strict=True):
        place = f"{job.hosts[0].name}:23456"
        assert f"mnist.py: rank {rank} of {world_size} (meeting at {place})" in text
        assert text.count(f"Waiting for {world_size - 1} other processes at {place}") == 1
        assert "Traceback" not in text
    assert "2/3" in printed[3]  # who has come


def test_a_master_and_a_worker_that_come_late_are_waited_for_beyond_the_time_limit(project, tmp_path):
    """The master's name comes late, too."""
    options = ("mnist.py", "--epochs", 1, "--timeout", 5, "--output-dir", tmp_path)
    with PyTorchJob(project.folder) as job:
        master, early, late = job.hosts
        early.know([early])
        first = early.fork(project.folder, *options, OMP_NUM_THREADS=1)
        assert first.until("Waiting for 2 other")  # which it says after five seconds
        early.know(job.hosts)
        second = master.fork(project.folder, *options, OMP_NUM_THREADS=1)
        assert second.until("Waiting for 2 other")
        time.sleep(1)
        processes = [second, first, late.fork(project.folder, *options, OMP_NUM_THREADS=1)]
        codes, printed = end(processes)
    assert codes == [0, 0, 0], printed
    assert f"/{TEST} (" in printed[0]


def test_an_elastic_job_survives_a_lost_process_and_a_lost_host_and_grows_again(project, tmp_path):
    # It trains for a minute: slowly, so that others have the processors.
    (project.folder / "slow.py").write_text(slowed(0.1))
    options = ("slow.py", "--epochs", 9999, "--timeout", TIMEOUT, "--log-interval", 1, "--resume")
    options += ("--checkpoint-interval", 2, "--output-dir", tmp_path)
    with PyTorchJob(project.folder, 3, (1, 3, 9), processes_per_node="1") as job:
        agents = job.fork(*options, **ELASTIC)

        def until(text, times=1):
            def printed():
                return sum(agent.output.count(text) for agent in agents) >= times

            assert agents[0].until(printed, 120), f"waited for {text}"

        until("Started by torchrun: rank 0 of 3")
        until("- Loss: ", 3)  # by then there is a checkpoint
        agents[1].family()[-1].kill()
        until("Started by torchrun: rank 0 of 3", 2)  # its agent starts it again
        until("Resuming in epoch")
        job.hosts[2].kill()
        assert agents[2].end(5)[0] == -9
        until("3 process(es) before, 2 now")
        agents[2] = job.hosts[2].fork(project.folder, *options, OMP_NUM_THREADS=1, **ELASTIC)
        until("2 process(es) before, 3 now")
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
        codes, printed = end(agents)
    assert codes == [143, 143, 143], printed
