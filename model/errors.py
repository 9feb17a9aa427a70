"""The one error that a stage raises for bad input: one line that a person can act on."""


class PipelineError(Exception):
    """Wrong input, found where it enters: not worth a retry.

    The message is one line: what was found where, what was expected, what to do. The orchestrator shows it as a
    permanent failure, the service as a start-up failure; neither shows a traceback.
    """
