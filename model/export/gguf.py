"""GGUF, the format of llama.cpp and Ollama: weights, tokenizer, merges, special tokens and chat template in one file.

Starts from the stock layouts of `model/weights/export.py`. Norms are float32 in every file, as llama.cpp requires; rows
whose length is not a multiple of 32 stay in full precision in a Q8_0 file. The keys are those of llama.cpp's converter.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model.configuration_rex import RexConfig
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.text.chat.template import MARKS, end_ids
from model.text.tokenizer import splits_as_gpt2
from model.weights import int4
from model.weights.export import export_state_dict, interleave_pairs, layout

PRE_TOKENIZER = "gpt-2"
"""llama.cpp's name of GPT-2's pre-tokenizer, which `model/text/tokenizer.py` trains with.

llama.cpp does not split a run of more than MAX_RUN_LENGTH characters of one class; only there its tokens differ, and
none of its pre-tokenizers has such a bound. The certificate compares such runs (`model/export/parity.py`).
"""
MARKS_THAT_END = (MARKS["user"], MARKS["tool"])
"""Marks that end a generation besides the end-of-text token. GGUF has places for two: after an answer comes a user's
turn, or the result of a tool.
"""
NORMAL, CONTROL = 1, 3
"""llama.cpp's token types."""
BLOCK = 32
"""Weights that share one scale in Q8_0 and Q4_0."""

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
}
_ARCHITECTURES = {"glm": "chatglm"}
"""llama.cpp's names of layouts, where they differ."""
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def reason_against(config: RexConfig, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Why llama.cpp cannot rotate heads as the model or split text as `tokenizer` does, in one line; None if it can."""
    rope: dict[str, Any] = config.rope_parameters or {}
    if rope["rope_type"] == "llama3" and layout(config) != "llama":
        return f"llama.cpp has rotary embeddings of the type 'llama3' in Llama's layout alone, not in {layout(config)}"
    if not rope.get("truncate", True):
        return "rope_parameters has truncate False, and llama.cpp rounds the range of dimensions that yarn blends"
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"].get("byte_fallback"):
        return "the tokenizer has one token per character, and llama.cpp has no such tokenizer"
    if state.get("normalizer"):
        return f"the tokenizer rewrites text first ({state['normalizer']['type']}), which llama.cpp would not"
    if state["model"].get("type") != "BPE" or not splits_as_gpt2(tokenizer.backend_tokenizer):
        splitter = (state.get("pre_tokenizer") or {}).get("type")
        return f"the tokenizer splits text by {splitter}, and GGUF's {PRE_TOKENIZER!r} is GPT-2's split"
    return None


def write_gguf(model: RexForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, kind: str, *, name: str) -> None:
    """Write `model` to `path`. kind: "full" (F32, or BF16 for a bfloat16 model), "q8_0" or "q4_0".

    Q4_0 holds the values and scales of `model/weights/int4.py`, with embedding and head in Q8_0.

    Raises PipelineError for what `reason_against` names.
    """
    import gguf

    config = model.config
    reason = reason_against(config, tokenizer)
    if reason:
        raise PipelineError(f"no GGUF of this model: {reason}; use --to hf")
    # llama.cpp rotates pairs of neighboring rows in Llama's heads, as in GLM-4's, so both need interleaved rows; in
    # Qwen3's it rotates as REX does.
    weights, kind_of_model = export_state_dict(model.state_dict(), config), layout(config)
    if kind_of_model == "llama":
        weights = {key: _neighboring(key, weight, config) for key, weight in weights.items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    writer = gguf.GGUFWriter(path, _ARCHITECTURES.get(kind_of_model, kind_of_model))
    _write_shape(writer, config, name)
    _write_rope(writer, model)
    _write_tokenizer(writer, tokenizer, config)
    for key, weight in weights.items():
        _write_tensor(writer, _tensor_name(key), weight.detach().cpu(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighboring(key: str, weight: Tensor, config: RexConfig) -> Tensor:
    is_turned = key.endswith(("q_proj.weight", "k_proj.weight"))
    return interleave_pairs(weight, config) if is_turned else weight


def _tensor_name(key: str) -> str:
    key = key.removesuffix(".weight")
    if key in _NAMES:
        return f"{_NAMES[key]}.weight"
    _, _, layer, rest = key.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.weight"


def _write_shape(writer: Any, config: RexConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_rope(writer: Any, model: RexForCausalLM) -> None:
    """Rotary embeddings. The type "dynamic" is not scaled within the context, so it needs no more than "default"."""
    import gguf

    config, embedding = model.config, model.model.rotary_emb
    rope: dict[str, Any] = config.rope_parameters or {}
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.rotary_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
        # llama.cpp multiplies by what transformers derives from the factor alone.
        writer.add_rope_scaling_attn_factors(embedding.attention_scaling / (0.1 * math.log(rope["factor"]) + 1))
    if rope["rope_type"] == "llama3":
        plain, _ = embedding.compute_default_rope_parameters(config)
        _write_tensor(writer, "rope_freqs.weight", plain / embedding.original_inv_freq.cpu(), "full")


def _write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerFast, config: RexConfig) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_ids)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if number in special else NORMAL for number in range(len(tokens))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if isinstance(config.eos_token_id, int):
        writer.add_eos_token_id(config.eos_token_id)
    ends, vocabulary = end_ids(tokenizer), tokenizer.get_vocab()
    for mark, add in zip(MARKS_THAT_END, (writer.add_eot_token_id, writer.add_eom_token_id), strict=True):
        if vocabulary.get(mark) in ends:
            add(vocabulary[mark])
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _write_tensor(writer: Any, name: str, weight: Tensor, kind: str) -> None:
    import gguf

    types = gguf.GGMLQuantizationType
    array = weight.float().numpy()
    if weight.dim() == 1:
        writer.add_tensor(name, array)
    elif kind == "q4_0" and name.startswith("blk.") and weight.shape[-1] % BLOCK == 0:
        writer.add_tensor(name, _q4_0(weight), raw_dtype=types.Q4_0)
    elif kind != "full" and weight.shape[-1] % BLOCK == 0:
        writer.add_tensor(name, gguf.quants.quantize(array, types.Q8_0), raw_dtype=types.Q8_0)
    elif weight.dtype == torch.bfloat16:
        writer.add_tensor(name, gguf.quants.quantize(array, types.BF16), raw_dtype=types.BF16)
    else:
        writer.add_tensor(name, array)


def _q4_0(weight_NK: Tensor) -> np.ndarray:
    """Blocks of Q4_0: a float16 scale, then 16 bytes: the first 16 values in their low bits, the rest in the high."""
    packed, scale_NG = int4.quantize_weight(weight_NK)
    n, groups = scale_NG.shape
    values_NGI = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(n, groups, BLOCK)
    bytes_NGI = values_NGI[..., : BLOCK // 2] | values_NGI[..., BLOCK // 2 :] << 4
    scale = scale_NG.to(torch.float16)[..., None].view(torch.uint8)
    return torch.cat([scale, bytes_NGI], dim=-1).reshape(n, -1).numpy()
