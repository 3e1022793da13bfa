"""Tags -> the embedding that guides the restorer: OpenCLIP's ViT-H/14 text tower without its last block.

    tags ──", "──> text ──byte-level BPE──> ids [77] ──embeddings, blocks, final norm──> [77, 1024]
                              start · words · end · 0 0 0 ...

Three habits of the original decide the numbers. Texts are padded with **id 0** after the end token;
transformers pads with the end token itself, and every padded place is read by the cross-attention.
There is no padding mask, only the causal one. The output is that of the last block but one, through
the final norm.

The weights are kept under the names of transformers' published checkpoints (``text_model.…``): the
``text_encoder`` folder of Stable Diffusion 2.1 fits as it is. :func:`text_to_ours` and
:func:`text_to_official` map them to OpenCLIP's, which the official checkpoints use.

The tokenizer is two files, ``vocab.json`` and ``merges.txt``, in the folder ``tokenizer`` of a
checkpoint. They come from a published CLIP checkpoint, from OpenCLIP's own list
(:func:`import_openclip_tokenizer`) or, for small codecs, from the words themselves
(:func:`train_tokenizer`). OpenCLIP repairs mojibake and HTML entities in a text before it splits it;
here a text is taken as it is. For words of letters, digits and punctuation the ids are the same.

Shape suffixes: B texts, T tokens, D width.
"""

import gzip
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dicmh_ray.codec.icmh.config import TextConfig
from dicmh_ray.errors import WeightsError

TOKENIZER_FILES = ("vocab.json", "merges.txt")

TOKENIZER_FOLDER = "tokenizer"
"""Of a checkpoint directory."""

PAD_ID = 0
"""What fills a text up. An ordinary token (``!``) at full width; the original does the same."""

DROPPED = ("text_projection", "logit_scale")
"""Official tensors that have no part in the embedding. So has the block after the last one kept:
block 23 at full width. They may be there or not; nothing else may."""

_START, _END = "<|startoftext|>", "<|endoftext|>"

_OPENCLIP_MERGES = 49152 - 256 - 2
"""OpenCLIP reads so many lines of its list, which is longer."""

_MAX_TOKENIZER_BYTES = 64 * 2**20

_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Layers of a block: OpenCLIP's name -> transformers'."""

_PLAIN_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}

_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
"""Thirds of OpenCLIP's ``attn.in_proj``, in order."""


def tags_text(tags: Sequence[str]) -> str:
    """The text that stands for tags: ``"cat, dog"``; empty for none.

    Order matters to the encoder. The original gives words in the order of their vocabulary, which is
    how :func:`~dicmh_ray.tags.decode_tags` returns them.
    """
    return ", ".join(tags)


