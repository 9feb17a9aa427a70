"""The graphs step on a device that computes each pass as late as it may: what the host overwrites too early is lost."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.generation import scheduler
from model.generation.requests import GenerationRequest, SamplingParameters
from model.generation.steps.choose import STEPS
from model.generation.steps.draw import Adjustment
from model.generation.steps.graphs import pages, step
from model.generation.steps.graphs.passes import MOST_CHAINED, Pass, Passes, Row, Wanted
from model.generation.steps.step import Segment, SegmentOutput
from tests.model.generation.engines import start, tokens
from tests.support.graphs import GraphStepOnCPU
from tests.support.tiny import tiny_model, tiny_tokenizer

CONTEXT = 5 * pages.PAGE


class LatePasses(Passes):
    """Computes a pass, and copies its inputs and results, when the host waits for it."""

    def __init__(self, *given) -> None:
        self._waiting: list[tuple[int, object]] = []
        self._launched = 0
        super().__init__(*given)
        for staging in self._staging:
            staging.number = 0
            staging.wait = lambda staging=staging: self.run(staging.number)

    @torch.inference_mode()
    def run(self, number: int | None = None) -> None:
        """Compute the passes up to this one, or all."""
        while self._waiting and (number is None or self._waiting[0][0] <= number):
            self._waiting.pop(0)[1]()

    def launch(self, rows: Sequence[Row], wanted: Sequence[Wanted]) -> Pass:
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % len(self._staging)
        ints = staging.fill(self.sizes(len(rows)), rows, wanted, self._cache.spare_slot)
        self._launched += 1
        staging.number, table = self._launched, self._cache.table
        has_pages, self._cache._is_changed = self._cache._is_changed, False
        count, wanted = len(rows), list(wanted)
        if has_pages:
            staging.table.numpy()[:] = self._cache._pages

        def compute() -> None:
            self._ints[: len(ints)].copy_(ints)
            staging.copy_allowed(self.adjustments.tables.allowed_RW, wanted)
            if has_pages:
                table.copy_(staging.table)
            self.replay(count)
            staging.copy_tokens(self._chosen_S)

        self._waiting.append((staging.number, compute))
        return staging.launched()

    def logits(self, indices: Sequence[int]) -> Tensor:
        self.run()
        return super().logits(indices)

    def hidden_states(self, rows: Sequence[Row]) -> Tensor:
        self.run()
        return super().hidden_states(rows)


class LateStep(GraphStepOnCPU):
    """What a GPU does in order, it does after the passes before."""

    def _start(self) -> None:
        super()._start()
        self._cache.passes = self._passes

    def adjust(self, slot: int, adjustment: Adjustment) -> bool:
        self._passes.run()
        return super().adjust(slot, adjustment)

    def copy(self, source: int, target: int, length: int) -> None:
        self._passes.run()
        super().copy(source, target, length)


class LateCache(pages.PagedCache):
    """Copies of pages, too."""

    passes: LatePasses | None = None

    def _take(self) -> int:
        if self.passes is not None:
            self.passes.run()
        return super()._take()


def requests(numbers: random.Random, vocab_size: int, count: int) -> list[GenerationRequest]:
    """Of many kinds, some with common prefixes."""
    starts = [[numbers.randrange(2, vocab_size) for _ in range(length)] for length in (30, 70, 130)]
    made = []
    for _ in range(count):
        start_of = numbers.choice(starts)
        prompt = start_of[: numbers.randrange(1, len(start_of) + 1)]
        prompt = prompt + [numbers.randrange(2, vocab_size) for _ in range(numbers.choice([0, 1, 40]))]
        sampling = SamplingParameters(
            temperature=numbers.choice([0.0, 0.0, 0.8, 1.5]),
            top_k=numbers.choice([0, 5, 40]),
            top_p=numbers.choice([1.0, 0.9]),
            seed=numbers.randrange(1000),
            repetition_penalty=numbers.choice([1.0, 1.0, 1.3]),
            logit_bias=numbers.choice([{}, {}, {7: 4.0}]),
        )
        request = GenerationRequest(prompt, numbers.choice([1, 2, 8, 60]), sampling, client=str(numbers.randrange(3)))
        if numbers.random() < 0.15:
            request = replace(request, allowed_token_ids=frozenset(numbers.sample(range(vocab_size), 50)))
        if numbers.random() < 0.15:
            request = replace(request, logprobs=2)
        made.append(request)
    return made


@pytest.mark.medium
@pytest.mark.parametrize("limit_mib", [0, 1], ids=["memory for all", "memory for few"])
@pytest.mark.parametrize("seed", range(3))
def test_each_request_has_the_tokens_that_it_has_alone(monkeypatch, seed, limit_mib):
    monkeypatch.setattr(step, "Passes", LatePasses)
    monkeypatch.setattr(step, "PagedCache", LateCache)
    monkeypatch.setitem(STEPS, "graphs", f"{__name__}:LateStep")
    # However long a call takes here, on a device it takes as long as one that chooses several tokens of each text.
    monkeypatch.setattr(scheduler, "CHAIN_S", 60.0)
    numbers, calls = random.Random(seed), []
    compute = LateStep.compute

    def counted(self: LateStep, segments: Sequence[Segment]) -> list[SegmentOutput]:
        calls.append(max(segment.steps for segment in segments))
        return compute(self, segments)

    monkeypatch.setattr(LateStep, "compute", counted)
    context = CONTEXT if not limit_mib else 4096  # takes a MiB
    model = tiny_model(tiny_tokenizer(), max_position_embeddings=context)
    options = {"kv_cache_mib": limit_mib, "end_of_text_ids": frozenset({11, 90})}
    asked = requests(numbers, model.config.vocab_size, 40)
    engine = start(model, tiny_tokenizer(), step="graphs", max_batch_size=numbers.choice([2, 5, 8]), **options)
    answers = []
    for request in asked:
        answers.append(engine.submit(request))
        if numbers.random() < 0.3:
            time.sleep(0.01)
    greedy = SamplingParameters(temperature=0)
    asked.append(GenerationRequest(asked[0].prompt_ids, 60, greedy, ignore_eos=True))  # has calls of its own
    found = [tokens(answer) for answer in answers]
    found.append(tokens(engine.submit(asked[-1])))
    assert engine.stats().restarts_total == 0
    assert max(calls) == MOST_CHAINED
    engine.stop()
    engine = start(model, tiny_tokenizer(), step="reference", max_batch_size=1, **options)
    assert found == [tokens(engine.submit(request)) for request in asked]
    engine.stop()
