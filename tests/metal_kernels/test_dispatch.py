import mlx.core as mx
import pytest

from metal_kernels import KernelError, active_backend, device, dispatch, kernel_path, reset_paths, rotate, use_backend
from metal_kernels.dispatch import has_kernel

SIGNS = mx.ones(64)


def test_the_device_chooses_the_backend_and_a_block_can_force_another() -> None:
    assert active_backend() == device()
    with use_backend("reference"):
        assert active_backend() == "reference"
    assert active_backend() == device()


def test_the_path_that_ran_is_on_record() -> None:
    reset_paths()
    assert kernel_path() == f"mlx on {device()}"
    rotate(mx.ones((2, 64)), SIGNS, 64)
    assert kernel_path() == "cpu:rotate"
    with use_backend("reference"):
        rotate(mx.ones((2, 64)), SIGNS, 64)
    assert kernel_path() == "cpu:rotate; reference:rotate on cpu"


def test_a_backend_that_cannot_run_is_an_error_that_says_why() -> None:
    with (
        pytest.raises(KernelError, match="no backend named 'tpu'; choose from metal, cuda, cpu, reference"),
        use_backend("tpu"),
    ):
        pass
    with pytest.raises(KernelError, match="needs MLX on a metal device, and MLX runs on cpu"), use_backend("metal"):
        pass


def test_a_forced_backend_without_a_kernel_is_an_error() -> None:
    with use_backend("cpu"), pytest.raises(KernelError, match="no kernel for levitate"):
        has_kernel("levitate")
    assert not has_kernel("levitate")


OPERATIONS = ["matmul", "feed_forward", "expert_matmul", "packed_attention", "decode_attention", "decoder_layer"]


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize("nvidia", ["sm_75"], indirect=True)
def test_a_gpu_that_lacks_their_instructions_has_no_kernels_and_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "device", lambda: "cuda")
    dispatch._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="this GPU is sm_75, and they are written for sm_80 and later") as told:
        assert not any(map(has_kernel, OPERATIONS))
    assert len(told) == 1
    with pytest.raises(KernelError, match="cannot run: this GPU is sm_75"), use_backend("cuda"):
        pass


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize("nvidia", ["sm_80", "sm_89", "sm_90", "sm_120", ""], indirect=True)
def test_newer_ones_have_them_and_one_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "device", lambda: "cuda")
    with use_backend("cuda"):
        assert all(map(has_kernel, OPERATIONS))
