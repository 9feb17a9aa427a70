"""vLLM in its process: a line of JSON in, one step of its engine, a line of JSON out.

Started by `process.py` with the interpreter of the environment that has vLLM; nothing outside of the standard library
and vLLM is imported. vLLM's engine runs in this process, not in a child, so that it ends with this one.
"""

import json
import os
import sys
import threading
import time
from typing import Any

LOOK_S = 1.0


def main() -> int:
    """Serve the model directory of argument 1 with the engine arguments of argument 2, JSON, until the input ends."""
    # What vLLM prints goes to standard error; answers have the pipe for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, name="lifeline", daemon=True).start()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import EngineArgs, LLMEngine, __version__
    from vllm.platforms import current_platform

    options = json.loads(sys.argv[2])
    device = current_platform.device_type
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=sys.argv[1],
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            # Compiling takes minutes on a processor and needs a compiler.
            enforce_eager=device == "cpu",
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
        refused = {
            number: reason for number, request in asked["add"].items() if (reason := _add(engine, number, request))
        }
        outputs = engine.step() if engine.has_unfinished_requests() else []
        say = {"refused": refused, "outputs": {output.request_id: _shown(output) for output in outputs}}
    return 0


def _add(engine: Any, number: str, request: dict[str, Any]) -> str | None:
    """Queue a request; the reason if vLLM refuses it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    options = request["options"]
    # JSON has no other keys than strings.
    options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()} or None
    try:
        parameters = SamplingParams(detokenize=False, output_kind=RequestOutputKind.DELTA, **options)
        engine.add_request(number, {"prompt_token_ids": request["ids"]}, parameters)
    except Exception as error:  # noqa: BLE001  a wrong request must not end the others
        return " ".join(str(error).split())
    return None


def _shown(output: Any) -> dict[str, Any]:
    """What is new of a request: ids, their log-probabilities, those of the prompt, and whether it has ended."""
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
