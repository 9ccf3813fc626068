"""The rows of recall.py: what each sets over the preset for photographs."""

from __future__ import annotations

from compare_methods import METHODS, SMALLER  # beside this file

TEACHER = "deit_tiny_patch16_224"  # of s_smke, at 224 pixels: the weights that all start from
# A pair of ViLT's costs a pass: all pictures and more candidates would take longer than training.
FEWER = ("pretrain.validation_images=200", "pretrain.rerank_top_k=8")
TOP_K = {"vilt": 10}  # of the last evaluation, which is of all pictures
# A run has few of their steps at the preset's batch, 72 of MAMO's at L: more and smaller ones.
DEAR = ("albef", "albef-queue", "mamo", "mamo-seed", "maskvlm", "s_smke")

MATCHING = ("itm",)
MASKED = ("mlm", "mim", "joint_mim")
VICREG = ("variance", "covariance", "invariance")
OTHERS = (*MATCHING, *MASKED, *VICREG)
# What a loss that is added gets: on from the middle of the run, when features tell something.
ADDED = {"itm": 0.5, "mlm": 0.2, "mim": 0.1, "joint_mim": 0.1}
LATE = "start = 0.5, ramp = 0.1, every = 2"


def without(*names: str) -> tuple[str, ...]:
    """Settings that turn losses of VicVLM's recipe off."""
    return tuple(f"pretrain.losses.{name}.weight=0" for name in names)


def on_projections(**weights: float) -> tuple[str, ...]:
    """Settings of ITC with VICReg's terms on the projections."""
    terms = (f"pretrain.losses.{name}.weight={weight}" for name, weight in weights.items())
    return ("pretrain.objective=clip", *terms)


def frozen(blocks: int, views: int = 0) -> tuple[str, ...]:
    """Settings of blocks that are frozen for good, some views of each picture through them kept."""
    return (
        f"pretrain.frozen_blocks={blocks}",
        "pretrain.frozen_epochs=0",
        f"pretrain.cached_views={views}",
    )


def late(*names: str) -> tuple[str, ...]:
    """Settings that turn losses on from the middle of a run."""
    return tuple(f"pretrain.losses.{name}={{weight = {ADDED[name]}, {LATE}}}" for name in names)


