"""What a checkpoint does under the release of transformers that is importable: python releases.py CHECKPOINT.

The last line printed is JSON: the release, then one entry for each way of using a checkpoint. It imports nothing of
this project, so that the code that travels with the checkpoint is what runs.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline


def main(checkpoint: str) -> None:
    """Try everything on seeded tokens."""

    def load(kind: Any = AutoModelForCausalLM, path: str = checkpoint, **options: Any) -> Any:
        return kind.from_pretrained(path, trust_remote_code=True, **options).eval()

    model = load()
    ids_BT = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    padding_BT = torch.ones_like(ids_BT)
    padding_BT[0, :4] = 0

    def generate(**options: Any) -> list[list[int]]:
        torch.manual_seed(0)
        options = {"inputs": ids_BT[:1], "max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, **options}
        return model.generate(**options).tolist()

    def size(values: torch.Tensor) -> float:
        return round(values.double().abs().sum().item(), 3)

    def saved_again() -> float:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return size(load(path=folder)(ids_BT).logits)

    def gradient() -> float:
        model.train()
        with torch.enable_grad():
            model(ids_BT, labels=ids_BT, num_items_in_batch=torch.tensor(10)).loss.backward()
        model.eval()
        return size(model.model.layers[0].mlp.up_proj.weight.grad)

    def text_generation() -> str:
        words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(300)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1")
        continued = pipeline("text-generation", model=model, tokenizer=tokenizer)
        made = continued("w5 w6 w7", max_new_tokens=6, do_sample=False, return_full_text=False)
        return str(made[0]["generated_text"]).strip()

    def unknown_argument() -> str:
        try:
            model(ids_BT, no_such_argument=1)
        except TypeError as error:
            return str(error).split(":")[0]
        return "taken in silence"

    def eager() -> list[float]:
        made = load(attn_implementation="eager")(ids_BT, output_attentions=True, output_hidden_states=True)
        return [*made.attentions[0].shape, len(made.hidden_states), size(made.logits)]

    tries: dict[str, Callable[[], Any]] = {
        "logits": lambda: size(model(ids_BT).logits),
        "hidden states": lambda: size(load(AutoModel)(ids_BT).last_hidden_state),
        "eager attention": eager,
        "tuple": lambda: len(model(ids_BT, return_dict=False)),
        "greedy": generate,
        "without cache": lambda: generate(use_cache=False),
        "static cache": lambda: generate(cache_implementation="static"),
        "sampled": lambda: generate(do_sample=True, top_k=5),
        "beam": lambda: generate(num_beams=3),
        "padded": lambda: generate(inputs=ids_BT, attention_mask=padding_BT),
        "saved again": saved_again,
        "loss": lambda: size(model(ids_BT, labels=ids_BT).loss),
        "gradient": gradient,
        "pipeline": text_generation,
        "unknown argument": unknown_argument,
    }
    with torch.no_grad():
        print(json.dumps([transformers.__version__, {name: attempt() for name, attempt in tries.items()}]))


main(sys.argv[1])
