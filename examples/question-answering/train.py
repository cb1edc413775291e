"""Fine-tune a transformer to answer questions about a text: an encoder-decoder such as T5, or a decoder.

    python train.py [--model DIR]                         google/flan-t5-small, or a model in a folder
    torchrun --standalone --nproc-per-node 2 train.py     in two processes on this machine
    python train.py --ask QUESTION --context TEXT         print the answer of the model in output/model

Exit codes: 0 done; 1 failed, and one line says why; 2 wrong usage; 143 stopped by SIGTERM or Ctrl-C while
training, after saving a checkpoint from which --resume continues.
"""

import argparse
import atexit
import json
import logging
import math
import os
import shutil
import signal
import sys
import zlib
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object, reduce
from torchmetrics.functional.text import squad
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

FIELDS = ("context", "question", "answer")
PROMPT = "{context}\nQuestion: {question}\nAnswer:"
LONGEST = 32  # tokens in an answer of the model
MAIN = os.environ.get("RANK", "0") == "0"  # if there are several processes, only this one prints and writes
say = tqdm.write if MAIN else lambda line: None  # above the progress bar, if there is one


def read(path):
    """Read questions from JSON lines. Returns dicts of FIELDS and "source". Raises OSError, ValueError."""
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            question = json.loads(line)
            missing = [field for field in FIELDS if not question.get(field, "").encode().strip()]
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is not an object of texts in JSON ({error})") from error
        if missing:
            raise ValueError(f"{path}, line {number} has no {missing[0]}")
        questions.append(question | {"source": f"{path}, line {number}"})
    if not questions:
        raise ValueError(f"{path} is empty: it needs lines with {', '.join(FIELDS)}")
    return questions


def load(name):
    """Return a model in float32 and its tokenizer, from a folder or the hub. Raises OSError."""
    try:
        if not Path(name).exists() and Path(f"{name}.old").exists():  # `save` was killed between its renames
            name = f"{name}.old"
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if "question" not in tokenizer.decode(tokenizer(PROMPT).input_ids).lower():
            raise ValueError("its tokenizer is missing or empty")
        return kind.from_pretrained(name, dtype=torch.float32), tokenizer
    except Exception as error:  # the library raises many kinds
        advice = "no training has written it (--model DIR), and it does not come from the hub"
        raise OSError(f"cannot load the model {name}: {advice} ({error})") from error


def encode(question, model, tokenizer):
    """Return a question's tokens for training. Raises ValueError if they are more than the model can take."""
    prompt, two = tokenizer(PROMPT.format(**question)).input_ids, model.config.is_encoder_decoder
    text = question["answer"] if two else " " + question["answer"]
    answer = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    room = max(len(answer), LONGEST)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    needed = max(len(prompt), room) if two else len(prompt) + room
    if 0 < limit < needed:  # T5 has no limit
        raise ValueError(f"{question['source']} is too long: {needed} tokens, and the model takes {limit}")
    if two:
        return {"input_ids": prompt, "labels": answer}
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}  # -100 hides from the loss


