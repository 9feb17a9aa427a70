from collections.abc import Iterator

import pytest
import torch
from transformers.utils.import_utils import enable_tf32

from model.errors import PipelineError
from model.system.devices import has_fast_bfloat16, resolve_device, resolve_precision, serving_dtype, set_tf32

CPU = torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PipelineError, match=r"^serving.device is 'cuda': .* sees no GPU; set it to 'cpu' or 'auto'$"):
        resolve_device("cuda", setting="serving.device")
    assert resolve_device("auto") == CPU


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize(
    ("amx", "avx512", "precision"), [(False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")]
)
def test_auto_takes_bfloat16_only_where_the_cpu_has_it(monkeypatch, amx, avx512, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert has_fast_bfloat16(CPU) == (precision == "bfloat16")
    assert resolve_precision("auto", CPU) == precision


@pytest.fixture
def precision_flags() -> Iterator[None]:
    flags = torch.backends.fp32_precision, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.fp32_precision, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@pytest.mark.parametrize("enabled", [False, True])
def test_tf32_is_set_in_both_of_pytorchs_interfaces(precision_flags, enabled):
    enable_tf32.__wrapped__(True)  # as TrainingArguments do with compilation
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    set_tf32(enabled=enabled)
    assert torch.get_float32_matmul_precision() == ("high" if enabled else "highest")
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == enabled
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if enabled else "ieee")
    assert torch.backends.fp32_precision == "ieee"


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("is_fast", [False, True])
def test_a_gpu_serves_in_bfloat16_where_it_is_fast(monkeypatch, has_gpu, is_fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_fast)
    assert serving_dtype("auto", "auto") == (torch.bfloat16 if has_gpu and is_fast else None)
    assert serving_dtype("auto", "cpu") is None
    for precision in ("float32", "bfloat16"):
        assert serving_dtype(precision, "auto") == getattr(torch, precision)


def test_a_precision_that_is_asked_for_is_taken():
    assert resolve_precision("bfloat16", CPU) == "bfloat16"
    assert resolve_precision("float16", torch.device("cuda")) == "float16"
    with pytest.raises(PipelineError, match="float16' on the CPU"):
        resolve_precision("float16", CPU)
    with pytest.raises(PipelineError, match="'int4': expected"):
        resolve_precision("int4", CPU)
