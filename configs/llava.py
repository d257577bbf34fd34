"""LLaVA-1.5's recipe (arXiv 2310.03744, table 9) for any encoder, language model and number of visual tokens.

    python -m vlm_jax.aot --config configs/llava.py:llm=qwen1.5-7b,tokens=16 --topology v5e:16x16
    python -m vlm_jax.train --config configs/llava.py:llm=qwen1.5-7b,tokens=16,sequence=256 --workdir DIR \\
        --config.encoder_checkpoint=so400m-folder --config.decoder_checkpoint=qwen-folder \\
        --config.data.tokenizer=qwen-folder

Two stages: first the projector and compressor, then also the language model; the encoder stays frozen. Differences
from the paper: the compressor between encoder and projector (LLaVA-1.5 keeps every patch), one batch size for both
stages (the paper uses 256 examples in the first and 128 in the second), and the data. LLaVA's mixture is not part of
this repository: the data fields name the generated `glyph_ocr` pages, whose short questions fit into sequence=256.
Without checkpoints all parameters are random: for compiling and sizing.
"""

from ml_collections import ConfigDict

from vlm_jax.compress import catalog
from vlm_jax.config.arguments import parse_arg
from vlm_jax.config.resolve import model_group
from vlm_jax.sizing import zoo

SEQUENCE = 2048  # image and text together, as in LLaVA
EXAMPLES = {1: 558_000, 2: 665_000}  # of LLaVA's two mixtures, each seen once


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg,
        llm="qwen1.5-7b",
        encoder="siglip-so400m14-384",
        tokens=144,
        compressor="resampler",  # gives any number of tokens
        batch=256,
        tensor=16,  # devices of the mesh axis `tensor`: best a side of the pod's torus
        stage=0,  # 1 or 2: only that stage
        sequence=SEQUENCE,
        seed=0,
    )
    c = ConfigDict()
    encoder, llm = zoo.encoder(arg.encoder), zoo.decoder(arg.llm)
    model = catalog.model_spec(encoder, arg.compressor, arg.tokens, llm)
    c.model = model_group(model)
    c.encoder_checkpoint = c.decoder_checkpoint = ""
    c.data = dict(
        dataset="glyph_ocr",
        config="rows6",
        train_split="train",
        test_split="test",
        batch_examples=arg.batch,
        questions_per_example=1,
        text_tokens=arg.sequence - catalog.entering(model.compressor),
        frozen_features=False,
        tokenizer="",
    )
    steps = {stage: -(-examples // arg.batch) for stage, examples in EXAMPLES.items()}
    warmup = {stage: round(0.03 * count) for stage, count in steps.items()}
    # Rates of 1e-3 and 2e-5, as factors of the second.
    align = dict(name="align", total_steps=steps[1], train=("connector",), lr_factor=50.0, warmup_steps=warmup[1])
    tune = dict(
        name="tune", total_steps=steps[2], train=("connector", "decoder"), lr_factor=1.0, warmup_steps=warmup[2]
    )
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
        examples=0, questions_per_example=1, batch_examples=arg.batch, max_new_tokens=32, subset_examples=256
    )
    c.seed = arg.seed
    c.log_every_steps = 10
    c.evaluate_every_steps = 0
    c.save_every_steps = 500
    c.keep_checkpoints = 2
    c.keep_every_steps = 0
    c.bad_step = dict(policy="stop", spike_factor=0.0, skip_limit=10)
    return c
