"""FSDP2 on two or three gloo processes: gradients, steps of the optimizer and checkpoints of a whole model.

Sizes are odd where they can be, so that processes hold different numbers of rows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.build import build_model
from model.configuration_rex import RexConfig
from model.errors import PipelineError
from model.modeling_rex import RexForCausalLM
from model.settings import TrainingSettings
from model.training.checkpoints import sharded
from model.training.loss import TrainingLoss
from model.training.optim.optimizer import MuonAdamW, build_optimizer
from model.training.optim.sharded import own_part, rows_by_rank
from model.training.sharding import shard_model, whole
from tests.support import forked

CPU = torch.device("cpu")
STEPS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {},
    "muon with every option": {
        "muon_normalize_rows": True,
        "muon_cautious_weight_decay": True,
        "newton_schulz_coefficients": "polar_express",
    },
    "adamw": {"optim": "adamw"},
}


def small_model() -> RexForCausalLM:
    return build_model(
        RexConfig(
            vocab_size=301,
            hidden_size=36,
            intermediate_size=65,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=12,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        ),
        seed=1,
    )


def prepared(options: dict[str, Any], *, shards: bool) -> tuple[RexForCausalLM, MuonAdamW]:
    settings = TrainingSettings(**options)
    model = small_model()
    model.config.use_cache = False
    model.linear_loss = TrainingLoss(settings)
    if shards:
        shard_model(model, CPU, "float32")
    return model, build_optimizer(model, settings, "float32")


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 301, (6, 32), generator=torch.Generator().manual_seed(step))


def train(
    model: RexForCausalLM, optimizer: MuonAdamW, steps: range, rank: int, world_size: int
) -> list[dict[str, torch.Tensor]]:
    """Clipped gradients of each step, whole; each process takes its part of the batch."""
    gradients = []
    for step in steps:
        ids_BT = batch(step)
        items = torch.tensor(6 * 31 / world_size)  # gradients are averaged over processes
        model(
            input_ids=ids_BT[rank::world_size], labels=ids_BT[rank::world_size], num_items_in_batch=items
        ).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        found = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        gradients.append(found | {"norm": whole(norm)})
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def state_of(model: RexForCausalLM, optimizer: MuonAdamW) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter.detach()).clone()
        found |= {f"{name}.{key}": whole(value).clone() for key, value in optimizer.state[parameter].items()}
    return found


def process(rank: int, world_size: int, folder: Path, name: str) -> None:
    """One process: trains, saves, reads into a new model and trains on; or reads what another number has written."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    model, optimizer = prepared(OPTIONS[name], shards=True)
    record: dict[str, Any] = {}
    if world_size == 2:
        record["gradients"] = train(model, optimizer, range(STEPS), rank, world_size)
        sharded.save(folder / "checkpoint", model, optimizer)
        record["state"] = state_of(model, optimizer)
        record["parameters"] = sum(own_part(parameter).numel() for parameter in model.parameters())
        states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        record["momenta"] = sum(own_part(value).numel() for value in states)
        train(model, optimizer, range(STEPS, STEPS + 2), rank, world_size)
        record["uninterrupted"] = state_of(model, optimizer)
        try:
            sharded.save(folder / "store-2" / "no folder", model, optimizer)
        except OSError as error:
            record["refused"] = str(error)
        model, optimizer = prepared(OPTIONS[name], shards=True)
    sharded.load_weights(folder / "checkpoint", model)
    sharded.load_optimizer(folder / "checkpoint", model, optimizer)
    record["read"] = state_of(model, optimizer)
    train(model, optimizer, range(STEPS, STEPS + 2), rank, world_size)
    record["resumed"] = state_of(model, optimizer)
    torch.save(record, folder / f"{rank}-of-{world_size}.pt")
    dist.destroy_process_group()


def run(world_size: int, folder: Path, name: str) -> list[dict[str, Any]]:
    program = (
        "import sys; from pathlib import Path; from tests.model.training.optim.test_sharded import process; "
        "process(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])"
    )
    logs = [folder / f"{rank}-of-{world_size}.log" for rank in range(world_size)]
    processes = [forked.start(program, rank, world_size, folder, name, log=log) for rank, log in enumerate(logs)]
    for one in processes:
        one.join()
    assert [one.exitcode for one in processes] == [0] * world_size, "\n".join(log.read_text() for log in logs)
    return [torch.load(folder / f"{rank}-of-{world_size}.pt") for rank in range(world_size)]