def answer(questions, model, tokenizer):
    """Return the model's answers: the most probable token at each step, LONGEST at most."""
    # A decoder adds words at the right, so its texts are padded at the left. Training does not need that.
    side = "right" if model.config.is_encoder_decoder else "left"
    texts = [PROMPT.format(**question) for question in questions]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt").to(model.device)
    prompt, how = batch.input_ids, {"max_new_tokens": LONGEST, "do_sample": False, "use_cache": True}
    tokens = model.eval().generate(prompt, attention_mask=batch.attention_mask, **how)
    tokens = tokens if model.config.is_encoder_decoder else tokens[:, prompt.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class Stop(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):
    """Stop if any process is asked to. The library then saves. Each checkpoint contains `flags`."""

    def __init__(self, flags):
        self.flags, self.asked, self.agreed = flags, False, False

    def state(self):
        return {"args": {"flags": self.flags}, "attributes": {}}

    def on_epoch_begin(self, *_, **__):
        for number in (signal.SIGTERM, signal.SIGINT):  # Kubernetes sends SIGTERM, and SIGKILL 30 s later
            signal.signal(number, lambda *_: setattr(self, "asked", True))

    def on_step_end(self, args, state, control, **_):
        self.agreed = bool(reduce(torch.tensor(float(self.asked), device=args.device), "sum"))
        control.should_training_stop |= self.agreed

    def on_save(self, args, state, *_, **__):
        """Delete all checkpoints but the newest."""  # the library would also delete a folder checkpoint-foo
        for path in checkpoints(args.output_dir) if MAIN else ():
            if path.name != f"checkpoint-{state.global_step}":
                shutil.rmtree(path)

    on_train_begin = on_save


class Trainer(transformers.Trainer):
    """The library's trainer, but measured by its answers to `eval_dataset`. Its `stop` is a Stop."""

    def log(self, logs, *_):
        """Keep the figures for the checkpoints, and print none. Raises FloatingPointError."""
        if not math.isfinite(loss := logs.get("loss", 0)):
            raise FloatingPointError(f"the loss is {loss}: try a smaller --lr")
        self.state.log_history.append({"epoch": self.state.epoch} | logs)

    def evaluate(self, *_, **__):
        """Log exact match and F1 after an epoch, unless the run that is resumed has already done so."""
        epoch, figures = self.state.epoch or 0, [entry for entry in self.state.log_history if "f1" in entry]
        if epoch % 1 or any(entry["epoch"] == epoch for entry in figures):
            return
        size, rank, world, mine = self.args.eval_batch_size, self.args.process_index, self.args.world_size, []
        batches = [self.eval_dataset[at : at + size] for at in range(0, len(self.eval_dataset), size)]
        for turn in range(0, len(batches), world):  # so batches do not depend on the number of processes
            self.stop.on_step_end(self.args, self.state, self.control)
            if self.stop.agreed:  # the library saves, and --resume will measure
                return
            for batch in batches[turn + rank : turn + rank + 1]:  # in the last turn, some get none
                with self.accelerator.autocast():
                    mine.append((turn + rank, answer(batch, self.model, self.processing_class)))
        answers = [text for _, texts in sorted(gather_object(mine)) for text in texts]
        given = [{"id": str(i), "prediction_text": text} for i, text in enumerate(answers)]
        wanted = [{"answer_start": [0], "text": [question["answer"]]} for question in self.eval_dataset]
        scores = squad(given, [{"id": str(i), "answers": answer} for i, answer in enumerate(wanted)])
        new = {"epoch": int(epoch)} | {name: value.item() for name, value in scores.items()}
        exact, f1 = new["exact_match"], new["f1"]
        self.log(new)
        best = all(f1 >= entry["f1"] for entry in figures)
        if MAIN:  # all or nothing
            if best:
                save(self.model, self.processing_class, Path(self.args.output_dir, "model"))
            temporary = Path(self.args.output_dir, "metrics.jsonl.tmp")
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in [*figures, new]))
            os.replace(temporary, temporary.with_suffix(""))
        say(f"Epoch {epoch:.0f}: exact match {exact:.0f} %, F1 {f1:.0f}{' (kept)' * best}")


