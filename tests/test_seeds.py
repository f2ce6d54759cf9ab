"""Every seed has a stream of its own, in the pipeline, in folders and in training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from madformer.config import tiny
from madformer.engine.schedulers import default_scheduler
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from madformer.seeds import check_seed, generator_of, seed_all
from madformer.training.config import TrainingConfig
from madformer.training.data import EpochOrder
from madformer.training.parallel import World, make_model
from tests.helpers.testing import perturb, relative_error

LARGE = [2**32, 2**32 + 1, 2**33, 2**40 + 7, 2**62, 2**63 - 1]


def words(generator: torch.Generator, count: int) -> list[int]:
    """What the twister gives, but for the highest bit: as many as are needed to see that it goes on by itself."""
    return torch.empty(count, dtype=torch.int32).random_(generator=generator).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_below_two_to_the_32_they_are_torchs(seed: int) -> None:
    own, theirs = generator_of(seed), torch.Generator().manual_seed(seed)
    assert torch.equal(own.get_state(), theirs.get_state())


@pytest.mark.parametrize("seed", LARGE)
def test_from_there_on_they_are_the_twisters_of_both_words(seed: int) -> None:
    """Against NumPy's Mersenne twister, over several of its rounds of 624 words."""
    theirs = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).randint(0, 2**32, 2000, dtype=np.uint32)
    generator = generator_of(seed)
    assert generator.initial_seed() == seed
    assert words(generator, 2000) == (theirs & 0x7FFFFFFF).tolist()


def test_all_are_different() -> None:
    near = [base + offset for base in (0, 2**31, 2**32, 2**33, 2**48) for offset in range(-3, 4) if base + offset >= 0]
    seeds = sorted({*near, *LARGE, *(seed % 2**32 for seed in LARGE)})
    first = {tuple(torch.randn(4, generator=generator_of(seed)).tolist()) for seed in seeds}
    assert len(first) == len(seeds)


def test_whole_numbers_of_any_kind() -> None:
    for seed in (5, np.int64(5), np.uint32(5), torch.tensor(5)):
        assert generator_of(seed).initial_seed() == 5
    assert check_seed(2**63 - 3, 3) == 2**63 - 3


@pytest.mark.parametrize(
    ("seed", "count", "message"),
    [
        (-1, 1, "seed=-1 must be from 0 to 2\\^63 - 1$"),
        (2**63, 1, "must be from 0 to 2\\^63 - 1$"),
        (2**63 - 2, 3, "must be from 0 to 2\\^63 - 1, and with it the last of 3"),
        (1.5, 1, "seed=1.5 must be a whole number"),
        ("7", 1, "seed='7' must be a whole number"),
    ],
)
def test_what_is_no_seed(seed: object, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_seed(seed, count)  # type: ignore[arg-type]


def test_seed_all() -> None:
    before = torch.get_rng_state()
    try:
        for seed in (3, 2**32, 2**32 + 3):
            seed_all(seed)
            assert torch.equal(torch.randn(700), torch.randn(700, generator=generator_of(seed)))
    finally:
        torch.set_rng_state(before)


@pytest.mark.parametrize("seed", [2**32 - 2, 2**63 - 4])
def test_pictures_across_the_boundary(seed: int) -> None:
    """Image i of a batch is the one that seed + i draws alone, and none is drawn twice."""
    torch.manual_seed(0)
    transformer = perturb(MADFormer(tiny().replace(num_blocks=1, num_layers=2, diffusion_layers=1)))
    pipeline = MADFormerPipeline(transformer, None, default_scheduler("epsilon"))  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(num_images_per_prompt=4, num_inference_steps=1, seed=seed, output_type="latent").images
    alone = [
        pipeline(num_images_per_prompt=1, num_inference_steps=1, seed=seed + image, output_type="latent").images[0]
        for image in range(4)
    ]
    assert relative_error(drawn, torch.stack(alone)) < 1e-4
    low = pipeline(num_images_per_prompt=4, num_inference_steps=1, seed=0, output_type="latent").images
    pictures = torch.cat([drawn, low]).flatten(1)
    assert (torch.cdist(pictures, pictures) + torch.eye(8) > 0.5).all()
    for refused in (-1, 2**63 - 3):
        with pytest.raises(ValueError, match="must be from 0 to"):
            pipeline(num_images_per_prompt=4, num_inference_steps=1, seed=refused, output_type="latent")
    own = torch.Generator().manual_seed(2**40)
    given = pipeline(num_images_per_prompt=1, num_inference_steps=1, generator=own, output_type="latent").images
    assert relative_error(given[0], low[0]) < 1e-4  # a generator is used as it is


def test_training_begins_from_its_own_weights_and_order() -> None:
    """2^32 began from seed 0's weights."""
    config = TrainingConfig(model=tiny(), backend="reference")
    weights, orders = [], []
    for seed in (0, 2**32, 2**63 - 1):
        world = World(0, 1, torch.device("cpu"), "single", None)
        model, _ = make_model(dataclasses.replace(config, seed=seed), world, frozenset())
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
        orders.append([EpochOrder(1000, seed)[position] for position in range(20)])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert relative_error(weights[one], weights[other]) > 0.1
        assert orders[one] != orders[other]
    with pytest.raises(ValueError, match="seed=-1 must be from 0"):
        dataclasses.replace(config, seed=-1)
