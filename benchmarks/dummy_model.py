"""Write a model's configuration and a tokenizer, no weights: for engines started with `--load-format dummy`.

python dummy_model.py DIRECTORY HIDDEN LAYERS HEADS KV_HEADS INTERMEDIATE VOCAB, by the Python that has vLLM.
"""

import sys
from pathlib import Path

from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))
from make_model import make_tokenizer


def main(directory: Path, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int) -> None:
    """A Llama of that shape."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:]))
