from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.cam import CAMS
from models.heads import HEADS
from pipeline.errors import TrainConfigError
from pipeline.training.config import TrainConfig
from pipeline.training.presets import PRESETS, train_config
from tests.repository import REPOSITORY


def test_the_default_preset_changes_no_default() -> None:
    assert train_config() == TrainConfig()


def test_the_paper_preset_is_the_published_method() -> None:
    config = train_config("paper-sgd")
    assert (config.head, config.attention, config.cam) == ("gap", "pda", "grad-cam")
    assert config.layer_weights == (0.2, 0.2, 0.6)
    assert (config.optimizer, config.schedule, config.weight_decay) == ("sgd", "poly", 5e-4)
    assert (config.backbone_rate, config.new_rate, config.bias_factor) == (0.01, 0.1, 2.0)
    assert config.region is None


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_is_a_valid_configuration(preset: str) -> None:
    # The networks of the release have no weights that a package offers.
    settings = ["weights=a.safetensors"] if preset == "release" else []
    assert isinstance(train_config(preset, None, settings), TrainConfig)


def test_the_release_preset_is_the_published_code() -> None:
    config = train_config("release", None, ["weights=a.safetensors", "encoder_weights=b.safetensors"])
    assert (config.backbone, config.encoder, config.rates) == ("resnet38d", "resnet101", (6, 12, 18))
    assert (config.mean, config.std) == ((0, 0, 0), (1, 1, 1))
    assert (config.optimizer, config.schedule, config.backbone_rate, config.new_rate) == ("sgd", "poly", 0.01, 0.1)
    assert (config.momentum, config.decay_biases, config.bias_factor, config.clip) == (5e-4, False, 2.0, 0)
    assert (config.classifier_moves, config.segmenter_moves, config.blur) == ("flips", "mirror", 0.5)
    assert (config.attention, config.normalize_attention, config.pda_schedule) == ("pda", False, "release")
    assert (config.classifier_epochs, config.segmenter_epochs, config.view - 2 * config.margin) == (20, 30, 224)
    assert config.xavier_head
    assert config.encoder_pretrained
    assert not config.encoder_starts


def test_an_encoder_starts_from_the_classifier_its_own_weights_or_none() -> None:
    def starts(*settings: str) -> tuple[bool, bool]:
        config = train_config("default", None, settings)
        return config.encoder_starts, config.encoder_pretrained

    assert starts() == (True, True)
    assert starts("weights=none") == (False, False)
    assert starts("encoder=resnet18") == (False, False)
    assert starts("encoder=resnet18", "encoder_weights=a.safetensors") == (False, True)
    assert starts("encoder_weights=a.safetensors") == (False, True)
    assert starts("encoder_weights=none") == (False, False)


def test_settings_override_the_file_and_the_file_overrides_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text('ema = 0.5\nhead = "gap"\n')
    config = train_config(
        "default", file, ["head=pcam", "cam=pcam", "region=none", "layer_weights=[0.0, 0.0, 1.0]", "seed=3"]
    )
    assert (config.ema, config.head, config.region, config.seed) == (0.5, "pcam", None, 3)


def test_settings_of_a_data_set_change_the_preset_and_are_overridden_by_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text("ema = 0.5\n")
    config = train_config("paper", file, ["stain=0.1"], {"ema": 0.3, "stain": 0.4, "imaging": 0.2})
    assert (config.ema, config.stain, config.imaging, config.head) == (0.5, 0.1, 0.2, "gap")


def test_the_error_names_a_head_without_the_map_that_attention_needs() -> None:
    with pytest.raises(TrainConfigError, match="attention pda needs a head with a linear class map, but abn has none"):
        train_config("default", None, ["head=abn", "cam=abn", "attention=pda"])


