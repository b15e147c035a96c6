"""Save and load checkpoints with hfvit, transformers and timm."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from helpers.commands import run_command
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names
from helpers.models import build_model
from helpers.recipes import ARCHITECTURE, MICRO
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperForImageClassification,
    pipeline,
)

import hfvit
from hfvit.errors import ModelError
from hfvit.models.attention import unfuse_slow_attention
from hfvit.models.configuration import HFViTConfig, load_config
from hfvit.models.modeling import HFViTForImageClassification

LEVIT = {"embed_dim": (16, 16, 16), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 8}
COAT = {"embed_dims": [8, 16, 16, 16], "serial_depths": [1, 1, 1, 1], "parallel_depth": 1, "num_heads": 8}


@pytest.fixture
def saved(tmp_path):
    """Save a micro model; returns folder, image, its pixel values and logits."""
    model = build_model(LABELS, architecture=ARCHITECTURE, image_size=32, timm_kwargs=MICRO).eval()
    model.config.set_preprocessing(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_pct=0.8, interpolation="bilinear")
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    image = colored_image(1, np.random.default_rng(0), size=50)
    pixel_values = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))(image)[
        None
    ]
    with torch.no_grad():
        return folder, image, pixel_values, model(pixel_values).logits


def test_from_pretrained_round_trips(saved):
    folder, _, pixel_values, logits = saved
    model = HFViTForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(model(pixel_values).logits, logits)
    assert model.config.id2label == dict(enumerate(LABELS))


def test_checkpoint_loads_in_transformers_without_hfvit(saved, tmp_path):
    folder, image, pixel_values, logits = saved
    image.save(tmp_path / "image.png")
    np.save(tmp_path / "logits.npy", logits.numpy())
    np.save(tmp_path / "pixels.npy", pixel_values.numpy())
    script = (
        "import gc, sys; sys.modules['hfvit'] = None; gc.disable()\n"
        "import numpy as np, torch\nfrom PIL import Image\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification\n"
        "folder, work = sys.argv[1:]\n"
        "model = AutoModelForImageClassification.from_pretrained(folder).eval()\n"
        "inputs = AutoImageProcessor.from_pretrained(folder)(Image.open(work + '/image.png'))\n"
        "assert np.array_equal(inputs['pixel_values'].numpy(), np.load(work + '/pixels.npy'))\n"
        "assert np.array_equal(model(**inputs).logits.detach().numpy(), np.load(work + '/logits.npy'))\n"
        "assert model.config.id2label == {0: 'red', 1: 'green', 2: 'blue'}, model.config.id2label\n"
        "assert type(model).__name__ == 'TimmWrapperForImageClassification'\n"
    )
    result = run_command(sys.executable, "-c", script, folder, tmp_path, new_process=True)
    assert result.returncode == 0, result.stderr


def test_checkpoint_loads_in_a_pipeline(saved):
    folder, image, _, logits = saved
    answers = pipeline("image-classification", model=str(folder))(image)
    probabilities = logits.softmax(dim=1)[0]
    assert [answer["label"] for answer in answers] == [LABELS[i] for i in probabilities.argsort(descending=True)]
    assert [answer["score"] for answer in answers] == pytest.approx(
        sorted(probabilities.tolist(), reverse=True), abs=1e-6
    )


def test_checkpoint_loads_in_timm(saved):
    folder, image, pixel_values, logits = saved
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(model(pixel_values), logits)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert torch.equal(transform(image)[None], pixel_values)
    assert model.pretrained_cfg["label_names"] == LABELS


def test_checkpoint_loads_as_a_classifier(saved):
    folder, image, _, logits = saved
    classifier = hfvit.load_classifier(folder, device="cpu")
    torch.testing.assert_close(torch.from_numpy(classifier.logits([image])), logits)
    probabilities = dict(zip(LABELS, logits.softmax(dim=1)[0].tolist(), strict=True))
    for answer in classifier.predict((image for _ in range(3)), batch_size=2):
        assert answer == pytest.approx(probabilities, abs=1e-6)
    assert list(classifier.predict([np.asarray(image)], top_k=1)[0]) == [max(probabilities, key=probabilities.get)]


def test_save_pretrained_writes_a_stock_config(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    assert config["model_type"] == "timm_wrapper"
    assert config["architectures"] == ["TimmWrapperForImageClassification"]
    assert config["label_names"] == LABELS
    assert config["num_classes"] == 3
    assert config["model_args"] == {**MICRO, "img_size": 32}
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert "auto_map" not in config
    assert "problem_type" not in config
    assert sorted(path.name for path in saved[0].iterdir()) == ["config.json", "model.safetensors"]
    assert AutoImageProcessor.from_pretrained(saved[0]).data_config["mean"] == (0.1, 0.2, 0.3)


def test_build_model_has_timms_initialization():
    torch.manual_seed(7)
    expected = timm.create_model(ARCHITECTURE, img_size=32, num_classes=3, **MICRO).state_dict()
    torch.manual_seed(7)
    actual = build_model(LABELS, architecture=ARCHITECTURE, image_size=32, timm_kwargs=MICRO).timm_model.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_from_pretrained_with_labels_round_trips(saved, tmp_path):
    folder = saved[0]
    renamed = HFViTForImageClassification.from_pretrained(folder, labels=["a", "b", "c", "d"])
    renamed.save_pretrained(tmp_path / "renamed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "renamed")
    assert loaded.config.id2label == dict(enumerate("abcd"))
    assert loaded(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 4)
    many = [f"class {index}" for index in range(12)]
    build_model(many, architecture=ARCHITECTURE, image_size=32, timm_kwargs=MICRO).save_pretrained(tmp_path / "many")
    assert list(AutoModelForImageClassification.from_pretrained(tmp_path / "many").config.id2label.values()) == many


def test_from_pretrained_keeps_the_head_for_equal_labels_only(saved):
    folder = saved[0]
    weights = load_file(folder / "model.safetensors")["head.weight"]

    def head(**kwargs):
        return HFViTForImageClassification.from_pretrained(folder, **kwargs).timm_model.head.weight

    assert torch.equal(head(), weights)
    assert torch.equal(head(labels=LABELS), weights)
    assert torch.equal(head(num_labels=3), weights)
    assert not torch.equal(head(labels=["x", "y", "z"]), weights)
    assert head(labels=["x", "y"]).shape == (2, 32)
    assert head(num_labels=5).shape == (5, 32)
    assert head(id2label={0: "p", 1: "q"}).shape == (2, 32)
    config = hfvit.HFViTConfig.from_pretrained(folder)
    assert torch.equal(head(config=config), weights)
    config.id2label = {0: "p", 1: "q"}
    assert head(config=config).shape == (2, 32)
    stock = AutoConfig.from_pretrained(folder, num_labels=5)
    assert head(config=stock, image_size=48).shape == (5, 32)


def test_from_pretrained_with_labels_in_another_order_reorders_the_trained_head(saved, tmp_path):
    folder, _, pixel_values, logits = saved
    order = [2, 0, 1]
    labels = [LABELS[index] for index in order]
    model = HFViTForImageClassification.from_pretrained(folder)
    model.config.thresholds = [0.2, 0.9, 0.4]
    model.save_pretrained(tmp_path / "with_thresholds")
    reordered = HFViTForImageClassification.from_pretrained(tmp_path / "with_thresholds", labels=labels).eval()
    with torch.no_grad():
        torch.testing.assert_close(reordered(pixel_values).logits, logits[:, order])
    assert reordered.config.label_names == labels
    assert reordered.config.thresholds == [0.4, 0.2, 0.9]


@pytest.mark.parametrize("labels", [list("ponmlkjihgfedcba"), list("abc")])
def test_new_head_with_a_norm_layer_has_its_initial_scale(labels, tmp_path):
    # 16 classes are as many as features, so that the norm layer has the shape of a bias.
    model = build_model(list("abcdefghijklmnop"), architecture="levit_128s", image_size=32, timm_kwargs=LEVIT)
    for parameter in model.timm_model.head.parameters():
        torch.nn.init.constant_(parameter, 5.0)
    model.save_pretrained(tmp_path)
    head = HFViTForImageClassification.from_pretrained(tmp_path, labels=labels).timm_model.head
    assert head.linear.weight.shape == (len(labels), 16)
    assert torch.equal(head.bn.weight, torch.ones(16))
    assert not head.bn.bias.any()
    assert not head.linear.bias.any()


def test_from_pretrained_none_loads_a_state_dict(saved):
    folder, _, pixel_values, logits = saved
    state_dict = load_file(folder / "model.safetensors")

    def load(config, **kwargs):
        return HFViTForImageClassification.from_pretrained(None, config=config, state_dict=dict(state_dict), **kwargs)

    own, stock = hfvit.HFViTConfig.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    for config in (own, stock):
        model = load(config).eval()
        assert torch.equal(model(pixel_values).logits, logits)
        assert model.config.label_names == LABELS
    renamed = load(own, labels=["x", "y"])
    assert renamed.config.label_names == ["x", "y"]
    assert torch.equal(renamed.timm_model.pos_embed, state_dict["pos_embed"])
    assert own.label_names == LABELS
    del state_dict["pos_embed"]
    with pytest.raises(ModelError, match=r"\b1 weights\b.*\(pos_embed\)"):
        load(own)
    for kwargs in ({"config": own}, {"state_dict": state_dict}, {}):
        with pytest.raises(ValueError, match="config= and state_dict="):
            HFViTForImageClassification.from_pretrained(None, **kwargs)


def test_from_pretrained_with_depth_keeps_the_first_blocks(saved):
    folder, _, _, _ = saved
    model = HFViTForImageClassification.from_pretrained(folder, timm_kwargs={"depth": 1})
    assert len(model.timm_model.blocks) == 1
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(model.timm_model.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])


def test_from_pretrained_without_weights_names_the_folder(saved):
    (saved[0] / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        build_model(LABELS, model_name_or_path=str(saved[0]))
    assert_names(caught.value, saved[0], "model.safetensors")


def test_from_pretrained_of_an_adapter_without_weights_names_it(saved):
    (saved[0] / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    with pytest.raises(ModelError, match=r"^model_name_or_path: .*adapter_config\.json"):
        HFViTForImageClassification.from_pretrained(saved[0])


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("google/vit-base-patch16-224-in21k", "timm/vit_base_patch16_224.orig_in21k"),
        ("google/vit-base-patch16-384", "timm/vit_base_patch16_384.orig_in21k_ft_in1k"),
        ("facebook/deit-tiny-patch16-224", "timm/deit_tiny_patch16_224.fb_in1k"),
        ("facebook/deit-base-distilled-patch16-384", "timm/deit_base_distilled_patch16_384.fb_in1k"),
        ("facebook/convnext-tiny-224", "timm/convnext_tiny.fb_in1k"),
        ("facebook/dinov2-small", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", "timm/vit_base_patch16_dinov3.lvd1689m"),
        ("microsoft/swin-tiny-patch4-window7-224", "timm/swin_tiny_patch4_window7_224.ms_in1k"),
        ("google/vit-unknown-patch16-224", "timm"),
        ("user/vit", "timm"),
    ],
)
def test_checkpoint_in_the_format_of_transformers_names_timms_repository(name, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match=r"^model_name_or_path: ") as caught:
        load_config(name)
    assert_names(caught.value, name, "vit", repository)


def test_from_pretrained_without_head_requires_labels(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    (saved[0] / "config.json").write_text(json.dumps({**config, "num_classes": 0, "label_names": []}))
    with pytest.raises(ModelError, match=r"^labels: ") as caught:
        HFViTForImageClassification.from_pretrained(saved[0])
    assert_names(caught.value, saved[0])
    assert build_model(["a", "b"], model_name_or_path=str(saved[0])).config.num_labels == 2


def test_from_pretrained_with_missing_weights_raises(saved):
    file = saved[0] / "model.safetensors"
    weights = load_file(file)
    del weights["blocks.1.mlp.fc1.weight"]
    weights["pos_embed"] = weights["pos_embed"][:, :-2].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"\b2\b.*\(blocks\.1\.mlp\.fc1\.weight, pos_embed\).*\bmodel_args\b"):
        HFViTForImageClassification.from_pretrained(saved[0], labels=["new", "classes"])


@pytest.mark.parametrize(
    ("size", "crop_pct", "resized"),
    [(224, 0.9, 248), (224, 0.875, 256), (224, 0.95, 236), (98, 1.0, 98), (32, 0.9, 36), (518, 0.98, 528)],
)
def test_squash_keeps_the_crop_fraction_with_an_even_margin(size, crop_pct, resized):
    config = HFViTConfig.from_architecture("vit_tiny_patch16_224", ["a", "b"])
    config.pretrained_cfg |= {"input_size": [3, size, size], "crop_pct": crop_pct}
    config.set_crop_mode("squash")
    resize, crop, *_ = create_transform(**resolve_data_config(config.pretrained_cfg)).transforms
    assert (tuple(resize.size), tuple(crop.size)) == ((resized, resized), (size, size))


def test_crop_mode_center_keeps_the_transform_of_the_pretrained_model():
    config = HFViTConfig.from_architecture("vit_tiny_patch16_224", ["a", "b"])
    before = dict(config.pretrained_cfg)
    config.set_crop_mode("center")
    assert config.pretrained_cfg == {**before, "crop_mode": "center"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_hidden_states", True), ("return_dict", False), ("problem_type", "regression"),
        ("initializer_range", 0.5), ("attn_implementation", "eager"),
    ],
)  # fmt: skip
def test_from_pretrained_passes_values_to_the_configuration(saved, key, value):
    folder, _, pixel_values, logits = saved
    model = HFViTForImageClassification.from_pretrained(folder, **{key: value}).eval()
    stock = TimmWrapperForImageClassification.from_pretrained(folder, **{key: value}).eval()
    name = "_attn_implementation" if key == "attn_implementation" else key
    assert getattr(model.config, name) == getattr(stock.config, name) == value
    outputs, expected = model(pixel_values), stock(pixel_values)
    assert type(outputs) is type(expected)
    assert torch.equal(outputs[0], logits)
    assert len(outputs) == len(expected)


def test_from_pretrained_without_a_checkpoint_loads_the_state_dict(saved):
    folder, _, pixel_values, logits = saved
    model = HFViTForImageClassification.from_pretrained(folder)
    copy = HFViTForImageClassification.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(copy.eval()(pixel_values).logits, logits)


def test_from_pretrained_with_id2label_renames_the_trained_head(saved):
    folder, _, pixel_values, logits = saved
    names = {0: "x", 1: "y", 2: "z"}
    model = HFViTForImageClassification.from_pretrained(folder, id2label=names).eval()
    assert model.config.id2label == names
    assert model.config.label2id == {"x": 0, "y": 1, "z": 2}
    assert torch.equal(model(pixel_values).logits, logits)


def test_from_pretrained_with_label2id_renames_the_trained_head(saved):
    folder, _, pixel_values, logits = saved
    model = HFViTForImageClassification.from_pretrained(folder, num_labels=3, label2id={"z": 2, "x": 0, "y": 1}).eval()
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert torch.equal(model(pixel_values).logits, logits)


@pytest.mark.parametrize(
    ("option", "kwargs"),
    [
        ("id2label", {"id2label": {0: "x", 2: "y"}}), ("label2id", {"label2id": {"x": 1, "y": 2}}),
        ("num_labels", {"num_labels": 5, "id2label": {0: "x", 1: "y", 2: "z"}}),
        ("num_labels", {"num_labels": 5, "labels": ["x", "y"]}),
        ("num_labels", {"num_labels": 0}),
        ("num_labels", {"num_labels": "3"}),
        ("labels", {"labels": []}),
        ("id2label", {"id2label": {}}),
        ("id2label", {"id2label": {"a": "x"}}),
        ("label2id", {"label2id": {"x": "a"}}),
        ("problem_type", {"problem_type": "multi_label"}),
        ("id2label", {"labels": ["x", "y"], "id2label": {0: "y", 1: "x"}}), ("image_size", {"image_size": 0}),
        ("image_size", {"image_size": -64}),
    ],
)  # fmt: skip
def test_from_pretrained_with_contradicting_values_raises(saved, option, kwargs):
    with pytest.raises(ValueError, match=rf"^{option}: "):
        HFViTForImageClassification.from_pretrained(saved[0], **kwargs)


@pytest.mark.parametrize(
    ("option", "value"),
    [("labels", "abc"), ("labels", 3), ("id2label", ["a", "b"]), ("label2id", [0]), ("id2label", {0: 1}),
      ("labels", [0, 1]), ("image_size", (64, 48)), ("image_size", "64"),
     ("image_size", 64.0)],
)  # fmt: skip
def test_from_pretrained_with_a_wrong_type_raises(saved, option, value):
    with pytest.raises(TypeError, match=rf"^{option}: "):
        HFViTForImageClassification.from_pretrained(saved[0], **{option: value})


def test_output_attentions_of_attention_between_channels_raises():
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    model = build_model(LABELS, architecture="xcit_nano_12_p16_224", image_size=32, timm_kwargs=options)
    with pytest.raises(ModelError, match=r"^output_attentions: .*\bXcit\b"):
        model(torch.zeros(1, 3, 32, 32), output_attentions=True)


def test_new_head_has_no_thresholds_of_the_old_one(saved, tmp_path):
    model = HFViTForImageClassification.from_pretrained(saved[0], problem_type="multi_label_classification")
    model.config.thresholds = [0.2, 0.9, 0.4]
    model.save_pretrained(tmp_path / "labels")

    def thresholds(**kwargs):
        config = HFViTForImageClassification.from_pretrained(tmp_path / "labels", **kwargs).config
        assert config.problem_type == "multi_label_classification"
        return getattr(config, "thresholds", None)

    assert thresholds() == thresholds(id2label={0: "x", 1: "y", 2: "z"}) == [0.2, 0.9, 0.4]
    assert thresholds(labels=["x", "y", "z"]) is None
    assert thresholds(num_labels=5) is None


@pytest.mark.parametrize("part", ["head", "2", None, 1.5])
def test_freeze_of_another_value_raises(saved, part):
    model = HFViTForImageClassification.from_pretrained(saved[0])
    with pytest.raises(ModelError, match=r"^freeze: "):
        model.freeze(part)


def test_integers_of_numpy_are_integers(saved, tmp_path):
    model = HFViTForImageClassification.from_pretrained(saved[0], image_size=np.int64(64))
    model.freeze(np.int64(1))
    model.save_pretrained(tmp_path)
    assert HFViTForImageClassification.from_pretrained(tmp_path).config.image_size == (64, 64)


def test_overlapping_patches_take_any_image_size(tmp_path):
    options = {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    model = build_model(LABELS, architecture="pvt_v2_b0", image_size=64, timm_kwargs=options).eval()
    model.save_pretrained(tmp_path)
    larger = HFViTForImageClassification.from_pretrained(tmp_path, image_size=96).eval()
    pixel_values = torch.randn(1, 3, 96, 96)
    assert larger.config.image_size == (96, 96)
    assert torch.equal(larger(pixel_values).logits, model(pixel_values).logits)


def test_compiled_blocks_are_saved_with_plain_names(saved, tmp_path):
    folder, _, pixel_values, logits = saved
    model = HFViTForImageClassification.from_pretrained(folder).eval()
    for index, block in enumerate(model.timm_model.blocks):
        model.timm_model.blocks[index] = torch.compile(block, backend="eager")
    model.save_pretrained(tmp_path / "compiled")
    copy = HFViTForImageClassification.from_pretrained(tmp_path / "compiled").eval()
    assert torch.equal(copy(pixel_values).logits, logits)


def test_model_with_shared_modules_round_trips(tmp_path):
    model = build_model(LABELS, architecture="coat_tiny", image_size=32, timm_kwargs=COAT).eval()
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 32, 32)
    copies = (HFViTForImageClassification, AutoModelForImageClassification)
    for copy in copies:
        assert torch.equal(copy.from_pretrained(tmp_path).eval()(pixel_values).logits, model(pixel_values).logits)


def test_model_with_an_auxiliary_head_gets_other_classes(tmp_path):
    model = build_model(LABELS, architecture="volo_d1_224", image_size=32)
    model.save_pretrained(tmp_path)
    other = HFViTForImageClassification.from_pretrained(tmp_path, labels=["a", "b", "c", "d"]).eval()
    assert other(torch.randn(1, 3, 32, 32)).logits.shape == (1, 4)
    assert not other.timm_model.aux_head.bias.any()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}),
        ("eva02_tiny_patch14_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}),
        (ARCHITECTURE, MICRO),
    ],
)
def test_init_weights_after_to_empty_equals_a_new_model(architecture, options):
    torch.manual_seed(3)
    model = build_model(LABELS, architecture=architecture, image_size=32, timm_kwargs=options).eval()
    with torch.device("meta"):
        empty = HFViTForImageClassification(model.config)
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.zero_()
    torch.manual_seed(3)
    empty.init_weights()
    pixel_values = torch.randn(1, 3, 32, 32)
    assert torch.equal(empty.eval()(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize(
    ("size", "device", "dtype", "is_fused"),
    [
        (192, "cpu", torch.bfloat16, False),  # 576 patches
        (200, "cpu", torch.bfloat16, True),  # 625 patches
        (192, "cpu", torch.float32, True),
        (192, "cuda", torch.bfloat16, True),
    ],
    ids=["bf16", "bf16 and many patches", "fp32", "GPU"],
)
def test_unfuse_slow_attention(size, device, dtype, is_fused):
    model = timm.create_model(ARCHITECTURE, img_size=size, **MICRO).eval()
    pixel_values = torch.rand(2, 3, size, size)
    with torch.no_grad():
        before = model(pixel_values)
        unfuse_slow_attention(model, torch.device(device), dtype)
        assert [block.attn.fused_attn for block in model.blocks] == [is_fused] * MICRO["depth"]
        torch.testing.assert_close(model(pixel_values), before)
