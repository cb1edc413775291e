"""The guide to clouds. Stand-ins get its commands, and the real programs judge what the stand-ins got."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from rig.manifests import check
from rig.processes import free_port, need
from rig.project import ROOT

GUIDE = (ROOT / "kubernetes" / "clouds.md").read_text()
BLOCKS = re.findall(r"^([^\n]*)\n```bash\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
AWS = ROOT / ".venv" / "bin" / "aws"
ACCOUNT = "123456789012"  # what every stand-in prints
STAND_IN = f"""#!/bin/sh
exec '{sys.executable}' -ISc '
import json, os, sys, tempfile
with tempfile.NamedTemporaryFile("w", dir=os.environ["CALLS"], delete=False) as file:
    json.dump([os.path.basename(sys.argv[1]), sys.argv[2:], sys.stdin.read()], file)
print({ACCOUNT})' "$0" "$@"
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """What bash makes of all blocks: the name, the arguments and the standard input of each program."""
    programs, folder = tmp_path_factory.mktemp("programs"), tmp_path_factory.mktemp("calls")
    for name in ("aws", "docker", "eksctl", "kubectl"):
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    (programs / "sed").symlink_to(shutil.which("sed"))  # and bash finds nothing else
    command = [shutil.which("bash"), "-euo", "pipefail", "-c", "".join(block for _, block in BLOCKS)]
    environment = {"PATH": str(programs), "CALLS": str(folder)}
    run = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert (run.returncode, run.stderr) == (0, b"")
    return [json.loads(file.read_text()) for file in folder.iterdir()]


def given(calls, program):
    """Return the arguments of every call of a program; there must be one."""
    found = [arguments for name, arguments, _ in calls if name == program]
    assert found, program
    return found


def test_every_block_says_what_it_needs():
    assert len(BLOCKS) == GUIDE.count("```bash") > 0
    assert [block for above, block in BLOCKS if not re.fullmatch("<!-- needs .+ -->", above)] == []


# What `aws` does, for one command after the other: it takes its time to start.
AS_AWS = """
import json, sys
from awscli.clidriver import create_clidriver
for command in json.load(sys.stdin):
    print("$ aws", *command, file=sys.stderr)
    create_clidriver().main(command)
"""


def test_the_aws_command_line_gets_as_far_as_the_network_with_every_command(calls, tmp_path):
    need(AWS, "awscli, as make does")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AWS_DEFAULT_REGION": "eu-central-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "none", "AWS_MAX_ATTEMPTS": "1"}
    environment |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    commands = given(calls, "aws")
    python = [AWS.resolve().with_name("python"), "-c", AS_AWS]
    run = subprocess.run(python, input=json.dumps(commands), env=environment, capture_output=True, text=True)
    assert run.stderr.count("Could not connect to the endpoint URL") == len(commands), run.stderr


def test_the_guide_names_the_version_of_the_aws_command_line():
    pinned = re.search(r"awscli==(\S+)", (ROOT / "Makefile").read_text())[1]
    assert f"AWS command line ({pinned})" in GUIDE


def test_kubectl_knows_every_flag(calls):
    need("kubectl", "the package kubernetes-client")
    for command in given(calls, "kubectl"):
        run = subprocess.run(["kubectl", *command, "--help"], capture_output=True, text=True)
        assert run.returncode == 0, (command, run.stderr)


def test_every_file_that_kubectl_is_given_exists(calls):
    commands = [command for command in given(calls, "kubectl") if command[0] != "logs"]
    files = {c[i + 1] for c in commands for i, flag in enumerate(c) if flag == "-f"} - {"-"}
    assert files and [file for file in files if not (ROOT / file).is_file()] == []


def test_every_manifest_in_a_pipe_is_right_and_has_the_image_that_is_pushed(calls):
    manifests = [yaml.safe_load(text) for program, _, text in calls if program == "kubectl" and text]
    names = sorted(manifest["metadata"]["name"] for manifest in manifests)
    assert names == ["fetch", "gp3", "pod-mnist", "pytorchjob-mnist"]
    for manifest in manifests:
        check(manifest)
    (pushed,) = (command[1] for command in given(calls, "docker") if command[0] == "push")
    assert pushed.startswith(f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com/")
    assert set(re.findall(r'"image": "([^"]+)"', json.dumps(manifests))) == {pushed}
