"""Tokenizers: bytes, and one of ``transformers`` that is made here, without a download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from madformer.conditioning.tokenizer import ByteTokenizer, PretrainedTokenizer, check_tokenizer, load_tokenizer
from madformer.config import TextConfig

WORDS = ["[PAD]", "[UNK]", "[END]", "red", "heart", "flag"]


@pytest.fixture
def words() -> PretrainedTokenizer:
    """Ids are places in WORDS."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra, and not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PretrainedTokenizer(
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]"
        )
    )


@pytest.mark.parametrize("text", ["", "red heart", "ein Käfer", "日本の旗", "\0 🇫🇷"])
def test_bytes_are_utf8_and_padding(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode([text], 40)
    assert ids.dtype == torch.int64
    content = ids[ids != tokenizer.pad_token_id]
    assert bytes(content.tolist()).decode() == text
    assert ids[len(content) :].eq(256).all()
    assert len(content) == len(text.encode())


def test_bytes_are_cut_wherever_the_length_ends() -> None:
    """Also between the bytes of a character: a model reads bytes, and half a character tells more than none."""
    text = "ab€c"  # the sign is e2 82 ac
    cut = [[0x61, 0x62], [0x61, 0x62, 0xE2], [0x61, 0x62, 0xE2, 0x82], [0x61, 0x62, 0xE2, 0x82, 0xAC]]
    for ids in cut:
        assert ByteTokenizer().encode([text], len(ids)).tolist() == [ids]


def test_a_row_does_not_depend_on_the_others() -> None:
    texts = ["red heart", "", "a much longer text than the rest"]
    together = ByteTokenizer().encode(texts, 12)
    assert together.shape == (3, 12)
    assert torch.equal(together, torch.cat([ByteTokenizer().encode([text], 12) for text in texts]))


def test_one_of_transformers(words: PretrainedTokenizer) -> None:
    ids = words.encode(["red heart", "flag", "red red red red heart", "blue flag"], 4)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[3, 4, 0, 0], [5, 0, 0, 0], [3, 3, 3, 3], [1, 5, 0, 0]]
    assert (words.vocab_size, words.pad_token_id) == (len(WORDS), 0)


def test_without_a_padding_token_the_last_one_pads(words: PretrainedTokenizer) -> None:
    words.tokenizer.pad_token = None
    padded = PretrainedTokenizer(words.tokenizer)
    assert padded.pad_token_id == WORDS.index("[END]")
    assert padded.encode(["heart"], 3).tolist() == [[4, 2, 2]]


def test_save_and_load(words: PretrainedTokenizer, tmp_path: Path) -> None:
    texts = ["red heart", "blau"]
    for name, tokenizer in (("bytes", ByteTokenizer()), ("words", words)):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        assert (loaded.vocab_size, loaded.pad_token_id) == (tokenizer.vocab_size, tokenizer.pad_token_id)
        assert torch.equal(loaded.encode(texts, 10), tokenizer.encode(texts, 10))
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, content in (("empty", None), ("damaged", "{")):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"no tokenizer at {tmp_path / name}: .") as raised:
            load_tokenizer(tmp_path / name)
        assert len(str(raised.value).splitlines()) == 1


def test_a_model_must_know_every_token() -> None:
    check_tokenizer(ByteTokenizer(), TextConfig(vocab_size=257, length=4))
    with pytest.raises(ValueError, match=r"has 257 tokens, and the model text\.vocab_size=256"):
        check_tokenizer(ByteTokenizer(), TextConfig(vocab_size=256, length=4))
