"""Ollama's Modelfile: the weights, the chat template in Go's syntax, the context, the stops and the sampling.

Ollama renders `TEMPLATE` with Go's text/template from `.Messages`, each with a role and a content; neighboring messages
of one role, but those of tools, reach it joined by an empty line. Format:
https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

from transformers import PreTrainedTokenizerFast

from model.modeling_rex import RexForCausalLM
from model.text.chat.template import MARKS, has_marks

SAMPLING = {"temperature": "1", "top_k": "0", "top_p": "1", "min_p": "0", "repeat_penalty": "1"}
"""Ollama's own defaults cut the distribution and penalize repetition, of which code is full; the service's do not."""

_TEMPLATE_BEFORE_MARKS = """\
{{- range .Messages }}{{ if eq .Role "assistant" }}{{ .Content }}EOS{{ else if eq .Role "user" }}### User:
{{ .Content }}

### Assistant:
{{ else }}{{ .Content }}

{{ end }}{{ end }}"""
"""Of checkpoints from before role marks."""


def modelfile(model: RexForCausalLM, tokenizer: PreTrainedTokenizerFast, weights: str = "model-q8_0.gguf") -> str:
    """The Modelfile of the GGUF `weights` in the same folder.

    Without a chat template the prompt goes to the model as it is; for one of another project there is no TEMPLATE, and
    Ollama takes that of the GGUF where it knows it.
    """
    lines = [f"FROM ./{weights}"]
    stops = [tokenizer.eos_token] if tokenizer.eos_token else []
    if has_marks(tokenizer):
        stops += MARKS.values()
        lines.append(f'TEMPLATE """{chat_template(str(tokenizer.eos_token))}"""')
    elif "### User:" in (tokenizer.chat_template or ""):
        lines.append(f'TEMPLATE """{_TEMPLATE_BEFORE_MARKS.replace("EOS", str(tokenizer.eos_token))}"""')
    elif not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines.append(f"PARAMETER num_ctx {model.config.max_position_embeddings}")
    lines += [f"PARAMETER {name} {value}" for name, value in SAMPLING.items()]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def chat_template(end: str) -> str:
    """`model.text.chat.template.TEMPLATE` in Go's syntax; `end` is the token that ends what the assistant says."""
    turns = {
        'eq .Role "assistant"': f"{MARKS['assistant']}{{{{ .Content }}}}{end}",
        'eq .Role "user"': f"{MARKS['user']}{{{{ .Content }}}}",
        'or (eq .Role "system") (eq .Role "developer")': f"{MARKS['system']}{{{{ .Content }}}}",
        'eq .Role "tool"': f"{MARKS['tool']}{{{{ .Content }}}}",
    }
    branches = "{{ else if ".join(f"{condition} }}}}{text}" for condition, text in turns.items())
    return f"{{{{- range .Messages }}}}{{{{ if {branches}{{{{ end }}}}{{{{ end }}}}{MARKS['assistant']}"
