"""Compares an exported model in its engine with REX, and writes a certificate.

Compared on difficult prompts: token ids (with special tokens parsed, and as text), chat templates, greedy
continuations, log-probabilities of the chosen tokens, and bits per byte of held-out text. A greedy difference is
accepted only if REX's two best log-probabilities differ by less than twice the format's bound. Two differences are of
GGUF: it bounds no run of characters (other tokens are accepted if they are those of the tokenizer without its bound),
and has places for three of the tokens that end a generation. Accepted differences are listed.

The engine of a file that is rounded is compared with REX in the same numbers (`model/export/stored.py`); what rounding
costs is listed on its own.
"""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.errors import PipelineError
from model.export.gguf import MARKS_THAT_END
from model.export.stored import ROUNDED, as_stored
from model.modeling_rex import RexForCausalLM
from model.system.commands import ending_with_parent
from model.system.cpu import limit_threads
from model.system.failure import reason_of
from model.text.chat.template import MARKS
from model.text.tokenizer import MAX_RUN_LENGTH, without_bound
from model.text.tokens import TokenDataset

STEPS = 16
"""Greedy tokens after each prompt."""
LOG_PROBABILITY_BOUND = {"float32": 1e-3, "bfloat16": 0.25, "int8": 0.25, "q8_0": 0.25, "q4_0": 0.25}
"""Largest difference of one log-probability, nats, by storage precision of the exported weights."""
BITS_PER_BYTE_BOUND = 1e-3
"""Largest difference in bits per byte on the same held-out tokens."""
_NO_END_IN_GGUF = set(MARKS.values()) - set(MARKS_THAT_END)
SCORED_TOKENS = 2048
"""Held-out tokens to score, or all where there are fewer: an engine that rounds activations to 8 bits shifts a single
log-probability by a hundredth of a nat, the mean of so many by a few ten-thousandths."""
WINDOW = 257
"""Tokens of a window at most, the first of which has no score: windows are evenly spread over the validation split."""

TEXTS = {
    "empty": "",
    "one letter": "a",
    "unicode": "naïve Größe, Ελληνικά, 日本語, עברית, 👩‍👩‍👧 e\u0301 \u00a0\u2003\u200b\ufeff",
    "whitespace runs": "a  b   c\t\t d\n\n\n    e \r\n  \n",
    "special tokens spelled out": "before<|endoftext|>after <|pad|> <|endoftex t|>",
    "code": 'def f(x, *, y=1):\n    """Doc."""\n    return {k: v**2 for k, v in x.items()}  # it\'s\n',
    "numbers": "1234567890 3.14159e-10 0x1F 1,000,000 ½ ² Ⅷ ٣",
    "contractions": "I'm we've THEY'LL don't 'sup it''s",
    "control characters": "a\x01b\x1b[0m\x7fc",
}


def _runs(length: int) -> str:
    """One run of each kind of character that a pre-token consists of, `length` characters each."""
    runs = [(pattern * length)[:length] for pattern in ("return", "1729", "=-", "日本語")]
    return "\n".join([*runs, "a" + " " * length + "b"])


RUNS = {
    f"runs of {MAX_RUN_LENGTH} characters": _runs(MAX_RUN_LENGTH),
    f"runs of {MAX_RUN_LENGTH + 1} characters": _runs(MAX_RUN_LENGTH + 1),
    f"runs of {3 * MAX_RUN_LENGTH} characters": _runs(3 * MAX_RUN_LENGTH),
}
"""Texts whose tokens are compared, at the bound on a run and beyond it."""
CHATS = {
    "one turn": [{"role": "user", "content": "What does  zip do?"}],
    "three turns": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n"},
    ],
}


