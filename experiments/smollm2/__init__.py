"""SmolLM2-135M-Instruct, a public language model, tuned to see in LLaVA's two stages."""
