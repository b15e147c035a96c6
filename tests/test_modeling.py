"""The model: what it saves loads everywhere, what it loads is complete, and its size may change."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ARCHITECTURE, LABELS, MICRO, coloured_image, run_command
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperForImageClassification,
    pipeline,
)

import hfvit
from hfvit.building import build_model
from hfvit.errors import ModelError
from hfvit.modeling import HFViTForImageClassification

# One of each kind of position embedding: with a class token in it, beside it (DINOv2 with registers), and without one.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", MICRO),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {**MICRO, "patch_size": 8, "img_size": 64}),
    "siglip": ("vit_base_patch16_siglip_224", MICRO),
    "deit": ("deit_tiny_distilled_patch16_224", MICRO),
}


def micro(labels=LABELS, image_size=32, family="vit", **kwargs):
    torch.manual_seed(0)
    architecture, args = FAMILIES[family]
    return build_model(list(labels), architecture=architecture, image_size=image_size, timm_kwargs={**args, **kwargs})


@pytest.fixture
def saved(tmp_path):
    """A saved micro model with preprocessing of its own, a picture, and the logits the model gives it."""
    model = build_model(
        LABELS,
        architecture=ARCHITECTURE,
        image_size=32,
        timm_kwargs=MICRO,
        preprocessing={"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8, "interpolation": "bilinear"},
    ).eval()
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    image = coloured_image(1, np.random.default_rng(0), size=50)
    pixel_values = timm.data.create_transform(**timm.data.resolve_data_config(model.config.pretrained_cfg))(image)[
        None
    ]
    with torch.no_grad():
        return folder, image, pixel_values, model(pixel_values).logits


def test_loads_as_itself(saved):
    folder, _, pixel_values, logits = saved
    model = HFViTForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(model(pixel_values).logits, logits)
    assert model.config.id2label == dict(enumerate(LABELS))


def test_loads_with_stock_transformers_where_hfvit_cannot_be_imported(saved, tmp_path):
    folder, image, pixel_values, logits = saved
    image.save(tmp_path / "image.png")
    np.save(tmp_path / "logits.npy", logits.numpy())
    np.save(tmp_path / "pixels.npy", pixel_values.numpy())
    script = (
        "import sys; sys.modules['hfvit'] = None\n"
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
    result = run_command(sys.executable, "-c", script, folder, tmp_path)
    assert result.returncode == 0, result.stderr


def test_loads_in_a_pipeline(saved):
    folder, image, _, logits = saved
    answers = pipeline("image-classification", model=str(folder))(image)
    probabilities = logits.softmax(dim=1)[0]
    assert [answer["label"] for answer in answers] == [LABELS[i] for i in probabilities.argsort(descending=True)]
    assert [answer["score"] for answer in answers] == pytest.approx(
        sorted(probabilities.tolist(), reverse=True), abs=1e-6
    )


def test_loads_in_timm(saved):
    folder, image, pixel_values, logits = saved
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(model(pixel_values), logits)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    assert torch.equal(transform(image)[None], pixel_values)
    assert model.pretrained_cfg["label_names"] == LABELS


def test_loads_as_a_classifier(saved):
    folder, image, _, logits = saved
    classifier = hfvit.load_classifier(folder, device="cpu")
    torch.testing.assert_close(torch.from_numpy(classifier.logits([image])), logits)
    probabilities = dict(zip(LABELS, logits.softmax(dim=1)[0].tolist(), strict=True))
    for answer in classifier.predict((image for _ in range(3)), batch_size=2):
        assert answer == pytest.approx(probabilities, abs=1e-6)
    assert list(classifier.predict([np.asarray(image)], top_k=1)[0]) == [max(probabilities, key=probabilities.get)]


def test_config_is_stock_and_complete(saved):
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


def test_a_new_model_starts_from_timms_own_initialisation():
    torch.manual_seed(7)
    expected = timm.create_model(ARCHITECTURE, img_size=32, num_classes=3, **MICRO).state_dict()
    torch.manual_seed(7)
    actual = build_model(LABELS, architecture=ARCHITECTURE, image_size=32, timm_kwargs=MICRO).timm_model.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_labels_change_and_survive_round_trips(saved, tmp_path):
    folder = saved[0]
    renamed = HFViTForImageClassification.from_pretrained(folder, labels=["a", "b", "c", "d"])
    renamed.save_pretrained(tmp_path / "renamed")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "renamed")
    assert again.config.id2label == dict(enumerate("abcd"))
    assert again(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 4)
    many = [f"class {index}" for index in range(12)]
    micro(many).save_pretrained(tmp_path / "many")
    assert list(AutoModelForImageClassification.from_pretrained(tmp_path / "many").config.id2label.values()) == many


def test_the_head_is_kept_when_the_classes_agree_and_new_when_they_differ(saved):
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [24, 48])
def test_position_embeddings_are_resampled_as_timm_does(family, size, tmp_path):
    start = 64 if family == "dinov2" else 32
    model = micro(family=family, image_size=start)
    torch.nn.init.normal_(model.timm_model.pos_embed)
    model.save_pretrained(tmp_path)
    resized = HFViTForImageClassification.from_pretrained(tmp_path, image_size=size)
    assert resized.config.image_size == (size, size)
    # timm's loader resamples by itself when it builds the model at another size: an independent route.
    reference = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size)
    torch.testing.assert_close(resized.timm_model.pos_embed, reference.pos_embed)
    resized.save_pretrained(tmp_path / "resized")
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "resized").eval()
    x = torch.randn(2, 3, size, size)
    assert torch.equal(stock(x).logits, resized.eval()(x).logits)


def test_a_resampled_model_sees_nearly_the_same_and_the_stock_class_does_not(tmp_path):
    """Smooth position embeddings and a smooth picture: at twice the size the features barely change."""
    model = micro(image_size=64).eval()
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij"), dim=-1)
    smooth = grid.reshape(64, 2) @ torch.randn(2, 32)
    with torch.no_grad():
        model.timm_model.pos_embed[0, 1:] = smooth
    model.save_pretrained(tmp_path)
    resized = HFViTForImageClassification.from_pretrained(tmp_path, image_size=128).eval()
    # A picture of 8x8 flat tiles, each one patch at 64 px and four patches at 128 px.
    tiles = torch.randn(1, 3, 8, 8)
    small, large = (torch.nn.functional.interpolate(tiles, scale_factor=scale) for scale in (8, 16))

    def features(wrapped, pixel_values):
        with torch.no_grad():
            return wrapped.timm_model.forward_head(wrapped.timm_model.forward_features(pixel_values), pre_logits=True)

    original = features(model, small)
    assert torch.cosine_similarity(features(resized, large), original).item() > 0.99
    stock = TimmWrapperForImageClassification.from_pretrained(
        tmp_path, model_args={**MICRO, "img_size": 128}, ignore_mismatched_sizes=True
    )
    # What the stock class leaves there is uninitialised memory, often NaN; at any rate not the resampled positions.
    assert not torch.allclose(stock.timm_model.pos_embed, resized.timm_model.pos_embed, atol=0.1)


def test_attention_maps():
    model = micro().eval()
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    outputs = model(x, output_attentions=True)
    torch.testing.assert_close(outputs.logits, plain.logits)
    assert plain.attentions is None
    assert len(outputs.attentions) == 2
    assert outputs.attentions[0].shape == (2, 2, 17, 17)
    torch.testing.assert_close(outputs.attentions[0].sum(dim=-1), torch.ones(2, 2, 17))
    block = model.timm_model.blocks[0]
    tokens = block.norm1(model.timm_model._pos_embed(model.timm_model.patch_embed(x)))
    q, k, _ = block.attn.qkv(tokens).reshape(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(outputs.attentions[0], (q @ k.transpose(-1, -2) / 4).softmax(dim=-1))
    assert isinstance(model(x, output_attentions=True, return_dict=False)[-1], tuple)
    assert all(layer.attn.fused_attn for layer in model.timm_model.blocks)


def test_attention_maps_of_another_family_are_refused():
    model = build_model(
        LABELS, architecture="convnext_atto", timm_kwargs={"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    )
    with pytest.raises(ModelError, match="no plain attention blocks"):
        model(torch.zeros(1, 3, 64, 64), output_attentions=True)


def test_frozen_parts_have_no_gradient_and_no_dropout():
    model = micro(drop_path_rate=0.5, proj_drop_rate=0.5)
    model.freeze("backbone")
    model.train()
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x).logits, model(x).logits)
    model(x).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "timm_model.head.weight",
        "timm_model.head.bias",
    }


def test_gradient_checkpointing_gives_the_same_gradients():
    x, grads = torch.randn(2, 3, 32, 32), []
    for checkpointing in (False, True):
        model = micro().train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.timm_model.grad_checkpointing
        model(x).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_fewer_blocks_of_a_pretrained_model(saved):
    folder, _, _, _ = saved
    model = HFViTForImageClassification.from_pretrained(folder, timm_kwargs={"depth": 1})
    assert len(model.timm_model.blocks) == 1
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(model.timm_model.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])


def test_layer_scale_is_loaded(tmp_path):
    """transformers renames `gamma` in old checkpoints (transformers#33687); timm's LayerScale must not suffer."""
    model = micro(init_values=0.3)
    torch.nn.init.normal_(model.timm_model.blocks[0].ls1.gamma)
    model.save_pretrained(tmp_path)
    again = HFViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again.timm_model.blocks[0].ls1.gamma, model.timm_model.blocks[0].ls1.gamma)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"architecture": "vit_tinny_patch16_224"}, "Did you mean 'vit_tiny_patch16_224'?"),
        ({"architecture": ARCHITECTURE, "image_size": 50}, "use 48 or 64"),
        ({"architecture": ARCHITECTURE, "timm_kwargs": {"heads": 2}}, "heads"),
        ({"architecture": ARCHITECTURE, "timm_kwargs": {"embed_dim": 32}}, "cannot be built"),
        ({"architecture": ARCHITECTURE, "timm_kwargs": MICRO, "frozen": 9}, "9 blocks were asked for"),
        ({"model_name_or_path": "/nowhere"}, "there is no folder"),
    ],
)
def test_models_that_cannot_be_built_are_named(kwargs, message):
    with pytest.raises(ModelError) as caught:
        build_model(LABELS, **kwargs)
    assert message in str(caught.value)


