"""Captions that are cut or not read are told before a training begins."""

from __future__ import annotations

import pytest

from vicvlm_cli.data import caption_check
from vicvlm_cli.data.caption_check import caption_warning
from vicvlm_cli.data.tokenizer import Tokenizer

SHORT, LONG = "a red dog", "a red dog " * 20  # 5 and 62 tokens
TOKENIZER = Tokenizer.train([SHORT], 60)


def told(captions: list[list[str]], max_tokens: int = 40, pretrained: bool = False) -> str | None:
    return caption_warning(captions, TOKENIZER, max_tokens, pretrained)


def test_a_share_of_one_percent_is_borne() -> None:
    assert told([[SHORT] * 99, [LONG]]) is None
    assert told([[SHORT] * 99, ["狗" * 3]]) is None
    assert told([]) is None


def test_captions_that_are_cut_are_told_with_what_keeps_them() -> None:
    assert told([[SHORT] * 3, [LONG]]) == (
        "25% of the captions are cut at 40 tokens: --set model.max_tokens=62 keeps more of them"
    )
    assert told([[SHORT] * 3, [LONG]], 62) is None


def test_a_pretrained_bert_reads_no_more_than_it_has_positions_for() -> None:
    longest = [[LONG * 10]]
    assert "max_tokens=602" in str(told(longest))
    assert "max_tokens=512" in str(told(longest, pretrained=True))
    assert "reads no more, shorten them" in str(told(longest, 512, pretrained=True))


@pytest.mark.parametrize(
    ("pretrained", "mend"), [(True, "name a --text-encoder"), (False, "put spaces between")]
)
def test_captions_of_unknown_words_alone_are_told(pretrained: bool, mend: str) -> None:
    note = told([[SHORT, "狗 猫"], [f"{SHORT} 狗", "\u200b"]], pretrained=pretrained)
    assert note is not None and mend in note
    assert note.startswith("50% of the captions have no word that the tokenizer knows: ")


def test_no_more_than_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_check, "SAMPLE", 10)
    seen: list[int] = []
    real = Tokenizer.tokens

    def tokens(self: Tokenizer, texts: list[str], limit: int) -> object:
        seen.append(len(texts))
        return real(self, texts, limit)

    monkeypatch.setattr(Tokenizer, "tokens", tokens)
    told([[SHORT, LONG]] * 30)
    assert seen == [10]
