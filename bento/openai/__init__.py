"""The OpenAI API: routes, request schemas, response formats, chat templates, log-probabilities."""
