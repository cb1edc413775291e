"""The guide to containers, and how its commands are run."""

import os
import re
import subprocess

from rig.project import ROOT

GUIDE = re.split(r"^## (.+)\n", (ROOT / "docs/containers.md").read_text(), flags=re.M)
CHAPTERS = dict(zip(GUIDE[1::2], GUIDE[2::2], strict=True))  # by their titles


def with_more(program, more):
    """Return a script that runs `program`, and adds words to its commands: {command: words}."""
    cases = "".join(
        f'    {command}) shift; set -- {command} {words} "$@" ;;\n' for command, words in more.items()
    )
    return f'case "$1" in\n{cases}esac\nexec {program} "$@"\n'


def run_chapter(title, folder, bin, environment, change=("", ""), **person):
    """Run a chapter's commands in `folder`, one block after the other, and return all that they print.

    They find first what is in `bin`, {program: shell script}, where they are told what is different here.
    """
    programs = folder / ".bin"
    programs.mkdir(exist_ok=True)
    for name, script in bin.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}")
    for path in (programs, *programs.iterdir()):
        path.chmod(0o755)
    environment = environment | {"PATH": f"{programs}:{os.environ['PATH']}"}
    log = ""
    # A block that needs what is not here has a comment right above it.
    for block in re.findall(r"(?<!-->\n)```bash\n(.*?)^```$", CHAPTERS[title], re.M | re.S):
        command = ["bash", "-euxo", "pipefail", "-c", block.replace(*change)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 1200}
        shell = subprocess.run(command, cwd=folder, env=environment, **options, **person)
        assert shell.returncode == 0, shell.stdout
        log += shell.stdout
    return log
