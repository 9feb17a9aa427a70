"""vLLM's part of the comparison, run by the interpreter of its environment; imports nothing that this lacks.

    python -m bench.engine.vllm_worker MODEL_DIR OPTIONS

OPTIONS: arguments of vLLM's engine, JSON. A line of JSON in has the prompts of one run, the tokens of each answer and
the sampling parameters; a line out has, in seconds since the first request, the times of each answer's first and last
token.
"""

import json
import os
import sys
import time


def main() -> int:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM prints to standard output
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import EngineArgs, LLMEngine, SamplingParams, __version__
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind

    options = json.loads(sys.argv[2])
    engine = LLMEngine.from_engine_args(
        EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, disable_log_stats=True, **options)
    )
    say: dict[str, object] = {"release": __version__, "device": current_platform.device_type, "cache_tokens": 0}
    while True:
        answers.write(json.dumps(say) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return 0
        asked = json.loads(line)["add"]
        started = time.perf_counter()
        for number, (ids, count) in enumerate(zip(asked["prompts"], asked["answers"], strict=True)):
            parameters = SamplingParams(
                max_tokens=count,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                **asked["sampling"],
            )
            engine.add_request(str(number), {"prompt_token_ids": ids}, parameters)
        first, last = [0.0] * len(asked["prompts"]), [0.0] * len(asked["prompts"])
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                number = int(output.request_id)
                last[number] = now
                first[number] = first[number] or now
        say = {"first": first, "last": last}


if __name__ == "__main__":
    sys.exit(main())
