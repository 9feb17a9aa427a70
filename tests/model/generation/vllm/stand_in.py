"""Speaks the protocol of `model/generation/vllm/worker.py` without vLLM: the next token is the last one plus one.

The token CRASH in a prompt ends the process, HANG stops it, and REFUSED makes it refuse the request.
"""

import json
import sys
import time
from pathlib import Path

CRASH, HANG, REFUSED = 200, 201, 202


def main() -> None:
    vocab_size = json.loads((Path(sys.argv[1]) / "config.json").read_text())["vocab_size"]
    running: dict[str, dict] = {}
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
        refused = {number: "too bad" for number, one in asked["add"].items() if REFUSED in one["ids"]}
        running |= {number: {**one, "made": 0} for number, one in asked["add"].items() if number not in refused}
        outputs = {}
        for number, one in list(running.items()):
            if CRASH in one["ids"][:1]:
                raise MemoryError("the stand-in has no memory")
            if HANG in one["ids"][:1]:
                time.sleep(600)
            token = (one["ids"][-1] + 1) % vocab_size
            one["ids"].append(token)
            one["made"] += 1
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
