"""Continuous batching: selects the tokens of each step and processes its logits.

In each step every running sequence decodes one token, and prefill fills the step up to `prefill_chunk` tokens, so a
long prompt delays the others by one chunk at most. Without prompts a step may compute several tokens of each sequence.
While several clients are present the chunk is what a short step computes, shared among those that are prefilled, the
client with the fewest requests is prefilled in steps of its own at most every other time, and a slot stays free for a
client that has none, so that a first token waits for at most a short step of the others.
Sequences join and leave at every step. A failing request does not affect the others. All of this runs in one thread;
`engine.py` has queueing, threads and restarts.
"""

import collections.abc
import logging
import math
import sys
import time
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from model.generation.constraints import Constraint, TokenIndex, is_constrained
from model.generation.grammar.grammar import GrammarFailure
from model.generation.pace import Pace, StepBudget
from model.generation.queue import RequestQueue, unreserved
from model.generation.requests import (
    FAILED,
    Embedding,
    FinishReason,
    Generation,
    PromptScores,
    Refusal,
)
from model.generation.sampler import Sampler, score_rows, token_logprobs
from model.generation.sequence import Sequence
from model.generation.slots import MIN_REUSED_TOKENS, SlotTable
from model.generation.speculation.draft import Draft
from model.generation.steps.step import Segment, SegmentOutput, Step

logger = logging.getLogger(__name__)
SHARED_STARTS = 4
"""Requests that start in one step while several clients are present: each is looked up in the cache first."""
CHAIN_S = 0.002
"""Time of a call that computes several tokens of each text: a request that comes meanwhile waits for its end."""
MOST_CHAINED = 8
Batch = list[tuple[Sequence, Segment]]


