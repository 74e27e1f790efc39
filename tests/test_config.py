"What a run may be told: each wrong setting is one sentence, and what a checkpoint's run was told is read."

from dataclasses import asdict

import pytest

from masked_ldm.training.config import (
    PAPER_PICTURES,
    PRESETS,
    ConfigError,
    TrainConfig,
    changed,
    resume_differences,
    training_pictures,
)


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(T=1200), "T must be 0 to 1000, not 1200"),
        (dict(lamda1=0.2), "unknown parameter 'lamda1'; did you mean 'lambda1'?"),
        (dict(decode=None), "unknown parameter 'decode'"),
        (
            dict(preset="sd51"),
            "preset must be one of tiny, sd15, sd15-12gb, sd15-fast, sdxl-lora, sd3-lora, not 'sd51'",
        ),
        (dict(lambda1=0.8, lambda2=0.5), "lambda1 + lambda2 must be between 0 and 1"),
        (dict(lambda1=-0.1), "lambda1 must be 0 or more, not -0.1"),
        (dict(max_steps=10.5), "max_steps must be a whole number, not 10.5"),
        (dict(use_ema="yes"), "use_ema must be True or False, not 'yes'"),
        (dict(sample_prompts="one"), "sample_prompts must be a list of texts"),
        (dict(size=100), "size must be a multiple of 8 pixels, 32 to 4096, not 100; "),
        (dict(size=16), "not 16; the nearest is 32"),
        (dict(seed=2**53), "seed must be 0 to 9007199254740991, not 9007199254740992"),
        (dict(dataloader_num_workers=100_000), "dataloader_num_workers must be 0 to 256"),
        (dict(resume=""), "resume must be a text, not ''"),
        (dict(variant="as_published", gate="linear"), "gate must be hard with variant as_publish"),
        (dict(lambda3=0.4), "lambda1 + lambda2 + lambda3 must be between 0 and 1"),
        (dict(lambda3=0.1, variant="as_published"), "lambda3 must be 0 and lpips_net not decoder"),
        (dict(balance=1, T=0), "balance 1 has no perceptual gradient to scale with T=0"),
        (dict(balance=1, lambda_warmup_steps=5), "so lambda_warmup_steps must be 0"),
        (dict(per_person=True, face_weight=2), "per_person averages LPIPS over whole people"),
        (dict(x0_steps=0), "x0_steps must be 1 to 50, not 0"),
        (dict(ldm_face_weight=0), "ldm_face_weight must be above 0"),
        (dict(learning_rate=0), "learning_rate must be above 0 and at most 1, not 0.0"),
        (dict(min_area=1.0), "min_area must be 0 or more and below 1"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be 1 or more"),
        (dict(batch_size=6, gradient_accumulation_steps=4), "cannot be cut into"),
        (dict(batch_size=1, stratified_t=True), "stratified_t needs batch_size 2 or more"),
        (dict(validation_steps=5, val_pictures=0), "validation_steps needs val_pictures above 0"),
        (dict(push_to_hub=True, hub_model_id="me"), "push_to_hub needs hub_model_id, user/name"),
        (dict(preset="sd15"), "data_root is needed with base 'sd15'"),
        (dict(data_root="/nowhere"), "data_root /nowhere is not a folder"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_a_sentence(given, said):
    with pytest.raises(ConfigError) as e:
        TrainConfig.make(**given)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_config_made_by_hand_is_checked_too():
    "`train` is also called from Python, with a config that `make` never saw."
    from masked_ldm.train import train

    with pytest.raises(ConfigError, match="sample_interval must be 1"):
        train(TrainConfig(sample_interval=0))


def test_presets():
    for preset, values in PRESETS.items():
        config = TrainConfig.make(preset=preset, base="tiny")
        assert changed(config) == ({} if preset == "tiny" else {"base": "tiny"})
        assert {k: getattr(config, k) for k in values if k != "base"}.items() <= values.items()
    assert TrainConfig.make(T=None, max_steps=1e3) == TrainConfig.make(max_steps=1000)


def test_data_root(tmp_path):
    with pytest.raises(ConfigError, match="lacks annotations/instances_train2017.json.*val2017/"):
        TrainConfig.make(data_root=tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "manifest.json").write_text('{"kept": 7}')
    with pytest.raises(ConfigError, match="has a manifest of train only"):
        TrainConfig.make(data_root=tmp_path)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "manifest.json").write_text("{}")
    assert training_pictures(TrainConfig.make(data_root=tmp_path)) == 7
    assert training_pictures(TrainConfig(data_root="coco")) == PAPER_PICTURES


def test_what_may_change_on_resume():
    config = TrainConfig.make()
    saved = asdict(config)
    assert resume_differences(config, saved) == {}
    free = dict(max_steps=9, log_steps=1, decode_batch=2, gradient_checkpointing=True, out_dir="x")
    assert resume_differences(TrainConfig.make(**free), saved) == {}
    now = TrainConfig.make(lambda1=0.3, seed=1)
    assert resume_differences(now, saved) == {"lambda1": (0.2, 0.3), "seed": (0, 1)}
    assert resume_differences(config, {k: v for k, v in saved.items() if k != "use_ema"}) == {}
    assert resume_differences(config, saved | {"hue": 3}) == {"hue": (3, "unknown here")}


def test_settings_of_the_first_version():
    config = TrainConfig.make()
    first = asdict(config) | dict(
        decode="full", adam_beta1=0.9, adam_beta2=0.999, fused_adam=True, checkpoint_vae=True
    )
    assert resume_differences(config, first) == {}
    with pytest.raises(ConfigError, match="adam_beta1=0.5, a setting that is gone.*new run"):
        resume_differences(config, first | {"adam_beta1": 0.5})
