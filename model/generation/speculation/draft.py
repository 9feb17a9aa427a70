"""Proposals of a draft model: a smaller one with the same vocabulary, which continues each text by a few tokens.

It computes steps like the model's, over slots of the same numbers, and draws with the same random numbers, so that it
often chooses what the model will. How many tokens it proposes depends on how often it was right in this text and on the
measured time of its steps and the model's. It computes a text's tokens when it first proposes: a first token does not
wait for it.
"""

import logging
import math
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.errors import PipelineError
from model.generation.speculation.length import expected_tokens, moved
from model.generation.steps.step import Segment, Step
from model.text.tokenizer import load_tokenizer
from model.weights.int8 import is_quantized
from model.weights.loading import load_model

if TYPE_CHECKING:
    from model.generation.sequence import Sequence

logger = logging.getLogger(__name__)
FIRST_RATE = 0.6
"""Taken for the rate of right proposals until there have been some."""
NEW_SHARE_OF_ALL = 0.02
"""Of the latest proposal in the moving average over all texts, with which a text begins."""
GOOD_RATE = 0.8
LEAST_GAIN = 1.15
"""Expected tokens per second over those without the draft from which on it proposes: steps in use take longer than the
measured ones, with long texts and sampling."""
RETRY_TOKENS = 128
"""A text without a proposal for this long counts as one with GOOD_RATE, as the draft may be better than it was. It
then has to compute all of these tokens."""
USUAL_BACKLOG = 2
"""Tokens that the draft has yet to compute of a text whose last proposal was right."""
TIMED_ROWS = (1, 4, 16, 64)
TIMED_STEPS = 5


@dataclass
class _Text:
    """One slot. computed: tokens whose keys and values the draft holds, rejected ones at the end included. place: the
    position of the first token of the last `proposal`.
    """

    computed: int = 0
    rate: float = FIRST_RATE
    place: int = 0
    proposal: list[int] = field(default_factory=list)


class Draft:
    """step: the draft model's. draft_s, model_s: seconds of a step of the draft and of the model by its tokens."""

    def __init__(self, step: Step, draft_s: Many[float], model_s: Many[float]) -> None:
        self._step, self._draft_s, self._model_s = step, draft_s, model_s
        self._texts = [_Text() for _ in range(step.slots)]
        self._rate = FIRST_RATE
        self._is_broken = False

    @classmethod
    def measured(cls, step: Step, model_step: Step) -> "Draft":
        """A draft with the times that both steps, whose slots must be empty, take on this machine."""
        return cls(step, *measured_seconds([step, model_step]))

    def renewed(self) -> "Draft":
        """The same draft with empty slots, as `Step.renewed`."""
        return Draft(self._step.renewed(), self._draft_s, self._model_s)

    @property
    def cost_ratio(self) -> float:
        """Time of a step of one token over that of the model."""
        return self._draft_s[1] / self._model_s[1]

    @property
    def cache_bytes(self) -> int:
        """Memory that its keys and values hold."""
        return self._step.cache_bytes(sum(text.computed for text in self._texts))

    def copy(self, source: int, target: int, length: int) -> None:
        """Follow `Step.copy` of the model's step."""
        length = min(length, self._texts[source].computed)
        self.truncate(target, 0)
        if length:
            self._step.copy(source, target, length)
            self._texts[target].computed = length

    def truncate(self, slot: int, length: int) -> None:
        """Follow `Step.truncate` of the model's step."""
        if length < self._texts[slot].computed:
            self._step.truncate(slot, length)
            self._texts[slot].computed = length

    def clear(self, slot: int) -> None:
        """Follow `Step.clear` of the model's step."""
        self._step.clear(slot)
        self._texts[slot].computed = 0

    def start(self, sequence: "Sequence") -> None:
        """A sequence begins in its slot, with the tokens that are computed already."""
        self.truncate(sequence.slot, sequence.num_computed_tokens)
        computed = self._texts[sequence.slot].computed
        self._texts[sequence.slot] = _Text(computed, self._rate, sequence.num_tokens)

    def improve(
        self, sequences: Many["Sequence"], proposals: list[list[int]], texts: int, most: int, room: int
    ) -> list[list[int]]:
        """The proposals, one for each sequence, with own ones of up to `most` tokens where those give more tokens per
        second.

        texts: sequences in the model's step. room: tokens of texts that the draft has not followed which it may compute
        now, so that a long prompt does not delay the others. If the draft fails, it proposes nothing anymore.
        """
        if self._is_broken:
            return proposals
        try:
            most_each = [self._most(sequence, most) for sequence in sequences]
            counts = self._counts(sequences, [len(proposal) for proposal in proposals], most_each, texts)
            drafted = self._propose(sequences, counts, room)
        except Exception:
            logger.exception("the draft model failed: the texts go on without it")
            self._is_broken = True
            return proposals
        return [own or proposal for own, proposal in zip(drafted, proposals, strict=True)]

    def _propose(self, sequences: Many["Sequence"], counts: list[int], room: int) -> list[list[int]]:
        proposals: list[list[int]] = [[] for _ in sequences]
        batch = []
        for number, sequence in enumerate(sequences):
            if not counts[number]:
                continue
            text = self._texts[sequence.slot]
            behind = sequence.num_tokens - text.computed - USUAL_BACKLOG
            if behind <= room:
                text.place, text.proposal = sequence.num_tokens, proposals[number]
                batch.append((number, self._segment(sequence, [])))
            elif room > 0:
                ids = sequence.ids[text.computed : text.computed + room]
                batch.append((number, Segment(sequence.slot, text.computed, ids, "none")))
            room -= max(0, min(behind, room))
        while batch:
            outputs = self._step.compute([segment for _, segment in batch])
            following = []
            for (number, segment), output in zip(batch, outputs, strict=True):
                self._texts[segment.slot].computed = segment.start + len(segment.ids)
                token = output.tokens[0] if output.tokens else None
                if token is not None:
                    proposals[number].append(token)
                    if len(proposals[number]) < counts[number]:
                        following.append((number, self._segment(sequences[number], proposals[number])))
            batch = following
        return proposals

    def _segment(self, sequence: "Sequence", proposal: list[int]) -> Segment:
        """The tokens that the draft has not computed yet, to choose the one after them."""
        computed = self._texts[sequence.slot].computed
        if proposal:
            ids = np.array(proposal[computed - sequence.num_tokens :])
        else:
            ids = sequence.ids[computed : sequence.num_tokens]
        place = len(proposal)
        draws = () if sequence.sampler.is_greedy else sequence.sampler.draws(place + 1)[place:]
        return Segment(sequence.slot, computed, ids, "token", draws)

    def _most(self, sequence: "Sequence", most: int) -> int:
        """Tokens that may be proposed for a sequence, whose last proposal is judged."""
        self._judge(sequence)
        return max(0, min(most, sequence.most_proposed, self._step.context_length - sequence.num_tokens))

    def _counts(self, sequences: Many["Sequence"], proposed: list[int], most_each: list[int], texts: int) -> list[int]:
        """Tokens to propose for each sequence: as many for all, that give the most tokens per second, where they are
        better than the `proposed` ones of the text itself. A pass of the draft delays all `texts`, so that one which
        pays for several need not pay for one.
        """
        usual = [expected_tokens(s.repetition_rate, count) for s, count in zip(sequences, proposed, strict=True)]
        others = texts - len(sequences)
        rows = [count + 1 for count in proposed]
        best = LEAST_GAIN * (sum(usual) + others) / _at(self._model_s, sum(rows) + others)
        rates = [self._rate_of(sequence) for sequence in sequences]
        counts, former = [0] * len(sequences), 0.0
        for count in range(1, max(most_each, default=0) + 1):
            own = [min(count, most) for most in most_each]
            tokens = [expected_tokens(rate, some) for rate, some in zip(rates, own, strict=True)]
            chosen = [some if mine > other else 0 for some, mine, other in zip(own, tokens, usual, strict=True)]
            drafting = sum(some > 0 for some in chosen)
            all_rows = sum(some + 1 if some else row for some, row in zip(chosen, rows, strict=True)) + others
            seconds = _at(self._model_s, all_rows) + max(chosen) * _at(self._draft_s, drafting)
            speed = (sum(map(max, tokens, usual)) + others) / seconds
            if speed > best:
                best, counts = speed, chosen
            elif speed < former:
                break
            former = speed
        return counts

    def _rate_of(self, sequence: "Sequence") -> float:
        """The rate of a text, or a good one if it is time to try the draft again."""
        text = self._texts[sequence.slot]
        is_due = sequence.num_tokens - text.place >= RETRY_TOKENS
        return max(text.rate, GOOD_RATE) if is_due else text.rate

    def _judge(self, sequence: "Sequence") -> None:
        """Compare the last proposal with what followed, and forget the keys and values of wrong tokens."""
        text = self._texts[sequence.slot]
        right = 0
        for proposed, token in zip(text.proposal, sequence.ids[text.place : sequence.num_tokens], strict=False):
            is_right = bool(proposed == token)
            text.rate = moved(text.rate, is_right=is_right)
            self._rate = moved(self._rate, is_right=is_right, share=NEW_SHARE_OF_ALL)
            if not is_right:
                break
            right += 1
        if text.proposal:
            text.computed = min(text.computed, text.place + right)
            text.proposal = []


