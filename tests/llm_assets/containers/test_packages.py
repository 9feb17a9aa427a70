"""Where uv looks for packages, which locks are refused, and what an image leaves out."""

import pytest

from llm_assets.containers.packages import pinned, refuse_other_device, remove_unused, uv_environment
from model.errors import PipelineError

CPU = "bentoml==1.4.39\nnvidia-ml-py==13.615.71\ntorch==2.13.0+cpu\n"
GPU = "nvidia-cudnn-cu13==9.20.0.48\nnvidia-ml-py==13.615.71\ntorch==2.13.0\ntriton==3.7.1\n"


def test_uv_takes_its_index_and_certificates_from_pip() -> None:
    pip = {"index-url": "https://mirror.example/simple", "cert": "/certificates.crt", "timeout": "9"}
    found = uv_environment("gpu", pip, {"HOME": "/home"})
    assert found == {
        "HOME": "/home",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "SSL_CERT_FILE": "/certificates.crt",
    }


def test_what_uv_is_told_by_its_own_variables_wins() -> None:
    pip = {"index-url": "https://mirror.example/simple"}
    assert uv_environment("gpu", pip, {"UV_DEFAULT_INDEX": "x"}) == {"UV_DEFAULT_INDEX": "x"}
    assert uv_environment("gpu", pip, {"UV_INDEX_URL": "x"}) == {"UV_INDEX_URL": "x"}
    assert uv_environment("cpu", {}, {"UV_TORCH_BACKEND": "auto"}) == {"UV_TORCH_BACKEND": "auto"}


def test_the_cpu_build_of_torch_comes_from_a_folder_of_wheels_that_has_it_else_from_its_index(tmp_path) -> None:
    pip = {"find-links": str(tmp_path)}
    assert uv_environment("cpu", pip, {}) == {"UV_TORCH_BACKEND": "cpu"}
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").touch()
    assert uv_environment("cpu", pip, {}) == {"UV_FIND_LINKS": str(tmp_path)}
    assert uv_environment("gpu", pip, {}) == {}


def test_a_lock_for_its_device_passes() -> None:
    refuse_other_device(CPU, "cpu")
    refuse_other_device(GPU, "gpu")


def test_the_packages_of_a_lock_are_named_without_their_hashes() -> None:
    hashed = " \\\n    --hash=sha256:ab\n"
    locked = f"torch==2.13.0+cpu{hashed}uvloop==0.23.0 ; sys_platform != 'win32'{hashed}"
    assert pinned(locked) == ["torch==2.13.0+cpu", "uvloop==0.23.0"]
    refuse_other_device(locked, "cpu")


@pytest.mark.parametrize(
    ("lock", "device"),
    [(GPU, "cpu"), (CPU, "gpu"), (GPU.replace("2.13.0\ntriton", "2.13.0+cpu\ntriton"), "gpu"), ("", "gpu")],
    ids=["CUDA for a CPU image", "no CUDA", "CPU build of torch", "nothing"],
)
def test_a_lock_for_the_other_device_is_refused(lock: str, device: str) -> None:
    with pytest.raises(PipelineError, match=f"the lock of a {device.upper()} image has"):
        refuse_other_device(lock, device)


def test_what_no_service_imports_is_not_in_an_image(tmp_path) -> None:
    kept = [
        "numpy/core.py",
        "torch/bin/torch_shm_manager",
        "torch/testing/data.py",
        "a.dist-info/tests/NOTICE",
        "tests.py",
    ]
    gone = [
        "bin/f2py",
        "torch/include/a.h",
        "torch/bin/protoc",
        "torch/test/x",
        "numpy/tests/a.py",
        "sympy/b/tests/c.py",
    ]
    for name in [*kept, *gone]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    remove_unused(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
