"""Heads from class names equal the zero-shot classifier of CLIP or SigLIP."""

import json

import numpy as np
import pytest
import torch
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names
from helpers.models import build_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

import hfvit
from hfvit.errors import ModelError, run
from hfvit.finetuning.zero_shot_head import initialize_head_from_text, name_embeddings
from hfvit.pipeline import main

TOWER = "vit_base_patch16_clip_quickgelu_224"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["[PAD]", "[UNK]", "[END]", "a", "photo", "of", ".", *LABELS]


def write_pair(folder, siglip=False):
    """Save a micro CLIP or SigLIP model with random weights and spread logits."""
    torch.manual_seed(0)
    config = SiglipConfig if siglip else CLIPConfig
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    extra = {} if siglip else {"projection_dim": 24}
    pair = (SiglipModel if siglip else CLIPModel)(config(text_config=text, vision_config=vision, **extra)).eval()
    for parameter in pair.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    pair.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return pair, tokenizer


def timm_tower(pair: CLIPModel) -> dict[str, torch.Tensor]:
    """Return the vision model's weights with timm's names."""
    vision = {name.removeprefix("vision_model."): value for name, value in pair.state_dict().items()}
    found = {
        "cls_token": vision["embeddings.class_embedding"][None, None],
        "pos_embed": vision["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": vision["embeddings.patch_embedding.weight"],
    }
    renamed = {"pre_layrnorm": "norm_pre", "post_layernorm": "norm"}
    for index in range(SIZES["num_hidden_layers"]):
        here, there = f"encoder.layers.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            found[f"{there}.attn.qkv.{kind}"] = torch.cat(
                [vision[f"{here}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
        parts = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
        parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        renamed |= {f"{here}.{old}": f"{there}.{new}" for old, new in parts.items()}
    for old, new in renamed.items():
        found |= {f"{new}.{kind}": vision[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Save a CLIP model; returns it, its folder, and the folder of its timm image tower."""
    folder = tmp_path_factory.mktemp("pair")
    model, tokenizer = write_pair(folder / "clip")
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    tower = build_model(LABELS, architecture=TOWER, image_size=16, timm_kwargs=shape)
    missing, unexpected = tower.timm_model.load_state_dict(timm_tower(model), strict=False)
    assert not unexpected
    assert all("head" in name for name in missing)
    tower.save_pretrained(folder / "tower")
    return model, tokenizer, folder


def test_train_with_head_from_text_starts_as_zero_shot(pair, colors, tmp_path):
    """Before the first step, logits equal CLIP's up to a factor per image."""
    clip, tokenizer, folder = pair
    recipe = tmp_path / "text.yaml"
    recipe.write_text(
        f"model_name_or_path: {folder / 'tower'}\nhead_from_text: {folder / 'clip'}\nimage_size: 16\ncrop_pct: 1.0\n"
        f"dataset_name: {colors}\noutput_dir: {tmp_path / 'out'}\nvalidation_fraction: 0.2\nglobal_batch_size: 8\n"
        "max_steps: 1\nlearning_rate: 0.0\nfreeze: backbone\neval_strategy: 'no'\nplots: false\ndisable_tqdm: true\n"
    )
    assert run(lambda: main([str(recipe)])) == 0
    classifier = hfvit.load_classifier(tmp_path / "out", device="cpu")
    rng = np.random.default_rng(4)
    images = [colored_image(index % 3, rng) for index in range(60)]
    logits = classifier.logits(images)
    pixels = torch.from_numpy(classifier.pixel_values(images))
    tokens = tokenizer([f"a photo of a {label}." for label in LABELS], padding=True, return_tensors="pt")
    with torch.inference_mode():
        names = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        expected = clip(pixel_values=pixels, **names).logits_per_image.numpy()
    assert len(set(expected.argmax(1))) > 1
    assert (logits.argmax(1) == expected.argmax(1)).all()
    ratio = logits / expected  # one factor per image: its norm over the mean
    assert np.allclose(ratio, ratio[:, :1], rtol=1e-3)
    assert 0.5 < ratio.mean() < 2
    assert json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]["head_from_text"] == str(folder / "clip")


def test_name_embeddings_equal_siglips(tmp_path):
    model, tokenizer = write_pair(tmp_path, siglip=True)
    tokens = tokenizer([f"a photo of a {label}." for label in LABELS], padding="max_length", max_length=16)
    with torch.inference_mode():
        expected = model(
            input_ids=torch.tensor(tokens["input_ids"]), pixel_values=torch.zeros(1, 3, 16, 16)
        ).text_embeds
        found = name_embeddings(model, "siglip", LABELS, source=str(tmp_path), templates=["a photo of a {}."])
    assert torch.allclose(found, expected, atol=1e-6)


def test_many_class_names_are_embedded_in_several_passes(pair, monkeypatch):
    def limited(input_ids, attention_mask):
        assert len(input_ids) <= 256
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    clip, _, folder = pair
    forward = clip.get_text_features
    source = {"source": str(folder / "clip"), "templates": ["a photo of {}", "{}"]}
    few = name_embeddings(clip, "clip", LABELS, **source)
    monkeypatch.setattr(clip, "get_text_features", limited)
    many = name_embeddings(clip, "clip", LABELS * 100, **source)
    assert torch.allclose(many, few.repeat(100, 1), atol=1e-6)


@pytest.mark.parametrize("what", ["another tower", "no pair", "no linear head"])
def test_head_from_text_of_unsuitable_model_raises(what, pair, stock):
    shape = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2}
    source, model = pair[2] / "clip", build_model(LABELS, architecture=TOWER, image_size=16, timm_kwargs=shape)
    if what == "no pair":
        source = stock
    if what == "no linear head":
        model.timm_model.head = torch.nn.Identity()
    data = {"another tower": [32, 48], "no pair": ["'vit'"], "no linear head": ["Identity"]}
    with pytest.raises(ModelError, match=r"^head_from_text: ") as caught:
        initialize_head_from_text(model, LABELS, None, None, source=str(source), templates=["{}"])
    assert_names(caught.value, *data[what])
