"Launchers that would cut the trained weights are refused before anything is loaded."

import pytest


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launcher_that_cuts_the_weights_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    from masked_ldm.train import main

    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(SystemExit) as e:
        main(["--out_dir", str(tmp_path / "run")])
    text = str(e.value)
    assert text.startswith(f"masked-ldm-train: {name} keeps trained weights") and "\n" not in text
    assert "choose multi-GPU in accelerate config" in text
