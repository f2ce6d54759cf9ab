"""What makes a plan fit for CUDA graphs: no pass needs the host, and a replay is the pass, whatever block or run."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from madformer.engine.graphs import EagerLauncher
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.sampler import Sampler
from tests.helpers.engine_cases import BATCH, CASES, STEPS, draw_noise, draw_prompt, make_model, shared_model
from tests.helpers.recording import HostReadError, RecordingLauncher


def make_plan(
    name: str, launcher: RecordingLauncher | EagerLauncher, guidance: float = 1.0, refresh_every: int = 1
) -> Plan:
    config = CASES[name]
    scheduler = DPMSolverMultistepScheduler(prediction_type=config.prediction_type)
    sampler = Sampler(shared_model(config), scheduler, pack_weights=False, launcher=launcher)
    plan = sampler.plan(BATCH, SamplingOptions(STEPS, guidance=guidance, refresh_every=refresh_every))
    plan.cache.on_host = False  # as on a GPU, where nothing is
    return plan


# What the network predicts, and how, is the same to a graph.
PASSES = [name for name in CASES if name not in ("no QK-norm", "sample prediction", "v prediction", "shared towers")]
# One of each kind of pass; the others differ from them in the network alone.
OFTEN = [
    *("a U-Net of two levels", "both", "clean only", "condition only", "noisy blocks only", "block-local", "one block"),
    *("released quirks, condition only", "text, block-local", "text and classes", "ACDiT", "spiral", "any order"),
]


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        *(pytest.param(name, 1.0, marks=() if name in OFTEN else pytest.mark.slow) for name in PASSES),
        *[("text, block-local", 3.0), ("ACDiT", 3.0), pytest.param("text", 3.0, marks=pytest.mark.slow)],
    ],
)
def test_replay_equals_eager(name: str, guidance: float) -> None:
    """Bit for bit, at every block, and again for a second request with other noise and texts."""
    eager, replayed = (make_plan(name, launcher, guidance) for launcher in (EagerLauncher(), RecordingLauncher()))
    for seed in (1, 2):
        noise = draw_noise(CASES[name], seed=seed)
        prompt = draw_prompt(CASES[name], seed=seed, guided=guidance != 1.0)
        expected, actual = eager.run(noise, prompt), replayed.run(noise, prompt)
        for block in range(CASES[name].num_blocks):
            assert torch.equal(actual[:, block], expected[:, block]), f"seed {seed}, block {block}"


@pytest.mark.parametrize(("name", "guidance"), [("both", 1.0), ("text", 3.0)])
@pytest.mark.parametrize("refresh_every", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_replayed_rounds_equal_eager_ones(name: str, guidance: float, refresh_every: int) -> None:
    launchers = EagerLauncher(), RecordingLauncher()
    eager, replayed = (make_plan(name, launcher, guidance, refresh_every) for launcher in launchers)
    for seed in (1, 2):
        noise, prompt = draw_noise(CASES[name], seed=seed), draw_prompt(CASES[name], seed=seed, guided=guidance != 1.0)
        assert torch.equal(replayed.run(noise, prompt), eager.run(noise, prompt))


def test_one_recording_serves_every_order() -> None:
    eager, replayed = make_plan("any order", EagerLauncher()), make_plan("any order", RecordingLauncher())
    noise = draw_noise(CASES["any order"])
    for order in (None, [2, 0, 3, 1], [3, 2, 1, 0], None):
        assert torch.equal(replayed.run(noise, order=order), eager.run(noise, order=order))


def test_the_recorder_sees_what_the_host_put_in() -> None:
    """The check above can fail: attention that slices by lengths on the host is wrong from the second block on."""
    eager, replayed = make_plan("both", EagerLauncher()), make_plan("both", RecordingLauncher())
    replayed.cache.on_host = True
    noise = draw_noise(CASES["both"])
    expected, actual = eager.run(noise), replayed.run(noise, check=False)
    assert torch.allclose(actual[:, 0], expected[:, 0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(actual[:, 1], expected[:, 1], rtol=1e-2, atol=1e-2)


def test_the_recorder_refuses_a_read() -> None:
    flag = torch.ones(1)

    def read() -> None:
        if flag.sum().item():
            flag.zero_()

    with pytest.raises(HostReadError):
        RecordingLauncher().prepare("reads", read, lambda: None)


def test_weights_that_move_are_captured_anew() -> None:
    """A graph reads the memory that it was captured with: replaced weights need another."""
    launcher = RecordingLauncher()
    model = make_model(CASES["both"])
    plan = Sampler(model, DPMSolverMultistepScheduler(), pack_weights=False, launcher=launcher).plan(
        BATCH, SamplingOptions(STEPS)
    )
    plan.cache.on_host = False
    noise = draw_noise(CASES["both"])
    first = plan.run(noise)
    assert len(launcher.prepared) == 3
    with torch.no_grad():
        model.upsampler.conv_out.weight.mul_(0.5)  # the same memory: the graphs see it
    changed = plan.run(noise)
    assert len(launcher.prepared) == 3
    assert not torch.equal(first, changed)
    model.upsampler.conv_out.weight = torch.nn.Parameter(model.upsampler.conv_out.weight.detach() * 2)
    assert torch.equal(plan.run(noise), first)
    assert len(launcher.prepared) == 6


def test_a_plan_refuses_other_shapes() -> None:
    plan = make_plan("both", RecordingLauncher())
    noise = draw_noise(CASES["both"])
    with pytest.raises(ValueError, match=r"noise must have the shape \(2, 4, 16, 4\), got \(1, 4, 16, 4\)"):
        plan.run(noise[:1])
    with pytest.raises(ValueError, match="out must have the shape"):
        plan.run(noise, out=noise[:, :1])
    result = torch.empty_like(noise)
    assert plan.run(noise, out=result) is result