ALONE = without(*OTHERS)
# VICReg where VicVLM was published with it, late and with small weights.
MULTIMODAL = (
    'pretrain.options.vicreg="multimodal"',
    *(
        f"pretrain.losses.{name}={{weight = {weight}, {LATE}}}"
        for name, weight in zip(VICREG, (0.02, 0.002, 0.02), strict=True)
    ),
)
# VicVLM as it was published: every loss on all rows of every step, from the start.
PUBLISHED = (
    'pretrain.options.vicreg="multimodal"',
    "pretrain.options.masked_stride=1",
    "pretrain.options.image_mask=0.75",
    "pretrain.options.mask_block=2",
    "pretrain.options.text_mask=0.25",
    *(f"pretrain.losses.{name}={{weight = 1, start = 0, ramp = 0, every = 1}}" for name in OTHERS),
    "pretrain.losses.invariance.weight=25",
)
WORDS = ("pretrain.losses.words.weight=1",)
SPREAD = {"variance": 0.5, "covariance": 0.02}  # the preset's
PROJECTED: dict[str, dict[str, float]] = {
    "vicreg": SPREAD,
    "variance": {"variance": 0.5},
    "covariance": {"covariance": 0.02},
    "vicreg-strong": {"variance": 2.0, "covariance": 0.1},
    "vicreg-weak": {"variance": 0.1, "covariance": 0.005},
    "vicreg-invariance": {"variance": 0.5, "covariance": 0.02, "invariance": 0.5},
}
SMALL_STEPS = ("pretrain.batch_size=64", *frozen(6))
AT_ONCE = frozen(0)  # both encoders train from the first step
ONE_VIEW = ("model.eval_views=1",)
SMALL = ("model.image_size=128", "data.word_dropout=0")
# What rows were laid over before the preset changed: their results have folders of their own.
BASES: dict[str, tuple[str, ...]] = {
    "lr-1e-3": ("pretrain.lr=1e-3", *SMALL, *AT_ONCE, *ONE_VIEW),
    "no-mirror": (*SMALL, *ONE_VIEW),
    "mirror": (*SMALL, "model.eval_views=2"),
    "small": SMALL,
}
LEVERS: dict[str, tuple[str, ...]] = {
    "batch-96": ("pretrain.batch_size=96",),
    "batch-384": ("pretrain.batch_size=384",),
    **{f"lr-{rate}": (f"pretrain.lr={rate}",) for rate in ("1e-3", "4e-3")},
    **{f"image-lr-{rate}": (f"pretrain.image_lr={rate}",) for rate in ("1e-4", "4e-4")},
    "warmup-0.03": ("pretrain.warmup=0.03",),
    "weight-decay-0.2": ("pretrain.weight_decay=0.2",),
    "vicreg-off": tuple(f"pretrain.losses.{name}.weight=0" for name in SPREAD),
    **{f"dropout-{share}": (f"model.text_dropout={share}",) for share in (0, 0.2, 0.3)},
    **{f"word-dropout-{share}": (f"data.word_dropout={share}",) for share in (0.1, 0.2, 0.4)},
    **{f"text-layers-{n}": (f"model.text_layers={n}",) for n in (1, 2, 4)},
    **{f"text-width-{n}": (f"model.text_width={n}",) for n in (128, 192, 384)},
    **{f"vocab-{n}": (f"model.vocab_size={n}",) for n in (3000, 10000)},
    **{f"temperature-{t}": (f"model.temperature={t}",) for t in (0.03, 0.15)},
    "more-captions": ("data.more_captions=1",),
    "max-pool": ("model.image_pool=max",),
    "size-96": ("model.image_size=96", "model.eval_image_scale=1.34"),
    "size-160": ("model.image_size=160", "model.eval_image_scale=1"),
    "crop-0.4": ("data.crop_scale=0.4",),
}
# A row's settings of pretraining, laid over the preset for photographs; all of the budget goes to
# pretraining.
ROWS: dict[str, tuple[str, ...]] = {
    "itc": ALONE,
    **{f"itc+{name}": (*ALONE, *late(name)) for name in ADDED},
    "itc+vicreg": (*ALONE, *(f"pretrain.losses.{name}.weight={w}" for name, w in SPREAD.items())),
    "itc+vicreg-multimodal": (*ALONE, *MULTIMODAL),
    "itc+words": (*ALONE, *WORDS),
    "vicvlm": (),  # the preset, which is itc+vicreg
    "vicvlm+words": WORDS,
    "vicvlm-all": late(*ADDED),
    **{f"vicvlm-all-{name}": (*late(*ADDED), *without(name)) for name in ADDED},
    "vicvlm-all-vicreg": (*late(*ADDED), *without(*VICREG)),
    "vicvlm-published": PUBLISHED,
    "vicvlm-multimodal": (*late(*ADDED), *MULTIMODAL),
    # Without what makes it cheap: every loss on all rows of every step.
    "vicvlm-multimodal-all-rows": (
        *late(*ADDED),
        *MULTIMODAL,
        "pretrain.options.masked_stride=1",
        *(f"pretrain.losses.{name}.every=1" for name in OTHERS),
    ),
    # Hidden patches stay in the image encoder as mask tokens.
    "vicvlm-multimodal-encode-hidden": (
        *late(*ADDED),
        *MULTIMODAL,
        "pretrain.options.drop_hidden=false",
    ),
    # Levers, on ITC alone: what holds for it holds for every method that has it.
    **{f"itc-batch-{n}": (*ALONE, f"pretrain.batch_size={n}") for n in (64, 96)},
    **{f"itc-frozen-{n}": (*ALONE, *frozen(n)) for n in (3, 6)},
    "itc-batch-64-frozen-6": (*ALONE, *SMALL_STEPS),
    "vicvlm-multimodal-batch-64-frozen-6": (*late(*ADDED), *MULTIMODAL, *SMALL_STEPS),
    # Pictures of 96 and 128 pixels have 36 and 64 patches, those of 160 and 192 have 100 and 144.
    "vicvlm-size-128": ("model.image_size=128",),
    "vicvlm-word-dropout-0": ("data.word_dropout=0",),
    **{f"itc-size-{n}": (*ALONE, f"model.image_size={n}") for n in (96, 128, 160, 192)},
    "itc-eval-128": (*ALONE, "model.eval_image_scale=1"),
    "itc-more-captions": (*ALONE, "data.more_captions=1"),
    **{f"itc-image-lr-{rate}": (*ALONE, f"pretrain.image_lr={rate}") for rate in ("1e-4", "4e-4")},
    **{f"itc-lr-{rate}": (*ALONE, f"pretrain.lr={rate}") for rate in ("1e-3", "4e-3")},
    **{f"itc-text-layers-{n}": (*ALONE, f"model.text_layers={n}") for n in (1, 2, 4)},
    **{f"itc-text-width-{n}": (*ALONE, f"model.text_width={n}") for n in (192, 384)},
    **{f"itc-temperature-{t}": (*ALONE, f"model.temperature={t}") for t in (0.03, 0.15)},
    **{f"itc-crop-{share}": (*ALONE, f"data.crop_scale={share}") for share in (0.4, 0.8)},
    **{f"itc-vocab-{n}": (*ALONE, f"model.vocab_size={n}") for n in (3000, 10000)},
    "itc-max-pool": (*ALONE, "model.image_pool=max"),
    "itc-no-dropout": (*ALONE, "model.text_dropout=0"),
    "itc-drop-path": (*ALONE, "model.image_options={drop_path_rate = 0.1}"),
    "itc-color": (*ALONE, "data.color_jitter=0.3"),
    "itc-final-lr-0": (*ALONE, "pretrain.final_lr=0"),
    # VICReg on the two projections themselves: it needs no pass of its own.
    **{f"clip+{name}": on_projections(**weights) for name, weights in PROJECTED.items()},
    # The time that the frozen blocks take for their views is the run's.
    **{f"itc-cached-{n}": (*ALONE, *frozen(n, 8)) for n in (3, 6, 9)},
    **{f"clip+vicreg-cached-{n}": (*on_projections(**SPREAD), *frozen(n, 8)) for n in (3, 6, 9)},
    "itc-at-once": (*ALONE, *AT_ONCE),
    "vicvlm-at-once": AT_ONCE,
    "clip+vicreg-at-once": (*on_projections(**SPREAD), *AT_ONCE),
    "clip+vicreg-at-once-lr-1e-3": (*on_projections(**SPREAD), *AT_ONCE, "pretrain.lr=1e-3"),
    **{
        f"clip+vicreg-text-first-{n}": (*on_projections(**SPREAD), f"pretrain.frozen_epochs={n}")
        for n in (3, 12)
    },
    # The other methods, by their recipes.
    **{
        name: method.pretrain
        for name, method in METHODS.items()
        if not name.startswith(("itc", "vicvlm"))
    },
    "vilt": (*METHODS["vilt"].pretrain, *FEWER),
    **{name + SMALLER: (*METHODS[name].pretrain, "pretrain.batch_size=64") for name in DEAR},
    "vicvlm-published" + SMALLER: (*PUBLISHED, "pretrain.batch_size=64"),
    # Further levers, beside VICReg; and the text side's on a picture side that stays frozen, which
    # few minutes tell apart.
    "frozen": (*on_projections(**SPREAD), *frozen(12, 2)),
    **{
        f"{start}-{name}": (*on_projections(**SPREAD), *settings, *more)
        for start, settings in {"clip+vicreg": (), "frozen": frozen(12, 2)}.items()
        for name, more in LEVERS.items()
    },
}
