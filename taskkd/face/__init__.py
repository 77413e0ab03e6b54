"""Face recognition: margin heads, backbones, evaluation, and distillation on embeddings."""
