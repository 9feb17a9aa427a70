"""Text on its way to the model: documents, a tokenizer, packed windows of tokens."""
