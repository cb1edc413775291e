"""The lines of Kubeflow's SDK in kubernetes/README do what the page says, with a stand-in for the cluster."""

import re

import pytest

from rig.api_server import ApiServer
from rig.manifests import check_schema, load, parse
from rig.project import ROOT

README = (ROOT / "kubernetes" / "README.md").read_text()
LINES, CLAIM = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
WITH_CLAIM = LINES.replace("client =", f"{CLAIM}client =")
LOG = "Started by torchrun: rank 0 of 2, device cpu\n\nTest accuracy: 9915/10000 ( 99.2%)\n"


@pytest.fixture
def run_lines(tmp_path, monkeypatch, capsys):
    """A function that runs lines of the page where jobs print LOG. Returns what they print, and the job."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def run(lines, **settings):
        with ApiServer(log=LOG, **settings) as cluster:
            file = str(cluster.kubeconfig(tmp_path))
            monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", file)
            exec(lines, {})
            assert cluster.changes == ["POST trainjobs", "DELETE trainjobs"]
            assert cluster.names("trainjobs") == []
            (job,) = cluster.created
            check_schema(job)
            return capsys.readouterr().out, job

    return run


# When the page looks after a job is over, one that has failed has taken along what it said.
@pytest.mark.parametrize("running", [2, 0], ids=["in-time", "when-all-is-over"])
@pytest.mark.parametrize(("end", "state"), [("Succeeded", "Complete"), ("Failed", "Failed")])
def test_the_job_of_the_page_is_followed_to_its_end_and_deleted(end, state, running, run_lines):
    output, job = run_lines(LINES, end=end, running=running)
    seen = "" if (end, running) == ("Failed", 0) else LOG
    assert output == f"{seen}{job['metadata']['name']} is {state}\n"
    manifest, trainer = load(ROOT / "kubernetes" / "trainjob-mnist.yaml"), job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"]["name"] == manifest["spec"]["runtimeRef"]["name"]
    assert (trainer["image"], trainer["numNodes"]) == (manifest["spec"]["trainer"]["image"], 2)
    resources = {"cpu": "1", "memory": "3Gi"}  # one process in a pod
    assert trainer["resourcesPerNode"] == {"requests": resources, "limits": resources}
    assert "command" not in trainer and "runtimePatches" not in job["spec"]
    assert vars(parse(trainer["args"])) == vars(parse(["--epochs", "5", "--seed", "7"]))


def test_with_the_claim_the_model_outlives_the_pods(run_lines):
    output, job = run_lines(WITH_CLAIM)
    assert output.endswith(" is Complete\n")
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]["template"]["spec"]
    check_schema({"apiVersion": "v1", "kind": "Pod", "spec": spec})
    (volume,), (container,) = spec["volumes"], spec["containers"]
    (mount,) = container["volumeMounts"]
    claim = load(ROOT / "kubernetes" / "volume-claim.yaml")["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim
    assert volume["name"] == mount["name"]
    assert spec["securityContext"] == {"fsGroup": 1000}
    args = parse(job["spec"]["trainer"]["args"])
    assert args.output_dir.startswith(f"{mount['mountPath']}/")
    assert (args.epochs, args.seed, args.resume, args.save_model) == (5, 7, True, True)
