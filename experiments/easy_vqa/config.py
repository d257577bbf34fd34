"""A cell on easy-VQA: the study's recipe (configs/vlm.py) with another source and tokenizer.

python -m vlm_jax.train --config experiments/easy_vqa/config.py:llm=d48,tokens=4 --workdir workdirs/easy
"""

from ml_collections import ConfigDict

from configs import vlm
from vlm_jax.config.arguments import parse_arg

SOURCE = "experiments.easy_vqa.source:EasyVqa"


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, llm="d48", tokens=4, steps=3000, lr=3e-3, seed=0)
    c = vlm.get_config(f"llm={arg.llm},tokens={arg.tokens},steps={arg.steps},lr={arg.lr},seed={arg.seed}")
    source = dict(source=SOURCE, name="easy-vqa", separate=True)
    c.data.train, c.data.test = (dict(source, split="train"),), (dict(source, split="test"),)
    c.data.tokenizer = "experiments/easy_vqa/tokenizer"
    c.data.questions_per_example = 8
    c.data.row_tokens = arg.tokens + 8 * 12  # "does the image not contain a rectangle?" and its answer
    c.evaluation.questions_per_example = 32  # all
    c.evaluation.max_new_tokens = 2
    return c