def _at(seconds: Many[float], rows: int) -> float:
    """The last one stands for more rows."""
    return seconds[min(rows, len(seconds) - 1)]


def measured_seconds(steps: Many[Step]) -> list[list[float]]:
    """Seconds of each step by its number of tokens, from 0 on: the fastest of a few over each of TIMED_ROWS tokens, in
    between interpolated. Their slots must be empty, and are again.

    The steps take turns, as each displaces the weights of the other from the caches.
    """
    fastest = [[math.inf] * len(TIMED_ROWS) for _ in steps]
    for place, rows in enumerate(TIMED_ROWS):
        for _ in range(TIMED_STEPS):
            for step, seconds in zip(steps, fastest, strict=True):
                length = math.ceil(rows / step.slots)
                ids = np.zeros(length, dtype=np.int64)
                segments = [Segment(slot, 0, ids, "token", rows=length) for slot in range(math.ceil(rows / length))]
                started = time.perf_counter()
                step.compute(segments)
                seconds[place] = min(seconds[place], time.perf_counter() - started)
    for step in steps:
        for slot in range(step.slots):
            step.clear(slot)
    return [np.interp(range(TIMED_ROWS[-1] + 1), TIMED_ROWS, seconds).tolist() for seconds in fastest]


def load_draft(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The draft model of a directory, on the device of `model` and in its precision: int8 if that is quantized.

    tokenizer: the model's. Raises PipelineError if the directory is not a REX model, or has another tokenizer.
    """
    theirs, ours = load_tokenizer(directory).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        raise PipelineError(
            f"the draft model {str(directory)!r} has another tokenizer ({len(theirs):,} tokens, "
            f"{len(theirs.items() ^ ours.items()):,} entries differ): expected the model's, of {len(ours):,} tokens; "
            "train it with tokenizer=pretrained tokenizer.path=FOLDER"
        )
    return load_model(directory, device=str(model.device), quantized=is_quantized(model), dtype=model.dtype)
