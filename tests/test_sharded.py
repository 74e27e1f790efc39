"Launchers that would cut the trained weights are refused before anything is loaded."

import sys

import pytest
from conftest import run


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launcher_that_cuts_the_weights_is_refused_in_one_sentence(name, tmp_path):
    code, text = run(
        sys.executable,
        "-m",
        "masked_ldm.train",
        "--out_dir",
        tmp_path / "run",
        **{f"ACCELERATE_USE_{name}": "true"},
    )
    last = text.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in text, text
    assert last.startswith(f"masked-ldm-train: {name} keeps trained weights"), text
    assert "choose multi-GPU in accelerate config" in last
