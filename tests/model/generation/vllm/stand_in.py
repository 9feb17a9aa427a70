"""Speaks the protocol of `model/generation/vllm/worker.py` without vLLM: the next token is the last one plus one, or
the next one that the request's mask allows.

The token CRASH at the beginning of a prompt ends the process, HANG stops it, REFUSED makes it refuse a value of the
request, FAILS fail to take it, and GARBLED answer it with something else than tokens.
"""

import base64
import json
import sys
import time
from pathlib import Path

CRASH, HANG, REFUSED, FAILS, GARBLED = 200, 201, 202, 203, 204
REFUSALS = {REFUSED: {"reason": "too bad", "is_value": True}, FAILS: {"reason": "no memory", "is_value": False}}


def next_token(last: int, mask: str | None, vocab_size: int) -> int:
    """The first allowed token after `last`."""
    bits = base64.b64decode(mask) if mask else b""
    order = [(last + 1 + step) % vocab_size for step in range(vocab_size)]
    return next(token for token in order if mask is None or bits[token // 8] >> token % 8 & 1)


def main() -> None:
    vocab_size = json.loads((Path(sys.argv[1]) / "config.json").read_text())["vocab_size"]
    running: dict[str, dict] = {}
    masks: dict[str, str] = {}
    say: dict = {"device": "cpu", "release": "none", "cache_tokens": 512}
    print("WARNING this is a stand-in", file=sys.stderr)
    while True:
        print(json.dumps(say), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        asked = json.loads(line)
        for number in asked["abort"]:
            running.pop(number, None)
        masks |= asked["masks"]
        refused = {number: REFUSALS[one["ids"][0]] for number, one in asked["add"].items() if one["ids"][0] in REFUSALS}
        running |= {number: {**one, "made": 0} for number, one in asked["add"].items() if number not in refused}
        outputs = {}
        for number, one in list(running.items()):
            if CRASH in one["ids"][:1]:
                raise MemoryError("the stand-in has no memory")
            if HANG in one["ids"][:1]:
                time.sleep(600)
            token = next_token(one["ids"][-1], masks.get(number), vocab_size)
            one["ids"].append(token)
            one["made"] += 1
            if GARBLED in one["ids"][:1]:
                outputs[number] = {"ids": ["?"]}
                continue
            options = one["options"]
            stops = token in options["stop_token_ids"] and one["made"] > options["min_tokens"]
            ended = "stop" if stops else "length" if one["made"] >= options["max_tokens"] else None
            outputs[number] = {"ids": [token], "ended": ended, "cached": 0}
            if options["logprobs"] is not None:
                outputs[number]["logprobs"] = [[[token, -0.5, 1], [3, -2.0, 2]][: max(options["logprobs"], 1)]]
            if options["prompt_logprobs"] is not None and one["made"] == 1:
                places = [[[given, -1.0, 9], [5, -0.1, 1]] for given in one["ids"][:-1]]
                outputs[number]["prompt_logprobs"] = [None, *places[1:]]
            if ended:
                del running[number]
        say = {"refused": refused, "outputs": outputs}


if __name__ == "__main__":
    main()
