"""Captions to token ids, from a trained vocabulary and from a BERT's own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CAPTIONS, make_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from vicvlm_cli.data.tokenizer import SPECIAL, Tokenizer
from vicvlm_cli.errors import UserError

VOCAB = [*SPECIAL, "a", "dog", "##s", "run", "##ning", "cafe", "!"]


def vocab_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", "utf-8")
    return folder


def whole_folder(folder: Path) -> Path:
    """What `save_pretrained` of transformers leaves."""
    backend = Tokenizer.load(str(vocab_folder(folder))).backend
    names = zip(
        ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, **dict(names)).save_pretrained(folder)
    (folder / "vocab.txt").unlink()
    return folder


def tokens(tokenizer: Tokenizer, text: str) -> list[str | None]:
    ids, _ = tokenizer([text], 20)
    return [tokenizer.backend.id_to_token(int(i)) for i in ids[0]]


def unnamed_folder(folder: Path) -> Path:
    """As old BERTs lie on the hub: the words, and a configuration that does not say of what."""
    vocab_folder(folder)
    (folder / "config.json").write_text('{"vocab_size": 12}', "utf-8")
    return folder


def test_a_trained_vocabulary_keeps_words_and_special_tokens() -> None:
    tokenizer = make_tokenizer(400)
    assert tokenizer.vocab_size <= 400
    for caption in CAPTIONS:
        assert tokens(tokenizer, caption) == ["[CLS]", *caption.split(), "[SEP]"]
    assert [tokenizer.backend.token_to_id(t) for t in SPECIAL] == list(tokenizer.special_ids())


@pytest.mark.parametrize("size", [60, 90, 400])
def test_training_is_the_same_whatever_process_does_it(size: int) -> None:
    # Each process of a distributed run trains its own vocabulary.
    made = {make_tokenizer(size).to_json() for _ in range(5)}
    assert len(made) == 1


def test_only_special_tokens_are_special() -> None:
    tokenizer = make_tokenizer(400)
    special = {t.content for t in tokenizer.backend.get_added_tokens_decoder().values()}
    assert special == set(SPECIAL)
    assert tokens(tokenizer, "boats") == ["[CLS]", "boat", "##s", "[SEP]"]


def test_a_vocabulary_is_not_larger_than_asked_and_knows_every_sign() -> None:
    vocabulary = make_tokenizer(90).backend.get_vocab()
    assert len(vocabulary) == 90
    signs = {sign for caption in CAPTIONS for sign in caption if sign != " "}
    inner = {f"##{s}" for caption in CAPTIONS for w in caption.split() for s in w[1:]}
    assert signs | inner <= set(vocabulary)
    assert "##q" in inner and "##j" not in vocabulary  # "jumping" only begins with it


def test_case_is_folded_and_unknown_signs_are_unknown() -> None:
    tokenizer = make_tokenizer(400)
    assert tokens(tokenizer, "Two DOGS") == ["[CLS]", "two", "dogs", "[SEP]"]
    assert tokens(tokenizer, "two 狗") == ["[CLS]", "two", "[UNK]", "[SEP]"]


def test_captions_are_padded_to_the_longest_and_masked() -> None:
    tokenizer = make_tokenizer(400)
    ids, mask = tokenizer(["two dogs", "a boat on the water", ""], 20)
    assert ids.dtype == torch.long and mask.dtype == torch.bool
    assert ids.shape == mask.shape == (3, 7)
    assert mask.sum(1).tolist() == [4, 7, 2]
    assert mask.tolist() == [[i < n for i in range(7)] for n in (4, 7, 2)]
    assert bool((ids[~mask] == tokenizer.pad_id).all())
    assert not bool((ids[mask] == tokenizer.pad_id).any())


@pytest.mark.parametrize("limit", [3, 5, 7])
def test_a_long_caption_loses_its_end_but_not_its_sep(limit: int) -> None:
    tokenizer = make_tokenizer(400)
    text = "a boat on the water at night"
    whole, _ = tokenizer([text], 100)
    cut, mask = tokenizer([text], limit)
    assert cut.shape == (1, limit) and bool(mask.all())
    assert cut[0, : limit - 1].tolist() == whole[0, : limit - 1].tolist()
    assert int(cut[0, -1]) == tokenizer.sep_id


def test_no_captions_give_an_empty_batch() -> None:
    ids, mask = make_tokenizer()([], 20)
    assert ids.shape == mask.shape == (0, 0)


@pytest.mark.parametrize("limit", [6, 40])
def test_batches_of_tokenised_texts_are_those_of_the_texts(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vicvlm_cli.data.tokenizer.TEXTS_AT_A_TIME", 3)
    tokenizer = make_tokenizer()
    tokens = tokenizer.tokens(CAPTIONS, limit)
    assert tokens.ids.dtype == np.int32
    for index in ([4], [7, 0, 0, 2], list(range(8))):
        ids, mask = tokens.batch(np.array(index))
        for i, row, real in zip(index, ids, mask, strict=True):
            alone = tokenizer.backend.encode(CAPTIONS[i]).ids
            cut = alone if len(alone) <= limit else [*alone[: limit - 1], tokenizer.sep_id]
            assert row[real].tolist() == cut and bool(real[: len(cut)].all())
            assert (row[~real] == tokenizer.pad_id).all()


def test_json_and_back_is_the_same_tokenizer() -> None:
    tokenizer = make_tokenizer()
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert torch.equal(again(CAPTIONS, 24)[0], tokenizer(CAPTIONS, 24)[0])


def test_continuations_are_the_pieces_inside_words() -> None:
    tokenizer = make_tokenizer()
    flags = tokenizer.continuation()
    assert flags.shape == (tokenizer.vocab_size,)
    named = {t: bool(flags[i]) for t, i in tokenizer.backend.get_vocab().items()}
    assert {t for t, flag in named.items() if flag} == {t for t in named if t.startswith("##")}
    assert any(named.values()) and not all(named.values())


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (vocab_folder, Tokenizer.load),
        (whole_folder, Tokenizer.load),
        (unnamed_folder, Tokenizer.from_pretrained),
    ],
)
def test_a_bert_gives_its_own_tokenizer(
    make: Callable[[Path], Path], load: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = load(str(make(tmp_path / "bert")))
    assert tokenizer.vocab_size == len(VOCAB)
    assert {t: i for i, t in enumerate(VOCAB)} == tokenizer.backend.get_vocab()
    expected = ["[CLS]", "a", "dog", "##s", "run", "##ning", "!", "[UNK]", "cafe", "[SEP]"]
    assert tokens(tokenizer, "A dogs running! cat café") == expected
    # Whatever padding and truncation the folder asks for, batches are padded to their longest.
    assert tokenizer(["a", "a a a"], 20)[0].shape == (2, 5)


def test_the_padding_that_a_folder_asks_for_is_left_out(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path / "bert")
    content = json.loads((folder / "tokenizer.json").read_text())
    backend = Backend.from_str(json.dumps(content))
    backend.enable_padding(length=12)
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(folder))
    assert tokenizer(["a a a"], 20)[0].shape == (1, 5)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        Tokenizer.load(str(tmp_path))


def test_a_tokenizer_that_is_not_a_berts_is_refused() -> None:
    other = Backend(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    with pytest.raises(UserError, match=r"has no \[PAD\], \[UNK\]"):
        Tokenizer(other)


def test_a_damaged_tokenizer_text_is_refused() -> None:
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.from_json('{"version": 1}')
