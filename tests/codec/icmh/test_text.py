"""The text encoder against an independent one in plain torch, under OpenCLIP's names."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from dicmh_ray.codec.icmh.config import TextConfig
from dicmh_ray.codec.icmh.text import (
    PAD_ID,
    TOKENIZER_FILES,
    TextEncoder,
    import_openclip_tokenizer,
    load_tokenizer,
    official_shapes,
    tags_text,
    text_to_official,
    text_to_ours,
    train_tokenizer,
)
from dicmh_ray.errors import WeightsError

WORDS = ["dog", "cat", "christmas tree", "Border collie", "zebra crossing", "größe", "3D glasses"]
TEXTS = ["", "dog", "dog, cat, christmas tree", "zebra " * 90]
CONFIG = TextConfig(width=64, layers=2, heads=4, feed_forward=256, vocabulary_size=620)


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)}
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClipText(nn.Module):
    """The whole tower with one block more than is used; ``penultimate`` is what guides."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        d = config.width
        self.token_embedding = nn.Embedding(config.vocabulary_size, d)
        self.positional_embedding = nn.Parameter(torch.randn(config.max_tokens, d) / 8)
        blocks = [
            OpenClipBlock(d, config.heads, config.feed_forward) for _ in range(config.layers + 1)
        ]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(d)
        self.text_projection = nn.Parameter(torch.randn(d, d))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    @torch.no_grad()
    def penultimate(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        for block in self.transformer["resblocks"][:-1]:
            x = block(x, mask)
        return self.ln_final(x)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return train_tokenizer(WORDS, tmp_path_factory.mktemp("tokenizer"), size=620)


@pytest.fixture(scope="module")
def official() -> OpenClipText:
    """Random weights; norms and biases too, so that a swapped one is seen."""
    torch.manual_seed(3)
    model = OpenClipText(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def encoder(tokenizer: CLIPTokenizer, official: OpenClipText) -> TextEncoder:
    encoder = TextEncoder(CONFIG, tokenizer)
    encoder.load_weights(text_to_ours(official.state_dict(), CONFIG))
    return encoder


def test_the_embedding_is_that_of_an_independent_openclip(
    encoder: TextEncoder, official: OpenClipText
) -> None:
    wanted = official.penultimate(encoder.tokenize(TEXTS))
    found = encoder.embed(TEXTS)
    assert found.shape == (4, 77, 64)
    assert not found.requires_grad
    assert (found - wanted).abs().max() < 1e-5


def test_padding_with_the_end_token_gives_another_embedding(
    encoder: TextEncoder, official: OpenClipText
) -> None:
    ids = encoder.tokenize(["dog"])
    end = encoder.tokenizer.eos_token_id
    length = int((ids[0] == end).nonzero()[0]) + 1
    wrong = ids.clone()
    wrong[:, length:] = end
    right = official.penultimate(ids)
    difference = official.penultimate(wrong) - right
    assert difference.norm() / right.norm() > 0.1
    assert difference[:, :length].abs().max() < 1e-5, "what comes before sees nothing of it"


@pytest.mark.parametrize("change", ["last block kept", "no final norm", "approximate gelu"])
def test_each_departure_from_the_original_is_seen(
    encoder: TextEncoder, official: OpenClipText, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = encoder.tokenize(["dog, cat"])
    if change == "last block kept":
        blocks = nn.ModuleList([*official.transformer["resblocks"], nn.Identity()])
        monkeypatch.setitem(official.transformer._modules, "resblocks", blocks)
    elif change == "no final norm":
        monkeypatch.setitem(official._modules, "ln_final", nn.Identity())
    else:
        monkeypatch.setattr(nn.functional, "gelu", lambda x: x * torch.sigmoid(1.702 * x))
    wrong = official.penultimate(ids)
    monkeypatch.undo()
    assert (wrong - encoder.embed(["dog, cat"])).abs().max() > 1e-3


def test_a_text_alone_and_among_others_embeds_alike(encoder: TextEncoder) -> None:
    together = encoder.embed(TEXTS)
    for text, wanted in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(encoder.embed([text])[0], wanted, atol=1e-5, rtol=0)


def test_ids_are_start_words_end_and_zeros(encoder: TextEncoder) -> None:
    start, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    empty, dog, _, long = encoder.tokenize(TEXTS).tolist()
    assert empty == [start, end, *[PAD_ID] * 75]
    assert dog[0] == start
    assert dog[-1] == PAD_ID
    assert (len(long), long[0], long[-1]) == (77, start, end), "cut texts keep their end"
    assert PAD_ID not in long
    assert encoder.tokenize([]).shape == (0, 77)


def test_marks_inside_a_tag_are_letters(encoder: TextEncoder) -> None:
    (ids,) = encoder.tokenize(["<|endoftext|> dog"]).tolist()
    assert ids.count(encoder.tokenizer.eos_token_id) == 1


def test_tags_become_one_text() -> None:
    assert tags_text(()) == ""
    assert tags_text(("cat", "christmas tree")) == "cat, christmas tree"


def test_weights_go_to_the_official_names_and_back(
    encoder: TextEncoder, official: OpenClipText
) -> None:
    state = official.state_dict()
    back = text_to_official(text_to_ours(state, CONFIG), CONFIG)
    assert set(state) - set(back) == {
        "text_projection",
        "logit_scale",
        *(name for name in state if name.startswith("transformer.resblocks.2.")),
    }
    for name, value in back.items():
        assert torch.equal(value, state[name]), name
    ours = encoder.state_dict()
    again = text_to_ours(text_to_official(ours, CONFIG), CONFIG)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    "name",
    ["token_embedding.weight", "transformer.resblocks.1.attn.in_proj_bias", "ln_final.bias"],
)
def test_a_missing_official_tensor_is_named(official: OpenClipText, name: str) -> None:
    state = official.state_dict()
    value = state.pop(name)
    with pytest.raises(WeightsError, match=rf"{name} is missing"):
        text_to_ours(state, CONFIG)
    with pytest.raises(WeightsError, match=rf"{name} is \(1,\), wanted"):
        text_to_ours(state | {name: value.new_zeros(1)}, CONFIG)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.resblocks.3.ln_1.weight",
        "transformer.resblocks.2.ln_3.weight",
        "transformer.resblocks.1.attn.q_proj_weight",
        "attn_mask",
        "visual.proj",
    ],
)
def test_an_unexpected_official_tensor_is_named(official: OpenClipText, name: str) -> None:
    with pytest.raises(WeightsError, match=rf"{name} is unexpected"):
        text_to_ours(official.state_dict() | {name: torch.zeros(1)}, CONFIG)


