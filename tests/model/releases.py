"""What a checkpoint does under the release of transformers that is importable: python releases.py CHECKPOINT.

The last line printed is JSON: the release, then one entry for each way of using a checkpoint. It imports nothing of
this project, so that the code that travels with the checkpoint is what runs.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
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

    def other_rotations() -> list[float]:
        """Logits with scaled rotary embeddings in half of each head, each from a file."""
        scaled = {"factor": 4.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        found = []
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            path = Path(folder, "config.json")
            config = json.loads(path.read_text())
            for kind in ("default", "linear", "dynamic", "llama3", "yarn"):
                rope = {"rope_type": kind, "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, **scaled}
                path.write_text(json.dumps({**config, "rope_parameters": rope}))
                found.append(size(load(path=folder)(ids_BT).logits))
        return found

    def gradient() -> float:
        model.train()
        with torch.enable_grad():
            model(ids_BT, labels=ids_BT, num_items_in_batch=torch.tensor(10)).loss.backward()
        model.eval()
        return size(model.model.layers[0].mlp.up_proj.weight.grad)

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w1")

    def text_generation() -> str:
        continued = pipeline("text-generation", model=model, tokenizer=tokenizer)
        made = continued("w5 w6 w7", max_new_tokens=6, do_sample=False, return_full_text=False)
        return str(made[0]["generated_text"]).strip()

    def unknown_argument() -> str:
        try:
            model(ids_BT, no_such_argument=1)
        except TypeError as error:
            return str(error).split(":")[0]
        return "taken in silence"

    def adapted() -> dict[str, Any]:
        """LoRA trained for some steps, saved and loaded, merged, and the merged model saved and loaded."""
        torch.manual_seed(0)
        before = model(ids_BT).logits
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        tuned = peft.get_peft_model(load(), lora)
        optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.01)
        losses = []
        with torch.enable_grad():
            for _ in range(6):
                loss = tuned(input_ids=ids_BT, labels=ids_BT).loss
                losses.append(loss.item())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        after = tuned.eval()(input_ids=ids_BT).logits
        with tempfile.TemporaryDirectory() as folder:
            tuned.save_pretrained(f"{folder}/adapter")
            loaded = peft.PeftModel.from_pretrained(load(), f"{folder}/adapter").eval()
            from_adapter = loaded(input_ids=ids_BT).logits
            merged = tuned.merge_and_unload()
            merged.save_pretrained(f"{folder}/merged")
            from_merged = load(path=f"{folder}/merged")(ids_BT).logits
        return {
            "losses": [round(loss, 3) for loss in losses],
            "moved": bool((after - before).abs().max() > 0.1),
            "adapter loaded": torch.equal(from_adapter, after),
            "merged": bool((merged(ids_BT).logits - after).abs().max() < 1e-4),
            "merged, loaded": torch.equal(from_merged, merged(ids_BT).logits),
        }

    def harness() -> dict[str, Any]:
        """lm-eval's model `hf` against log-probabilities taken here from the logits."""
        import lm_eval.models.huggingface
        from lm_eval.api.instance import Instance

        judge = lm_eval.models.huggingface.HFLM(
            pretrained=checkpoint, tokenizer=tokenizer, trust_remote_code=True, device="cpu", batch_size=2
        )
        pairs = [("w5 w6 w7", " w8 w9"), ("w250", " w3 w299 w17"), ("", "w40 w41")]
        asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        found = judge.loglikelihood(asked, disable_tqdm=True)
        whole = [Instance("loglikelihood_rolling", {}, ("w9 w8 w7 w6 w5",), 0)]
        rolled = judge.loglikelihood_rolling(whole, disable_tqdm=True)
        until = [Instance("generate_until", {}, ("w5 w6 w7", {"until": ["w0"], "max_gen_toks": 6}), 0)]
        text = judge.generate_until(until, disable_tqdm=True)[0]

        def nats(context: str, continuation: str) -> float:
            prompt, added = (tokenizer(part, add_special_tokens=False).input_ids for part in (context, continuation))
            ids = [*(prompt or [0]), *added]
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            return sum(log_p[at - 1, ids[at]].item() for at in range(len(ids) - len(added), len(ids)))

        ours = [*(nats(*pair) for pair in pairs), nats("", "w9 w8 w7 w6 w5")]
        theirs = [*(value for value, _ in found), *rolled]
        return {
            "log-likelihoods": [round(value, 3) for value in theirs],
            "equal ours": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4,
            "text": text.split(),
        }

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
        "other rotations": other_rotations,
        "loss": lambda: size(model(ids_BT, labels=ids_BT).loss),
        "gradient": gradient,
        "pipeline": text_generation,
        "unknown argument": unknown_argument,
        "LoRA": adapted,
        **({"lm-eval": harness} if find_spec("lm_eval") else {}),
    }
    with torch.no_grad():
        print(json.dumps([transformers.__version__, {name: attempt() for name, attempt in tries.items()}]))


main(sys.argv[1])
