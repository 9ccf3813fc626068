"""retrieve: the pictures of a gallery that best fit a text or another picture."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.images import BadImage, load_rgb
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.gallery.results import Hit, RetrieveResult
from vicvlm_cli.gallery.store import Gallery, check_model
from vicvlm_cli.inference import LoadedModel
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.report.sheet import Cell, check_sheet, contact_sheet, printable, save_sheet

CANDIDATES = 128
THUMBNAIL = 448


def retrieve(
    gallery: Path,
    query: str | None = None,
    image: Path | None = None,
    *,
    checkpoint: Path | None = None,
    top_k: int = 10,
    rerank: bool | None = None,
    sheet: Path | None = None,
    progress: Progress,
) -> RetrieveResult:
    """Searches a gallery by words or by a picture.

    Args:
        checkpoint: None is the model that the gallery names.
        top_k: how many hits, at most as many as the gallery has pictures.
        rerank: order the best candidates by similarity and ITM together, or by the pair score of
            a model where that stands alone, SCAN or ViLT (text queries only). None is the model's
            own way: where the weight of its score, chosen on validation, is above 0.
        sheet: a picture file to draw the query and the hits into. Where that cannot be done, the
            result has the hits and says why.

    Raises:
        UsageError: as :func:`check_query`, or the model cannot re-rank.
        UserError: gallery, model or query picture cannot be read, or the model is not the one
            that made the gallery.
    """
    picture = check_query(query, image, top_k=top_k, rerank=rerank, sheet=sheet)
    stored = Gallery.open(gallery)
    model = _model_of(stored, gallery, checkpoint, progress)
    own = model.vlm.pair_score
    if rerank and own is None:
        raise UsageError("this model has no matching head: leave out --rerank")
    if own is not None and own.alone and (image is not None or rerank is False):
        of = "pictures like this one" if image else "without re-ranking, they"
        progress.say(
            f"note: {own.name} is of words with pictures: {of} are in the order of the "
            "shortlist's vectors"
        )
    asked = bool(rerank)
    if rerank is None:
        rerank = image is None and own is not None and _weights(model)[1] > 0
    text = query or ""
    if image is None:
        features = model.encode_texts([text])
        _warn_of_unknown(text, model, progress)
    else:
        features = model.encode_images([image], views=stored.views)
    wanted = max(top_k, CANDIDATES) if rerank else top_k
    scores, rows = (found[0] for found in stored.search(features, wanted, of_words=image is None))
    cosines = scores
    if image is None and stored.off is not None:
        cosines = scores + stored.off[rows]
    if rerank:
        found = _reranked(text, stored, model, scores, rows, asked, progress)
        rerank = found is not None
        if found is not None:
            scores, at = found
            cosines, rows = cosines[at], rows[at]
    hits = [
        Hit(
            rank=rank,
            score=float(score),
            cosine=float(cosine),
            path=stored.location(row),
            id=stored.items[row].id,
            captions=stored.items[row].captions,
            row=row,
        )
        for rank, (score, cosine, row) in enumerate(
            zip(scores[:top_k], cosines, rows.tolist(), strict=False), start=1
        )
    ]
    sheet_error = None
    if sheet is not None:
        try:
            _draw(text or f"pictures like {image}", picture, hits, stored, sheet, progress)
        except UserError as error:  # the hits are there all the same
            sheet, sheet_error = None, error
    return RetrieveResult(
        query=text or str(image),
        by_image=image is not None,
        gallery=Path(gallery),
        searched=len(stored),
        reranked=rerank,
        hits=hits,
        sheet=sheet,
        sheet_error=sheet_error,
    )


def check_query(
    query: str | None,
    image: Path | None,
    *,
    top_k: int = 10,
    rerank: bool | None = None,
    sheet: Path | None = None,
) -> Image.Image | None:
    """Check what is asked of :func:`retrieve`, before any work.

    Returns:
        The query picture, reduced but not below `THUMBNAIL`; None for words.

    Raises:
        UsageError: not exactly one query, one that is empty, not text or cannot be re-ranked, or a
            sheet that is not named as a picture.
        UserError: the query picture cannot be read.
    """
    if (query is None) == (image is None):
        raise UsageError("give either a text or --image PATH to look for")
    if query is not None and not query.strip():
        raise UsageError("the query is empty: give some words to look for, or --image PATH")
    if query is not None and printable(query) != query:
        raise UsageError(
            f"the query {printable(query)!r} is not in UTF-8: set the terminal to UTF-8 and give "
            "it again"
        )
    if rerank and query is None:
        raise UsageError(
            "--rerank compares words with pictures: it needs a text query, not --image"
        )
    if top_k < 1:
        raise UsageError(f"--top-k must be at least 1, not {top_k}")
    if sheet is not None:
        check_sheet(sheet)
    try:
        return None if image is None else load_rgb(image, at_least=THUMBNAIL)
    except BadImage as error:
        raise UserError(f"picture {image} cannot be read: {error.reason}") from None


def _model_of(
    gallery: Gallery, path: Path, checkpoint: Path | None, progress: Progress
) -> LoadedModel:
    """The model to search with, which must be the one that made the gallery."""
    if checkpoint is None:
        checkpoint = Path(gallery.model_path)
        if not os.path.isfile(checkpoint):  # Path's own raises where one may not look
            raise UserError(
                f"{checkpoint}, the model that made the gallery {path}, is gone: "
                "name its new place with --checkpoint, or run `vicvlm embed` with another"
            )
        progress.say(f"checkpoint: {checkpoint} (made this gallery; --checkpoint to change)")
    model = load_model(checkpoint)
    check_model(gallery, path, model)
    return model


def _warn_of_unknown(query: str, model: LoadedModel, progress: Progress) -> None:
    input_ids, _ = model.tokenizer([query], model.vlm.config.max_tokens)
    words = set(input_ids[0, 1:-1].tolist())
    if words == {model.tokenizer.unk_id}:
        progress.say(
            "note: no word of the query is in the model's vocabulary; the hits mean little"
        )


def _weights(model: LoadedModel) -> tuple[float, float]:
    """What the similarity and the pair score of a text with a picture count."""
    own = model.vlm.pair_score
    assert own is not None
    return own.weights(model.logit_scale, model.info.rerank_weights.image_retrieval)


def _reranked(
    query: str,
    gallery: Gallery,
    model: LoadedModel,
    similarity: torch.Tensor,
    rows: torch.Tensor,
    asked: bool,
    progress: Progress,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Combined scores of the candidates [k], best first, and their places among ``rows``.

    Candidates whose picture cannot be read any more are left out, with a note; where none can,
    None, or UserError if re-ranking was ``asked`` for. ``similarity`` [k] is what they were found
    by, which counts beside the pair score.
    """
    pictures, kept, lost = [], [], []
    for i, row in enumerate(progress.track(rows.tolist(), "reading candidates", unit="images")):
        try:
            pictures.append(gallery.image(row, at_least=model.vlm.eval_image_size))
            kept.append(i)
        except BadImage as error:
            lost.append(f"{gallery.location(row)} is {error.reason}")
        except UserError as error:  # the whole data set
            if asked:
                raise
            progress.say(f"note: the order is that of the vectors alone: {error}")
            return None
    own = model.vlm.pair_score
    assert own is not None
    if not kept:
        none = f"no candidate's picture can be read from {gallery.source}"
        if asked:
            raise UserError(
                f"{none}: leave out --rerank, or run `vicvlm embed` on where the pictures are now"
            )
        progress.say(
            f"note: {none}, so that the order is that of the vectors, without {own.name}: run "
            "`vicvlm embed` on where the pictures are now"
        )
        return None
    if lost:
        others = f", and {len(lost) - 1} others" if lost[1:] else ""
        progress.say(f"note: {lost[0]} and was left out{others}")
    scale, weight = _weights(model)
    how = f"{own.name} weight {weight:g} from the checkpoint"
    progress.say(f"re-ranking: {len(kept)} candidates, {f'by {own.name}' if own.alone else how}")
    at = torch.tensor(kept)
    logits = model.match_pairs(pictures, [query] * len(pictures), gallery.features[rows[at]])
    scores = scale * similarity[at] + weight * logits
    order = scores.argsort(descending=True, stable=True)
    return scores[order], at[order]


def _draw(
    title: str,
    query: Image.Image | None,
    hits: list[Hit],
    gallery: Gallery,
    sheet: Path,
    progress: Progress,
) -> None:
    """Raises UserError where the data set is gone or the sheet cannot be written."""
    cells = [
        Cell(_picture(gallery, hit.row), f"{hit.rank}.  {hit.score:.3f}", hit.caption or hit.id)
        for hit in progress.track(hits, "drawing", unit="images")
    ]
    save_sheet(contact_sheet(title, cells, query), sheet)


def _picture(gallery: Gallery, row: int) -> Image.Image | None:
    try:
        return gallery.image(row, at_least=THUMBNAIL)
    except BadImage:
        return None
