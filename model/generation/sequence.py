"""A running request: its tokens, computation progress, and text so far."""

import collections.abc
from contextlib import suppress

import numpy as np
from torch import Tensor

from model.generation.constraints import Constraint
from model.generation.requests import Generation, TextPiece, TokenLogprob
from model.generation.sampler import Sampler, ScoredRow
from model.generation.speculation.length import proposal_length
from model.generation.speculation.repetition import FIRST_RATE, Proposer
from model.generation.steps.draw import Draw
from model.generation.steps.step import Segment, Wanted
from model.generation.stopping import GeneratedText


class Sequence:
    """A request that has a slot.

    num_cached_tokens: prompt tokens whose keys and values the prefix cache provided. speculates: whether a step
    may take several tokens. runs_ahead: whether segments tell how the token after the next one is chosen. step_adjusts:
    whether the step applies the sampler's penalties and biases and the constraint.
    """

    def __init__(
        self,
        generation: Generation,
        slot: int,
        num_cached_tokens: int,
        *,
        token_bytes: collections.abc.Sequence[bytes],
        end_of_text_ids: frozenset[int],
        sampler: Sampler,
        constraint: Constraint | None = None,
        speculates: bool = False,
        runs_ahead: bool = False,
        step_adjusts: bool = False,
    ) -> None:
        request = generation.request
        self.generation, self.request, self.slot = generation, request, slot
        self.num_prompt_tokens = len(request.prompt_ids)
        self.ids = np.empty(self.num_prompt_tokens + request.max_tokens, dtype=np.int64)
        self.ids[: self.num_prompt_tokens] = request.prompt_ids
        self.num_tokens = self.num_prompt_tokens
        """Number of tokens set in `ids`: the prompt's, then generated ones."""
        self.num_computed_tokens = num_cached_tokens
        """Tokens whose keys and values are in the cache."""
        self.ends: frozenset[int] = frozenset() if request.ignore_eos else end_of_text_ids
        """Tokens that end the text."""
        self.sampler, self.constraint = sampler, constraint
        self.speculates, self._runs_ahead, self._step_adjusts = speculates, runs_ahead, step_adjusts
        self._proposer: Proposer | None = None
        self._is_proposing = False
        self.hidden_sum_D: Tensor | None = None
        """Sum of the hidden states of the prompt's computed tokens, float64, shape (D,)."""
        self.prompt_scores: list[TokenLogprob | None] = [None]
        self.scored_row: ScoredRow | None = None
        """Log-probabilities of the next token, if they are requested."""
        self.text = GeneratedText(request, token_bytes)
        self._pieces: list[TextPiece] = []

    @property
    def is_prefilling(self) -> bool:
        """Whether prefill is incomplete."""
        return self.num_computed_tokens < self.num_prompt_tokens

    def next_segment(self, most: int) -> Segment:
        """The next segment to compute, at most `most` tokens."""
        end = min(self.num_tokens, self.num_computed_tokens + most)
        wanted, allowed_V = self._wanted(end), None
        if wanted == "last" and self._step_adjusts:
            allowed_V = self._allowed()
            wanted = "last" if allowed_V is None else "token"
        draws = wanted == "token" or (wanted == "last" and self.is_plain)
        draws = draws and not self.sampler.is_greedy
        ids = self.ids[self.num_computed_tokens : end]
        chosen = (self.sampler.draw(),) if draws else ()
        following: tuple[Draw | None, ...] = ()
        is_ahead = self._runs_ahead and wanted == "token" and allowed_V is None
        if is_ahead and self.num_tokens + 2 <= len(self.ids):
            following = self.sampler.draws(2)[1:] if draws else (None,)
        return Segment(
            *(self.slot, self.num_computed_tokens, ids, wanted, chosen),
            following=following,
            is_adjusted=wanted == "token" and not self.sampler.is_plain,
            allowed_V=allowed_V,
        )

    def _allowed(self) -> np.ndarray | None:
        """The tokens that may come next, (V,); None if none may, or this fails: who takes the token finds out why."""
        with suppress(Exception):
            if self.constraint is not None:
                return self.constraint.next_allowed(self.forbidden, self.ends)
            allowed_V = np.ones(self.sampler.vocab_size, np.bool_)
            allowed_V[self.forbidden] = False
            return allowed_V
        return None

    def propose(self, texts: int, most: int) -> list[int]:
        """Up to `most` tokens that may follow and are worth checking; none after most tokens of a text that does not
        repeat itself. texts: sequences in the step.
        """
        # While nothing is proposed, only each text's every n-th token of n texts is looked at: one in a step.
        behind = self.num_tokens - (self.num_prompt_tokens if self._proposer is None else len(self._proposer))
        if behind < texts and not self._is_proposing:
            return []
        if self._proposer is None:
            self._proposer = Proposer(self.ids[: self.num_tokens].tolist())
        else:
            self._proposer.extend(self.ids[self.num_tokens - behind : self.num_tokens].tolist())
        proposal = self._proposer.propose(proposal_length(self._proposer.rate, texts, min(most, self.most_proposed)))
        self._is_proposing = bool(proposal)
        return proposal

    @property
    def most_proposed(self) -> int:
        """Tokens that may be proposed, so that the one after them still belongs to the answer."""
        return len(self.ids) - self.num_tokens - 1

    @property
    def repetition_rate(self) -> float:
        """How often the tokens that `propose` names are right."""
        return FIRST_RATE if self._proposer is None else self._proposer.rate

    @property
    def may_chain(self) -> bool:
        """Whether the step can choose several tokens, one after the other."""
        return self.is_plain and (self.speculates or self._step_adjusts)

    def chained(self, steps: int) -> Segment:
        """The next segment, for that many tokens of the answer, one after the other. For texts that `may_chain`."""
        ahead = min(steps, len(self.ids) - self.num_tokens - steps) if self._runs_ahead else 0
        draws: tuple[Draw, ...] = () if self.sampler.is_greedy else self.sampler.draws(steps + ahead)
        return Segment(
            *(self.slot, self.num_computed_tokens, self.ids[self.num_computed_tokens : self.num_tokens]),
            logits="token",
            draws=draws[:steps],
            following=draws[steps:] or (None,) * ahead,
            is_adjusted=not self.sampler.is_plain,
            steps=steps,
        )

    def with_proposal(self, proposal: collections.abc.Sequence[int]) -> Segment:
        """The next segment, with proposed tokens after the last one; the next token must be plain."""
        rows = 1 + len(proposal)
        ids = np.append(self.ids[self.num_computed_tokens : self.num_tokens], proposal)
        draws = () if self.sampler.is_greedy else self.sampler.draws(rows)
        return Segment(self.slot, self.num_computed_tokens, ids, "token", draws, rows)

    def take(self, tokens: collections.abc.Sequence[int | None]) -> int:
        """Append chosen tokens, as many as surely are neither the last of the text nor need a look at each; returns
        their number.
        """
        request, generation = self.request, self.generation
        if request.stop or request.stop_token_ids or self.constraint is not None or self.scored_row is not None:
            return 0
        if generation.generated_tokens < request.min_tokens:
            return 0
        taken: list[int] = []
        for token in tokens[: max(request.max_tokens - generation.generated_tokens - 1, 0)]:
            if token is None or token in self.ends:
                break
            taken.append(token)
        if taken:
            count = len(taken)
            self.ids[self.num_tokens : self.num_tokens + count] = taken
            self.num_tokens += count
            generation.generated_tokens += count
            self.sampler.take(count)
            self._pieces.append(TextPiece(self.text.push_all(taken), tuple(taken)))
        return len(taken)

    def add_text(self, text: str, token: int | None = None, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """Text to deliver, and the token that completed it; None: no token did."""
        if text or token is not None:
            self._pieces.append(TextPiece(text, () if token is None else (token,), logprobs))

    def deliver(self) -> None:
        """Emit the text added since the last time, as one piece: an event costs a server as much as a token."""
        if len(self._pieces) > 1:
            text = "".join(piece.text for piece in self._pieces)
            ids = tuple(token for piece in self._pieces for token in piece.token_ids)
            logprobs = tuple(score for piece in self._pieces for score in piece.logprobs)
            self._pieces = [TextPiece(text, ids, logprobs)]
        for piece in self._pieces:
            self.generation.emit(piece)
        self._pieces.clear()

    @property
    def is_plain(self) -> bool:
        """Whether the step can choose the next token: nothing changes its logits but what the step knows."""
        return not self.forbidden and self.constraint is None and (self.sampler.is_plain or self._step_adjusts)

    @property
    def forbidden(self) -> list[int]:
        """Tokens excluded because they would end the text before min_tokens."""
        if self.generation.generated_tokens >= self.request.min_tokens:
            return []
        return [*self.request.stop_token_ids, *self.ends]

    def _wanted(self, end: int) -> Wanted:
        if self.request.embedding:
            return "hidden"
        if self.request.prompt_logprobs is not None and self.is_prefilling:
            return "all"
        if end < self.num_tokens:
            return "none"
        return "token" if self.is_plain and self.request.logprobs is None else "last"