def checkpoints(folder):
    """Return the folders of checkpoints in a folder, the newest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdecimal() and p.is_dir()]
    return sorted(found, key=lambda path: -int(path.name[11:]))


def find_checkpoint(folder, flags):
    """Return the newest complete checkpoint, or None. Raises ValueError if it belongs to another run."""
    found = checkpoints(folder)
    if len(set(gather_object([str(found)]))) > 1:
        raise ValueError(f"not all processes see the same checkpoint in {folder}: all pods must mount it")
    for path in found:
        try:
            state = json.loads((path / "trainer_state.json").read_bytes())  # this file is written last
            theirs = state["stateful_callbacks"]["Stop"]["args"]["flags"]
        except (FileNotFoundError, LookupError, TypeError, ValueError):  # cut off, or of another program
            continue
        pairs = [(name, str(theirs.get(name)), str(flags[name])) for name in flags]
        wrong = [f"{name} {old}, not {new}" for name, old, new in pairs if old.split()[-1] != new.split()[-1]]
        if wrong:
            raise ValueError(f"{path} is of another run, with {', '.join(wrong)}")
        say(f"Resuming from {path}")
        return str(path)
    say(f"No checkpoint in {folder} yet: starting afresh")


def save(model, tokenizer, folder):
    """Write a model's folder, readable by everyone. If it is killed, `load` finds the folder of before."""
    temporary, old = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    use_cache, model.config.use_cache = model.config.use_cache, True  # the library's training switches it off
    model.save_pretrained(temporary)
    model.config.use_cache = use_cache
    tokenizer.save_pretrained(temporary)
    for path in temporary.iterdir():
        path.chmod(0o644)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def train(args):
    """Fine-tune a model, measure it after each epoch, and save it. Raises OSError, ValueError and others."""
    training, validation = (read(Path(args.data_dir, name)) for name in ("train.jsonl", "validation.jsonl"))
    (folder := Path(args.output_dir)).mkdir(parents=True, exist_ok=True)
    if Path(args.model).resolve() == (result := (folder / "model").resolve()):
        raise ValueError(f"this training replaces its own --model {args.model}: choose another --output-dir")
    say(f"Loading {args.model}")
    transformers.set_seed(args.seed)  # for weights that a model lacks
    model, tokenizer = load(args.model)
    encoded = [encode(question, model, tokenizer) for question in training + validation][: len(training)]
    cpu = args.no_cuda or not torch.accelerator.is_available()
    fast = torch.cpu.get_capabilities().get("avx512_bf16") if cpu else torch.cuda.is_bf16_supported(False)
    how = dict(use_cpu=cpu, dataloader_pin_memory=not cpu, seed=args.seed, learning_rate=args.lr)
    how |= dict(num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size, report_to="none")
    how |= dict(bf16=bool(fast), ddp_backend="gloo" if cpu and "RANK" in os.environ else None)
    how |= dict(eval_strategy="epoch", eval_on_start=True, save_strategy="epoch")
    how |= dict(logging_strategy="epoch", logging_nan_inf_filter=False, ddp_find_unused_parameters=False)
    settings = transformers.TrainingArguments(args.output_dir, disable_tqdm=not sys.stderr.isatty(), **how)
    atexit.register(settings.distributed_state.destroy_process_group)  # if Python does it, gloo may crash
    collator = transformers.DataCollatorForSeq2Seq(tokenizer)
    checksum = 0  # of the model, which may have another name when the run is resumed
    for weights in model.parameters():
        checksum = zlib.crc32(weights.detach().contiguous().numpy(), checksum)
    flags = {name: vars(args)[name] for name in ("epochs", "batch_size", "lr", "seed")}
    stop = Stop({"model": f"{args.model} {checksum:08x}"} | flags | {"processes": settings.world_size})
    trainer = Trainer(model, settings, collator, encoded, validation, tokenizer, callbacks=[stop])
    trainer.stop = stop
    checkpoint = find_checkpoint(folder, stop.flags) if args.resume else None
    say(f"{len(training)} questions to learn, {len(validation)} to measure with, on {settings.device}")
    trainer.train(checkpoint)
    if stop.agreed:
        say("Stopped by a signal. --resume goes on from the checkpoint")
        sys.exit(143)
    if MAIN:
        saved = load(result)
        for q in validation[:: math.ceil(len(validation) / 4)]:
            say(f"{q['question']} {answer([q], *saved)[0]} (expected: {q['answer']})")


def parse_arguments():
    """Return the values of the flags. A mistake ends the program with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description="Fine-tune a transformer.", allow_abbrev=False)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--model", metavar="NAME", default="google/flan-t5-small", help=f"folder or name on the hub {shown}")
    add("--epochs", metavar="N", type=int, default=3, help=f"passes over the training questions {shown}")
    add("--batch-size", metavar="N", type=int, default=8, help=f"questions per process and step {shown}")
    add("--lr", metavar="LR", type=float, default=2e-4, help=f"learning rate, which falls to 0 {shown}")
    add("--seed", metavar="S", type=int, default=1, help=f"seed of all random numbers {shown}")
    add("--data-dir", metavar="DIR", default="data", help=f"folder of the two .jsonl files {shown}")
    add("--output-dir", metavar="DIR", default="output", help=f"folder for the results {shown}")
    add("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    add("--no-cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--ask", metavar="QUESTION", help="do not train, but ask the trained model in --output-dir this")
    add("--context", metavar="TEXT", help="the text that --ask is about")
    args = parser.parse_args()
    if min(args.epochs, args.batch_size) < 1 or not 0 < args.lr < math.inf or not 0 <= args.seed < 2**32:
        parser.error("--epochs and --batch-size must be 1 or more, --lr above 0, --seed from 0 to 4294967295")
    if {args.ask, args.context} != {None} and not all((t or "").strip() for t in (args.ask, args.context)):
        parser.error("--ask and --context belong together, and both must say something")
    return args


def main():
    """Do what the command line says."""
    args = parse_arguments()
    logging.disable()  # of the libraries, which also raise their errors
    transformers.logging.disable_progress_bar()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # not every terminal can show every letter
    if "RANK" in os.environ:  # a PyTorchJob's operator does not set LOCAL_RANK, but GPUs need it
        os.environ.setdefault("LOCAL_RANK", "0")
    try:
        if args.ask is None:
            train(args)
        else:
            trained = load(Path(args.output_dir, "model").resolve())  # or the hub would be asked for it
            question = {"context": args.context, "question": args.ask, "answer": "", "source": "--context"}
            encode(question, *trained)  # which refuses what is too long
            say(answer([question], *trained)[0])
    except (Exception, KeyboardInterrupt) as error:  # the library has its own kinds
        text = str(error) if isinstance(error, (ArithmeticError, OSError, ValueError)) else repr(error)
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(text.split())[:600]}")


if __name__ == "__main__":
    main()