def test_only_weighted_layers_with_maps_by_head_get_heads_of_their_own() -> None:
    assert TrainConfig().layer_heads == ()
    assert train_config("default", None, ["layer_weights=[0.1, 0.2, 0.7]"]).layer_heads == ("shallow", "middle")
    assert train_config("default", None, ["layer_weights=[0.0, 0.2, 0.8]"]).layer_heads == ("middle",)
    assert train_config("paper").layer_heads == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("heads=gap", "unknown setting 'heads'"),
        ("ema", "must have the form name=value"),
        ("ema=much", "setting ema"),
        ("ema=1.5", "ema is 1.5"),
        ("region=100", "region is 100"),
        ("patience=0", "patience is 0"),
        ("layer_weights=[0.5, 0.5, 0.5]", "must sum to 1"),
        ("attention=pad", "setting attention"),
        ("optimizer=adam", "setting optimizer"),
        ("backbone=resnet38d", "set encoder too"),
        ("std=[0.5, 0.0, 0.5]", "std is"),
        ("mean=0.5", "setting mean"),
        ("blur=2", "blur is 2"),
        ("segmenter_moves=turns", "setting segmenter_moves"),
        ("head=lfi", "cannot make class probabilities from head lfi; set cam too"),
        ("head=gup", "head is 'gup'; use one of gap, pcam"),
        ("gate_stride=32", "setting gate_stride"),
        ("decoder_channels=0", "decoder_channels is 0"),
        ("cam=kam", "cam is 'kam'; use head, cam, grad-cam"),
        ("classifier_mpp=[1.0, 0.0]", r"classifier_mpp is \(1\.0, 0\.0\)"),
        ("classifier_mpp=[nan]", r"classifier_mpp is \(nan,\)"),
        ("mpp=inf", "mpp is inf"),
        (
            "mpp=1e-9",
            "mpp is 1e-09; it must be from 0.01 to 100 µm per pixel, or none for the pixel size of the data",
        ),
        ("mpp=101", r"mpp is 101\.0; it must be from"),
        (
            "classifier_mpp=[1.0, 1e300]",
            r"classifier_mpp is \(1\.0, 1e\+300\); each pixel size must be from 0.01 to 100 µm per pixel",
        ),
        ("seed=-1", r"seed is -1; it must be between 0 and 2\*\*63 - 1"),
        (f"seed={2**63}", f"seed is {2**63}"),
        ("mean=[inf, 0.0, 0.0]", r"mean is \(inf, 0\.0, 0\.0\); all three must be finite"),
        ("std=[nan, 1.0, 1.0]", r"std is \(nan, 1\.0, 1\.0\); all three must be finite"),
        ("layer_weights=[nan, nan, 1.0]", "layer_weights is .*must be finite"),
        ("backbone_rate=inf", "backbone_rate is inf; it must be a finite number"),
        ("weight_decay=nan", "weight_decay is nan; it must be a finite number"),
        ("clip=nan", "clip is nan; it must be a finite number"),
        ("mpp=true", "setting mpp is True; it cannot be true or false"),
        ("seed=false", "setting seed is False; it cannot be true or false"),
        ("classifier_mpp=[0.5, true]", r"setting classifier_mpp is \[0\.5, True\]; it cannot be true or false"),
    ],
)
def test_the_error_names_an_invalid_setting(setting: str, message: str) -> None:
    with pytest.raises(TrainConfigError, match=message):
        train_config("default", None, [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=" + "9" * 5000, "setting seed: a value of 5,000 characters is too long"),
        ("rates=[" + "9" * 5000 + ", 1, 1]", "setting rates: a value of 5,008 characters is too long"),
        ("seed=" + "[" * 3000 + "]" * 3000, "setting seed: a value of 6,000 characters is too long"),
        ("seed=" + "9" * 4000, "setting seed has an integer of more than 64 bits"),
        ("ema=0x" + "f" * 5000, "setting ema has an integer of more than 64 bits"),
        ("rates=[1, [0x" + "f" * 5000 + "], 1]", "setting rates has an integer of more than 64 bits"),
        ("seed={a=0x" + "f" * 5000 + "}", "setting seed has an integer of more than 64 bits"),
    ],
    ids=lambda text: text[:20],
)
def test_the_error_about_a_long_value_is_one_short_line(setting: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainConfigError, match=message) as caught:
        train_config(settings=[setting])
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)
    file = tmp_path / "settings.toml"
    file.write_text(setting.replace("=", " = ", 1), encoding="utf-8")
    with pytest.raises(TrainConfigError, match=r"settings\.toml: cannot be read as TOML|more than 64 bits") as caught:
        train_config(file=file)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 250


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gate_stride=8", "gate_stride is 8, but it must be 16"),
        ("encoder_depth=5", "depth is 4, but it must be 5"),
        ("depth=none", "depth is none, but it must be 4"),
        ("encoder=resnet50", "encoder is resnet50, but it must be tu-tf_efficientnet_lite0"),
        ("encoder_weights=w.safetensors", r"encoder_weights is w\.safetensors, but it must be empty"),
    ],
)
def test_a_backbone_is_shared_only_by_equal_networks(setting: str, message: str) -> None:
    assert train_config("default", None, ["shared_backbone=true"]).shared_backbone
    with pytest.raises(TrainConfigError, match=f"{message} with shared_backbone.*set shared_backbone=false"):
        train_config("default", None, ["shared_backbone=true", setting])


