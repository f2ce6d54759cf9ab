"""Running the released training loop: the shims, the gate, and whole runs of a clone made here and of the real one."""

from __future__ import annotations

import ast
import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import train_released
from benchmarks.released import CannotCompare
from benchmarks.train_released import OnCPU, Pictures, Run, compare, main

RELEASED = os.environ.get("MADFORMER_RELEASED")

# A training script with the released one's habits, and a model module around ours; OFFSET makes the model another one.
SCRIPT = """
import argparse, os
import torch, torch.distributed as dist, torch.nn.functional as F
from copy import deepcopy
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision import transforms
from torchvision.datasets import ImageFolder
from models import MADFormer

def main(args):
    assert torch.cuda.is_available()
    dist.init_process_group(backend="nccl", init_method="env://")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(local_rank)
    model = MADFormer(
        latent_size=4, block_size=args.block_size, ar_len=args.ar_len, spatial_len=args.spatial_len,
        model_config_path=args.model_config_path, diff_depth=args.diff_depth,
    ).to(local_rank)
    ema = deepcopy(model).to(local_rank)
    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse").to(local_rank).eval()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    model = DDP(model, device_ids=[local_rank])
    data = load_dataset("pictures", split="train")
    steps = [transforms.Resize((256, 256)), transforms.ToTensor(), transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3)]
    data.set_transform(lambda batch: {"data": [transforms.Compose(steps)(image) for image in batch["webp"]]})
    side = int(args.pre_downsample_block_size**0.5)
    for batch in torch.utils.data.DataLoader(data, batch_size=args.per_gpu_batch_size):
        with torch.no_grad():
            latent = vae.encode(batch["data"].to(local_rank)).latent_dist.sample()
        n, c, h, w = latent.shape
        latent = latent.reshape(n, c, h // side, side, w // side, side).permute(0, 2, 4, 3, 5, 1)
        latent = latent.reshape(n, -1, side * side, c)
        noise, t = torch.randn_like(latent), torch.randint(0, 1000, latent.shape[:2])
        noisy = DDPMScheduler().add_noise(latent.flatten(0, 1), noise.flatten(0, 1), t.flatten()).view_as(latent)
        prediction = model(latent, noisy, t)[0]
        loss = F.mse_loss(prediction, noise.reshape(-1, side, side, c).permute(0, 3, 1, 2))
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    dist.destroy_process_group()

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    sizes = "block_size pre_downsample_block_size ar_len spatial_len diff_depth per_gpu_batch_size"
    for name in sizes.split():
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--model_config_path")
    main(parser.parse_known_args()[0])
"""
MODELS = """
import torch
from madformer.compat.madformer_ffhq import MADFormer as Compat

class MADFormer(Compat):
    def build_attention_mask(self, *_):
        return torch.ones(1, 1, dtype=torch.bool)

    def forward(self, *arguments):
        prediction, condition, clean = super().forward(*arguments)
        return prediction + OFFSET, condition, clean
"""


def make_clone(folder: Path, offset: float) -> Path:
    (folder / "src").mkdir()
    (folder / "src" / "train.py").write_text(SCRIPT)
    (folder / "src" / "models.py").write_text(f"OFFSET = {offset}\n{MODELS}")
    return folder


def test_whole_runs_of_a_clone_made_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: sys.modules.get(name) for name in ("models", "datasets", "torchvision")}, list(sys.argv)
    cuda, handlers = torch.cuda.is_available, list(logging.getLogger().handlers)
    out = tmp_path / "record.json"
    clone = make_clone(tmp_path, 0.0)
    assert main(["--released", str(clone), "--tiny", "--steps", "2", "--out", str(out)]) == 0
    stdout = capsys.readouterr().out
    record = json.loads(stdout.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert [len(losses) for losses in record["losses"].values()] == [2, 2, 2]
    assert record["losses"]["released"][0] != record["losses"]["released"][1]
    assert record["metrics"]["loop_max_loss_difference"] < 1e-5
    assert all(name in stdout for name in train_released.VARIANTS)
    assert ({name: sys.modules.get(name) for name in before[0]}, sys.argv) == before
    assert torch.cuda.is_available is cuda
    assert logging.getLogger().handlers == handlers
    assert not torch.distributed.is_initialized()


def test_another_model_is_told_by_its_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--released", str(make_clone(tmp_path, 0.1)), "--tiny", "--steps", "2"]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "losses differ from the released ones by more than 0.0001: compat by" in stderr.splitlines()[-1]


def test_gate_refuses_what_is_no_number() -> None:
    expected = Run([1.0, 0.5])
    assert compare({"released": expected, "compat": Run([1.0, 0.50005])})["compat"] == pytest.approx(5e-5)
    for losses in ([1.0, 0.501], [1.0, float("nan")]):
        with pytest.raises(CannotCompare, match="compat by"):
            compare({"released": expected, "accelerate": Run([1.0, 0.5]), "compat": Run(losses)})


def test_source_is_sent_to_the_cpu_and_left_alone_otherwise() -> None:
    source = """
model.to(local_rank).to(torch.float32)
DDP(model, device_ids=[local_rank])
torch.tensor(x, device=local_rank)
dist.init_process_group(backend='nccl')
autocast('cuda', dtype=d)
torch.cuda.set_device(local_rank)
torch.load(path, map_location=f'cuda:{local_rank}')
rearrange(x, T=args.num_frames)
print(f'cuda:{local_rank}', 'cuda core', None, 0)
"""
    expected = """
model.to('cpu').to(torch.float32)
DDP(model, device_ids=None)
torch.tensor(x, device='cpu')
dist.init_process_group(backend='gloo')
autocast('cpu', dtype=d)
torch.cuda.set_device(local_rank)
torch.load(path, map_location='cpu')
rearrange(x, T=1)
print(f'cuda:{local_rank}', 'cuda core', None, 0)
"""
    assert ast.unparse(OnCPU().visit(ast.parse(source))) == expected.strip()


def test_pictures_differ_and_repeat() -> None:
    pictures = Pictures(2)
    pictures.set_transform(lambda batch: {"data": [train_released.to_tensor(image) for image in batch["webp"]]})
    first, second = (pictures[index]["data"] for index in range(2))
    assert first.shape == (3, 256, 256)
    assert torch.equal(pictures[0]["data"], first)
    assert (first - second).abs().mean() > 0.05


def test_stand_ins_for_torchvision_compute_what_it_does() -> None:
    transforms = train_released.stub_modules(1)["torchvision.transforms"]
    image = Image.new("RGB", (4, 2), (255, 0, 51))
    steps = [transforms.Resize((8, 6)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    result = transforms.Compose(steps)(image)
    assert result.shape == (3, 6, 8)
    assert result[:, 0, 0].tolist() == pytest.approx([2.0, -2.0, -1.2], abs=1e-6)


@pytest.mark.parametrize("missing", ["train.py", "models.py"])
def test_path_without_released_code_is_one_line(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (make_clone(tmp_path, 0.0) / "src" / missing).unlink()
    assert main(["--released", str(tmp_path)]) == 1
    stdout, stderr = capsys.readouterr()
    assert (stdout, len(stderr.splitlines())) == ("", 1)
    assert missing in stderr


@pytest.mark.slow
@pytest.mark.skipif(RELEASED is None, reason="MADFORMER_RELEASED does not name a clone of the released code")
def test_the_released_loop(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("einops")
    assert main(["--released", str(RELEASED), "--tiny", "--steps", "5"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["metrics"]["loop_max_loss_difference"] < 1e-5
