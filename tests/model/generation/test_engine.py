"""The engine gives what `generate()` gives, to many callers at once."""

import copy
import math
import random
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from model.errors import PipelineError
from model.generation import engine as engine_module
from model.generation.engine import MIB, Engine
from model.generation.requests import Finished, GenerationRequest, PromptScores, SamplingParameters
from model.generation.scheduler import Scheduler
from model.generation.steps.cache import bytes_per_token
from model.generation.steps.choose import available_steps
from model.text.tokenizer import token_bytes
from model.weights import int4, int8
from tests.model.generation.engines import GREEDY, PROMPT, StepHook, last, reference, start, tokens
from tests.support.tiny import CONTEXT, ROTATIONS, TEXT, tiny_model

pytestmark = pytest.mark.usefixtures("each_step")


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(2, 280) for _ in range(numbers.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_size": 1}, {"prefill_chunk": 5}, {"kv_cache": False}],
    ids=["batched", "one at a time", "prompts in chunks", "without cache"],
)
def test_greedy_tokens_equal_those_of_generate_in_any_company(model, tokenizer, options):
    prompts = random_prompts(24, 60)
    lengths = [random.Random(i).randint(1, CONTEXT - len(prompt)) for i, prompt in enumerate(prompts)]
    engine = start(model, tokenizer, **options)
    generations = [
        engine.submit(GenerationRequest(prompt, length, GREEDY))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    for i in (3, 9, 14):
        generations[i].cancel()
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        expected = reference(model, prompt, length)
        made = tokens(generations[i])
        assert made == (expected[: len(made)] if i in (3, 9, 14) else expected)
    assert engine.stats().running == 0
    engine.stop()


@pytest.mark.parametrize(
    "config",
    [
        {"post_norm": False},
        {"post_norm": False, "qk_norm": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        *ROTATIONS,
    ],
    ids=str,
)
def test_other_shapes_give_what_generate_gives(tokenizer, config):
    model = tiny_model(tokenizer, **config)
    engine = start(model, tokenizer, prefill_chunk=7)
    prompts = random_prompts(6, 70, seed=1)
    generations = [engine.submit(GenerationRequest(prompt, 20, GREEDY)) for prompt in prompts]
    assert [tokens(g) for g in generations] == [reference(model, prompt, 20) for prompt in prompts]
    engine.stop()


def test_a_shared_beginning_is_computed_once_and_changes_nothing(model, engine):
    beginning = random_prompts(1, 1, seed=3)[0] * 2 + list(range(50, 80))
    prompts = [[*beginning, n + 2] for n in range(8)]
    generations = [engine.submit(GenerationRequest(prompt, 12, GREEDY)) for prompt in prompts]
    assert [tokens(g) for g in generations] == [reference(model, prompt, 12) for prompt in prompts]
    stats = engine.stats()
    assert stats.cached_tokens_total == 7 * len(beginning)
    again = engine.submit(GenerationRequest(prompts[0], 12, GREEDY))
    assert tokens(again) == reference(model, prompts[0], 12)
    assert again.cached_tokens == len(beginning)


SAMPLED = {"temperature": 1.1, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "seed": 3}


@pytest.mark.parametrize("penalty", [0.0, 0.5])  # the step samples, or the scheduler
def test_a_seed_gives_the_same_text_whatever_else_runs(engine, penalty):
    sampling = SamplingParameters(**SAMPLED, presence_penalty=penalty)
    request = GenerationRequest(PROMPT, 40, sampling)
    alone = tokens(engine.submit(request))
    others = [GenerationRequest(p, 50, SamplingParameters(seed=i)) for i, p in enumerate(random_prompts(6, 40))]
    generations = [engine.submit(other) for other in [*others[:3], request, *others[3:], request]]
    assert tokens(generations[3]) == tokens(generations[-1]) == alone
    different = GenerationRequest(PROMPT, 40, SamplingParameters(temperature=1.1, seed=4))
    assert tokens(engine.submit(different)) != alone


def test_a_seed_gives_the_same_text_by_every_step_with_log_probabilities_or_without(model, tokenizer):
    texts = []
    for step in available_steps(model):
        engine = start(model, tokenizer, step=step)
        for logprobs in (None, 1):
            requests = [
                GenerationRequest(prompt, 30, replace(SamplingParameters(**SAMPLED), seed=seed), logprobs=logprobs)
                for seed, prompt in enumerate(random_prompts(6, 20))
            ]
            texts.append([tokens(generation) for generation in [engine.submit(one) for one in requests]])
        engine.stop()
    assert all(text == texts[0] for text in texts)
    assert len({tuple(text) for text in texts[0]}) == 6


@pytest.mark.parametrize("shape", [{}, *ROTATIONS[:3]], ids=str)
@pytest.mark.parametrize("kind", [int8, int4], ids=["int8", "int4"])
def test_a_quantized_model_gives_the_same_with_and_without_cache(tokenizer, kind, shape):
    model = kind.quantize(tiny_model(tokenizer, head_dim=16, **shape))
    runs = []
    for kv_cache in (True, False):
        engine = start(model, tokenizer, kv_cache=kv_cache)
        generations = [engine.submit(GenerationRequest(prompt, 20, GREEDY)) for prompt in random_prompts(6, 30)]
        runs.append([tokens(generation) for generation in generations])
        engine.stop()
    assert runs[0] == runs[1]


def test_the_text_is_that_of_the_tokens(engine, tokenizer):
    events = list(engine.submit(GenerationRequest(PROMPT, 40, SamplingParameters(seed=0))))
    ids = [token for event in events[:-1] for token in event.token_ids]
    spelled = b"".join(token_bytes(tokenizer)[token] for token in ids).decode("utf-8", "replace")
    assert "".join(event.text for event in events[:-1]) == spelled == engine.decode(ids)
    assert events[-1] == Finished("length", len(PROMPT), 40)


def test_the_whole_context_can_be_used(model, engine):
    count = CONTEXT - len(PROMPT)
    assert tokens(engine.submit(GenerationRequest(PROMPT, count, GREEDY))) == reference(model, PROMPT, count)


def test_the_end_of_text_token_stops_and_is_counted_but_not_shown(tokenizer):
    model = tiny_model(tokenizer, stops=True)
    model.generation_config.eos_token_id = None
    plain = reference(model, PROMPT, 12)
    # Whatever token comes sixth becomes the end of the text.
    model.generation_config.eos_token_id = [plain[5], tokenizer.eos_token_id]
    engine = Engine(model, tokenizer)
    events = list(engine.submit(GenerationRequest(PROMPT, 12, GREEDY)))
    on = tokens(engine.submit(GenerationRequest(PROMPT, 12, GREEDY, ignore_eos=True)))
    late = list(engine.submit(GenerationRequest(PROMPT, 12, GREEDY, min_tokens=9)))
    engine.stop()
    expected = plain[: min(plain.index(plain[5]), [*plain, 0].index(0))]
    assert [token for event in events[:-1] for token in event.token_ids] == expected
    assert events[-1] == Finished("stop", len(PROMPT), len(expected) + 1)
    assert on == plain
    assert late[-1].generated_tokens >= 9
    assert plain[5] not in [token for event in late[:-1] for token in event.token_ids][:9]


def test_a_stop_token_ends_the_text_and_is_named(model, engine):
    plain = reference(model, PROMPT, 12)
    request = GenerationRequest(PROMPT, 12, GREEDY, stop_token_ids=frozenset({plain[4]}))
    *pieces, end = engine.submit(request)
    count = plain.index(plain[4])
    assert [token for piece in pieces for token in piece.token_ids] == plain[:count]
    assert end == Finished("stop", len(PROMPT), count + 1, stopped_by=plain[4])


def test_a_stop_string_ends_the_text_before_it_also_across_tokens(model, engine):
    text = engine.decode(reference(model, PROMPT, 30))
    stop = text[9:13]
    *pieces, end = engine.submit(GenerationRequest(PROMPT, 30, GREEDY, stop=("never there", stop)))
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert (end.finish_reason, end.stopped_by) == ("stop", stop)
    *pieces, end = engine.submit(GenerationRequest(PROMPT, 30, GREEDY, stop=(stop,), min_tokens=30))
    assert end.generated_tokens == 30


def test_log_probabilities_are_those_of_the_model(model, engine):
    prompt = list(range(20, 50))
    request = GenerationRequest(prompt, 6, GREEDY, logprobs=3, prompt_logprobs=2)
    for _ in range(2):  # what is in the cache by then is computed again: every token of the prompt has a score
        scores, *pieces, _ = engine.submit(request)
        assert isinstance(scores, PromptScores) and scores.logprobs[0] is None
        ids = prompt + [token for piece in pieces for token in piece.token_ids]
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [*scores.logprobs[1:], *(score for piece in pieces for score in piece.logprobs)]
        assert [score.token_id for score in found] == ids[1:]
        for row, score in zip(expected[:-1], found, strict=True):
            assert score.logprob == pytest.approx(row[score.token_id].item(), abs=1e-4)
            assert score.top[0][1] == pytest.approx(row.max().item(), abs=1e-4)
        assert [len(score.top) for score in found] == [2] * 29 + [3] * 6


def test_a_prompt_can_be_scored_without_generating(engine):
    scores, end = engine.submit(GenerationRequest(PROMPT, 0, GREEDY, prompt_logprobs=0))
    assert len(scores.logprobs) == len(PROMPT)
    assert end == Finished("length", len(PROMPT), 0)


def test_special_tokens_written_out_in_a_prompt_are_ordinary_text(engine, tokenizer):
    ids = engine.encode("a<|endoftext|>b")
    assert tokenizer.eos_token_id not in ids
    assert engine.decode(ids) == "a<|endoftext|>b"
    assert engine.encode(TEXT) == tokenizer.encode(TEXT)


def test_ids_that_pad_the_vocabulary_have_no_text_and_can_be_generated(tokenizer):
    padded = len(tokenizer) + 40
    engine = start(tiny_model(tokenizer, vocab_size=padded), tokenizer)
    last = GenerationRequest(PROMPT, 3, replace(GREEDY, logit_bias={padded - 1: 100.0}), logprobs=1)
    *pieces, _ = engine.submit(last)
    assert [piece.token_ids for piece in pieces] == [(padded - 1,)] * 3
    assert "".join(piece.text for piece in pieces) == engine.decode([padded - 1]) == ""
    engine.stop()


def test_every_id_of_the_vocabulary_has_a_text_and_others_are_an_error(engine):
    everything = b"".join(engine.token_bytes).decode("utf-8", "replace")
    assert engine.decode(range(engine.vocab_size)) == everything
    with pytest.raises(IndexError):
        engine.decode([engine.vocab_size])


def test_many_threads_each_get_their_own_answer(model, engine):
    prompts = [[n + 2, n + 30] for n in range(16)]
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answers[number] = tokens(engine.submit(GenerationRequest(prompts[number], 10, GREEDY)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {number: reference(model, prompt, 10) for number, prompt in enumerate(prompts)}


def test_memory_for_keys_and_values_decides_how_many_generate_at_once(model, tokenizer):
    with pytest.raises(PipelineError, match="kv_cache_mib is 1"):
        start(tiny_model(tokenizer, max_position_embeddings=1 << 14), tokenizer, kv_cache_mib=1)
    wide = tiny_model(tokenizer, max_position_embeddings=1 << 12)
    engine = start(wide, tokenizer, max_batch_size=16, kv_cache_mib=3)  # a context takes 1 MiB
    assert engine.stats().cache_capacity_tokens == 3 << 12
    engine.stop()


def test_a_prefix_is_shared_while_the_cache_is_full(tokenizer):
    wide = tiny_model(tokenizer, max_position_embeddings=1 << 12)
    engine = start(wide, tokenizer, max_batch_size=2, kv_cache_mib=1)  # a context takes 1 MiB
    numbers = random.Random(1)
    kept = [numbers.randrange(2, 270) for _ in range((1 << 12) - 20)]
    assert len(tokens(engine.submit(GenerationRequest(kept, 20, GREEDY)))) == 20
    for length in (70, 128, 700):
        prompt = [*kept[:length], 5, 6, 7]
        assert tokens(engine.submit(GenerationRequest(prompt, 20, GREEDY))) == reference(wide, prompt, 20)
    assert engine.stats().cached_tokens_total >= 70 and engine.stats().restarts_total == 0
    engine.stop()


def test_a_request_that_cannot_start_is_answered(monkeypatch, model, tokenizer):
    engine, make = start(model, tokenizer), Scheduler._new_sequence

    def fail(*_):
        monkeypatch.setattr(Scheduler, "_new_sequence", make)
        raise RuntimeError("broken")

    monkeypatch.setattr(Scheduler, "_new_sequence", fail)
    assert last(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))).finish_reason == "error"
    deadline = time.monotonic() + 60
    while not engine.stats().restarts_total and time.monotonic() < deadline:
        time.sleep(0.01)
    assert tokens(engine.submit(GenerationRequest(PROMPT, 5, GREEDY))) == reference(model, PROMPT, 5)
    engine.stop()


def test_on_a_gpu_keys_and_values_take_no_more_than_most_of_the_free_memory(monkeypatch, model):
    on_gpu = SimpleNamespace(config=model.config, dtype=torch.bfloat16, device=torch.device("cuda"))
    size = bytes_per_token(model.config, torch.bfloat16)
    for tokens_free, capacity in ((10, CONTEXT), (5 * CONTEXT, 5 * CONTEXT), (1 << 40, 16 * CONTEXT)):
        free = math.ceil(tokens_free * size / engine_module.FREE_SHARE)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 60))
        assert engine_module._cache_tokens([on_gpu], 16, 0) == capacity
    assert engine_module._cache_tokens([on_gpu], 1 << 20, 1) == MIB // size


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(model, tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<|one more|>"])
    with pytest.raises(
        PipelineError, match=rf"has {len(larger)} tokens: expected at most {len(tokenizer)}, the model's"
    ):
        start(model, larger)


def test_short_texts_generate_side_by_side_in_the_memory_of_one_context(tokenizer):
    wide = tiny_model(tokenizer, max_position_embeddings=1 << 12)
    running = []
    engine = start(wide, tokenizer, max_batch_size=8, kv_cache_mib=1)  # a context takes 1 MiB
    hook = StepHook(engine, before=lambda segments: running.append(len(segments)))
    prompts = [[7, 5 + number, 9] for number in range(8)]
    asked = [engine.submit(GenerationRequest(prompt, 30, GREEDY)) for prompt in prompts]
    assert [tokens(generation) for generation in asked] == [reference(wide, prompt, 30) for prompt in prompts]
    assert max(running) == 8
    hook.remove()
    engine.stop()


def test_as_many_long_answers_as_stated_generate_at_once(tokenizer):
    model, running = tiny_model(tokenizer), []
    engine = start(model, tokenizer, max_batch_size=16)
    hook = StepHook(engine, before=lambda segments: running.append(len(segments)))
    prompts = [[7, 5 + number, 9] for number in range(17)]
    asked = [engine.submit(GenerationRequest(prompt, 80, GREEDY, ignore_eos=True)) for prompt in prompts]
    assert [len(tokens(generation)) for generation in asked] == [80] * 17
    assert max(running) == 16  # the last waits for an end, as the other slot is for short answers
    hook.remove()
    engine.stop()


def test_long_texts_wait_for_memory_and_leave_none_of_it_taken(tokenizer):
    context, count = 128, 30
    model = tiny_model(tokenizer, max_position_embeddings=context)
    bytes_of_context = context * bytes_per_token(model.config, model.dtype)
    held = []
    engine = start(model, tokenizer, max_batch_size=8, kv_cache_mib=math.ceil(2 * bytes_of_context / MIB))
    capacity = engine._scheduler._capacity = 2 * context
    hook = StepHook(engine, after=lambda segments: held.append(len(segments)))
    prompts = [[number + 3] * 40 for number in range(6)]
    asked = [engine.submit(GenerationRequest(prompt, count, GREEDY)) for prompt in prompts]
    assert [tokens(generation) for generation in asked] == [reference(model, prompt, count) for prompt in prompts]
    table = engine._scheduler._slots
    assert max(held) == capacity // table.pages(40 + count) < 4
    assert sum(table.pages(table.length(slot)) for slot in range(8)) <= capacity
    hook.remove()
    engine.stop()


def test_the_engine_leaves_the_model_that_it_was_given_as_it_was(model, tokenizer, engine):
    assert model.config._attn_implementation == "sdpa"
    batch = tokenizer(["def", "print main return"], return_tensors="pt", padding=True, padding_side="left")
    made = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert made[0, -5:].tolist() == reference(model, tokenizer("def")["input_ids"], 5)


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (GenerationRequest([], 5), "prompt"),
        (GenerationRequest([1], 0), "max_tokens"),
        (GenerationRequest([1], -1, prompt_logprobs=0), "max_tokens"),
        (GenerationRequest([1] * CONTEXT, 1), str(CONTEXT)),
        (GenerationRequest([1], CONTEXT), str(CONTEXT)),
        (GenerationRequest([-1], 1), "token ids"),
        (GenerationRequest([10**6], 1), "token ids"),
        (GenerationRequest([1], 1, SamplingParameters(logit_bias={10**6: 1.0})), "logit_bias"),
        (GenerationRequest([1], 1, stop_token_ids=frozenset({-3})), "stop_token_ids"),
    ],
)
def test_a_request_that_can_never_run_is_refused_at_once(engine, request_, names):
    with pytest.raises(PipelineError, match=names):
        engine.submit(request_)
