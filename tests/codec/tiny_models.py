"""Tiny random CLIP and SigLIP models with their processors, as directories that transformers loads."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from dicmh_ray.codec.icmh.text import train_tokenizer

WORDS = ("dog", "cat", "Border collie", "zebra", "tree", "house", "sea", "sky")

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def write_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(WORDS, folder / "bpe", size=600)
    config = CLIPConfig(
        text_config=TOWER
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    directory = folder / "clip"
    CLIPModel(config).save_pretrained(directory)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(directory)
    return directory


def write_siglip(folder: Path) -> Path:
    torch.manual_seed(1)
    letters = [
        *"abcdefghijklmnopqrstuvwxyz.",
        "this",
        "is",
        "photo",
        "of",
        "<pad>",
        "<unk>",
        "</s>",
    ]
    tokens = {token: i for i, token in enumerate([*letters, *(word.lower() for word in WORDS)])}
    backend = Tokenizer(WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    config = SiglipConfig(
        text_config=TOWER
        | {"vocab_size": len(tokens), "max_position_embeddings": 16, "projection_size": 32},
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
    )
    directory = folder / "siglip"
    model = SiglipModel(config)
    torch.nn.init.constant_(model.logit_scale, 2.0)
    torch.nn.init.constant_(model.logit_bias, -1.0)
    model.save_pretrained(directory)
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(directory)
    return directory
