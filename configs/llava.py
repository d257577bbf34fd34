"""LLaVA-1.5's recipe (arXiv 2310.03744, table 9) with compressed visual tokens (arXiv 2411.03312), on LLaVA's files.

    python -m vlm_jax.check_data --config configs/llava.py:stage=2,data=mix665k.json,images=DIR,tokenizer=vicuna
    python -m vlm_jax.train --config configs/llava.py:pretrain=blip558k.json,pretrain_images=DIR,\\
        data=mix665k.json,images=DIR,encoder_checkpoint=clip,llm=vicuna-7b,llm_checkpoint=vicuna,tokens=36 \\
        --workdir DIR
    python -m vlm_jax.aot --config configs/llava.py:llm=qwen1.5-7b,tokens=16,devices=256 --topology v5e:16x16

Two stages of one epoch each: projector and compressor on LCS-558K, then also the language model on mix665k; the encoder
stays frozen. Both stages use one conversation format, as the paper's repository does (`pretrain_format=plain` is
LLaVA's own); images are cropped in the first and padded in the second. Rows of 2,048 positions are packed: a step has
about the recipe's 256 and 128 conversations, and at least a row for each of `devices`. Without checkpoints all
parameters are random: for compiling and sizing.
"""

import math

from ml_collections import ConfigDict

from vlm_jax.compress import catalog
from vlm_jax.config.arguments import parse_arg, tokens_or_elastic
from vlm_jax.config.defaults import add_logs_and_checkpoints
from vlm_jax.config.resolve import model_group
from vlm_jax.core.errors import unknown
from vlm_jax.core.specs import ModelSpec
from vlm_jax.sizing import zoo

TOKENS = 144
SEQUENCE = 2048  # image and text together, as in LLaVA
# Of the two stages: conversations a step, and mean text tokens of a conversation with its template.
EXAMPLES, TEXT_TOKENS = {1: 256, 2: 128}, {1: 60, 2: 260}
FORMATS = {"vicuna": "v1", "llama2": "llama_2"}  # of language models by family; others have a template of their own


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg,
        data="",  # stage 2: a json or jsonl file
        images="",
        pretrain="",  # stage 1
        pretrain_images="",
        test="",  # held-out file of the same layout
        test_images="",
        llm="qwen1.5-7b",
        encoder="clip-l14-336",
        tokens=TOKENS,
        elastic="",  # several V instead of `tokens`, such as 1+4+16: one training serves all
        elastic_steps="drawn",  # each step at one of them; or "all", "most"
        compressor="tokenpacker",
        llm_checkpoint="",  # folders of public weights
        encoder_checkpoint="",
        tokenizer="",  # default: llm_checkpoint
        format="",  # default: v1 for Vicuna, llama_2 for Llama 2, else the tokenizer's own template
        pretrain_format="",  # default: as `format`; plain is LLaVA's
        pack="",  # fit, or none: one conversation a row; default: fit where the compressor allows it
        batch=0,  # rows; default: about the recipe's conversations, at least one row a device
        devices=16,
        tensor=16,  # devices of the mesh axis `tensor`: best a side of the pod's torus
        stage=0,  # 1 or 2: only that stage
        sequence=SEQUENCE,
        seed=0,
    )
    if arg.stage not in (0, 1, 2):
        raise unknown("stage", arg.stage, ("0", "1", "2"))
    c = ConfigDict()
    encoder, llm = zoo.encoder(arg.encoder), zoo.decoder(arg.llm)
    tokens = tokens_or_elastic(arg.tokens, TOKENS, arg.elastic)
    model = catalog.model_spec(encoder, arg.compressor, tokens, llm)
    c.model = model_group(model)
    c.encoder_checkpoint, c.decoder_checkpoint, c.connector_checkpoint = arg.encoder_checkpoint, arg.llm_checkpoint, ""
    arg.pack = arg.pack or ("none" if catalog.hides_tokens(model) else "fit")
    first, second = (_rows(stage, arg, model) for stage in (1, 2))
    chat = arg.format or FORMATS.get(zoo.family(arg.llm), "template")
    c.data = dict(
        train=(dict(source="llava", path=arg.data, images=arg.images),),
        test=(dict(source="llava", path=arg.test, images=arg.test_images),) if arg.test else (),
        format=chat,
        pack=arg.pack,
        batch_rows=second["batch_rows"],
        row_tokens=arg.sequence,
        row_images=second["row_images"],
        questions_per_example=0,
        frozen_features=False,
        tokenizer=arg.tokenizer or arg.llm_checkpoint,
        long="cut",
        max_bad_share=0.01,
        question_tokens=128,
        resize="pad",
    )
    pretrain = dict(
        train=(dict(source="llava", path=arg.pretrain, images=arg.pretrain_images),),
        format=arg.pretrain_format or chat,
        resize="crop",
        **first,
    )
    # Rates of 1e-3 and 2e-5, as factors of the second.
    both = dict(total_steps=0, epochs=1.0, examples=0, warmup_steps=0, warmup_share=0.03)
    align = dict(both, name="align", train=("connector",), lr_factor=50.0, data=pretrain)
    tune = dict(both, name="tune", train=("connector", "decoder"), lr_factor=1.0, data=None)
    c.stages = {0: (align, tune), 1: (align,), 2: (tune,)}[arg.stage]
    c.optim = dict(
        peak_lr=2e-5, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, final_lr_share=0.0, lr_scale=()
    )  # fmt: skip
    c.compute = dict(
        dtype="bfloat16",
        remat="block",
        attention="xla" if catalog.hides_tokens(model) else "splash",
        microbatches=1,
        strategy="fsdp",
        mesh=(1, -1, arg.tensor),
        slices=1,
        moments="float32",
        scan_layers=True,
    )
    c.evaluation = dict(
        examples=0, questions_per_example=1, batch_examples=second["batch_rows"], max_new_tokens=32,
        subset_examples=256,
    )  # fmt: skip
    c.elastic = arg.elastic_steps
    c.seed = arg.seed
    add_logs_and_checkpoints(c, 10, save_every_steps=500, keep_checkpoints=2)
    return c


def _rows(stage: int, arg: ConfigDict, model: ModelSpec) -> dict[str, int]:
    """Rows of a batch, and images of a row: those that usually fit, and a fifth more, for rows of short texts; not so
    where tokens leave inside the decoder, since a row has room for those of all its images."""
    if arg.pack == "none":
        return dict(batch_rows=max(arg.batch or EXAMPLES[stage], arg.devices), row_images=1)
    in_row = arg.sequence / (catalog.entering(model.compressor) + TEXT_TOKENS[stage])
    rows = arg.batch or arg.devices * max(1, round(EXAMPLES[stage] / in_row / arg.devices))
    images = math.floor(in_row) if catalog.leaving(model) else math.ceil(1.2 * in_row)
    return dict(batch_rows=rows, row_images=max(1, images))