@dataclass
class Certificate:
    """Scope and results of the comparison with one engine; `differences` is empty if they agree."""

    engine: str
    file: str
    precision: str
    prompts: int
    greedy_tokens: int
    explained_differences: list[str]
    log_probability_difference: float
    """Largest difference found, nats; `bound` is the limit."""
    log_probability_bound: float
    bits_per_byte: float
    """Of the engine, on `scored_tokens` held-out tokens."""
    bits_per_byte_difference: float
    bits_per_byte_bound: float
    scored_tokens: int
    compared_with: str
    """checkpoint, or the precision to which it was rounded."""
    bits_per_byte_lost_by_rounding: float
    """Of the rounded model in REX, above those of the checkpoint."""
    differences: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the engine computes the same model."""
        return not self.differences


def certify(
    model: RexForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dataset: TokenDataset,
    engine: str,
    path: Path,
    precision: str,
    *,
    name: str = "",
    python: Path = Path(sys.executable),
) -> Certificate:
    """Run `engine` on the export at `path`, and compare with `model`, a REX model in eval mode on the CPU.

    model: in full precision. precision: how the weights at `path` are stored, a key of LOG_PROBABILITY_BOUND. name: of
    the file in the certificate. python: the interpreter that has the engine.
    Raises PipelineError with the engine's error if it cannot load or run the file.
    """
    limit_threads()
    length = min(WINDOW, model.config.max_position_embeddings, len(dataset.tokens))
    available = (len(dataset.tokens) - 1) // (length - 1)
    count = min(math.ceil(SCORED_TOKENS / (length - 1)), available)
    starts = [index * available // count * (length - 1) for index in range(count)]
    windows = [dataset.tokens[start : start + length].astype("int64").tolist() for start in starts]
    asked = _questions(model, tokenizer, windows, dataset)
    answers = _ask(engine, path, asked, python)
    return _compare(model, tokenizer, dataset, asked, answers, precision, name or path.name, engine == "llama.cpp")


def _questions(
    model: RexForCausalLM, tokenizer: PreTrainedTokenizerFast, windows: list[list[int]], dataset: TokenDataset
) -> dict[str, Any]:
    context = model.config.max_position_embeddings
    room = context - STEPS
    plain = _plain(tokenizer)
    chats = CHATS if tokenizer.chat_template else {}
    rendered = {
        name: str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        for name, turns in chats.items()
    }
    first = model.config.bos_token_id or 0
    # An engine needs at least one token: the empty prompt is an end-of-text token.
    prompts = {name: plain.encode(text).ids[:room] or [first] for name, text in TEXTS.items()}
    prompts |= {name: tokenizer(text, add_special_tokens=False).input_ids[:room] for name, text in rendered.items()}
    prompts["longest context"] = dataset.tokens[:room].astype("int64").tolist()
    return {
        "texts": {**TEXTS, **RUNS, **rendered},
        "chats": chats,
        "ids": prompts,
        "steps": STEPS,
        "windows": windows,
        "context": context,
        "vocab_size": model.config.vocab_size,
    }


def _plain(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that reads special tokens in a text as ordinary text."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain


def _both_ways(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """Ids of a text with special tokens read as such, and with them as ordinary text."""
    ids: list[list[int]] = []
    for plain in (False, True):
        tokenizer.encode_special_tokens = plain
        ids.append(tokenizer.encode(text, add_special_tokens=False).ids)
    return ids


def _compare_tokens(
    tokenizer: PreTrainedTokenizerFast, texts: dict[str, str], found: dict[str, list[list[int]]], *, in_gguf: bool
) -> tuple[list[str], list[str]]:
    """Differences of the tokens, and the explained ones: a tokenizer in a GGUF bounds no run of characters."""
    ours, differences, explained = _plain(tokenizer), [], []
    unbounded = without_bound(ours)
    for title, text in texts.items():
        expected = _both_ways(ours, text)
        if found[title] == expected:
            continue
        if in_gguf and found[title] == _both_ways(unbounded, text):
            explained.append(
                f"tokens of {title!r}: {len(found[title][1]):,}, here {len(expected[1]):,}, as a GGUF splits no run of "
                f"more than {MAX_RUN_LENGTH} characters"
            )
        else:
            differences.append(f"tokens of {title!r}: {found[title]}, expected {expected}")
    return differences, explained


def _ask(engine: str, path: Path, asked: dict[str, Any], python: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.json"
        done = subprocess.run(
            ending_with_parent([str(python), "-m", "model.export.engines", engine, str(path)]),
            input=json.dumps({**asked, "output": str(output)}),
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
        if done.returncode or not output.is_file():
            reason = reason_of(done.stderr, done.returncode)
            raise PipelineError(f"{engine} cannot run {path}: {reason}; export the checkpoint again")
        answers: dict[str, Any] = json.loads(output.read_text())
        return answers


@torch.no_grad()
def _compare(
    model: RexForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dataset: TokenDataset,
    asked: dict[str, Any],
    answers: dict[str, Any],
    precision: str,
    name: str,
    in_gguf: bool,
) -> Certificate:
    stored = as_stored(model, precision)
    differences, explained = _compare_tokens(tokenizer, asked["texts"], answers["tokens"], in_gguf=in_gguf)
    for title, turns in asked["chats"].items():
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        if answers["chats"][title] != text:
            differences.append(f"chat template of {title!r}: {answers['chats'][title]!r}, expected {text!r}")
    bound = LOG_PROBABILITY_BOUND[precision]
    largest, compared = 0.0, 0
    for title, ids in asked["ids"].items():
        chosen = [int(token) for token, _ in answers["greedy"][title]]
        for token, line in _missed_ends(stored, title, chosen):
            is_known = in_gguf and tokenizer.convert_ids_to_tokens(token) in _NO_END_IN_GGUF
            (explained if is_known else differences).append(line)
        log_p = _next_log_probabilities(stored, [*ids, *chosen])[len(ids) - 1 :]
        for step, (token, score) in enumerate(answers["greedy"][title]):
            best = int(log_p[step].argmax())
            margin = float(log_p[step, best] - log_p[step, int(token)])
            if margin > 0:
                line = f"greedy token {step} of {title!r}: {int(token)}, expected {best}, {margin:.2g} nats more likely"
                (explained if margin <= 2 * bound else differences).append(line)
            gap = abs(float(log_p[step, int(token)]) - score)
            largest = max(largest, gap if math.isfinite(gap) else math.inf)
            compared += 1
    if not largest <= bound:
        differences.append(f"a log-probability differs by {largest:.3g} nats: expected at most {bound}")
    nats, tokens, text_bytes = _score(stored, asked["windows"], dataset)
    scale = 1 / math.log(2) / max(text_bytes, 1)
    gap = abs(answers["nats"] - nats) * scale
    if not gap <= BITS_PER_BYTE_BOUND:
        differences.append(f"bits per byte differ by {gap:.3g}: expected at most {BITS_PER_BYTE_BOUND}")
    is_rounded = precision in ROUNDED
    loss = nats - _score(as_stored(model, "float32"), asked["windows"], dataset)[0] if is_rounded else 0.0
    return Certificate(
        engine=answers["engine"],
        file=name,
        precision=precision,
        prompts=len(asked["ids"]) + len(asked["chats"]),
        greedy_tokens=compared,
        explained_differences=explained,
        log_probability_difference=largest,
        log_probability_bound=bound,
        bits_per_byte=answers["nats"] * scale,
        bits_per_byte_difference=gap,
        bits_per_byte_bound=BITS_PER_BYTE_BOUND,
        scored_tokens=tokens,
        compared_with=precision if is_rounded else "checkpoint",
        bits_per_byte_lost_by_rounding=loss * scale,
        differences=differences,
    )


def _next_log_probabilities(model: RexForCausalLM, ids: list[int]) -> Tensor:
    """Log-probabilities (T - 1, V) after each of `ids` but the last, float64."""
    log_p_TV: Tensor = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return log_p_TV


def _missed_ends(model: RexForCausalLM, title: str, chosen: list[int]) -> list[tuple[int, str]]:
    """The token and a line where the engine continues after one that ends a generation, or ends without one."""
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    missed = [
        (token, f"greedy continuation of {title!r} continues after {token}") for token in chosen[:-1] if token in stops
    ]
    if len(chosen) < STEPS and not stops & set(chosen[-1:]):
        line = f"greedy continuation of {title!r} ends after {len(chosen)} tokens: expected {STEPS}"
        missed.append((chosen[-1] if chosen else 0, line))
    return missed


def _score(model: RexForCausalLM, windows: list[list[int]], dataset: TokenDataset) -> tuple[float, int, int]:
    """Nats of predicting each window but its first token, the number of these tokens and of their bytes."""
    nats, tokens, text_bytes = 0.0, 0, 0
    for window in windows:
        log_p_TV = _next_log_probabilities(model, window)
        nats -= float(log_p_TV.gather(-1, torch.tensor(window)[1:, None]).sum())
        tokens += len(window) - 1
        text_bytes += int(dataset.byte_counts[window[1:]].sum())
    return nats, tokens, text_bytes


def as_rows(certificates: list[Certificate]) -> list[dict[str, Any]]:
    """Table rows, one per certificate: lists as counts; the engine's releases last, as they are long."""
    return [
        {
            key: len(value) if isinstance(value, list) else value
            for key, value in asdict(found).items()
            if key != "engine"
        }
        | {"engine": found.engine}
        for found in certificates
    ]