class TextEncoder(nn.Module):
    """Texts -> embeddings. Frozen: no gradient is ever wanted of it.

    Args:
        config: shapes.
        tokenizer: from :func:`load_tokenizer`; its ids must be below ``config.vocabulary_size``.

    Raises:
        WeightsError: the tokenizer has more tokens than the embedding has rows.
    """

    def __init__(self, config: TextConfig, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        if len(tokenizer) > config.vocabulary_size:
            raise WeightsError(
                TOKENIZER_FOLDER,
                f"it has {len(tokenizer)} tokens, the text encoder {config.vocabulary_size}",
            )
        self.config = config
        self.tokenizer = tokenizer
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocabulary_size,
                hidden_size=config.width,
                intermediate_size=config.feed_forward,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.max_tokens,
                hidden_act="gelu",  # exact; CLIPs of OpenAI have quick_gelu
                layer_norm_eps=1e-5,
                pad_token_id=PAD_ID,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        # Some releases of transformers have one module more; the published names are the same.
        self.text_model: nn.Module = getattr(model, "text_model", model)
        self.eval().requires_grad_(False)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids int64 ``[B, T]`` on the CPU: start, words, end, zeros. Long texts lose their end."""
        length = self.config.max_tokens
        ids_BT = torch.full((len(texts), length), PAD_ID, dtype=torch.int64)
        for row, text in zip(ids_BT, texts, strict=True):
            ids = self.tokenizer(
                text, truncation=True, max_length=length, split_special_tokens=True
            )["input_ids"]
            row[: len(ids)] = torch.tensor(ids)
        return ids_BT

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embeddings ``[B, T, D]`` of ids, in the dtype of the weights."""
        return self.text_model(input_ids=ids_BT).last_hidden_state

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[B, T, D]`` of at least one text, on the device and in the dtype of the weights.

        ``""`` is what a restorer without guidance is given.
        """
        device = next(self.parameters()).device
        return self(self.tokenize(texts).to(device))

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint, every one of them and no other.

        Raises:
            WeightsError: a tensor is missing, unexpected or of another shape; the message names it.
        """
        _check(state, {name: tuple(value.shape) for name, value in self.state_dict().items()})
        self.load_state_dict(dict(state))


def text_to_ours(official: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """Weights of an OpenCLIP text tower under our names.

    Args:
        official: keys without the checkpoint's prefix (``cond_stage_model.model.``).
        config: shapes.

    Returns:
        what :meth:`TextEncoder.load_weights` takes. The thirds of ``in_proj`` are views.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape; the message names it.
    """
    kept = {name: value for name, value in official.items() if not _is_dropped(name, config)}
    _check(kept, official_shapes(config))
    ours = {new: kept[old] for old, new in _PLAIN_NAMES.items()}
    for n in range(config.layers):
        old, new = _block_prefixes(n)
        for kind in ("weight", "bias"):
            thirds = kept[f"{old}.attn.in_proj_{kind}"].chunk(3)
            for name, third in zip(_QUERY_KEY_VALUE, thirds, strict=True):
                ours[f"{new}.self_attn.{name}.{kind}"] = third
            for layer, name in _BLOCK_NAMES.items():
                ours[f"{new}.{name}.{kind}"] = kept[f"{old}.{layer}.{kind}"]
    return ours


def text_to_official(ours: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """The inverse of :func:`text_to_ours`; what that drops (:data:`DROPPED`) does not come back.

    Raises:
        WeightsError: a tensor is missing or unexpected; the message names it.
    """
    used: set[str] = set()

    def take(name: str) -> Tensor:
        used.add(name)
        if name not in ours:
            raise WeightsError("text encoder", f"{name} is missing")
        return ours[name]

    official = {old: take(new) for old, new in _PLAIN_NAMES.items()}
    for n in range(config.layers):
        old, new = _block_prefixes(n)
        for kind in ("weight", "bias"):
            thirds = [take(f"{new}.self_attn.{name}.{kind}") for name in _QUERY_KEY_VALUE]
            official[f"{old}.attn.in_proj_{kind}"] = torch.cat(thirds)
            for layer, name in _BLOCK_NAMES.items():
                official[f"{old}.{layer}.{kind}"] = take(f"{new}.{name}.{kind}")
    if unexpected := sorted(set(ours) - used):
        raise WeightsError("text encoder", f"{unexpected[0]} is unexpected")
    _check(official, official_shapes(config))
    return official


def official_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every official tensor that is kept."""
    d, inner = config.width, config.feed_forward
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocabulary_size, d),
        "positional_embedding": (config.max_tokens, d),
        "ln_final.weight": (d,),
        "ln_final.bias": (d,),
    }
    block = {
        "ln_1.weight": (d,),
        "ln_2.weight": (d,),
        "attn.in_proj_weight": (3 * d, d),
        "attn.out_proj.weight": (d, d),
        "mlp.c_fc.weight": (inner, d),
        "mlp.c_proj.weight": (d, inner),
    }
    for n in range(config.layers):
        old, _ = _block_prefixes(n)
        for name, shape in block.items():
            shapes[f"{old}.{name}"] = shape
            shapes[f"{old}.{name.removesuffix('weight')}bias"] = shape[:1]
    return shapes


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer whose ``vocab.json`` and ``merges.txt`` lie in a folder. Nothing else is read.

    Raises:
        WeightsError: a file is missing, or they are not those of a CLIP tokenizer.
    """
    texts = []
    for name in TOKENIZER_FILES:
        try:
            data = (folder / name).read_bytes()
        except OSError as exc:
            raise WeightsError(str(folder), f"no tokenizer: {name}: {exc.strerror}") from exc
        if len(data) > _MAX_TOKENIZER_BYTES:
            raise WeightsError(str(folder), f"{name} has {len(data)} bytes: no tokenizer's")
        try:
            texts.append(data.decode())
        except UnicodeDecodeError as exc:
            raise WeightsError(str(folder), f"{name} is not UTF-8: {exc}") from exc
    try:
        vocab = json.loads(texts[0])
    except ValueError as exc:
        raise WeightsError(str(folder), f"vocab.json is not JSON: {exc}") from exc
    if not isinstance(vocab, dict) or sorted(vocab.values(), key=repr) != sorted(
        range(len(vocab)), key=repr
    ):
        raise WeightsError(str(folder), "vocab.json does not number its tokens 0, 1, 2, ...")
    if missing := [token for token in (_START, _END) if token not in vocab]:
        raise WeightsError(str(folder), f"vocab.json has no {missing[0]}")
    merges = []
    for number, line in enumerate(texts[1].splitlines(), start=1):
        if line.startswith("#version") or not line:
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise WeightsError(str(folder), f"merges.txt, line {number}: no merge of known tokens")
        merges.append(pair)
    # The annotation has no pairs; the class takes them, and files name merges by pairs.
    return CLIPTokenizer(vocab=vocab, merges=merges)  # type: ignore[arg-type]


def train_tokenizer(texts: Iterable[str], folder: Path, *, size: int = 1024) -> CLIPTokenizer:
    """Make a small tokenizer of the same kind from texts, so that a small codec needs no download.

    Any text has ids: every byte is a token. The same texts give the same files.

    Args:
        texts: words of a vocabulary, captions: what will be encoded.
        folder: for the two files; is created.
        size: tokens at most, ``TextConfig.vocabulary_size``; 514 are bytes and the two marks.

    Raises:
        ValueError: ``size`` is below 514.
    """
    smallest = 2 * 256 + 2
    if size < smallest:
        raise ValueError(f"size is {size}, wanted at least {smallest}")
    splitter = CLIPTokenizer(vocab=_clip_vocabulary([]), merges=[]).backend_tokenizer
    pieces: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(
            splitter.normalizer.normalize_str(text)
        ):
            pieces[(*word[:-1], word[-1] + "</w>")] += 1
    _write_tokenizer(_learn_merges(pieces, size - smallest), folder)
    return load_tokenizer(folder)


def _learn_merges(words: Mapping[tuple[str, ...], int], count: int) -> list[tuple[str, str]]:
    """The ``count`` most useful merges: each time the most frequent pair, the first of equal ones.

    The trainer of the library ``tokenizers`` breaks ties by hash, another way in each process.

    Args:
        words: letters of each word, and how often it occurs.
        count: fewer when every word is one token before.
    """
    spelled = [(list(letters), times) for letters, times in words.items()]
    totals: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = {}
    for number, (parts, times) in enumerate(spelled):
        for pair in itertools.pairwise(parts):
            totals[pair] += times
            places.setdefault(pair, set()).add(number)
    merges: list[tuple[str, str]] = []
    while len(merges) < count and totals:
        best = min(totals, key=lambda pair: (-totals[pair], pair))
        merges.append(best)
        for number in places.pop(best):
            parts, times = spelled[number]
            for pair in itertools.pairwise(parts):
                totals[pair] -= times
                if not totals[pair]:
                    del totals[pair]
            at = 0
            while at + 1 < len(parts):
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1
            for pair in itertools.pairwise(parts):
                totals[pair] += times
                places.setdefault(pair, set()).add(number)
    return merges


def import_openclip_tokenizer(path: Path, folder: Path) -> CLIPTokenizer:
    """Write OpenCLIP's tokenizer as the two files that a checkpoint holds.

    Args:
        path: ``bpe_simple_vocab_16e6.txt.gz`` from the package ``open_clip`` or CLIP's repository.
        folder: for the two files; is created.

    Raises:
        WeightsError: the file is not that list.
    """
    try:
        with gzip.open(path, "rb") as file:
            text = file.read(_MAX_TOKENIZER_BYTES).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as exc:
        raise WeightsError(str(path), f"no list of merges: {exc}") from exc
    lines = text.split("\n")[1 : _OPENCLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != _OPENCLIP_MERGES or any(len(pair) != 2 for pair in merges):
        raise WeightsError(str(path), f"wanted {_OPENCLIP_MERGES} merges of two tokens")
    _write_tokenizer(merges, folder)
    return load_tokenizer(folder)


def _write_tokenizer(merges: Sequence[tuple[str, ...]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocab = json.dumps(_clip_vocabulary(merges), ensure_ascii=False)
    (folder / "vocab.json").write_text(vocab + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _clip_vocabulary(merges: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """Token -> id in CLIP's order: bytes, bytes that end a word, merges, start, end."""
    # Printable bytes stand for themselves and come first, as in GPT-2; the others get a letter
    # from 256 on, in order. So a byte's letter is also its rank.
    letters = sorted(ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in letters]
    tokens = [*letters, *endings, *("".join(pair) for pair in merges), _START, _END]
    return {token: number for number, token in enumerate(tokens)}


def _block_prefixes(n: int) -> tuple[str, str]:
    return f"transformer.resblocks.{n}", f"text_model.encoder.layers.{n}"


def _is_dropped(name: str, config: TextConfig) -> bool:
    block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if block is None:
        return name in DROPPED
    first, _ = _block_prefixes(0)
    return int(block[1]) == config.layers and f"{first}.{block[2]}" in official_shapes(config)


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a WeightsError that names the first of the faults, and says how many there are."""
    faults = [f"{name} is missing" for name in wanted if name not in state]
    faults += [f"{name} is unexpected" for name in state if name not in wanted]
    faults += [
        f"{name} is {tuple(state[name].shape)}, wanted {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise WeightsError("text encoder", faults[0] + more)
