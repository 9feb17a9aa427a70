"""From a request to the engine and back: loaded models, admission, answers, the champion."""