def test_our_weights_are_taken_strictly(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> None:
    state = dict(encoder.state_dict())
    fresh = TextEncoder(CONFIG, tokenizer)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    value = state.pop(name)
    for load in (fresh.load_weights, lambda state: text_to_official(state, CONFIG)):
        with pytest.raises(WeightsError, match=f"{name} is missing"):
            load(state)
        with pytest.raises(WeightsError, match="more is unexpected"):
            load(state | {name: value, "more": value})
        with pytest.raises(WeightsError, match=r"is \(64,\), wanted"):
            load(state | {name: value[0]})
    fresh.load_weights(state | {name: value})
    assert torch.equal(fresh.embed(["cat"]), encoder.embed(["cat"]))


def test_the_full_width_is_the_official_one(tokenizer: CLIPTokenizer) -> None:
    config = TextConfig()
    with torch.device("meta"):
        encoder = TextEncoder(config, tokenizer)
    names = official_shapes(config)
    assert len(names) == 4 + 23 * 12
    assert names["transformer.resblocks.22.attn.in_proj_weight"] == (3072, 1024)
    assert names["transformer.resblocks.0.mlp.c_fc.bias"] == (4096,)
    kept = sum(map(math.prod, names.values()))
    assert sum(p.numel() for p in encoder.parameters()) == kept
    dropped_block = [s for n, s in names.items() if n.startswith("transformer.resblocks.0.")]
    assert kept + sum(map(math.prod, dropped_block)) + 1024 * 1024 + 1 == 354_032_641
    state = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    assert text_to_ours(state, config).keys() == encoder.state_dict().keys()


def test_names_and_shapes_are_those_of_the_official_list(reference: Path) -> None:
    """The list lies beside the reference tensors where somebody has put it."""
    path = reference.parent / "spec" / "diff-icmh-shapes.json"
    if not path.is_file():
        pytest.skip("there is no list of official shapes")
    listed = json.loads(path.read_text())["cond_stage_model.model"]
    state = {name: torch.empty(shape, device="meta") for name, shape in listed.items()}
    ours = text_to_ours(state, TextConfig())
    assert len(ours) == 372
    assert {n: tuple(v.shape) for n, v in text_to_official(ours, TextConfig()).items()} == (
        official_shapes(TextConfig())
    )


def test_a_tokenizer_learns_words_and_codes_any_text(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    for word in WORDS:
        ids = tokenizer(word)["input_ids"][1:-1]
        assert len(ids) == len(word.split()) + word.startswith("3D"), word
    for text in ("日本 🦊", "\x00", "qwertz & asdf"):
        ids = tokenizer(text)["input_ids"]
        assert all(0 <= i < len(tokenizer) for i in ids)
        assert tokenizer.decode(ids[1:-1]) == text
    again = train_tokenizer(WORDS, tmp_path, size=620)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 620
    with pytest.raises(ValueError, match="at least 514"):
        train_tokenizer(WORDS, tmp_path, size=513)


def test_the_limit_of_tokens_is_kept_whatever_is_learned(tmp_path: Path) -> None:
    words = [a + b + c for a in "bcdfg" for b in "aeiou" for c in "klmnp"]
    assert len(train_tokenizer(words, tmp_path, size=530)) == 530
    plain = train_tokenizer([], tmp_path, size=514)
    assert len(plain) == 514
    assert plain.eos_token_id == 513
    assert plain.convert_ids_to_tokens(PAD_ID) == "!"


def test_transformers_itself_reads_the_files(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    train_tokenizer(WORDS, tmp_path, size=620)
    theirs = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_openclips_list_of_merges_becomes_the_two_files(tmp_path: Path) -> None:
    path = tmp_path / "list.txt.gz"
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pairs = [f"{a} {b}" for a in letters for b in letters]
    extra = [f"{a}{b} {c}" for a in letters for b in letters for c in letters]
    extra += [f"{a}{b}{c} {d}" for a in letters for b in letters for c in letters for d in "xyz"]
    lines = ["first line", *pairs, *extra][: 48_894 + 1]
    with gzip.open(path, "wb") as file:
        file.write("\n".join([*lines, "beyond the end"]).encode())
    found = import_openclip_tokenizer(path, tmp_path / "tokenizer")
    assert (len(found), found.bos_token_id, found.eos_token_id) == (49408, 49406, 49407)
    assert found.convert_ids_to_tokens([0, 255, 256, 512]) == ["!", "Ń", "!</w>", "aa"]
    for content in (b"no gzip", gzip.compress(b"one line\na b"), path.read_bytes()[:-40]):
        path.write_bytes(content)
        with pytest.raises(WeightsError):
            import_openclip_tokenizer(path, tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("vocab.json", None, "No such file"),
        ("merges.txt", None, "No such file"),
        ("vocab.json", b"\xff", "not UTF-8"),
        ("vocab.json", b"{", "not JSON"),
        ("vocab.json", b"[]", "does not number"),
        ("vocab.json", b'{"a": 1}', "does not number"),
        ("vocab.json", b'{"a": 0, "b": "1"}', "does not number"),
        ("vocab.json", b'{"a": 0}', "no <|startoftext|>"),
        ("merges.txt", b"#version: 0.2\na b c\n", "line 2"),
        ("merges.txt", b"zz zz\n", "line 1"),
    ],
)
def test_files_that_are_no_tokenizer_are_named(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    train_tokenizer(WORDS, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(TOKENIZER_FILES)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        load_tokenizer(tmp_path)
    assert reason in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(WeightsError, match="tokens"):
        TextEncoder(TextConfig(width=64, heads=4, layers=1, vocabulary_size=520), tokenizer)