class Scheduler:
    """Serves the requests of a queue, step by step.

    end_of_text_ids: tokens that end a text. kv_cache: False recomputes all earlier tokens in each step.
    cache_tokens: most tokens whose keys and values all slots may hold together, at least one context. A request starts
    when its prompt and its longest answer fit beside those of the running ones; kept prefixes give way to it.
    speculative_tokens: most tokens proposed for one sequence in a step (`speculation/`); 0 for a step that is not
    batch invariant. draft: proposes for texts that do not repeat themselves.
    """

    def __init__(
        self,
        step: Step,
        queue: RequestQueue,
        *,
        token_bytes: collections.abc.Sequence[bytes],
        end_of_text_ids: frozenset[int],
        prefill_chunk: int,
        kv_cache: bool,
        cache_tokens: int | None = None,
        speculative_tokens: int = 0,
        draft: Draft | None = None,
    ) -> None:
        self._step, self._queue, self._draft = step, queue, draft
        # In a step that is not batch invariant, rounding could choose another token beside proposed ones.
        self._speculative_tokens = speculative_tokens if step.is_batch_invariant else 0
        self._slots = SlotTable(step, draft)
        self._capacity = cache_tokens and max(cache_tokens, self._slots.pages(step.context_length))
        self._token_bytes, self._end_of_text_ids = token_bytes, end_of_text_ids
        self._token_index: TokenIndex | None = None
        self._kv_cache = kv_cache
        # Chunked prefill needs the cache of the earlier chunks.
        self._budget = StepBudget(prefill_chunk if kv_cache else sys.maxsize)
        self._free = list(range(step.slots))
        self._present: set[str] = set()
        """Clients that have running requests or sent one lately."""
        self._computed: dict[str, int] = {}
        """Tokens computed for each client with running requests; one that joins starts just below the others."""
        self._token_s = CHAIN_S
        """Seconds of the last step, divided by the tokens of each text that it computed one after the other."""
        self._is_alone = False
        """Whether the last step had one client's sequences only, while others had some too."""
        self.running: list[Sequence] = []
        """Running sequences, in order of slot assignment."""
        self.pace = Pace()
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.cancelled = self.answered = 0
        self.proposed_tokens = self.accepted_tokens = 0

    @property
    def free_slots(self) -> int:
        """Requests that could start now."""
        return len(self._free)

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values of running and ended requests hold."""
        draft = self._draft.cache_bytes if self._draft else 0
        return self._step.cache_bytes(self._slots.held_tokens) + draft

    @property
    def cache_tokens(self) -> int:
        """Tokens of running sequences in the KV cache."""
        return sum(sequence.num_computed_tokens for sequence in list(self.running))

    def probe(self) -> None:
        """Compute one token in a free slot, to test the model; its exceptions propagate."""
        slot = self._free[0]
        self._slots.truncate(slot, 0)
        (output,) = self._step.compute([Segment(slot, 0, np.zeros(1, dtype=np.int64))])
        self._step.truncate(slot, 0)
        if not bool(torch.isfinite(output.logits_RV).all()):
            raise ValueError("the model's logits are not numbers: its weights are broken")

    def step(self) -> bool:
        """Compute and deliver the next tokens of all running sequences; False if none runs."""
        self.cancelled += self._queue.finish_interrupted()
        for sequence in [s for s in self.running if s.generation.interruption()]:
            self.cancelled += 1
            self._leave(sequence, sequence.generation.interruption() or "cancelled")
        if not self._kv_cache:
            self._forget_computed_tokens()
        batch = self._next_batch()
        if not batch:
            return False
        has_prompts = any(sequence.is_prefilling for sequence, _ in batch)
        started = time.perf_counter()
        try:
            outputs = self._step.compute([segment for _, segment in batch])
            self._token_s = (time.perf_counter() - started) / max(segment.steps for _, segment in batch)
        except Exception:
            logger.exception("a step over %d sequences failed: each is tried alone", len(batch))
            self._step_alone(batch)
            return True
        for sequence, segment in batch:
            self._advance(sequence, segment)
        self._score_rows(batch, outputs)
        for (sequence, segment), output in zip(batch, outputs, strict=True):
            self._process(sequence, segment, output)
        if has_prompts:
            self._budget.count(sum(len(segment.ids) for _, segment in batch), time.perf_counter() - started)
        return True

    def _forget_computed_tokens(self) -> None:
        for sequence in self.running:
            sequence.num_computed_tokens = 0
            self._slots.truncate(sequence.slot, 0)

    def _next_batch(self) -> Batch:
        self._count_clients()
        chunk = self._budget.most
        if len(self._present) > 1:
            chunk = self._budget.shared
            while self._start_next(has_priority=True):
                pass
        first = self._first_client(chunk)
        chosen = [s for s in self.running if first is None or s.request.client == first]
        decoding = [sequence for sequence in chosen if not sequence.is_prefilling]
        batch: Batch = []
        # Steps are filled to `chunk` tokens (whole GEMM tiles); a quarter is reserved for prefill so that it advances
        # however many sequences decode.
        left = max(chunk - len(decoding), math.ceil(chunk / 4))
        prefilling: dict[str, list[Sequence]] = {}
        for sequence in chosen:
            if sequence.is_prefilling:
                prefilling.setdefault(sequence.request.client, []).append(sequence)
        for number, client in enumerate(sorted(prefilling, key=self._computed.__getitem__)):
            share = math.ceil(left / (len(prefilling) - number))
            left -= share
            for sequence in prefilling[client]:
                if share > 0:
                    batch.append((sequence, sequence.next_segment(share)))
                    share -= len(batch[-1][1].ids)
            left += share
        starts = SHARED_STARTS if len(self._present) > 1 else len(self._free)
        while first is None and left > 0 and starts > 0 and (started := self._start_next()):
            batch.append((started, started.next_segment(left)))
            left -= len(batch[-1][1].ids)
            starts -= 1
        # No proposals beside a prompt: they would delay its first token.
        if batch:
            return [(s, s.next_segment(s.num_tokens)) for s in decoding] + batch
        return self._decoding_batch(decoding, chunk) if decoding else []

    def _first_client(self, chunk: int) -> str | None:
        """The client that has this step of `chunk` tokens alone, at most every other step: it waits for a first token
        and has fewer running requests than any other. Of as many, one that can have its first token in this step goes
        before others, and of several those that have fewer requests waiting; else, fewer tokens computed.
        """
        running = Counter(sequence.request.client for sequence in self.running)
        prefill = dict.fromkeys(running, 0)
        for sequence in self.running:
            prefill[sequence.request.client] += max(sequence.num_prompt_tokens - sequence.num_computed_tokens, 0)

        def order(client: str) -> tuple[int, bool, int, int]:
            fits = prefill[client] <= chunk
            return running[client], not fits, self._queue.count(client) if fits else 0, self._computed[client]

        first = min(running, key=order, default="")
        self._is_alone = len(running) > 1 and prefill[first] > 0 and not self._is_alone
        return first if self._is_alone else None

    def _count_clients(self) -> None:
        """Take notice of clients that came and went."""
        self._present = self._running_clients() | self._queue.present_clients()
        self._computed = {client: tokens for client, tokens in self._computed.items() if client in self._present}

    def _running_clients(self) -> set[str]:
        return {sequence.request.client for sequence in self.running}

    def _decoding_batch(self, decoding: list[Sequence], chunk: int) -> Batch:
        """The last token of each sequence, and proposed ones after it where they are worth checking. Without proposals,
        several tokens one after the other if all texts allow them: between two calls Python may take as long as a step.
        """
        texts, most = len(decoding), self._speculative_tokens
        speculating = [s for s in decoding if s.speculates and s.is_plain] if most else []
        proposals = [sequence.propose(texts, most) for sequence in speculating]
        if self._draft:
            proposals = self._draft.improve(speculating, proposals, texts, most, room=chunk)
        most_chained = min(MOST_CHAINED, int(CHAIN_S / self._token_s))
        if most_chained > 1 and not any(proposals) and all(s.may_chain for s in decoding):
            steps = self._step.chained(most_chained, [s.most_proposed + 1 for s in decoding])
            if any(count > 1 for count in steps):
                return [(sequence, sequence.chained(count)) for sequence, count in zip(decoding, steps, strict=True)]
        of_slot = {sequence.slot: proposal for sequence, proposal in zip(speculating, proposals, strict=False)}
        self.proposed_tokens += sum(map(len, proposals))
        return [
            (s, s.with_proposal(of_slot[s.slot]) if of_slot.get(s.slot) else s.next_segment(s.num_tokens))
            for s in decoding
        ]

    def _start_next(self, *, has_priority: bool = False) -> Sequence | None:
        """Start the next request in a free slot; None if none can start in this step.

        has_priority: consider only clients without running requests.
        """
        if not self._free:
            return None
        slots = len(self._free) + len(self.running)
        is_allowed = unreserved(slots, (sequence.generation for sequence in self.running))
        clients = self._running_clients()
        # A slot is kept for a client that is present without a request here.
        kept = 1 if slots > 1 and self._present - clients else 0

        def is_allowed_client(client: str) -> bool:
            return client not in clients or (not has_priority and len(self._free) > kept)

        generation = self._queue.first(is_allowed, is_allowed_client=is_allowed_client)
        if generation is None:
            return None
        prompt_ids = np.array(generation.request.prompt_ids, dtype=np.int64)
        reuse = self._kv_cache and generation.request.prompt_logprobs is None
        reuse = reuse and generation.request.embedding != "mean"  # averages the hidden states of all tokens
        if reuse and self._should_wait(prompt_ids):
            return None
        if self._capacity is not None and self._reserved(generation) > self._capacity:
            return None
        self._queue.remove(generation)
        with generation.ended_by_errors():
            slot, cached = self._slots.take(self._free, prompt_ids, reuse=reuse)
            sequence = self._new_sequence(generation, slot, cached)
            if self._draft:
                self._draft.start(sequence)
        self._free.remove(slot)
        self.running.append(sequence)
        client, least = generation.request.client, min((self._computed[one] for one in clients), default=0)
        self._computed[client] = max(self._computed.get(client, -1), least - 1)
        if self._capacity is not None:
            self._slots.free_memory(self._free, self._capacity - self._reserved())
        generation.start(cached)
        if not generation.is_continuation:
            self.prompt_tokens += len(prompt_ids)
            self.cached_tokens += cached
        return sequence

    def _reserved(self, *further: Generation) -> int:
        """Tokens of memory that the running requests, and further ones, take at most."""
        requests = [sequence.request for sequence in self.running] + [generation.request for generation in further]
        return sum(self._slots.pages(len(request.prompt_ids) + request.max_tokens) for request in requests)

    def _new_sequence(self, generation: Generation, slot: int, cached: int) -> Sequence:
        request = generation.request
        sampler = Sampler(request.sampling, request.prompt_ids, self._step.vocab_size, self._step.logits_device)
        if request.bad_words and self._token_index is None:
            self._token_index = TokenIndex(self._token_bytes)
        constraint = None
        if is_constrained(request):
            constraint = Constraint(request, self._token_index, self._step.vocab_size)
        # Only the step may choose the tokens: penalties and constraints change with each one.
        speculates = sampler.is_plain and constraint is None and request.logprobs is None and request.max_tokens > 1
        changes = not sampler.is_plain or constraint is not None or request.min_tokens > 0
        step_adjusts = changes and request.logprobs is None and self._step.adjust(slot, sampler.adjustment)
        return Sequence(
            generation,
            slot,
            cached,
            token_bytes=self._token_bytes,
            end_of_text_ids=self._end_of_text_ids,
            sampler=sampler,
            constraint=constraint,
            speculates=speculates,
            runs_ahead=self._step.runs_ahead,
            step_adjusts=step_adjusts,
        )

    def _should_wait(self, prompt_ids: np.ndarray) -> bool:
        """Whether a prompt now being computed will soon leave a longer prefix of this one in the cache."""
        held = self._slots.longest_shared(prompt_ids)
        for sequence in self.running:
            if sequence.is_prefilling:
                most = min(len(prompt_ids) - 1, sequence.num_prompt_tokens)
                differs = sequence.ids[:most] != prompt_ids[:most]
                if (int(differs.argmax()) if differs.any() else most) >= held + MIN_REUSED_TOKENS:
                    return True
        return False

    def _advance(self, sequence: Sequence, segment: Segment) -> None:
        """Count the segment's tokens as computed; proposed ones follow when they are taken."""
        self._computed[sequence.request.client] += len(segment.ids) + segment.steps - 1
        self._keep(sequence, segment.ids[: len(segment.ids) - segment.rows + 1])

    def _keep(self, sequence: Sequence, ids: np.ndarray) -> None:
        sequence.num_computed_tokens += len(ids)
        self._slots.append(sequence.slot, ids)

    def _step_alone(self, batch: Batch) -> None:
        """Compute each segment separately, so that only failing requests end. Raises if the model itself fails."""
        for sequence, segment in batch:
            try:
                (output,) = self._step.compute([segment])
            except Exception:
                logger.exception("a request failed; the others go on")
                self._leave(sequence, "error", error=FAILED)
                self.probe()
            else:
                self._advance(sequence, segment)
                self._score_rows([(sequence, segment)], [output])
                self._process(sequence, segment, output)

    def _score_rows(self, batch: Batch, outputs: collections.abc.Sequence[SegmentOutput]) -> None:
        """Compute the log-probabilities of the next tokens for which they are requested."""
        of_top: dict[int, list[tuple[Sequence, Tensor]]] = {}
        for (sequence, segment), output in zip(batch, outputs, strict=True):
            top = sequence.request.logprobs
            if top is not None and segment.logits in ("last", "all") and not sequence.is_prefilling:
                of_top.setdefault(top, []).append((sequence, output.logits_RV[-1]))
        for top, found in of_top.items():
            sequences, rows_V = zip(*found, strict=True)
            for sequence, row in zip(sequences, score_rows(rows_V, top), strict=True):
                sequence.scored_row = row

    def _process(self, sequence: Sequence, segment: Segment, output: SegmentOutput) -> None:
        """Score the prompt and sample the next token; an error ends only this request."""
        if segment.logits == "none":
            return
        try:
            if output.hidden_RD is not None:
                self._embed(sequence, output.hidden_RD)
                return
            if sequence.request.prompt_logprobs is not None and not sequence.generation.generated_tokens:
                self._score_prompt(sequence, segment, output)
            if sequence.num_computed_tokens == sequence.num_tokens:
                self._take_tokens(sequence, segment, output)
                sequence.deliver()
        except GrammarFailure as error:
            self._leave(sequence, "error", error=str(error), refusal="grammar")
        except Exception:
            logger.exception("a request failed; the others go on")
            self._leave(sequence, "error", error=FAILED)

    def _embed(self, sequence: Sequence, hidden_RD: Tensor) -> None:
        """Accumulate the prompt's hidden states; at its end deliver their mean or the last one."""
        total_D = hidden_RD.double().sum(dim=0)
        sequence.hidden_sum_D = total_D if sequence.hidden_sum_D is None else sequence.hidden_sum_D + total_D
        if sequence.is_prefilling:
            return
        is_mean = sequence.request.embedding == "mean"
        vector_D = sequence.hidden_sum_D / sequence.num_prompt_tokens if is_mean else hidden_RD[-1]
        if not bool(torch.isfinite(vector_D).all()):
            raise ValueError("the hidden states are not numbers: the weights or the cache hold broken numbers")
        sequence.generation.emit(Embedding(vector_D.float().cpu().numpy()))
        self._leave(sequence, "length")

    def _score_prompt(self, sequence: Sequence, segment: Segment, output: SegmentOutput) -> None:
        following = [int(token) for token in sequence.ids[segment.start + 1 : segment.start + 1 + len(segment.ids)]]
        following = following[: sequence.num_prompt_tokens - segment.start - 1]
        if following:
            top = sequence.request.prompt_logprobs or 0
            sequence.prompt_scores += token_logprobs(output.logits_RV[: len(following)], following, top)
        if not sequence.is_prefilling:
            sequence.generation.emit(PromptScores(tuple(sequence.prompt_scores)))

    def _take_tokens(self, sequence: Sequence, segment: Segment, output: SegmentOutput) -> None:
        """Take the next token and, while the chosen ones are those that were proposed, the tokens after them."""
        rows = segment.steps
        if segment.rows > 1:  # in a chain, each token was computed after those before it: none differs
            proposal = segment.ids[1 - segment.rows :].tolist()
            rows += next((i for i, token in enumerate(proposal) if token != output.tokens[i]), len(proposal))
        generation = sequence.generation
        is_simple = segment.logits == "token" and segment.allowed_V is None and not generation.interruption()
        taken = sequence.take(output.tokens[:rows]) if is_simple else 0
        self.generated_tokens += taken
        self.answered += taken
        while taken < rows and not (taken and (generation.is_finished or generation.interruption())):
            self._take_token(sequence, segment, output, taken)
            taken += 1
        if segment.rows == segment.steps == 1:
            return
        self.accepted_tokens += (taken - 1) * (segment.rows > 1)
        self._keep(sequence, sequence.ids[sequence.num_computed_tokens :][: taken - 1])
        self._slots.trim(sequence.slot, segment.start + len(segment.ids) + segment.steps - 1)

    def _take_token(self, sequence: Sequence, segment: Segment, output: SegmentOutput, row: int) -> None:
        """Append the token of a row and add the text that no later token can change."""
        request, generation = sequence.request, sequence.generation
        if request.max_tokens == 0:
            self._leave(sequence, "length")
            return
        may_end = generation.generated_tokens >= request.min_tokens
        token = self._next_token(sequence, segment, output, row)
        if token is None:
            self._end_text(sequence, "stop")
            return
        sequence.ids[sequence.num_tokens] = token
        sequence.num_tokens += 1
        generation.generated_tokens += 1
        self.generated_tokens += 1
        self.answered += 1
        is_end = token in sequence.ends
        # Before min_tokens a stop token comes only where the form allows no other token: it is part of the text.
        ends = is_end or (token in request.stop_token_ids and may_end)
        if ends and not (request.include_stop and self._token_bytes[token]):
            self._end_text(sequence, "stop", stopped_by=None if is_end else token)
            return
        logprobs = () if sequence.scored_row is None else (sequence.scored_row.of(token),)
        may_stop = generation.generated_tokens >= request.min_tokens
        text, stop = sequence.text.push(token, may_stop=may_stop)
        sequence.add_text(text, token, logprobs)
        if stop is not None:
            self._leave(sequence, "stop", stopped_by=stop)
        elif ends:
            self._end_text(sequence, "stop", stopped_by=None if is_end else token)
        elif sequence.constraint and sequence.constraint.is_complete:
            self._end_text(sequence, "stop")
        elif generation.generated_tokens >= request.max_tokens:
            self._end_text(sequence, "length")

    def _next_token(self, sequence: Sequence, segment: Segment, output: SegmentOutput, row: int) -> int | None:
        """The next token; None if the request's constraint allows no token, which completes the text."""
        constraint = sequence.constraint
        if segment.allowed_V is not None or (segment.logits != "all" and sequence.is_plain):
            token = output.tokens[row]
            if token is None:
                raise ValueError("the highest logit is not finite: the weights or the cache hold broken numbers")
            sequence.sampler.take()
        elif constraint is None:
            token = sequence.sampler.next(output.logits_RV[-1], sequence.forbidden)
        else:
            allowed_V = constraint.next_allowed(sequence.forbidden, sequence.ends)
            if allowed_V is None:
                return None
            token = sequence.sampler.next(output.logits_RV[-1], allowed_V=allowed_V)
        if constraint is not None:
            constraint.accept(token, self._token_bytes[token])
        return token

    def _end_text(self, sequence: Sequence, reason: FinishReason, *, stopped_by: int | None = None) -> None:
        """Emit the held-back text, then finish."""
        rest, stop = sequence.text.end()
        sequence.add_text(rest)
        if stop is None:
            self._leave(sequence, reason, stopped_by=stopped_by)
        else:
            self._leave(sequence, "stop", stopped_by=stop)

    def _leave(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stopped_by: str | int | None = None,
        error: str | None = None,
        refusal: Refusal | None = None,
    ) -> None:
        self.running.remove(sequence)
        self._free.append(sequence.slot)
        if reason == "error":
            self._slots.clear(sequence.slot)
        self._slots.touch(sequence.slot)
        sequence.deliver()
        self.pace.ended(sequence.generation)
        sequence.generation.finish(reason, stopped_by=stopped_by, error=error, refusal=refusal)
