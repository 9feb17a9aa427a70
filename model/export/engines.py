"""Runs one engine on the inputs of the parity check, in a separate process: JSON in, JSON out.

Run by `model/export/parity.py`: `python -m model.export.engines ENGINE MODEL_PATH < questions.json`. No engine here
runs this project's model code: transformers and vLLM load their own classes, llama.cpp reads only the GGUF. vLLM has a
separate environment, so nothing outside of the standard library is imported before an engine is chosen.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PACKAGES = {"transformers": "transformers", "compressed-tensors": "compressed-tensors", "llama.cpp": "xllamacpp"}
"""The package of each engine."""

Questions = dict[str, Any]
"""texts: {name: text}. ids: {name: prompt ids}. steps: greedy tokens to add. windows: ids to score."""
Answers = dict[str, Any]
"""tokens: {name: [ids with special tokens read, ids without]}. greedy: {name: [[id, log-probability], ..]}. nats."""


def installed_engines() -> dict[str, str]:
    """Installed release of each engine's package, by engine."""
    found: dict[str, str] = {}
    for engine, package in PACKAGES.items():
        with suppress(PackageNotFoundError):
            found[engine] = version(package)
    return found


def transformers(path: Path, asked: Questions) -> Answers:
    """Stock transformers on an exported directory. Raises TypeError if the class is not one of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False).eval()
    if not type(model).__module__.startswith("transformers.models."):
        raise TypeError(f"{path} loads as {type(model).__module__}: expected a class of transformers")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    tokens, chats = _tokenized(tokenizer, asked)
    greedy: dict[str, list[list[float]]] = {}
    nats = 0.0
    with torch.inference_mode():
        for name, ids in asked["ids"].items():
            made = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=asked["steps"],
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            chosen = made.sequences[0, len(ids) :].tolist()
            scores = [step[0].double().log_softmax(-1) for step in made.logits]
            greedy[name] = [[token, float(score[token])] for token, score in zip(chosen, scores, strict=True)]
        for window in asked["windows"]:
            ids_T = torch.tensor(window)
            log_p = model(ids_T[None]).logits[0, :-1].double().log_softmax(-1)
            nats -= float(log_p.gather(-1, ids_T[1:, None]).sum())
    return {
        "engine": f"transformers {version('transformers')}, torch {version('torch')}",
        "tokens": tokens,
        "chats": chats,
        "greedy": greedy,
        "nats": nats,
    }


def llama_cpp(path: Path, asked: Questions) -> Answers:
    """llama.cpp, from the xllamacpp wheel, on a GGUF file: float32 cache, no flash attention, one sequence."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    # One thread: several would wait for each other while the server sorts a distribution, and rounding depends on their
    # number.
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = asked["context"], 1, False
    parameters.cache_ram_mib = parameters.n_ctx_checkpoints = parameters.verbosity = 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.no_extra_bufts = True  # kernels for AMX and repacked weights round more than the plain ones
    server = xllamacpp.Server(parameters)

    # One connection: a certificate asks some 2,000 times.
    connection = HTTPConnection(urlsplit(server.listening_address).netloc, timeout=300)

    def post(route: str, body: dict[str, Any]) -> Any:
        connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise OSError(f"{route} answers {answer.status}: {content.decode(errors='replace')}")
        return json.loads(content)

    def tokenize(text: str, special: bool) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": special}
        return list(post("/tokenize", body)["tokens"]) if text else []

    (letter,) = tokenize("a", False)

    def log_probability(ids: list[int], token: int) -> float:
        """Of `token` after `ids`: the request allows no other, and the probabilities are those before that."""
        body = {"prompt": ids, "n_predict": 1, "n_probs": 1, "temperature": 0}
        answer = post("/completion", {**body, "logit_bias": [[token, 1e9]]})
        if "completion_probabilities" in answer:
            return float(answer["completion_probabilities"][0]["logprob"])
        # The server omits the probabilities of tokens inside an incomplete UTF-8 character: a letter in its place, and
        # the whole distribution.
        body |= {"n_probs": asked["vocab_size"], "logit_bias": [[letter, 1e9]]}
        (step,) = post("/completion", body)["completion_probabilities"]
        return next((entry["logprob"] for entry in step["top_logprobs"] if entry["id"] == token), -math.inf)

    def continued(ids: list[int]) -> list[list[float]]:
        body = {"prompt": ids, "n_predict": asked["steps"], "temperature": 0, "return_tokens": True}
        chosen = list(post("/completion", body)["tokens"])
        return [[token, log_probability([*ids, *chosen[:count]], token)] for count, token in enumerate(chosen)]

    greedy = {name: continued(ids) for name, ids in asked["ids"].items()}
    nats = 0.0
    for window in asked["windows"]:
        nats -= sum(log_probability(window[:place], window[place]) for place in range(1, len(window)))
    tokens = {name: [tokenize(text, True), tokenize(text, False)] for name, text in asked["texts"].items()}
    chats = {name: post("/apply-template", {"messages": turns})["prompt"] for name, turns in asked["chats"].items()}
    connection.close()
    return {
        "engine": f"llama.cpp (xllamacpp {version('xllamacpp')})",
        "tokens": tokens,
        "chats": chats,
        "greedy": greedy,
        "nats": nats,
    }


