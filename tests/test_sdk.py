"""The lines of Kubeflow's SDK in kubernetes/README do what the page says, with a stand-in for the cluster."""

import re

import pytest

from rig.api_server import ApiServer
from rig.manifests import check_schema, load, parse
from rig.processes import run
from rig.project import ROOT

README = (ROOT / "kubernetes" / "README.md").read_text()
LINES, CLAIM = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
WITH_CLAIM = LINES.replace("client =", f"{CLAIM}client =")
LOG = "Started by torchrun: rank 0 of 2, device cpu\n\nTest accuracy: 9915/10000 ( 99.2%)\n"


def run_lines(lines, folder, **settings):
    """Run lines of the page where jobs print LOG. Returns all that they print, and the job they create."""
    with ApiServer(log=LOG, **settings) as cluster:
        code, output = run(folder, "-c", lines, KUBECONFIG=cluster.kubeconfig(folder))
        assert code == 0, output
        assert cluster.changes == ["POST trainjobs", "DELETE trainjobs"]
        assert cluster.names("trainjobs") == []
        (job,) = cluster.created
        check_schema(job)
        return output, job


@pytest.mark.parametrize("running", [2, 0], ids=["in-time", "when-all-is-over"])
def test_the_job_of_the_page_is_followed_to_its_end_and_deleted(running, tmp_path):
    output, job = run_lines(LINES, tmp_path, running=running)
    assert output.endswith(f"{LOG}{job['metadata']['name']} is Complete\n") and output.count(LOG) == 1
    manifest, trainer = load(ROOT / "kubernetes" / "trainjob-mnist.yaml"), job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"]["name"] == manifest["spec"]["runtimeRef"]["name"]
    assert (trainer["image"], trainer["numNodes"]) == (manifest["spec"]["trainer"]["image"], 2)
    resources = {"cpu": "1", "memory": "3Gi"}  # one process in a pod
    assert trainer["resourcesPerNode"] == {"requests": resources, "limits": resources}
    assert "command" not in trainer and "runtimePatches" not in job["spec"]
    assert vars(parse(trainer["args"])) == vars(parse(["--epochs", "5", "--seed", "7"]))


def test_with_the_claim_the_model_outlives_the_pods(tmp_path):
    output, job = run_lines(WITH_CLAIM, tmp_path)
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


@pytest.mark.parametrize(("running", "seen"), [(2, LOG), (0, "")], ids=["in-time", "when-all-is-over"])
def test_of_a_job_that_fails_the_page_shows_what_it_said_while_it_ran(running, seen, tmp_path):
    output, job = run_lines(LINES, tmp_path, end="Failed", running=running)
    assert output.endswith(f"{seen}{job['metadata']['name']} is Failed\n")
    assert output.count(LOG) == (seen == LOG)
