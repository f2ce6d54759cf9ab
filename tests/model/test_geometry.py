"""Blocks that are no squares, images that are none, orders of blocks, and sizes that a model was not trained for."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from diffusers import DDIMScheduler

from madformer.config import MADFormerConfig, tiny
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.model.blocks import block_order, from_blocks, from_maps, in_order, order_around, to_blocks, to_maps
from madformer.model.rope import rope_tables, token_positions
from tests.helpers.engine_cases import BATCH, CASES, STEPS, draw_noise, draw_prompt, make_model
from tests.helpers.testing import relative_error

WIDE = tiny().replace(num_blocks=6, block_grid=(3, 2), block_shape=(1, 4))
SPIRALS = {
    (1, 1): [0],
    (1, 3): [2, 1, 0],
    (3, 1): [2, 1, 0],
    (2, 3): [3, 4, 5, 2, 1, 0],
    (3, 3): [4, 3, 6, 7, 8, 5, 2, 1, 0],
    (3, 4): [6, 5, 4, 8, 9, 10, 11, 7, 3, 2, 1, 0],
}


def test_blocks_cover_the_image_by_place() -> None:
    image = torch.arange(2 * 3 * 6 * 16).view(2, 3, 6, 16)
    blocks = to_blocks(image, WIDE)
    assert (WIDE.latent_shape, WIDE.block_latents, WIDE.token_grid) == ((4, 6, 16), (2, 8), (3, 8))
    assert blocks.shape == (2, 6, 16, 3)
    assert torch.equal(blocks[1, 3, :, 2], image[1, 2, 2:4, 8:16].flatten())
    assert torch.equal(from_blocks(blocks, WIDE), image)
    assert torch.equal(to_maps(blocks, WIDE.block_latents)[6 + 3, 2], image[1, 2, 2:4, 8:16])
    assert torch.equal(from_maps(to_maps(blocks, WIDE.block_latents), 6), blocks)


def test_token_positions_of_wide_blocks() -> None:
    rows, columns = token_positions(WIDE).view(2, 6, 4)
    for place, (row, column) in enumerate(itertools.product(range(3), range(2))):
        assert rows[place].tolist() == [row] * 4
        assert columns[place].tolist() == [4 * column + token for token in range(4)]


@pytest.mark.parametrize(("grid", "expected"), SPIRALS.items(), ids=str)
def test_a_spiral_goes_outwards(grid: tuple[int, int], expected: list[int]) -> None:
    """Each block has a neighbour before it; the last is in the upper left corner."""
    config = tiny().replace(num_blocks=grid[0] * grid[1], block_grid=grid, block_order="spiral")
    assert block_order(config) == expected


def test_orders() -> None:
    spiral, free = (WIDE.replace(block_order=order) for order in ("spiral", "random"))
    assert block_order(free) == list(range(6))
    assert order_around([1, 4], free) == [0, 2, 3, 5, 1, 4]
    assert order_around([1, 4], spiral) == block_order(spiral)
    blocks = torch.arange(2 * 6).view(2, 6, 1, 1)
    assert in_order(blocks, WIDE) is blocks
    assert in_order(blocks, spiral)[0].flatten().tolist() == block_order(spiral)
    orders = torch.tensor([[5, 4, 3, 2, 1, 0], [0, 2, 4, 1, 3, 5]])
    assert in_order(blocks, free, orders).flatten(1).tolist() == [[5, 4, 3, 2, 1, 0], [6, 8, 10, 7, 9, 11]]


def test_a_model_knows_blocks_by_their_places() -> None:
    """One weight set in two orders: told the spiral, a model for every order does what one for spirals does."""
    spiral = make_model(WIDE.replace(block_order="spiral"))
    free = make_model(WIDE.replace(block_order="random"))
    clean, noisy, timestep = draw_noise(WIDE), draw_noise(WIDE, seed=2), torch.full((BATCH, 6), 500)
    orders = torch.tensor([block_order(spiral.config), [0, 1, 2, 3, 4, 5]])
    expected, told = spiral(clean, noisy, timestep), free(clean, noisy, timestep, order_BM=orders)
    assert relative_error(told.prediction[0], expected.prediction[0]) < 1e-5
    assert relative_error(told.condition[0], expected.condition[0]) < 1e-5
    raster = make_model(WIDE)(clean, noisy, timestep)
    assert relative_error(told.prediction[1], raster.prediction[1]) < 1e-5
    assert relative_error(raster.prediction[0], expected.prediction[0]) > 0.01


# Other sizes


@pytest.mark.parametrize("name", ["both", "text", "condition only", "patches", "spiral"])
def test_a_larger_image_is_cached_as_it_is_trained(name: str) -> None:
    """Sampled at 3 x 1 blocks as a model of that size is, whose rotation has the smaller one's base."""
    config = CASES[name]
    larger = make_model(config).set_grid(3, 1)
    expected = make_model(config.replace(num_blocks=3, block_grid=(3, 1), rope_base=100))
    noise, prompt = draw_noise(larger.config), draw_prompt(config)
    drawn = [
        Sampler(model, DDIMScheduler()).plan(BATCH, SamplingOptions(STEPS)).run(noise, prompt)
        for model in (larger, expected)
    ]
    assert torch.equal(*drawn)


def test_positions_go_on_beyond_the_trained_ones() -> None:
    """Where both images have a token, it is turned alike."""
    config = tiny().replace(num_blocks=900, block_size=4)  # 60 x 60 tokens: a base of 200, where 80 would have 300
    small, large = ({}, {})
    for tables, at in ((small, config), (large, config.at_grid(40, 40))):
        for position, cos in zip(token_positions(at).T.tolist(), rope_tables(at)[0], strict=True):
            tables[tuple(position)] = cos
    assert len(large) == 80 * 80
    assert all(torch.equal(large[position], cos) for position, cos in small.items())
    assert not torch.equal(rope_tables(config.at_grid(40, 40))[0], rope_tables(config.replace(num_blocks=1600))[0])


@pytest.mark.parametrize(
    ("config", "grid", "message"),
    [
        (tiny(), (0, 2), "an image of 0 x 2 blocks is not possible: it has none"),
        (tiny().replace(square_blocks=False), (3, 3), "square_blocks=False numbers tokens over the image"),
        (tiny().replace(num_blocks=1), (2, 2), "the model was trained on a single block"),
    ],
)
def test_sizes_that_a_model_does_not_know(config: MADFormerConfig, grid: tuple[int, int], message: str) -> None:
    model = make_model(config)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        model.set_grid(*grid)
    assert "\n" not in str(caught.value)
    assert model.set_grid(*config.grid).config == config