def test_the_segmenter_keeps_a_shared_backbone_unless_the_head_follows_it() -> None:
    assert train_config("default", None, ["shared_backbone=true"]).keeps_backbone
    assert not train_config("default", None, ["shared_backbone=true", "head_epochs=2"]).keeps_backbone
    assert not train_config().keeps_backbone
    with pytest.raises(TrainConfigError, match="head_epochs is -1; it must be at least 0"):
        train_config("default", None, ["shared_backbone=true", "head_epochs=-1"])


def test_resnet38d_cannot_be_shared() -> None:
    with pytest.raises(TrainConfigError, match="resnet38d is not an encoder of the segmenter; set shared_backbone"):
        train_config("release", None, ["weights=w.safetensors", "shared_backbone=true"])


@pytest.mark.parametrize("weights", ["imagenet", "none"])
def test_resnet38d_is_refused_without_a_weights_file(weights: str) -> None:
    with pytest.raises(TrainConfigError, match=rf"weights is {weights}, but resnet38d needs a file.*checkpoints"):
        train_config("default", None, ["backbone=resnet38d", "encoder=resnet101", f"weights={weights}"])


def test_resnet38d_is_refused_at_stride_16() -> None:
    with pytest.raises(TrainConfigError, match="gate_stride is 16, but resnet38d has stride 8; set gate_stride=8"):
        train_config("release", None, ["weights=w.safetensors", "gate_stride=16"])


def test_the_error_names_an_unknown_preset_or_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TrainConfigError, match=r"unknown preset 'best'.*default, paper"):
        train_config("best")
    with pytest.raises(TrainConfigError, match=r"absent.toml: cannot be read as TOML"):
        train_config("default", tmp_path / "absent.toml")


def test_the_docs_list_every_head_and_every_cam_method() -> None:
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    rows = {name: re.search(rf"^\| `{name}` \|.*", text, re.MULTILINE) for name in ("head", "cam")}
    listed = {name: set(re.findall(r"`([^`]+)`", row[0])) for name, row in rows.items() if row}
    assert listed["head"] == {"head", *HEADS}
    assert listed["cam"] == {"cam", "head", *CAMS}


def test_the_error_names_the_setting_of_a_preset_that_does_not_fit_the_data_set() -> None:
    of_dataset = {"shared_backbone": True, "decoder_channels": 128}
    with pytest.raises(TrainConfigError, match=r"depth is none, but it must be 4 .* or set shared_backbone=false"):
        train_config("paper", of_dataset=of_dataset)
    config = train_config("paper", None, ["shared_backbone=false"], of_dataset)
    assert (config.depth, config.decoder_channels) == (None, 128)
