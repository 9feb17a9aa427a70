"""Further routes over the same engine: responses, Anthropic messages, embeddings, scores, tokenizing."""