@pytest.fixture(
    scope="module",
    params=["muon", "adamw", pytest.param("muon with every option", marks=pytest.mark.nightly)],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    return request.param, folder, run(2, folder, request.param)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rounding: float) -> None:
    """Up to the rounding of sums in another order, relative to the largest value of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape, name
        assert (value - theirs[name]).abs().max() <= rounding * theirs[name].abs().max(), name


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_take_the_steps_of_one_and_each_holds_half(trained: tuple[str, Path, list[Any]]) -> None:
    name, _, (first, second) = trained
    model, optimizer = prepared(OPTIONS[name], shards=False)
    gradients = train(model, optimizer, range(STEPS), 0, 1)
    assert_equal(first["state"], second["state"])
    assert_close(first["gradients"][0], gradients[0], 1e-5)
    for ours, theirs in zip(first["gradients"], gradients, strict=True):
        assert_close(ours, theirs, 1e-3)
    weights = {key for key, _ in model.named_parameters()}
    ours, theirs = first["state"], state_of(model, optimizer)
    assert ours.keys() == theirs.keys()
    assert_close({key: ours[key] for key in weights}, {key: theirs[key] for key in weights}, 1e-3)
    whole_size = sum(parameter.numel() for parameter in model.parameters())
    momenta = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)
    for record in (first, second):
        assert record["parameters"] == pytest.approx(whole_size / 2, rel=0.01)
        assert record["momenta"] == pytest.approx(momenta / 2, rel=0.01)
    assert first["parameters"] + second["parameters"] == whole_size


@pytest.mark.slow
@pytest.mark.processes
def test_a_checkpoint_resumes_with_the_same_bits_in_two_processes(trained: tuple[str, Path, list[Any]]) -> None:
    _, _, records = trained
    for record in records:
        assert_equal(record["read"], record["state"])
        assert_equal(record["resumed"], record["uninterrupted"])


@pytest.mark.slow
@pytest.mark.processes
def test_a_checkpoint_of_two_processes_is_read_by_three_and_by_one(trained: tuple[str, Path, list[Any]]) -> None:
    name, folder, (first, _) = trained
    for record in run(3, folder, name):
        assert_equal(record["read"], first["state"])
        assert_close(record["resumed"], first["resumed"], 1e-3)
    model, optimizer = prepared(OPTIONS[name], shards=False)
    sharded.load_weights(folder / "checkpoint", model)
    sharded.load_optimizer(folder / "checkpoint", model, optimizer)
    assert_equal(state_of(model, optimizer), first["state"])
    train(model, optimizer, range(STEPS, STEPS + 2), 0, 1)
    assert_close(state_of(model, optimizer), first["resumed"], 1e-3)


@pytest.mark.slow
@pytest.mark.processes
def test_what_cannot_be_written_or_read_is_one_line(trained: tuple[str, Path, list[Any]], tmp_path: Path) -> None:
    _, folder, records = trained
    for record in records:
        assert "Not a directory" in record["refused"] and "\n" not in record["refused"]
    model, optimizer = prepared({}, shards=False)
    damaged = tmp_path / "checkpoint-4"
    damaged.mkdir()
    for path in (folder / "checkpoint").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "__1_0.distcp").unlink()
    for read in (
        lambda: sharded.load_weights(damaged, model),
        lambda: sharded.load_optimizer(damaged, model, optimizer),
    ):
        with pytest.raises(PipelineError, match=r"the sharded checkpoint .*checkpoint-4 cannot be read: ") as error:
            read()
        assert "\n" not in str(error.value) and "__1_0.distcp" in str(error.value)


def test_rows_are_divided_as_torch_divides_them() -> None:
    for rows in range(1, 20):
        for world_size in range(1, 9):
            chunks = [len(chunk) for chunk in torch.empty(rows).chunk(world_size)]
            assert rows_by_rank(rows, world_size) == chunks + [0] * (world_size - len(chunks))
