"""The study's recipe: a frozen SigLIP-style encoder, a compressor, a small decoder trained from scratch.

    python -m vlm_jax.train --config configs/vlm.py:llm=d96,tokens=4,family=ocr --workdir workdirs/one
    python -m vlm_jax.train --config configs/vlm.py:smoke --workdir workdirs/smoke      # about a minute on a CPU

The decoder starts from random weights, so one stage trains connector and decoder together. `stages=2` is LLaVA's
order, connector first, for a pretrained decoder.
"""

from ml_collections import ConfigDict

from vlm_jax.compress import catalog
from vlm_jax.config.arguments import parse_arg, tokens_or_elastic
from vlm_jax.config.defaults import add_logs_and_checkpoints
from vlm_jax.config.resolve import model_group
from vlm_jax.core.errors import unknown
from vlm_jax.sizing import zoo

# Of each family and recipe: builder config, steps, tokens of the longest question with its answer (the loader refuses a
# row that does not fit). experiments/size_by_tokens/DESIGN.md says why the study has these.
FAMILIES = {
    "ocr": dict(study=("rows5", 2000, 9), demo=("rows4_small", 320, 8), questions=4, answer_tokens=7),
    "facts": dict(study=("facts1000x8", 1500, 4), demo=("facts256_small", 320, 4), questions=8, answer_tokens=2),
    "scene": dict(study=("chains2", 2000, 9), demo=("chains2_small", 320, 9), questions=4, answer_tokens=2),
}
GLYPHS = "vlm_jax.studies.glyphs.source:Glyphs"
TOKENS = 4
RECIPES = ("study", "demo", "smoke")  # smoke: sixty steps of the demo recipe


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg,
        llm="d48",
        tokens=TOKENS,
        elastic="",  # several V instead of `tokens`, such as 1+4+16: one training serves all
        elastic_steps="drawn",  # each step at one of them; or "all", "most"
        compressor="",  # default: resampler, and blind where tokens=0
        family="ocr",
        recipe="study",
        smoke=False,  # the same as recipe=smoke
        data="",  # another builder config of the family's data set
        steps=0,  # 0: as the family and the recipe say
        steps_factor=1.0,  # multiplies the steps
        lr=3e-3,  # of the connector, and of a decoder of width 24
        stages=1,
        seed=0,
    )
    recipe = "smoke" if arg.smoke else arg.recipe
    for kind, name, valid in (
        ("family", arg.family, FAMILIES),
        ("recipe", recipe, RECIPES),
        ("stages", arg.stages, (1, 2)),
    ):
        if name not in valid:
            raise unknown(kind, name, valid)
    family = FAMILIES[arg.family]
    data, steps, pair_tokens = family["study" if recipe == "study" else "demo"]
    steps = round(arg.steps_factor * (arg.steps or (60 if recipe == "smoke" else steps)))
    compressor = arg.compressor or ("resampler" if arg.tokens else "blind")
    questions = 1 if catalog.row(compressor).query_dependent else family["questions"]  # its tokens depend on one

    c = ConfigDict()
    encoder, llm = zoo.encoder("glyph-64"), zoo.decoder(arg.llm)
    tokens = tokens_or_elastic(arg.tokens, TOKENS, arg.elastic)
    model = catalog.model_spec(encoder, compressor, tokens, llm, projector="linear")
    c.model = model_group(model)
    c.encoder_checkpoint = "experiments/glyph_encoder/encoder.npz"
    c.decoder_checkpoint = c.connector_checkpoint = ""
    source = dict(source=GLYPHS, path=arg.family, config=arg.data or data, name=arg.family, separate=True)
    c.data = dict(
        train=(dict(source, split="train"),),
        test=(dict(source, split="test"),),
        format="prefix",
        pack="none",
        batch_rows=16 if recipe == "study" else 32,
        row_tokens=catalog.entering(model.compressor) + questions * pair_tokens,
        row_images=1,
        questions_per_example=questions,
        frozen_features=True,
        tokenizer="",
        long="drop",
        max_bad_share=0.0,
        question_tokens=16,
        resize="",
    )
    both = dict(name="both", total_steps=steps, train=("connector", "decoder"), lr_factor=1.0, warmup_steps=steps // 20)
    align = dict(both, name="align", total_steps=-(-steps // 4), train=("connector",), warmup_steps=steps // 80)
    c.stages = (both,) if arg.stages == 1 else (align, both)
    # Between widths 24 and 192 the better of two rates fell about as width^-1/2; the study's pilot tried 16 and 64.
    scale = (24 / llm.width) ** 0.5
    c.optim = dict(
        peak_lr=arg.lr,
        weight_decay=1e-4,
        clip_norm=1.0,
        b1=0.9,
        b2=0.99,
        final_lr_share=0.02,
        lr_scale=(("^decoder/", scale),),
    )
    c.compute = dict(
        dtype="float32",
        remat="none",
        attention="xla",
        microbatches=1,
        strategy="replicated",
        mesh=(-1, 1, 1),
        slices=1,
        moments="float32",
        scan_layers=True,
    )
    c.evaluation = dict(
        examples=0,
        questions_per_example=2,
        batch_examples=256,
        max_new_tokens=family["answer_tokens"],
        subset_examples=256,
    )
    c.elastic = arg.elastic_steps
    c.seed = arg.seed
    add_logs_and_checkpoints(c, max(steps // 20, 1))
    return c
