"""A replay of a cluster: the pods of a manifest run as its operator and the kubelets would run them.

    with Replay(load("pytorchjob-mnist.yaml"), project) as job:
        job.run_until("Epoch: 2 ")
        job.pods[1].kill()
        assert job.run() == "Succeeded"

Each pod is a host of hosts.py. Its container has the file system, the user, the rights, the memory and the
environment that manifest, Dockerfile and operator give it, and is run by runc, as in most clusters. It is no
cluster: nothing is scheduled or pulled. CPU limits and GPUs are left out. Needs root, iproute2 and runc.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time

from rig.hosts import Network, Process, new_name
from rig.manifests import quantity
from rig.operators import pods_of, state_of
from rig.project import ROOT

RESTART_AFTER = 1  # seconds; a kubelet waits longer each time, from 10 seconds to 5 minutes
TIDY_AFTER = 2  # seconds, until the operator hears of the end: by then the workers have left by themselves


def dockerfile(instruction):
    """Return what such instructions of the Dockerfile say; the last are those of the trainer's image."""
    return re.findall(rf"^{instruction} (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


class Replay(Network):
    """The pods of a manifest, on their hosts; `claims` is a folder with a folder for each volume claim."""

    def __init__(self, manifest, project):
        self.manifest = manifest | {"metadata": manifest["metadata"] | {"name": new_name()}}
        self.folder = project.parent / self.manifest["metadata"]["name"]
        pods = pods_of(self.manifest)
        super().__init__(self.manifest["metadata"]["name"], pods)
        self.image = make_image(self.folder / "image", project)
        self.pods = [RunningPod(self, *both) for both in zip(pods, self.hosts, strict=True)]

    def __enter__(self):
        super().__enter__()
        for pod in self.pods:
            pod.start()
        return self

    def __exit__(self, *error):
        for pod in self.pods:
            pod.kill()
        return super().__exit__(*error)

    def claim(self, name="mnist-output"):
        """Return the folder of a volume claim."""
        return self.folder / "claims" / name

    @property
    def log(self):
        """All that the pods have printed, pod by pod."""
        return "".join(pod.log for pod in self.pods)

    @property
    def restarts(self):
        return sum(pod.restarts for pod in self.pods)

    @property
    def state(self):
        succeeded = [pod.process.poll() == 0 for pod in self.pods]
        return state_of(self.manifest, succeeded, [pod.restarts for pod in self.pods])

    def run_until(self, printed, timeout=300):
        """Go on until a text is printed, or the job has come to its end. Returns its state."""
        limit = time.monotonic() + timeout
        while self.state == "Running" and printed not in self.log:
            assert time.monotonic() < limit, f"waited {timeout} s for {printed!r}:\n{self.log}"
            time.sleep(0.02)
            for pod in self.pods:
                pod.restart_if_needed()
        return self.state

    def run(self, timeout=600):
        """Go on to the end of the job, and tidy up as its cleanPodPolicy says. Returns the job's state."""
        state = self.run_until("\0", timeout)
        if self.manifest["spec"].get("runPolicy", {}).get("cleanPodPolicy", "None") != "None":
            time.sleep(TIDY_AFTER)
            for pod in self.pods:
                pod.process.terminate()  # runc hands it on
            for pod in self.pods:
                pod.wait_or_kill()
        return state


def make_image(folder, project):
    """Make a folder that has what the image has: the small project's trainer and digits."""
    app = folder / dockerfile("WORKDIR")[-1].strip("/")
    shutil.copytree(project / "datasets", app / "datasets")
    shutil.copy(project / "mnist.py", app)
    return folder


class RunningPod:
    """A pod on its host: volumes that last as long as it does, and a container that may be restarted."""

    def __init__(self, job, pod, host):
        self.job, self.pod, self.host, self.name = job, pod, host, pod.name
        self.folder = job.folder / pod.name
        self.processes = []

    @property
    def process(self):
        return self.processes[-1]

    @property
    def log(self):
        """All that its containers have printed."""
        return "".join(process.output for process in self.processes)

    @property
    def restarts(self):
        return len(self.processes) - 1

    def restart_if_needed(self):
        """Restart the container in place, as a kubelet does: the pods' restartPolicy is OnFailure."""
        if self.process.poll():
            self.ended = self.ended or time.monotonic()
            if time.monotonic() > self.ended + RESTART_AFTER:
                self.start()

    def kill(self):
        """Kill all that runs in the pod, as a power cut would."""
        while self.process.poll() is None:  # runc may just be about to start it
            self.host.kill()
            time.sleep(0.02)

    def wait_or_kill(self):
        """Give the container its grace period to leave, and kill it then."""
        try:
            self.process.wait(self.pod.spec["terminationGracePeriodSeconds"])
        except subprocess.TimeoutExpired:
            self.kill()

    def start(self):
        """Start the container."""
        self.ended = None
        bundle = self.folder / f"container-{len(self.processes)}"
        bundle.mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps(self.config()))
        name = f"{self.name}-{secrets.token_hex(2)}"
        command = ["runc", "--root", self.job.folder / "runc", "run", "--bundle", bundle, name]
        self.processes.append(Process(command, bundle / "log"))

    def config(self):
        """Return the container's description for runc."""
        pod, container, safety = self.pod.spec, self.pod.container, self.pod.container["securityContext"]
        limits = container["resources"]["limits"]
        user = pod["securityContext"]
        entry_point = json.loads(dockerfile("ENTRYPOINT")[-1])  # its init is looked for beside this Python
        arguments = container.get("command", entry_point) + container.get("args", [])
        namespaces = [{"type": kind} for kind in ("mount", "pid", "uts", "ipc")]
        namespaces.append({"type": "network", "path": f"/run/netns/{self.host.name}"})
        return {
            "ociVersion": "1.0.2",
            "hostname": self.name,
            "root": {"path": str(self.job.image), "readonly": safety["readOnlyRootFilesystem"]},
            "process": {
                "args": arguments,
                "cwd": dockerfile("WORKDIR")[-1],
                "env": [f"{name}={value}" for name, value in self.environment(limits).items()],
                "user": {"uid": user["runAsUser"], "gid": 0, "additionalGids": [user["fsGroup"]]},
                "noNewPrivileges": not safety["allowPrivilegeEscalation"],
                "capabilities": {},  # all are dropped
            },
            "mounts": [*self.system_mounts(), *self.volume_mounts(), *self.python_mounts()],
            "linux": {
                "namespaces": namespaces,
                "resources": {"memory": {"limit": int(quantity(limits["memory"]))}},
            },
        }

    def environment(self, limits):
        """Return the image's variables, then the manifest's, then the operator's, which win."""
        variables = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "HOSTNAME": self.name}
        variables |= dict(word.split("=") for line in dockerfile("ENV") for word in line.split())
        (variables["TRAINER"],) = (line[8:] for line in dockerfile("ARG") if line.startswith("TRAINER="))
        for variable in self.pod.container.get("env", []):
            source = variable.get("valueFrom", {}).get("resourceFieldRef", {}).get("resource")
            assert source in (None, "limits.cpu"), f"the replay does not know {source}"
            variables[variable["name"]] = variable["value"] if source is None else str(limits["cpu"])
        return variables | self.pod.variables

    def system_mounts(self):
        """Yield what every container has."""
        yield {"destination": "/proc", "type": "proc", "source": "proc"}
        yield {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}
        yield {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
        shared = ["nosuid", "nodev", "mode=1777", "size=64m"]
        yield {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": shared}
        for file in self.host.etc.iterdir():
            yield bind(file, f"/etc/{file.name}")

    def python_mounts(self):
        """Yield this machine's Python, which stands for the image's. Last, for it may lie below /tmp."""
        pythons = {sys.prefix, os.path.realpath(sys.prefix), sys.base_prefix}
        for folder in ("/usr", "/bin", "/lib", "/lib64", *sorted(pythons)):
            if os.path.exists(folder):
                yield bind(folder, folder)

    def volume_mounts(self):
        """Yield the mounts that the manifest asks for; the group of the pod may write to its volumes."""
        volumes = {volume["name"]: volume for volume in self.pod.spec["volumes"]}
        group = self.pod.spec["securityContext"]["fsGroup"]
        for mount in self.pod.container["volumeMounts"]:
            claim = volumes[mount["name"]].get("persistentVolumeClaim")
            folder = self.job.claim(claim["claimName"]) if claim else self.folder / mount["name"]
            folder.mkdir(parents=True, exist_ok=True)
            os.chown(folder, 0, group)
            folder.chmod(0o2775 if claim else 0o2777)
            yield bind(folder, mount["mountPath"], "rw")


def bind(source, destination, how="ro"):
    options = ["rbind", how]
    return {"destination": str(destination), "type": "bind", "source": str(source), "options": options}
