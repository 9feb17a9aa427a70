"""vLLM in its process: a line of JSON in, one step of its engine, a line of JSON out.

Started by `process.py` with the interpreter of the environment that has vLLM; nothing that this environment lacks is
imported. vLLM's engine runs in this process, not in a child, so that it ends with this one.
The tokens that a constrained request may take next come with each line, as a mask over the vocabulary.
"""

import base64
import json
import os
import sys
import threading
import time
from functools import partial
from typing import Any

LOOK_S = 1.0
masks: dict[str, Any] = {}
"""By request, for constrained ones: which tokens may come next, a bool tensor of shape (V,)."""


def main() -> int:
    """Serve the model directory of argument 1 with the engine arguments of argument 2, JSON, until the input ends."""
    # What vLLM prints goes to standard error; answers have the pipe for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Takes another interface of logits processors.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    # A prompt that fills the context is scored, and vLLM generates a token after it.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from vllm import EngineArgs, LLMEngine, __version__
    from vllm.platforms import current_platform

    from model.system.amx import allow_amx

    options = json.loads(sys.argv[2])
    device = current_platform.device_type
    if device == "cpu":
        allow_amx()
        # A part of a prompt rewinds the request's random generator, which only those of GPUs can.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], options["max_model_len"])
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=sys.argv[1],
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            # Compiling takes minutes on a processor and needs a compiler.
            enforce_eager=device == "cpu",
            # Would begin the next step before the masks for it are known.
            async_scheduling=False,
            logits_processors=[_masking()],
            **options,
        )
    )
    cache = engine.vllm_config.cache_config
    say = {"device": device, "release": __version__, "cache_tokens": (cache.num_gpu_blocks or 0) * cache.block_size}
    while True:
        answers.write(json.dumps(say) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            break
        asked = json.loads(line)
        if asked["abort"]:
            engine.abort_request(asked["abort"])
        masks.update({number: _mask(text) for number, text in asked["masks"].items()})
        refused = {
            number: reason for number, request in asked["add"].items() if (reason := _add(engine, number, request))
        }
        outputs = engine.step() if engine.has_unfinished_requests() else []
        for number in (*asked["abort"], *refused, *(output.request_id for output in outputs if output.finished)):
            masks.pop(number, None)
        say = {"refused": refused, "outputs": {output.request_id: _shown(output) for output in outputs}}
    return 0


def _mask(text: str) -> Any:
    """A mask of shape (V,), V rounded up to whole bytes, from the bits of `scheduler.packed`."""
    import numpy as np
    import torch

    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), bitorder="little")
    return torch.from_numpy(bits).bool()


def _masking() -> type:
    """The class through which vLLM applies a request's mask before it samples."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    def masked(number: str, _: list[int], logits_V: Any) -> Any:
        if number not in masks:  # aborted
            return logits_V
        return logits_V.masked_fill(~masks[number][: len(logits_V)].to(logits_V.device), float("-inf"))

    class Masking(AdapterLogitsProcessor):  # type: ignore[misc]
        """Looks the request up by its number."""

        def is_argmax_invariant(self) -> bool:
            """Masks change the most likely token."""
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            """The processor of one request, None for one without a constraint."""
            number = (params.extra_args or {}).get("masked")
            return number and partial(masked, number)

    return Masking


def _add(engine: Any, number: str, request: dict[str, Any]) -> dict[str, Any] | None:
    """Queue a request; if vLLM refuses it, the reason, and whether a value of the request is to blame."""
    from vllm import SamplingParams, exceptions
    from vllm.sampling_params import RequestOutputKind

    options = request["options"]
    # JSON has no other keys than strings.
    options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()} or None
    options["extra_args"] = {"masked": number} if number in masks else None
    try:
        parameters = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, **options)
        engine.add_request(number, {"prompt_token_ids": request["ids"]}, parameters)
    except Exception as error:  # noqa: BLE001  a wrong request must not end the others
        wrong = (ValueError, getattr(exceptions, "VLLMClientError", ValueError))
        reason = " ".join(str(error).split()) or type(error).__name__
        return {"reason": reason, "is_value": isinstance(error, wrong)}
    return None


def _shown(output: Any) -> dict[str, Any]:
    """A request's new output: token ids, their and the prompt's log-probabilities, and whether it has ended."""
    new = output.outputs[0]
    shown: dict[str, Any] = {
        "ids": list(new.token_ids),
        "ended": new.finish_reason,
        "cached": output.num_cached_tokens or 0,
    }
    if new.logprobs is not None:
        shown["logprobs"] = [_ranked(place) for place in new.logprobs]
    if output.prompt_logprobs is not None:
        shown["prompt_logprobs"] = [place and _ranked(place) for place in output.prompt_logprobs]
    return shown


def _ranked(place: dict[int, Any]) -> list[tuple[int, float, int]]:
    """Token, log-probability and rank of the entries at one place."""
    return [(token, entry.logprob, entry.rank or 0) for token, entry in place.items()]


def _end_with_parent() -> None:
    """A step that hangs would not see the end of the input."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
