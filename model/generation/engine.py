"""The generation engine: a bounded request queue, and one thread that batches requests and emits their events.

    engine = Engine(load_model(path), load_tokenizer(path))
    for event in engine.submit(GenerationRequest(engine.encode("def "), max_tokens=20)): ...

Greedy decoding gives the tokens of transformers' `generate()`, regardless of other requests. This module runs and
supervises the thread: if it dies or a step hangs, requests in flight fail and the engine restarts once. `scheduler.py`
assembles the steps, `step.py` is the interface of their computation. HTTP routes and limits are in the server.
"""

import atexit
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.errors import PipelineError
from model.generation.beams import Search, searches
from model.generation.grammar.grammar import Grammar, GrammarCompiler, Kind
from model.generation.queue import QueueFull, RequestQueue, slots_for, usual_requests
from model.generation.requests import (
    Deliver,
    EngineBusy,
    EngineStats,
    EngineStopped,
    Event,
    Generation,
    GenerationRequest,
    SamplingParameters,
)
from model.generation.scheduler import Scheduler
from model.generation.speculation.draft import Draft
from model.generation.steps.cache import bytes_per_token
from model.generation.steps.choose import REFERENCE, choose_step, step_class
from model.generation.steps.step import Step
from model.settings import ServingSettings
from model.system.allocator import keep_freed_memory
from model.system.cpu import release_worker_threads
from model.text.tokenizer import FastEncoder, token_bytes

logger = logging.getLogger(__name__)
MAX_RETRY_AFTER_S = 60
MIB = 1 << 20
FREE_SHARE = 0.45
"""Of a GPU's free memory: a restart makes a cache beside that of a step that hangs."""
RESTART_S = 300.0
"""Most time of a restart, which starts vLLM or records CUDA graphs."""
DIED = "the engine died"


