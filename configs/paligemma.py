"""Tunes a PaliGemma checkpoint on a data set of prefixes and suffixes, as big_vision's transfers do
(`configs/proj/paligemma/transfers/forkme.py`).

    python -m vlm_jax.train --config configs/paligemma.py:checkpoint=pt_224.npz,tokenizer=gemma_tokenizer.model,\\
        data=train.jsonl,images=DIR,test=val.jsonl --workdir DIR
    python -m vlm_jax.train --config configs/paligemma.py:checkpoint=FOLDER,source=tfds,data=TFDS_FOLDER,split=train \\
        --workdir DIR

A row of a jsonl file has `image`, `prefix` and `suffix`; other names and TFDS features: `data.train.0.fields`.
Attention is bidirectional over image and prefix. Every part is trained. `compressor` and `tokens` put a compressor of
random weights between encoder and projector.
"""

from ml_collections import ConfigDict

from vlm_jax.compress import catalog
from vlm_jax.config.arguments import parse_arg
from vlm_jax.config.defaults import add_logs_and_checkpoints
from vlm_jax.config.resolve import model_group
from vlm_jax.sizing import zoo


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg,
        checkpoint="",  # big_vision's npz, or a Hugging Face folder
        tokenizer="",  # a folder or a *.model file; default: the checkpoint's folder
        source="jsonl",  # or tfds
        data="",
        images="",
        split="train",  # of TFDS
        test="",
        test_split="",
        size=224,
        vocab=257152,  # 257216 in Hugging Face folders
        compressor="none",
        tokens=0,  # 0: those of the checkpoint
        text_tokens=128,
        batch=32,
        epochs=15.0,
        lr=1e-5,
        seed=0,
    )
    c = ConfigDict()
    encoder, llm = zoo.encoder(f"siglip-so400m14-{arg.size}"), zoo.decoder("gemma-2b")
    model = catalog.model_spec(encoder, arg.compressor, arg.tokens or None, llm, projector="linear", mask="prefix")
    c.model = {**model_group(model), "vocab": arg.vocab}
    c.encoder_checkpoint = c.decoder_checkpoint = c.connector_checkpoint = arg.checkpoint
    is_tfds = arg.source == "tfds"

    def source(path: str, split: str) -> dict[str, str]:
        return (
            dict(source=arg.source, path=path, split=split)
            if is_tfds
            else dict(source=arg.source, path=path, images=arg.images)
        )

    held_out = arg.test or (arg.data if arg.test_split else "")
    c.data = dict(
        train=(source(arg.data, arg.split),),
        test=(source(held_out, arg.test_split),) if held_out else (),
        format="prefix",
        pack="none",
        batch_rows=arg.batch,
        row_tokens=catalog.entering(model.compressor) + arg.text_tokens,
        row_images=1,
        questions_per_example=0,
        frozen_features=False,
        tokenizer=arg.tokenizer or arg.checkpoint,
        long="drop",
        max_bad_share=0.01,
        question_tokens=arg.text_tokens,
        resize="",
    )
    c.stages = (
        dict(
            name="tune", total_steps=0, epochs=arg.epochs, examples=0, train=("encoder", "connector", "decoder"),
            lr_factor=1.0, warmup_steps=0, warmup_share=0.05, data=None,
        ),
    )  # fmt: skip
    # 3e-7 in big_vision, which does not multiply it by the rate, 1e-5.
    c.optim = dict(
        peak_lr=arg.lr, weight_decay=0.03, clip_norm=1.0, b1=0.9, b2=0.999, final_lr_share=0.0, lr_scale=()
    )  # fmt: skip
    c.compute = dict(
        dtype="bfloat16",
        remat="block",
        attention="xla",
        microbatches=1,
        strategy="fsdp",
        mesh=(1, -1, 1),
        slices=1,
        moments="float32",
        scan_layers=True,
    )
    c.evaluation = dict(
        examples=0, questions_per_example=1, batch_examples=arg.batch, max_new_tokens=32, subset_examples=256
    )
    c.elastic = "drawn"
    c.seed = arg.seed
    add_logs_and_checkpoints(c, 10, save_every_steps=500, keep_checkpoints=2)
    return c
