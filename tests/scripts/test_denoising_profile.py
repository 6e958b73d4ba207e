"""What a step is made of: kinds of kernels, how often and how long, and how long none runs."""

import pytest
import torch
from denoising_profile import Kernel, busy_time, kind_of_kernel, profiled, summary, table_of, write_profile

KERNELS = [
    Kernel("triton_poi_fused_add_0", 0, 10),
    Kernel("nvjet_hsh_128x64", 20, 50),
    # beside the product
    Kernel("ncclDevKernel_SendRecv", 30, 60),
    Kernel("nvjet_hsh_128x64", 100, 140),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "messages"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16", "convolutions"),
        ("sm90_xmma_gemm_f16f16_f16f32", "products"),
        ("nvjet_hsh_128x192_64x4", "products"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_red_fused_native_layer_norm_3", "compiled"),
        ("triton_poi_fused__to_copy_convolution_silu_12", "compiled"),
        ("triton_tem_fused_addmm_view_4", "products"),
        ("aten::linear", "products"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::silu", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of_kernel(name) == kind


def test_a_table_has_what_takes_longest_first():
    assert table_of(KERNELS, steps=2) == [
        ("products", "nvjet_hsh_128x64", 1.0, 35.0),
        ("messages", "ncclDevKernel_SendRecv", 0.5, 15.0),
        ("compiled", "triton_poi_fused_add_0", 0.5, 5.0),
    ]


def test_time_in_which_nothing_runs_is_not_busy():
    assert busy_time(KERNELS) == 10 + 40 + 40
    assert summary(KERNELS, steps=1) == (
        "a step 0.14 ms, busy 0.09 ms: products 0.07 ms (2), messages 0.03 ms (1), compiled 0.01 ms (1)"
    )
    assert summary([], steps=1) == "the profiler saw no kernels"


def test_on_a_cpu_operators_are_told(tmp_path):
    layer, hidden = torch.nn.Linear(4, 4), torch.randn(2, 4)
    kernels = profiled(lambda: [torch.nn.functional.silu(layer(hidden)) for _ in range(3)], torch.device("cpu"))
    assert {kernel.name for kernel in kernels} == {"aten::linear", "aten::silu"}
    path = write_profile(tmp_path / "new", "sdxl p2, blocks", kernels, steps=3)
    assert path.name == "sdxl_p2_blocks.csv"
    lines = path.read_text().splitlines()
    assert lines[0] == "kind,kernel,calls_per_step,us_per_step"
    assert {line.split(",")[1]: line.split(",")[2] for line in lines[1:]} == {"aten::linear": "1", "aten::silu": "1"}
