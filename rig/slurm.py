"""A real Slurm: a head node with the controller, and nodes, each a network namespace with a name of its own.

    with Slurm(folder) as slurm:
        job = slurm.sbatch(project, "slurm/mnist.sbatch", "--epochs", 2)
        assert job.ended() == ("COMPLETED", 0), job.log
        slurm.nodes["node2"].kill()

Needs root, iproute2 and Debian's packages slurmctld, slurmd, slurm-client and munge. Nothing outside `folder`
and the namespaces is touched: several of them can run on one machine.
"""

import os
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil

from rig.hosts import Network, Process, ip, need_hosts, new_name
from rig.processes import clean_environment, need

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
# Slurm believes what it is told about them. The GPUs are a pretence: it only counts their files.
NODES = dict.fromkeys(("node1", "node2", "node3", "node4"), "CPUs=1")
NODES |= dict.fromkeys(("wide1", "wide2"), "CPUs=2")
NODES["gpu1"] = "CPUs=2 Gres=gpu:2"
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits until its credentials have expired, by default for two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldDebug=debug2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
# A lost node is noticed ten times as soon as on other clusters.
SlurmdTimeout=8
MessageTimeout=5
KillWait=20
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=node[1-4] Default=YES
PartitionName=wide Nodes=wide[1-2] GraceTime=20
PartitionName=urgent Nodes=wide[1-2] PriorityTier=2
PartitionName=crowded Nodes=wide[1-2] OverSubscribe=FORCE:2
PartitionName=gpus Nodes=gpu1
"""


def need_slurm():
    """Skip the test where Slurm cannot be started, and say what is missing."""
    need_hosts()
    for program, package in PACKAGES.items():
        need(program, package)


class Slurm(Network):
    """A cluster: `head`, from which jobs are submitted, and `nodes`, by their names."""

    def __init__(self, folder):
        self.folder, name = Path(folder), new_name()
        super().__init__(name, [SimpleNamespace(name=f"{name}-{node}", service=node, variables={})
                                for node in ("head", *NODES)])  # fmt: skip
        self.head, *nodes = self.hosts
        self.nodes, self.daemons = {node.service: node for node in nodes}, []

    def __enter__(self):
        super().__enter__()
        try:
            self.configure()
            self.daemons.append(self.serve("munge", "munged", "--foreground", "--force", *(
                f"--{what}={self.folder}/munge.{what.split('-')[0]}"
                for what in ("socket", "key-file", "pid-file", "seed-file", "log-file")
            )))  # fmt: skip
            self.wait(lambda: (self.folder / "munge.socket").exists())
            self.daemons.append(self.serve("head", *self.on(self.head, "slurmctld", "-D")))
            for name in self.nodes:
                self.start_node(name)
            self.wait(lambda: set(self("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == set(NODES))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error):
        for host in self.hosts:
            host.kill()
        for daemon in self.daemons:
            daemon.kill_all()
        return super().__exit__(*error)

    def configure(self):
        """Write what Slurm and munge need to know."""
        self.folder.chmod(0o755)
        addresses = {name: node.address for name, node in self.nodes.items()}
        nodes = [f"NodeName={n} NodeAddr={addresses[n]} RealMemory=4000 {has}" for n, has in NODES.items()]
        text = CONFIGURATION.format(folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("NodeName=gpu1 Name=gpu File=/dev/tty[1-2]\n")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "state").mkdir()

    def serve(self, name, *command):
        """Start a daemon. It prints to a file of that name."""
        environment = clean_environment(SLURM_CONF=self.folder / "slurm.conf")
        return Process(command, self.folder / f"{name}.log", env=environment, cwd=self.folder)

    def on(self, host, *command):
        """Return a command that runs `command` on a host."""
        # Not `ip netns exec`: it also mounts /sys anew, without the control groups that slurmd looks for.
        script = 'mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf; '
        script += 'hostname "$2"; shift 2; exec "$@"'
        inside = ["nsenter", f"--net=/run/netns/{host.name}", "unshare", "--uts", "--mount"]
        return [*inside, "sh", "-c", script, "sh", host.etc, host.service, *command]

    def start_node(self, name):
        """Switch a node on."""
        node = self.nodes[name]
        self.daemons.append(self.serve(name, *self.on(node, "slurmd", "-D", "-N", name)))

    def __call__(self, *command, folder=None, **changes):
        """Run a command on the head node, and return what it prints."""
        environment = clean_environment(SLURM_CONF=self.folder / "slurm.conf", **changes)
        done = subprocess.run(
            [str(word) for word in self.on(self.head, *command)],
            cwd=folder or self.folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait(self, happened, timeout=120):
        """Wait until `happened()`."""
        limit = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < limit, f"waited {timeout} s"
            time.sleep(0.1)

    def sbatch(self, folder, *words, **changes):
        """Submit a job in `folder`, as a user would. Returns it."""
        printed = self("sbatch", *words, folder=folder, **changes)
        return Job(self, folder, int(re.search(r"Submitted batch job (\d+)", printed)[1]))


class Job:
    """A job, or one of an array, and what it prints."""

    def __init__(self, slurm, folder, number):
        self.slurm, self.folder, self.number = slurm, Path(folder), number

    def shown(self, name):
        """Return a value that `scontrol show job` gives, such as JobState."""
        return re.search(rf"\b{name}=(\S*)", self.slurm("scontrol", "show", "job", self.number))[1]

    @property
    def log(self):
        path = self.folder / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def printed(self, text, starts=1, timeout=120):
        """Wait until the job prints `text` after so many starts."""
        self.slurm.wait(lambda: text in (self.log.split("Started by ", starts)[starts:] or [""])[0], timeout)

    def trainers(self, node):
        """Return the job's trainers that run on a node, as psutil's processes."""
        found, job = [], ("SLURM_JOB_ID", str(self.number))
        for pid in ip("netns", "pids", self.slurm.nodes[node].name).split():
            with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
                process = psutil.Process(int(pid))
                if process.cmdline()[1:3] == ["mnist.py", "--resume"] and job in process.environ().items():
                    found.append(process)
        return found

    def hold(self, node, text, starts=1):
        """Suspend the job's trainers on a node once it prints `text`: it cannot end before the disturbance.

        Slurm wakes whom it sends a signal to stop.
        """
        self.printed(text, starts)
        held = self.trainers(node)
        for trainer in held:
            trainer.suspend()
        assert held, f"ended too early; printed:\n{self.log}"
        return held

    def ended(self, timeout=120):
        """Wait for the end. Returns the state, such as COMPLETED, and the exit code."""
        active = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "REQUEUED")
        self.slurm.wait(lambda: self.shown("JobState") not in active, timeout)
        return self.shown("JobState"), int(self.shown("ExitCode").split(":")[0])
