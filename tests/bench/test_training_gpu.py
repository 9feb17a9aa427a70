"""The script for a machine with a GPU runs on any machine, as far as it goes."""

from bench.training import gpu
from model.errors import PipelineError
from model.training.trainer import RexTrainer


def test_gradients_are_checked_and_steps_are_timed_on_a_machine_without_a_gpu(capsys):
    found = gpu.measure("tiny", None, rounds=1, steps=2, modes=["eager, float32", "eager, bfloat16"])
    assert [mode["passed"] for mode in found["gradients"].values()] == [True, True]
    assert found["tokens_per_second"] > 0
    printed = capsys.readouterr().out
    assert "eager, bfloat16: self-check: gradients agree" in printed and "of the measured peak" in printed


def test_a_way_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    def fails(self):
        if self.run.precision == "float32":
            raise PipelineError("self-check: the gradient of a")
        self.run.log("self-check: gradients agree")

    monkeypatch.setattr(RexTrainer, "check_gradients", fails)
    assert gpu.check("tiny", "eager, float32") == (False, "self-check: the gradient of a")
    assert gpu.check("tiny", "eager, bfloat16") == (True, "self-check: gradients agree")
