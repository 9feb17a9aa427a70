"""What a training starts from: the weights of a checkpoint, or embeddings counted from its text."""