def compressed_tensors(path: Path, asked: Questions) -> Answers:
    """Stock transformers on int8 weights, read by the package compressed-tensors."""
    answers = transformers(path, asked)
    return {**answers, "engine": f"compressed-tensors {version('compressed-tensors')} in {answers['engine']}"}


def vllm(path: Path, asked: Questions) -> Answers:
    """Stock vLLM on an exported directory: float32 (int8: bfloat16), eager, one sequence at a time."""
    # A window to score may be as long as the context, and vLLM asks for room for one token more.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    # Its engine in this process: others would import everything again.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm import __version__ as release

    from model.system.amx import allow_amx

    allow_amx()
    # vLLM's int8 products on a CPU take half precision alone.
    is_int8 = "quantization_config" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    model = LLM(
        str(path),
        dtype="bfloat16" if is_int8 else "float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=asked["context"] + 1,
        max_num_seqs=1,
        seed=0,
    )
    tokenizer = model.get_tokenizer()
    tokens, chats = _tokenized(tokenizer, asked)

    def run(ids: list[int], **options: Any) -> Any:
        settings = SamplingParams(temperature=0, **options)
        return model.generate(TokensPrompt(prompt_token_ids=ids), settings, use_tqdm=False)[0]

    greedy: dict[str, list[list[float]]] = {}
    for name, ids in asked["ids"].items():
        (made,) = run(ids, max_tokens=asked["steps"], logprobs=0).outputs
        greedy[name] = [[token, step[token].logprob] for token, step in zip(made.token_ids, made.logprobs, strict=True)]
    nats = 0.0
    for window in asked["windows"]:
        scores = run(window, max_tokens=1, prompt_logprobs=0).prompt_logprobs
        nats -= sum(step[token].logprob for token, step in zip(window[1:], scores[1:], strict=True))
    return {"engine": f"vLLM {release}", "tokens": tokens, "chats": chats, "greedy": greedy, "nats": nats}


def _tokenized(tokenizer: Any, asked: Questions) -> tuple[dict[str, list[list[int]]], dict[str, str]]:
    """Each text's tokens, with special tokens recognized and spelled out, and each conversation as text."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    tokens = {
        name: [tokenizer(text, add_special_tokens=False).input_ids, plain.encode(text, add_special_tokens=False).ids]
        for name, text in asked["texts"].items()
    }
    chats = {
        name: tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for name, turns in asked["chats"].items()
    }
    return tokens, chats


ENGINES: dict[str, Callable[[Path, Questions], Answers]] = {
    "transformers": transformers,
    "compressed-tensors": compressed_tensors,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
}


def main() -> int:
    """Answer the questions on standard input; writes the answers to the file that the questions name."""
    asked = json.load(sys.stdin)
    answers = ENGINES[sys.argv[1]](Path(sys.argv[2]), asked)
    Path(asked["output"]).write_text(json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
