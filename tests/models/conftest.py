import checkpoints
import pytest

SAVED = {
    "sd": checkpoints.save_small_sd,
    "inpainting": checkpoints.save_small_sd_inpainting,
    "upscaler": checkpoints.save_small_upscaler,
    "sdxl": checkpoints.save_small_sdxl,
    "sd3": checkpoints.save_small_sd3,
    "flux": checkpoints.save_small_flux,
    "dit": checkpoints.save_small_dit,
    "controlnet": checkpoints.save_small_controlnet,
    "controlnet2": lambda folder: checkpoints.save_small_controlnet(folder, "another"),
    "motion": checkpoints.save_small_motion_adapter,
    "vae": checkpoints.save_small_vae,
    "lora": checkpoints.save_small_lora,
    "ip_adapter": checkpoints.save_small_ip_adapter,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder of a checkpoint or of a part, saved when it is first asked for."""
    root, saved = tmp_path_factory.mktemp("checkpoints"), {}

    def find(name):
        if name not in saved:
            saved[name] = str(SAVED[name](root / name))
        return saved[name]

    return find
