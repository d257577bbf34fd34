"""LLaVA's two stages on easy-VQA with SmolLM2-135M-Instruct, its own chat template and a frozen encoder.

    python -m vlm_jax.train --config experiments/smollm2/config.py:llm=smollm2 --workdir workdirs/smollm2

`llm` is the folder that `convert.py` writes. First the connector alone learns captions in the format `plain`, then
connector and language model learn questions. Sized to a CPU: rows of a few short conversations, and few steps.
"""

from ml_collections import ConfigDict

from configs import vlm
from experiments.easy_vqa.config import SOURCE
from vlm_jax.config.arguments import parse_arg

CAPTIONS = "experiments.easy_vqa.source:Captions"
SYSTEM = "Answer."  # else the template writes a longer one of its own
CAPTION_TOKENS = 6  # besides the visual ones


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(
        arg,
        llm="smollm2",
        tokens=4,
        align=300,  # steps of the first stage
        tune=400,
        rows=2,
        row_tokens=128,
        images=1600,  # of the second stage's questions
        test_images=150,
        lr=3e-3,  # of the connector in the first stage
        tune_lr=1e-3,  # in the second
        decoder_lr=2e-4,
        seed=0,
    )
    c = vlm.get_config(f"llm=smollm2-135m,tokens={arg.tokens},stages=2,lr={arg.lr},seed={arg.seed}")
    c.decoder_checkpoint = c.data.tokenizer = arg.llm
    source = dict(source=SOURCE, name="easy-vqa", separate=True, options=(("system", SYSTEM),))
    c.data.train = (dict(source, split="train", take=f"random:{arg.images}"),)
    c.data.test = (dict(source, split="test", take=f"random:{arg.test_images}"),)
    c.data.format, c.data.pack = "template", "fit"
    c.data.questions_per_example = 0
    c.data.batch_rows, c.data.row_tokens, c.data.row_images = arg.rows, arg.row_tokens, 6
    captions = dict(
        train=(dict(source=CAPTIONS, split="train"),),
        format="plain",
        row_images=arg.row_tokens // (arg.tokens + CAPTION_TOKENS),
    )
    both = dict(c.stages[1], warmup_steps=0, warmup_share=0.1)
    c.stages = (
        dict(both, name="align", train=("connector",), total_steps=arg.align, data=captions),
        dict(both, name="tune", total_steps=arg.tune, lr_factor=arg.tune_lr / arg.lr),
    )
    c.optim.lr_scale = (("^decoder/", arg.decoder_lr / arg.tune_lr),)
    c.evaluation.questions_per_example = 2
    c.evaluation.batch_examples = 16
    c.evaluation.max_new_tokens = 3
    c.log_every_steps = 5
    c.save_every_steps = 50
    return c