def test_any_timm_network_takes_an_image_size():
    kwargs = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    model = build_model(LABELS, architecture="convnext_atto", image_size=64, timm_kwargs=kwargs)
    assert model.config.image_size == (64, 64)
    assert "img_size" not in model.config.model_args
    assert model(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3)


def test_a_folder_without_weights_is_named(saved):
    (saved[0] / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be built"):
        build_model(LABELS, model_name_or_path=str(saved[0]))


def test_fsdp_wraps_the_models_own_blocks():
    assert micro()._no_split_modules == ["Block"]


def test_an_unreachable_repository_is_named():
    with pytest.raises(ModelError, match="timm/no-such-model cannot be read"):
        build_model(LABELS, model_name_or_path="timm/no-such-model")


def test_a_checkpoint_of_another_kind_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 32}))
    with pytest.raises(ModelError, match="is a 'vit' checkpoint, not a timm one"):
        build_model(LABELS, model_name_or_path=str(tmp_path))


def test_a_checkpoint_without_a_head_asks_for_classes(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    (saved[0] / "config.json").write_text(json.dumps({**config, "num_classes": 0, "label_names": []}))
    with pytest.raises(ModelError, match="has no classifier of its own"):
        HFViTForImageClassification.from_pretrained(saved[0])
    assert build_model(["a", "b"], model_name_or_path=str(saved[0])).config.num_labels == 2


def test_missing_or_misshapen_weights_are_an_error_not_a_warning(saved):
    file = saved[0] / "model.safetensors"
    weights = load_file(file)
    del weights["blocks.1.mlp.fc1.weight"]
    weights["pos_embed"] = weights["pos_embed"][:, :-2].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"2 weights are missing or of another shape \(blocks.1.mlp.fc1.weight, pos_embed\)"
    ):
        HFViTForImageClassification.from_pretrained(saved[0], labels=["new", "classes"])
