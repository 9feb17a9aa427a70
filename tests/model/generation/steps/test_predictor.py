"""A step scores held-out text as the model does."""

import pytest
import torch

from model.evaluation import as_predictor, compare, evaluate
from model.generation.steps.choose import choose_step
from model.generation.steps.predictor import StepPredictor
from model.text.tokens import TokenDataset
from tests.model.generation import engines
from tests.model.test_evaluation import make_model
from tests.model.training.tiny import TOKENIZER, make_dataset

pytestmark = pytest.mark.usefixtures("each_step")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return TokenDataset(make_dataset(tmp_path_factory.mktemp("scored")), "validation", TOKENIZER.sequence_length)


def served(model) -> StepPredictor:
    return StepPredictor(choose_step(model, engines.STEP).create(model, 1))


def test_a_step_scores_what_the_model_scores(dataset):
    model = make_model(0).eval()
    found, expected = evaluate(served(model), dataset, max_windows=5), evaluate(model, dataset, max_windows=5)
    assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-5)
    agreement = compare(served(model), model, dataset, max_windows=5)
    assert agreement.top1_agreement > 0.999 and agreement.kl_divergence < 1e-8


@pytest.mark.parametrize("rows", [1, 7, 16, 1000])
def test_chosen_rows_come_in_order_and_in_parts_of_the_size_that_was_asked(dataset, rows):
    model = make_model(0).eval()
    ids_BT = torch.stack([dataset[i]["input_ids"] for i in range(3)])[:, :20]
    selected_BT = torch.rand(3, 19, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = list(as_predictor(model).logits(ids_BT, selected_BT, rows))
    found = list(served(model).logits(ids_BT, selected_BT, rows))
    assert [len(part) for part in found] == [len(part) for part in expected]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected).detach(), rtol=1e-4, atol=1e-4)
