"""How the graphs step records its CUDA graphs, with a stand-in for the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from model.generation.steps.graphs.passes import MAX_ROWS
from tests.support.graphs import GraphStepOnCPU
from tests.support.tiny import tiny_model, tiny_tokenizer


class Recorder:
    """Stands for `torch.cuda` while graphs are recorded, which needs a GPU; remembers how. fails_at: a recording."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> None:
        self.options: list[dict] = []
        self.current = "serving"

        @contextmanager
        def graph(_: object, **options: object) -> Iterator[None]:
            self.options.append(options)
            self.current = options["stream"]
            if len(self.options) == fails_at:
                raise RuntimeError("operation failed due to a previous error during capture")
            yield
            self.current = "serving"

        for name, stand_in in {
            "graph": graph,
            "graph_pool_handle": object,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "Stream": lambda device: object(),
            "synchronize": lambda device: None,
            "current_stream": lambda device: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)


@torch.inference_mode()
def test_each_step_records_its_graphs_on_a_stream_of_its_own_beside_one_that_serves(monkeypatch):
    streams = []
    for _ in range(2):
        recorder = Recorder(monkeypatch)
        GraphStepOnCPU.create(tiny_model(tiny_tokenizer()), 4)._passes._record()
        assert len(recorder.options) == MAX_ROWS.bit_length()
        assert {options["capture_error_mode"] for options in recorder.options} == {"thread_local"}
        assert len({id(options[name]) for options in recorder.options for name in ("stream", "pool")}) == 2
        streams.append(recorder.options[0]["stream"])
    assert streams[0] is not streams[1]


@torch.inference_mode()
def test_a_recording_that_fails_leaves_the_thread_on_its_stream_and_others_may_record(monkeypatch):
    recorder = Recorder(monkeypatch, fails_at=2)
    passes = GraphStepOnCPU.create(tiny_model(tiny_tokenizer()), 4)._passes
    with pytest.raises(RuntimeError, match="during capture"):
        passes._record()
    assert recorder.current == "serving"
    Recorder(monkeypatch)
    passes._record()