class Engine:
    """Generates text with one model in one thread; every method is safe to call from any thread.

    max_batch_size: requests that generate at once, besides some with short answers (`slots_for`); 0: as many as
    are usual on the device.
    kv_cache_mib: memory limit for keys and values, in MiB: a request starts when its prompt and its longest answer fit
    beside the running ones. 0: as much as their contexts need, which a processor commits as texts grow; of a
    GPU's free memory, FREE_SHARE at most.
    kv_cache: False recomputes all earlier tokens for each new one, for comparison.
    prefill_chunk: tokens of one step with prompts in it, those that decode included.
    max_queue, max_queue_tokens: requests that may wait besides those that run, and tokens of their prompts.
    step: how a step is computed, a name of `steps.py` or "auto". threads: of a step that has its own, at most; None: as
    many as torch has. step_timeout_s: a step that takes longer counts as hung. speculative_tokens: most tokens that a
    step proposes for one text and checks at once; texts stay the same. draft: a smaller model with the same vocabulary
    that proposes them, too.
    end_of_text_ids: tokens that end a text; None: the model's own.
    Raises PipelineError if the memory does not hold one context, for more tokens than the model has, and for a draft
    with another vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        kv_cache: bool = ServingSettings.kv_cache,
        max_batch_size: int = ServingSettings.max_batch_size,
        kv_cache_mib: int = ServingSettings.kv_cache_mib,
        prefill_chunk: int = ServingSettings.prefill_chunk,
        max_queue: int = ServingSettings.max_queue,
        max_queue_tokens: int = ServingSettings.max_queue_tokens,
        step: str = "auto",
        threads: int | None = None,
        step_timeout_s: float = ServingSettings.step_timeout_s,
        speculative_tokens: int = ServingSettings.speculative_tokens,
        draft: PreTrainedModel | None = None,
        end_of_text_ids: frozenset[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size: int = model.config.vocab_size
        self.hidden_size: int = model.config.hidden_size
        self.context_length: int = model.config.max_position_embeddings
        """Most tokens of prompt and answer together."""
        if end_of_text_ids is None:
            end_of_text_ids = _end_of_text_ids(model, tokenizer)
        self.end_of_text_ids = end_of_text_ids
        known = token_bytes(tokenizer)
        if len(known) > self.vocab_size:
            raise PipelineError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has {len(known):,} tokens: expected at most "
                f"{self.vocab_size:,}, the model's vocab_size; take the tokenizer that came with the model"
            )
        self.token_bytes: Sequence[bytes] = [*known, *[b""] * (self.vocab_size - len(known))]
        """Of every id of the vocabulary; those that pad it have none."""
        self._encoder = FastEncoder(tokenizer)
        self._grammars = GrammarCompiler(
            known,
            special_ids=tokenizer.all_special_ids,
            end_of_text_ids=sorted(end_of_text_ids) or [tokenizer.eos_token_id or 0],
            vocab_size=self.vocab_size,
            encode=lambda data: self._encoder.encode_bytes(data).tolist(),
        )
        self._kv_cache, self._prefill_chunk, self._step_timeout_s = kv_cache, prefill_chunk, step_timeout_s
        models = [model, draft] if draft is not None else [model]
        self._slots = slots_for(max_batch_size or usual_requests(model.device.type))
        self._cache_tokens = _cache_tokens(models, self._slots, kv_cache_mib)
        self._is_limited = self._cache_tokens < self._slots * self.context_length
        self._threads, self._speculative_tokens = threads, speculative_tokens
        self._max_queue, self._max_queue_tokens = max_queue, max_queue_tokens
        self._queue = RequestQueue(max_queue, max_queue_tokens)
        self._changed = threading.Condition()
        self._stopping = False
        self._is_warm = False
        self._restarts = 0
        self._retired: Scheduler | None = None
        """The one that a restart replaces: its thread may still be in a step."""
        self._step_started: float | None = None
        self._past = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        self._step = self._create_step(model, step)
        self._draft = None if draft is None else self._create_draft(draft)
        keep_freed_memory()
        release_worker_threads()
        self._scheduler = self._new_scheduler()
        self._thread = self._start()
        self._watchdog = threading.Thread(target=self._watch, name="generation-watchdog", daemon=True)
        self._watchdog.start()
        # A thread still inside torch at interpreter shutdown would abort the process.
        atexit.register(self.stop)

    @property
    def step_name(self) -> str:
        """Which implementation computes the steps: "reference" or another of `steps.py`."""
        return self._step.name

    @property
    def precision(self) -> str:
        """Precision of the weights: "float32", "bfloat16" or "int8"."""
        return self._step.precision

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values per token."""
        return self._step.bytes_per_token

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs or restarts; permanently False once it is dead or stopped."""
        return not self._stopping

    @property
    def is_ready(self) -> bool:
        """Whether the model has generated a token and can generate more."""
        return self._is_warm and self.is_alive

    def stats(self) -> EngineStats:
        """Current load, and counters since creation."""
        scheduler, past = self._scheduler, self._past
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(self._queue),
            waiting_tokens=self._queue.tokens,
            cache_tokens=scheduler.cache_tokens,
            cache_capacity_tokens=self._cache_tokens,
            prompt_tokens_total=past.prompt_tokens_total + scheduler.prompt_tokens,
            cached_tokens_total=past.cached_tokens_total + scheduler.cached_tokens,
            generated_tokens_total=past.generated_tokens_total + scheduler.generated_tokens,
            cancelled_total=past.cancelled_total + scheduler.cancelled,
            restarts_total=self._restarts,
            cache_bytes=scheduler.cache_bytes,
            proposed_tokens_total=past.proposed_tokens_total + scheduler.proposed_tokens,
            accepted_tokens_total=past.accepted_tokens_total + scheduler.accepted_tokens,
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; special tokens in it are encoded as ordinary text. Long texts take seconds."""
        ids: list[int] = self._encoder.encode(text).tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; bytes that are not UTF-8 become U+FFFD. Raises IndexError for an id outside the
        vocabulary.
        """
        return b"".join(map(self.token_bytes.__getitem__, ids)).decode("utf-8", "replace")

    def compile_grammar(self, kind: Kind, source: str) -> Grammar:
        """A grammar for requests to this engine, see `GrammarCompiler.compile`. Raises PipelineError."""
        return self._grammars.compile(kind, source)

    def compiled_grammar(self, kind: Kind, source: str) -> Grammar | None:
        """The grammar if it is in the cache of compiled grammars, else None."""
        return self._grammars.kept(kind, source)

    def submit(self, request: GenerationRequest, deliver: Deliver | None = None) -> Generation:
        """Queue a request. Its events go to `deliver`, in the engine's thread, or to the iterator of the Generation.

        Raises PipelineError for a request that can never run, EngineBusy if the queue is full, EngineStopped.
        """
        return self._admit([Generation(request, deliver)])[0]

    def submit_all(
        self, requests: Sequence[GenerationRequest], deliver: Callable[[int, Event], None]
    ) -> list[Generation]:
        """Queue all requests or none; `deliver` is called with a request's index and an event.

        Raises as `submit` does.
        """
        return self._admit([Generation(request, partial(deliver, i)) for i, request in enumerate(requests)])

    def warm_up(self) -> None:
        """Generate one token, so that buffers are allocated before the first request. Raises PipelineError."""
        start = min(self.end_of_text_ids, default=0)
        *_, last = self.submit(GenerationRequest([start], 1, SamplingParameters(temperature=0)))
        if last.finish_reason not in ("stop", "length"):  # type: ignore[union-attr]
            raise PipelineError(f"the model cannot generate a token ({last}): see the log; make the model again")
        self._is_warm = True

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its current step; running and waiting requests finish as canceled."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._watchdog.join(timeout_s)
        atexit.unregister(self.stop)

    def _admit(self, generations: list[Generation]) -> list[Generation]:
        for generation in generations:
            self._check(generation.request)
        self._check_together(generations)
        beginnings = [self._beginning(group) for group in searches(generations)]
        with self._changed:
            if not self.is_alive:
                raise EngineStopped
            try:
                self._queue.put(generations, room=self._scheduler.free_slots, beginnings=beginnings)
            except QueueFull:
                running = [sequence.generation for sequence in list(self._scheduler.running)]
                seconds = self._scheduler.pace.seconds([*running, *self._queue.generations()], self._slots)
                raise EngineBusy(min(MAX_RETRY_AFTER_S, math.ceil(seconds))) from None
            self._changed.notify_all()
        return generations

    def _beginning(self, group: list[Generation]) -> Generation:
        """The first request of a beam search; a generation without one is that itself."""
        if group[0].request.beams is None:
            return group[0]
        search = Search(
            group,
            ends=self.end_of_text_ids,
            token_bytes=self.token_bytes,
            submit=self._continue,
            release=partial(self._queue.release, len(group) - 1),
        )
        return search.parts()[0]

    def _continue(self, parts: Sequence[Generation]) -> None:
        with self._changed:
            if not self.is_alive:
                raise EngineStopped
            self._queue.put_continuations(parts)
            self._changed.notify_all()

    def _check(self, request: GenerationRequest) -> None:
        prompt, wanted = len(request.prompt_ids), request.max_tokens
        if not prompt:
            raise PipelineError("the prompt has no tokens: expected at least one")
        if wanted < 0 or (wanted == 0 and request.prompt_logprobs is None and request.embedding is None):
            raise PipelineError(f"max_tokens is {wanted}: expected 1 or more")
        if prompt + wanted > self.context_length:
            raise PipelineError(
                f"the prompt has {prompt:,} tokens and max_tokens is {wanted:,}: together at most "
                f"{self.context_length:,} fit into the model's context"
            )
        if request.beams and request.beams.width > self.vocab_size - len(self.end_of_text_ids):
            raise PipelineError(f"a beam search of width {request.beams.width:,}: the vocabulary has fewer tokens")
        named = [
            ("the prompt", request.prompt_ids),
            ("logit_bias", request.sampling.logit_bias),
            ("stop_token_ids", request.stop_token_ids),
            ("allowed_token_ids", request.allowed_token_ids),
        ]
        for name, ids in named:
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise PipelineError(f"{name} has token ids outside 0 to {self.vocab_size - 1}")

    def _check_together(self, generations: list[Generation]) -> None:
        """Refuse batches that exceed even an idle engine: a retry could never succeed."""
        requests, tokens = len(generations), sum(len(generation.request.prompt_ids) for generation in generations)
        if requests > self._slots + self._max_queue:
            raise PipelineError(f"{requests:,} texts at once: at most {self._slots + self._max_queue:,} have a place")
        if requests > self._slots and tokens > self._max_queue_tokens:
            raise PipelineError(
                f"the {requests:,} prompts have {tokens:,} tokens: more than {self._slots} at once may have "
                f"{self._max_queue_tokens:,} together; send fewer at once"
            )

    def _create_step(self, model: PreTrainedModel, name: str) -> Step:
        chosen = choose_step(model, name)
        try:
            return self._created(chosen, model)
        except PipelineError as error:
            if name != "auto" or chosen.name == REFERENCE:
                raise
            logger.warning("%s; the step %r computes instead", error, REFERENCE)
        return self._created(step_class(REFERENCE), model)

    def _created(self, chosen: type[Step], model: PreTrainedModel) -> Step:
        if not chosen.grows(model):
            self._slots = min(self._slots, self._cache_tokens // self.context_length)
        tokens = max(self._cache_tokens, self.context_length)
        return chosen.create(model, self._slots, tokens, self._threads)

    def _create_draft(self, model: PreTrainedModel) -> Draft | None:
        """The draft, if this engine's step can use one; else a log line says why not."""
        if model.config.vocab_size != self.vocab_size:
            raise PipelineError(
                f"the draft model has a vocabulary of {model.config.vocab_size:,} tokens: expected the model's, "
                f"{self.vocab_size:,}; train it with the model's tokenizer"
            )
        kind = type(self._step)
        reason = kind.unavailable(model)
        if not kind.is_batch_invariant:
            reason = f"the step {kind.name!r} checks no proposals"
        elif not (self._speculative_tokens and self._kv_cache):
            reason = "speculative_tokens is 0, or kv_cache false"
        if reason:
            logger.warning("the draft model is not used: %s", reason)
            return None
        tokens = self._slots * model.config.max_position_embeddings
        draft = Draft.measured(kind.create(model, self._slots, tokens, self._threads), self._step)
        logger.info("a step of the draft model takes %.2f of the model's time", draft.cost_ratio)
        return draft

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self._step,
            self._queue,
            token_bytes=self.token_bytes,
            end_of_text_ids=self.end_of_text_ids,
            prefill_chunk=self._prefill_chunk,
            kv_cache=self._kv_cache,
            cache_tokens=self._cache_tokens if self._is_limited else None,
            speculative_tokens=self._speculative_tokens,
            draft=self._draft,
        )

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, args=(self._scheduler,), name="generation-engine", daemon=True)
        thread.start()
        return thread

    def _run(self, scheduler: Scheduler) -> None:
        try:
            if self._restarts:
                scheduler.probe()
                self._is_warm = True
            while self._retired is not scheduler and self._wait_for_work(scheduler):
                started = time.monotonic()
                self._step_started = started
                scheduler.step()
                if self._retired is not scheduler:
                    self._step_started = None
                    self._is_warm = self._is_warm or scheduler.answered > 0
        except BaseException:
            logger.exception("the engine's thread died")
            self._recover(scheduler, "the engine died: it restarts, try again")
        else:
            if self._retired is not scheduler:
                self._finish_all("cancelled")

    def _wait_for_work(self, scheduler: Scheduler) -> bool:
        """Block until a request arrives; False when the engine stops."""
        with self._changed:
            while not self._stopping and not scheduler.running and not len(self._queue):
                self._changed.wait()
            return not self._stopping

    def _watch(self) -> None:
        """Watchdog for hanging steps. A thread cannot be killed, so it is abandoned and its results are ignored.

        Time in which this process was stopped (SIGSTOP, a paused container) belongs to no step: a look counts for at
        most two intervals.
        """
        interval_s = min(1.0, self._step_timeout_s / 4)
        watched: float | None = None
        age_s, looked = 0.0, time.monotonic()
        while not self._stopping:
            scheduler, started, now = self._scheduler, self._step_started, time.monotonic()
            age_s = (age_s if started == watched else 0.0) + min(now - looked, 2 * interval_s)
            watched, looked = started, now
            if started is not None and age_s > self._step_timeout_s:
                logger.error("a step has taken longer than %g s", self._step_timeout_s)
                self._recover(scheduler, "the engine hung: it restarts, try again")
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, timeout=interval_s)

    def _recover(self, scheduler: Scheduler, reason: str) -> None:
        """Fail requests in flight and restart; a second failure, or a failing restart, leaves the engine dead."""
        with self._changed:
            if self._retired is scheduler or self._stopping:
                return
            self._retired = scheduler
            self._is_warm, self._step_started = False, None
            in_flight = [sequence.generation for sequence in scheduler.running]
            is_dead, self._restarts = self._restarts > 0, 1
            self._stopping = is_dead
        for generation in in_flight:
            generation.finish("error", error=DIED if is_dead else reason)
        if is_dead or not self._restart():
            self._finish_all("error", DIED)

    def _restart(self) -> bool:
        """Go on with a new step; False if there is none. Requests are admitted meanwhile: a GPU may hang here, too."""
        made: list[tuple[Step, Draft | None]] = []

        def make() -> None:
            try:
                made.append((self._step.renewed(), self._draft and self._draft.renewed()))
            except BaseException:
                logger.exception("the engine cannot restart")

        maker = threading.Thread(target=make, name="generation-restart", daemon=True)
        maker.start()
        maker.join(RESTART_S)
        if maker.is_alive():
            logger.error("the engine has not restarted within %g s", RESTART_S)
        with self._changed:
            if self._stopping:  # asked to meanwhile
                self._finish_all("cancelled")
            elif made:
                self._past = self.stats()
                ((self._step, self._draft),) = made
                self._scheduler = self._new_scheduler()
                self._thread = self._start()
            else:
                self._stopping = True
                return False
        return True

    def _finish_all(self, reason: str, error: str | None = None) -> None:
        running = [sequence.generation for sequence in self._scheduler.running]
        self._scheduler.running.clear()
        for generation in [*running, *self._queue.clear()]:
            generation.finish(generation.interruption() or reason, error=error)  # type: ignore[arg-type]


def _cache_tokens(models: Sequence[PreTrainedModel], slots: int, kv_cache_mib: int) -> int:
    """Most tokens in the cache. models: the model and, if there is one, its draft. Raises PipelineError if the memory
    does not hold one context.
    """
    context, device = int(models[0].config.max_position_embeddings), models[0].device
    token_size = sum(bytes_per_token(model.config, model.dtype) for model in models)
    if not kv_cache_mib:
        tokens = slots * context
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            tokens = max(min(tokens, int(FREE_SHARE * free) // token_size), context)
        return tokens
    tokens = kv_cache_mib * MIB // token_size
    if tokens < context:
        size = token_size * context
        raise PipelineError(
            f"kv_cache_mib is {kv_cache_mib}: one context of {context:,} tokens takes {math.ceil(size / MIB):,} MiB; "
            f"give it that much"
        )
    return min(tokens, slots * context)


def _end_of_text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)
