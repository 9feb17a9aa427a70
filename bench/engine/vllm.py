"""vLLM on the same weights, in float32, in a process of its environment (`make vllm`, or VLLM_PYTHON names another).

The weights have the layout that vLLM knows (`model/weights/export.py`). It runs as its users run it: compiled, with all
threads, and requests join and leave its batch.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.engine.workloads import RAGGED_STREAMS, SAMPLED, Contender
from model.generation.vllm.process import VllmProcess
from model.modeling_rex import RexForCausalLM
from model.weights.export import export_model

PYTHON = Path(os.environ.get("VLLM_PYTHON") or Path(__file__).parents[2] / ".venv-vllm/bin/python").absolute()


def installed() -> bool:
    """Whether vLLM has an environment."""
    return PYTHON.is_file()


class Vllm(Contender):
    """vLLM's engine, one step after the other."""

    def __init__(self, model: RexForCausalLM) -> None:
        super().__init__(model)
        self._folder = tempfile.TemporaryDirectory(prefix="rex-vllm-")
        export_model(model).save_pretrained(self._folder.name)
        options: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": model.config.max_position_embeddings,
            "max_num_seqs": RAGGED_STREAMS,
            "generation_config": "vllm",
        }
        self._process = VllmProcess(
            PYTHON,
            Path(self._folder.name),
            options,
            variables={"VLLM_CPU_KVCACHE_SPACE": "2"},  # GiB
            precision="float32",
            bytes_per_token=0,
            worker="bench.engine.vllm_worker",
        )
        self._process.start()

    def prefill(self) -> float:
        """Tokens of a prompt of 900 over the time to its answer's first token."""
        first, _ = self._ask([900], [1])
        return 900 / first[0]

    def decode(self, streams: int, prompt_tokens: int, answer_tokens: int) -> float:
        """Equal streams."""
        first, last = self._ask([prompt_tokens] * streams, [answer_tokens] * streams)
        return streams * (answer_tokens - 1) / statistics.mean(b - a for a, b in zip(first, last, strict=True))

    def _ragged(self, answer_tokens: list[int]) -> float:
        _, last = self._ask(self._prompt_tokens[: len(answer_tokens)], answer_tokens)
        return sum(answer_tokens) / max(last)

    def _ask(self, prompt_tokens: list[int], answer_tokens: list[int]) -> tuple[list[float], list[float]]:
        """Times of each request's first and last token, seconds from the first request on."""
        sampling: dict[str, float] = {"temperature": 0.0}
        if self._is_sampled:
            sampling = {"temperature": SAMPLED.temperature, "top_k": SAMPLED.top_k, "top_p": SAMPLED.top_p}
        asked = {"prompts": self._prompts(prompt_tokens), "answers": answer_tokens, "sampling": sampling}
        answer = self._process.exchange(asked, [], {})
        return answer["first"], answer["last"]

    def __del__(self) -> None:
        if process := getattr(self, "_process", None):
            process.close()
